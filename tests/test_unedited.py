"""Tasks that ask for the unedited model's answer get it from ``edited_hf``, and from no other model class."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import transformers
from lm_eval.tasks import TaskManager
from support.lm_eval_files import without_groups
from support.taught_models import EDITS, HPARAMS, teach

import harness_rect._autoload  # noqa: F401  registers edited_hf
from harness_rect.model_wrappers.edited_hf import EditedHF

TASKS = Path(__file__).resolve().parent.parent / "tasks"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_model, tokenizer, bos_tokenizer) -> Path:
    """A folder with two models, edits and hyper-parameters."""
    folder = tmp_path_factory.mktemp("unedited")
    for family, text in (("gpt2", tokenizer), ("llama", bos_tokenizer)):
        teach(make_model(family), text).save_pretrained(folder / family)
        text.save_pretrained(folder / family)
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, EDITS)))
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    return folder


@pytest.fixture
def arguments(place: Path) -> Callable[..., dict[str, Any]]:
    """``arguments(family, **more)``: model_args of an edited run."""

    def arguments(family: str = "gpt2", **more: Any) -> dict[str, Any]:
        files = {"edits": str(place / "edits.jsonl"), "hparams": str(place / "hparams.json")}
        return {"pretrained": str(place / family), **files, **more}

    return arguments


def unedited(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "hparams"} | {"method": "none"}


def evaluate(model: Any, given: dict[str, Any], **more: Any) -> dict[str, Any]:
    metadata = given | more.pop("metadata", {})
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    settings = {"batch_size": 1, "device": "cpu", "bootstrap_iters": 0, **more}
    if model == "hf":
        given = {"pretrained": given["pretrained"]}
    results = lm_eval.simple_evaluate(
        model=model, model_args=given, tasks=["rect_autoregressive"], task_manager=manager, **settings
    )
    assert results is not None
    return without_groups(results)


def metrics(results: dict[str, Any]) -> dict[str, float]:
    found = results["results"]["rect_autoregressive"]
    return {name.removesuffix(",none"): value for name, value in found.items() if isinstance(value, float)}


def told(results: dict[str, Any]) -> dict[str, Any]:
    """prompt -> the answer, of all documents."""
    return {
        request[0]: answer
        for sample in results["samples"]["rect_autoregressive"]
        for request, (answer,) in zip(sample["arguments"], sample["resps"], strict=True)
    }


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_unedited_answers_are_those_of_hf_on_the_unedited_model(
    arguments, family: str, batch_size: int
) -> None:
    given = arguments(family)
    edited = told(evaluate("edited_hf", given, batch_size=batch_size))
    pairs = {prompt: answer for prompt, answer in edited.items() if isinstance(answer, tuple)}
    assert len(pairs) == 4
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(given["pretrained"])
    words = transformers.AutoTokenizer.from_pretrained(given["pretrained"])
    for prompt, (_, before) in pairs.items():
        context = words(prompt, return_tensors="pt")
        ids = model.generate(**context, max_new_tokens=50, do_sample=False, pad_token_id=0)
        said = words.decode(ids[0, context["input_ids"].shape[1] :], skip_special_tokens=True)
        assert before == said.split(".")[0].split("\n")[0]
    assert any(after != before for after, before in pairs.values()), "editing changed no answer"


def test_the_edited_weights_are_bit_for_bit_there_again(arguments) -> None:
    model = EditedHF(**arguments(), device="cpu", dtype="bfloat16")
    edited = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    base = EditedHF(**unedited(arguments()), device="cpu", dtype="bfloat16").model.state_dict()
    with pytest.raises(ZeroDivisionError), model.unedited():
        now = model.model.state_dict()
        assert all(torch.equal(weight, base[name]) for name, weight in now.items())
        raise ZeroDivisionError
    assert all(torch.equal(weight, edited[name]) for name, weight in model.model.state_dict().items())
    assert any(not torch.equal(weight, base[name]) for name, weight in edited.items())


def test_without_an_edit_every_answer_is_the_unedited_models(arguments) -> None:
    found = metrics(evaluate("edited_hf", unedited(arguments()), batch_size=16))
    assert found["locality"] == 1


def test_a_kept_run_gives_the_same_answers(arguments, tmp_path: Path) -> None:
    given = arguments(edit_cache=str(tmp_path))
    first, kept = (evaluate("edited_hf", given) for _ in range(2))
    assert kept["config"]["edit"]["from_cache"] is True
    assert told(kept) == told(first)
    assert metrics(kept) == metrics(first)


def test_lm_evals_cache_keeps_no_answer_of_the_unedited_model(arguments, tmp_path: Path) -> None:
    given = arguments()
    alone = {name: told(evaluate(*of)) for name, of in runs(given).items()}
    assert alone["edited"] != alone["none"]
    assert alone["edited, short"] != alone["edited"] and alone["none, short"] != alone["none"]
    for name in ("edited", "none", "none, short", "edited, short", "hf", "edited", "hf", "none"):
        model, asked = runs(given)[name]
        found = evaluate(model, asked, use_cache=str(tmp_path / "answers"))
        assert told(found) == alone[name], name


def runs(given: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    short = {"max_length": 52}  # of which 50 are for the answer
    return {
        "edited": ("edited_hf", given),
        "none": ("edited_hf", unedited(given)),
        "edited, short": ("edited_hf", given | short),
        "none, short": ("edited_hf", unedited(given) | short),
        "hf": ("hf", unedited(given)),
    }


def test_other_model_classes_leave_what_needs_the_unedited_model_out(arguments, tmp_path, caplog) -> None:
    folder = str(tmp_path / "edited")
    given = arguments(save_edited=folder)
    ours = evaluate("edited_hf", given)
    theirs = evaluate("hf", {"pretrained": folder, "edits": given["edits"]})
    assert metrics(ours).keys() == {"reliability", "generalization", "locality", "stopped"}
    assert metrics(theirs).keys() == {"reliability", "generalization", "stopped"}
    assert "rect_autoregressive: locality need the unedited model" in caplog.text
    for name in ("reliability", "generalization"):
        assert metrics(theirs)[name] == metrics(ours)[name]
    asked = {prompt for prompt, answer in told(theirs).items() if answer is not None}
    assert {prompt: told(ours)[prompt] for prompt in asked} == {p: told(theirs)[p] for p in asked}
