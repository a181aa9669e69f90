"""``rect_drift`` against logits computed by transformers alone, and where its text comes from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import transformers
from lm_eval.tasks import TaskManager
from support.taught_models import EDITS, HPARAMS, teach

import harness_rect._autoload  # noqa: F401  registers edited_hf
from harness_rect import embedded
from harness_rect.errors import UserError
from harness_rect.evaluation import drift

TASKS = Path(__file__).resolve().parents[2] / "tasks"
LENGTH = 150  # tokens the models read: a window has two segments


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_model, tokenizer, bos_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("drift")
    for family, text, length in (
        ("gpt2", tokenizer, "n_positions"),
        ("llama", bos_tokenizer, "max_position_embeddings"),
    ):
        teach(make_model(family, **{length: LENGTH}), text).save_pretrained(folder / family)
        text.save_pretrained(folder / family)
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, EDITS)))
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    (folder / "rows").mkdir()
    text = "LeBron James plays football. Where is the Space Needle? Giulia Rossi spoke French, a list.\n"
    (folder / "rows" / "drift.txt").write_text(text * 12)
    return folder


def evaluate(model: str, given: dict[str, Any], **metadata: Any) -> dict[str, float]:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=given | metadata)
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=given,
        tasks=["rect_drift"],
        task_manager=manager,
        device="cpu",
        bootstrap_iters=0,
    )
    assert found is not None
    scores = found["results"]["rect_drift"]
    return {name.removesuffix(",none"): v for name, v in scores.items() if isinstance(v, float)}


def by_hand(before: Path, after: Path, text: str) -> dict[str, float]:
    """All metrics from the logits of whole windows, in float64."""
    words = transformers.AutoTokenizer.from_pretrained(before)
    models = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (before, after)]
    ids = words(text)["input_ids"]
    bos = ids[0] == words.bos_token_id
    windows, at = [], 1
    while at < len(ids):
        start = ids[:1] if bos else ids[at - 1 : at]
        windows.append(start + ids[at : at + LENGTH - 1])
        at += LENGTH - 1
    kl, changed, nll = [], [], [0.0, 0.0]
    for window in windows:
        with torch.no_grad():
            p, q = (m(torch.tensor([window])).logits[0, :-1].double().log_softmax(-1) for m in models)
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        changed += (p.argmax(-1) != q.argmax(-1)).tolist()
        for i, of in enumerate((p, q)):
            nll[i] -= of[torch.arange(len(window) - 1), window[1:]].sum().item()
    assert len(kl) == len(ids) - 1 and len(windows) > 2
    return {
        "kl": sum(kl) / len(kl),
        "argmax_changed": sum(changed) / len(kl),
        "perplexity": math.exp(nll[1] / len(kl)),
        "perplexity_unedited": math.exp(nll[0] / len(kl)),
    }


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_metric_is_what_the_logits_say(place: Path, tmp_path: Path, family: str) -> None:
    given = {
        "pretrained": str(place / family),
        "edits": str(place / "edits.jsonl"),
        "hparams": str(place / "hparams.json"),
        "data": str(place / "rows"),
        "save_edited": str(tmp_path / "edited"),
    }
    found = evaluate("edited_hf", given)
    text = (place / "rows" / "drift.txt").read_text()
    expected = by_hand(place / family, tmp_path / "edited", text)
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected["kl"] > 1e-3 and 0 < expected["argmax_changed"] < 1

    theirs = evaluate("hf", {"pretrained": str(tmp_path / "edited")}, data=str(place / "rows"))
    assert theirs == {"perplexity": pytest.approx(found["perplexity"], rel=1e-6)}


def test_an_unedited_model_has_not_drifted(place: Path) -> None:
    given = {"pretrained": str(place / "gpt2"), "method": "none", "data": str(place / "rows")}
    found = evaluate("edited_hf", given)
    assert (found["kl"], found["argmax_changed"]) == (0, 0)
    assert found["perplexity"] == pytest.approx(found["perplexity_unedited"], rel=1e-6)


def test_the_text_is_the_folders_own_or_the_embedded_one(place: Path, tmp_path: Path, caplog) -> None:
    def text(data: str, pretrained: str = str(place / "llama")) -> str:
        rows = drift.segments(pretrained=pretrained, data=data)["test"]
        return "".join(rows["text"])

    shipped = drift.TEXT.read_text()
    assert 900 < len(shipped.split()) < 1300
    assert text("hub") == shipped == text(str(tmp_path))
    assert text(str(place / "rows")) == (place / "rows" / "drift.txt").read_text()
    tiny = (embedded.DATA / "drift.txt").read_text()
    assert text("tiny", "rect-tiny") == tiny.removeprefix("Please"), (
        "without BOS the first token is not predicted"
    )
    assert "longer than the specified maximum" not in caplog.text


@pytest.mark.parametrize(
    ("content", "problem"), [("", "no two tokens"), ("a", "no two tokens"), (None, "is not a folder")]
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, content: str | None, problem: str) -> None:
    folder = tmp_path / "rows"
    if content is not None:
        folder.mkdir()
        (folder / "drift.txt").write_text(content)
    with pytest.raises(UserError, match=problem):
        drift.segments(pretrained="rect-tiny", data=str(folder))


def test_a_collapsed_model_has_a_finite_perplexity() -> None:
    from harness_rect.evaluation.aggregations import PERPLEXITY, perplexity

    assert perplexity([(3.0, 2), (1.0, 2)]) == pytest.approx(math.e)
    assert math.isfinite(perplexity([(1e6, 10)]))
    assert math.isfinite(PERPLEXITY([(709.5, 1)]))


@pytest.mark.parametrize("length", [{}, 1, -5, "x", 1.5])
def test_a_length_that_no_model_has_is_one_line(length: object) -> None:
    with pytest.raises(UserError, match=r"max_length=.*: expected a number from 2 on"):
        drift.segments(max_length=length, pretrained="rect-tiny")
