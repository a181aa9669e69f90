"""``measure=generated``: generated answers, measured by the session itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from support.taught_models import EDITS, HPARAMS, teach

import harness_rect._autoload  # noqa: F401  registers edited_hf
from harness_rect import generated, measure
from harness_rect.answers import cut
from harness_rect.config import EditConfig
from harness_rect.edits import Edit, load_edits
from harness_rect.errors import UserError
from harness_rect.models import EditableLM
from harness_rect.session import EditSession
from harness_rect.session.runs import EditCache

TASKS = Path(__file__).resolve().parent.parent / "tasks"
GENERATED = {"reliability_gen", "generalization_gen", "locality_gen"}


@pytest.fixture(scope="module")
def taught(make_model, tokenizer, bos_tokenizer) -> dict[str, EditableLM]:
    words = {"gpt2": tokenizer, "llama": bos_tokenizer}
    return {family: EditableLM(teach(make_model(family), text), text) for family, text in words.items()}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, EDITS)))
    (tmp_path / "hparams.json").write_text(json.dumps(HPARAMS))
    return {"edits": str(tmp_path / "edits.jsonl"), "hparams": str(tmp_path / "hparams.json")}


@pytest.fixture
def facts(files: dict[str, str]) -> tuple[Edit, ...]:
    return load_edits(files["edits"]).edits


def prompts_of(edit: Edit) -> list[str]:
    return [edit.text, *edit.paraphrases, *(probe.prompt for probe in edit.neighborhood)]


def alone(lm: EditableLM, prompt: str) -> str:
    """What transformers generates after one prompt, cut by hand."""
    words: Any = lm.encoder.tokenizer
    context = words(prompt, return_tensors="pt")["input_ids"]
    ids = lm.model.generate(context, max_new_tokens=50, do_sample=False, pad_token_id=0)
    return (
        str(words.decode(ids[0, context.shape[1] :], skip_special_tokens=True)).split(".")[0].split("\n")[0]
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("size", [1, 3, 32])
def test_answers_are_those_of_each_prompt_alone(
    taught, facts, monkeypatch: pytest.MonkeyPatch, family: str, size: int
) -> None:
    monkeypatch.setattr(measure, "BATCH_SEQUENCES", size)
    prompts = [prompt for edit in facts for prompt in prompts_of(edit)]
    lm = taught[family]
    found = generated.generate(lm, prompts)
    assert found == [alone(lm, prompt) for prompt in prompts]
    assert len(set(found)) > 3 and all(cut(answer) == answer for answer in found)


def test_a_long_prompt_loses_its_beginning_and_a_short_model_is_refused(make_model, tokenizer) -> None:
    lm = EditableLM(make_model("gpt2"), tokenizer)
    end = "The city is large and you can use a list of English football here, too"
    ids = lm.encoder.ids("Rome " * 60 + end)
    kept = tokenizer.decode(ids[-(lm.max_length - 50) :])
    assert generated.generate(lm, ["Rome " * 60 + end]) == [alone(lm, kept)]
    with pytest.raises(UserError, match="more than 50 tokens"):
        generated.generate(EditableLM(make_model("gpt2", n_positions=50), tokenizer), ["The city"])


def test_the_session_measures_right_after_each_edit_and_at_the_end(taught, files, facts) -> None:
    lm = taught["llama"]
    before = {prompt: alone(lm, prompt) for edit in facts for prompt in prompts_of(edit)}
    seen: list[dict[str, str]] = []
    session = EditSession(lm.model, lm.encoder.tokenizer, EditConfig(measure="generated", **files), facts)

    def look(n: int) -> None:
        seen.append({prompt: alone(lm, prompt) for prompt in before})

    report = session.run(on_step=look)
    session.revert()
    assert report["measure"] == "generated"
    assert any(now[prompt] != before[prompt] for now in seen for prompt in before)
    for i, (edit, record) in enumerate(zip(facts, report["edits"], strict=True)):
        assert not GENERATED & record["before"].keys()
        for when, now in (("after", seen[i + 1]), ("end", seen[-1])):
            right = [
                now[prompt].strip(" ").lower().replace(",", "") == edit.target_new.lower().replace(",", "")
                for prompt in (edit.text, *edit.paraphrases)
            ]
            same = [now[probe.prompt] == before[probe.prompt] for probe in edit.neighborhood]
            expected = {
                "reliability_gen": float(right[0]),
                "generalization_gen": sum(right[1:]) / len(right[1:]),
                "locality_gen": sum(same) / len(same),
            }
            assert {name: record[when][name] for name in GENERATED} == expected, (edit.id, when)
    ends = [record["end"]["reliability_gen"] for record in report["edits"]]
    assert report["at_the_end"]["reliability_gen"] == sum(ends) / 3


def test_measuring_changes_no_weight_and_names_another_run(taught, files, facts, tmp_path: Path) -> None:
    lm = taught["gpt2"]
    cache = EditCache(tmp_path / "runs")
    reports = []
    for how in ("teacher_forced", "generated", "generated"):
        config = EditConfig.from_args(measure=how, **files)
        session = EditSession(lm.model, lm.encoder.tokenizer, config, facts)
        reports.append(session.run(cache))
        session.revert()
    plain, first, kept = reports
    assert plain["run"] != first["run"] == kept["run"]
    assert (plain["from_cache"], first["from_cache"], kept["from_cache"]) == (False, False, True)
    assert plain["weights"] == first["weights"]
    assert kept["edits"] == first["edits"]
    assert not GENERATED & plain["at_the_end"].keys()
    assert first["at_the_end"].keys() >= GENERATED


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_end_is_what_rect_autoregressive_reports(taught, files, tmp_path: Path, family: str) -> None:
    lm = taught[family]
    lm.model.save_pretrained(tmp_path / "model")
    lm.encoder.tokenizer.save_pretrained(tmp_path / "model")
    given = {"pretrained": str(tmp_path / "model"), "measure": "generated", **files}
    results = lm_eval.simple_evaluate(
        model="edited_hf",
        model_args=given,
        tasks=["rect_autoregressive"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata=given),
        batch_size=5,
        device="cpu",
        bootstrap_iters=0,
    )
    assert results is not None
    end = results["config"]["edit"]["at_the_end"]
    for name in GENERATED:
        found = results["results"]["rect_autoregressive"][f"{name.removesuffix('_gen')},none"]
        assert end[name] == pytest.approx(found), name


def test_only_the_two_ways_of_measuring_are_known() -> None:
    with pytest.raises(UserError, match="measure"):
        EditConfig.from_args(method="none", measure="spoken")
