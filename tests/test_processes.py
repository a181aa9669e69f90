"""Several processes: they share out value searches, all end with the same weights, and one writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import transformers
from lm_eval.tasks import TaskManager
from support.every_method import HPARAMS, write_moments
from support.lm_eval_command import LAUNCH, lm_eval_command
from support.ranks import run_ranks
from support.tiny_models import depth

import harness_rect._autoload  # noqa: F401  registers edited_hf
from harness_rect.config import EditConfig
from harness_rect.session import EditSession

TASKS = Path(__file__).resolve().parent.parent / "tasks"
WEIGHT = "transformer.h.0.mlp.c_proj.weight"
#: The second batch is about the subjects of the first: its search depends on the weights after the first.
FACTS = [
    {"prompt": "{} is a city in", "subject": subject, "target_new": target, "target_true": "France"}
    for targets in (("Austria", "Vienna", "Seattle"), ("Rome", "Paris", "Austria"))
    for subject, target in zip(("Old Ferrol", "New Kassel", "Upper Thun"), targets, strict=True)
]

#: One rank: counts what its editing method proposes and the facts that it searches for, and says what its
#: model and report look like at the end.
RANK = """
import dataclasses, json, os, sys
import torch
torch.set_num_threads(1)
from harness_rect.methods import METHODS, value_search
from harness_rect.model_wrappers.edited_hf import EditedHF

rank, calls, searched = int(os.environ["RANK"]), [], []
propose, search = METHODS["memit"].propose, value_search._search

def watched(*arguments):
    calls.append(1)
    return propose(*arguments)

def counted(terms, v0, settings):
    searched.append(len(v0))
    return search(terms, v0, settings)

if sys.argv[3:]:  # this process does not end with the weights that were broadcast
    from harness_rect.processes import Processes
    as_main_ = Processes.as_main_
    Processes.as_main_ = lambda self, weight: (as_main_(self, weight), weight.mul_(1.001))
METHODS["memit"] = dataclasses.replace(METHODS["memit"], propose=watched)
value_search._search = counted
model = EditedHF(**json.loads(sys.argv[1]), device="cpu")
with model.unedited():
    unedited = {name: weight.clone() for name, weight in model.model.state_dict().items()}
torch.save(
    {
        "calls": len(calls),
        "searched": searched,
        "report": model.get_model_info()["edit"],
        "weights": model.model.state_dict(),
        "unedited": unedited,
    },
    f"{sys.argv[2]}/rank{rank}.pt",
)
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def place(tmp_path: Path, make_model, tokenizer) -> Path:
    for name, seed in (("model", 0), ("other", 1)):
        make_model("gpt2", seed=seed, **depth("gpt2", 3)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    (tmp_path / "hparams.json").write_text(json.dumps(HPARAMS["memit"]))
    (tmp_path / "moments").mkdir()
    write_moments(tmp_path / "moments")
    (tmp_path / "rank.py").write_text(RANK)
    return tmp_path


def editing(place: Path) -> dict[str, Any]:
    return {
        "method": "memit",
        "edits": str(place / "facts.json"),
        "edit_batch_size": 3,
        "hparams": str(place / "hparams.json"),
        "stats": str(place / "moments"),
    }


def test_searches_are_shared_out_and_all_hold_the_same_weights(place: Path, tokenizer) -> None:
    more = {"pretrained": str(place / "model"), "edit_cache": "off", "save_edited": str(place / "out")}
    words = [str(place / "rank.py"), json.dumps(editing(place) | more), str(place)]
    for ended in run_ranks([words] * 3):
        assert ended.status == 0, ended.err
    first, *others = (torch.load(place / f"rank{rank}.pt", weights_only=True) for rank in range(3))
    assert first["calls"] == 2 and first["searched"] == [1, 1]
    for other in others:
        assert other["calls"] == 0 and other["searched"] == [1, 1]
        assert other["report"] == first["report"]
        for name, weight in first["weights"].items():
            assert torch.equal(weight.view(torch.uint8), other["weights"][name].view(torch.uint8)), name

    alone = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    assert not torch.equal(alone.get_parameter(WEIGHT), first["weights"][WEIGHT])
    for name, weight in alone.named_parameters():
        assert all(torch.equal(one["unedited"][name], weight) for one in (first, *others)), name
    EditSession(alone, tokenizer, EditConfig.from_args(**editing(place))).run()
    torch.testing.assert_close(first["weights"], alone.state_dict(), rtol=1e-3, atol=1e-4)
    saved = transformers.AutoModelForCausalLM.from_pretrained(place / "out")
    assert torch.equal(saved.get_parameter(WEIGHT), others[0]["weights"][WEIGHT])
    assert not [path for path in place.iterdir() if path.name.startswith(".")], "several have written"


@pytest.mark.parametrize("second", [["other"], ["model", "differs"]], ids=["before", "by editing"])
def test_different_models_are_refused_by_all(second: list[str], place: Path) -> None:
    words = []
    for name, *more in (["model"], second):
        given = editing(place) | {"pretrained": str(place / name), "edit_cache": "off"}
        words.append([str(place / "rank.py"), json.dumps(given), str(place), *more])
    ranks = run_ranks(words)
    assert [ended.status for ended in ranks] == [2, 2]
    assert "error: the processes hold different models" in ranks[0].err
    assert "ranks that differ from rank 0: 1" in ranks[0].err


def test_two_launched_processes_evaluate_half_of_the_rows_each_and_score_as_one(tmp_path: Path) -> None:
    given = {"edits": "tiny[0:2]", "rect": 0.4, "edit_cache": "off"}
    text = ",".join(f"{name}={value}" for name, value in given.items())
    tasks = ["rect_sentiment", "rect_zsre"]
    words = ["--model", "edited_hf", "--model_args", text, "--tasks", ",".join(tasks), "--limit", "4"]
    words += ["--device", "cpu"] * torch.cuda.is_available()
    done = lm_eval_command(tmp_path, *words, "--log_samples", "--output_path", "out", launch=LAUNCH)
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "out").rglob("results_*.json")  # one process writes
    two = json.loads(path.read_text())
    [path] = (tmp_path / "out").rglob("samples_rect_sentiment_*.jsonl")
    rows = [json.loads(line)["doc_id"] for line in path.read_text().splitlines()]
    assert rows == [0, 2, 1, 3], "not the first process's rows, then the second's"
    assert two["config"]["edit"]["processes"] == two["config"]["computed_on"]["processes"] == 2

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=given)
    one = lm_eval.simple_evaluate("edited_hf", given, tasks, task_manager=manager, limit=4, device="cpu")
    assert one is not None
    assert "processes" not in one["config"]["computed_on"]
    assert two["config"]["edit"]["weights"] == one["config"]["edit"]["weights"]
    for name in ("provenance", "self_checks"):
        assert two["config"][name] == one["config"][name]
    assert two["n-samples"] == one["n-samples"]
    for task in tasks:
        scores = one["results"][task]
        numbers = {name: score for name, score in scores.items() if isinstance(score, int | float)}
        assert {name: two["results"][task][name] for name in numbers} == pytest.approx(numbers, abs=1e-6)
