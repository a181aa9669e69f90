"""``harness-rect sweep`` on a small model: what it writes, and that being killed makes no difference."""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from filelock import FileLock
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from support.small_sweep import CONFIG, TIMES, Fuse, files, started, sweep, was_killed

import harness_rect._autoload  # noqa: F401  for the stock lm_eval to compare with
from harness_rect import cli
from harness_rect.errors import Failed, UserError
from harness_rect.evaluation.task import RectTask
from harness_rect.experiments.results import load
from harness_rect.experiments.sweep import evaluate
from harness_rect.experiments.sweep.evaluate import read_results
from harness_rect.experiments.sweep.work import Worker
from harness_rect.io.checksums import write_sums
from harness_rect.machine import computed_on
from harness_rect.model_wrappers.unedited import ComparingLM
from harness_rect.session import EditSession

ROOT = Path(__file__).resolve().parents[3]


# ------------------------------------------------------------------------------------------ what it writes


def test_all_evaluations_are_there_and_nothing_else(undisturbed: Path) -> None:
    expected = {".lock", "sweep.json", "edits/order1.jsonl"}
    evaluations = ["model/unedited"] + [
        f"model/{label}/order{order}/edits_{n:03d}"
        for label in ("rome", "rome+random0.5")
        for order in (0, 1)
        for n in (1, 3)
    ]
    tasks = ("rect_nli", "rect_sentiment", "rect_zsre", "rect_counterfact")
    for folder in evaluations:
        expected |= {f"{folder}/results.json"} | {f"{folder}/samples_{task}.jsonl" for task in tasks}
    assert set(files(undisturbed)) == expected
    index = json.loads((undisturbed / "sweep.json").read_text())
    listed = [{key: e[key] for key in ("results", "done")} for e in index["evaluations"]]
    assert listed == [{"results": f"{folder}/results.json", "done": True} for folder in evaluations]
    for n, folder in ((1, evaluations[1]), (3, evaluations[2])):
        results = json.loads((undisturbed / folder / "results.json").read_text())
        assert results["n-samples"]["rect_zsre"] == {"original": n, "effective": n}
        assert results["n-samples"]["rect_nli"] == {"original": 6, "effective": 4}
        assert results["sweep"]["n_edits"] == n == results["config"]["edit"]["n_edits"]


@pytest.mark.parametrize(
    "evaluation",
    ["unedited", "rome/order0/edits_001", "rome+random0.5/order0/edits_003", "rome/order1/edits_003"],
)
def test_a_stock_lm_eval_run_gives_the_same(
    undisturbed: Path, evaluation: str, place, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place("stock")
    (folder / "out").symlink_to(undisturbed)
    ours = json.loads(files(undisturbed)[f"model/{evaluation}/results.json"])
    given = ",".join(f"{key}={value}" for key, value in ours["config"]["model_args"].items())
    command = ["lm_eval", "run", "--model", "edited_hf", "--model_args", given, "--output_path", "stock.json"]
    command += ["--tasks", "rect_nli,rect_sentiment,rect_editing", "--limit", "4", "--batch_size", "2"]
    command += ["--device", "cpu", "--log_samples", "--include_path", str(ROOT / "tasks")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    (path,) = folder.glob("stock_*.json")
    stock = json.loads(TIMES.sub(r"\g<1>0", path.read_text()))
    ours.pop("sweep")
    stock["config"].get("edit", {}).pop("seconds", None)  # a sweep's run is not over at a checkpoint
    for results in (ours, stock):
        if results["config"]["model_args"].get("method") in ("none", None):  # how lm-eval reads method=none
            results["config"]["model_args"]["method"] = None
            for task in results["configs"].values():
                task["metadata"]["method"] = None
    assert ours.keys() == stock.keys()
    for key, value in stock.items():
        assert ours[key] == value, key
    for task in stock["configs"]:
        (theirs,) = folder.glob(f"samples_{task}_*.jsonl")
        written = undisturbed / "model" / evaluation / f"samples_{task}.jsonl"
        assert written.read_text() == theirs.read_text()


def numbers_of_edits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many edits each run's model had, from its start to its last step."""
    seen: list[int] = []
    run: Callable[..., Any] = EditSession.run

    def watched(*args: Any, on_step: Callable[[int], None], **kwargs: Any) -> Any:
        def stepped(done: int) -> None:
            seen.append(done)
            on_step(done)

        return run(*args, on_step=stepped, **kwargs)

    monkeypatch.setattr(EditSession, "run", watched)
    return seen


def test_requests_are_built_once_and_the_model_is_edited_once(here, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    construct = RectTask.construct_requests

    def constructing(task: Any, *args: Any, **kwargs: Any) -> Any:
        built.append(task.config.task)
        return construct(task, *args, **kwargs)

    monkeypatch.setattr(RectTask, "construct_requests", constructing)
    edited = numbers_of_edits(monkeypatch)
    sweep(orders=1, log_samples=False)
    assert sorted(built) == ["rect_nli"] * 4 + ["rect_sentiment"] * 4
    assert edited == 2 * [0, 1, 2, 3]


def test_the_unedited_model_answers_once_and_as_in_a_run_of_its_own(here, monkeypatch) -> None:
    asked: list[str] = []
    generate = ComparingLM.generate_until

    def watched(self: Any, requests: Any, *args: Any) -> Any:
        weight = self.model.get_parameter("transformer.h.0.mlp.c_proj.weight")
        if self._originals and torch.equal(weight, next(iter(self._originals.values()))):
            asked.extend(request.args[0] for request in requests)
        return generate(self, requests, *args)

    monkeypatch.setattr(ComparingLM, "generate_until", watched)
    tasks = ["rect_autoregressive", "rect_drift"]
    sweep(tasks=tasks, orders=1, checkpoints=[1, 3], limit=None)
    assert asked == ["The capital of France is"], (
        "asked by three edits, at two checkpoints of two trajectories"
    )
    for path in sorted((here / "out").glob("model/*/order0/*/results.json")):
        ours = json.loads(path.read_text())
        given = ours["config"]["model_args"]
        alone = lm_eval.simple_evaluate(
            model="edited_hf",
            model_args=given,
            tasks=tasks,
            task_manager=TaskManager(
                include_path=str(ROOT / "tasks"), include_defaults=False, metadata=given
            ),
            batch_size=2,
            device="cpu",
        )
        assert alone is not None
        for task in tasks:
            for metric in ("locality,none", "stopped,none", "kl,none", "perplexity,none"):
                expected = alone["results"][task].get(metric)
                assert ours["results"][task].get(metric) == expected, (path, metric)
        assert ours["results"]["rect_drift"]["kl,none"] > 0


# --------------------------------------------------------------------------------------------- being killed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_it_ends_with_the_same_files(undisturbed: Path, place) -> None:
    reference = files(undisturbed)
    moments = random.Random(20)
    kills, rounds = 0, 0
    while kills < 6:
        rounds += 1
        folder = place(f"round{rounds}") / "out"
        while was_killed(started(Fuse(*moments.choice([("rename", 40), ("pass", 120)]), moments))):
            kills += 1
            for path in folder.rglob("results.json"):  # what is there is whole
                json.loads(path.read_text())
        assert files(folder) == reference
    assert rounds < 6  # several times in one sweep, too


def test_a_trajectory_goes_on_where_it_was(here, monkeypatch: pytest.MonkeyPatch) -> None:
    only: dict[str, Any] = {"orders": 1, "regularizers": ["none"], "checkpoints": [1, 3, 4]}
    evaluated: list[int] = []
    original = evaluate.Evaluator.evaluate

    def breaking(evaluator: Any, evaluation: Any, *rest: Any) -> Any:
        evaluated.append(evaluation.n_edits)
        if len(evaluated) == 2:
            raise RuntimeError("the evaluation failed")
        return original(evaluator, evaluation, *rest)

    monkeypatch.setattr(evaluate.Evaluator, "evaluate", breaking)
    with pytest.raises(RuntimeError, match="the evaluation failed"):
        sweep(**only)
    edited = numbers_of_edits(monkeypatch)
    sweep(**only)
    assert evaluated == [1, 3, 3, 4] and edited == [3, 4]


# ------------------------------------------------------------------------------------- going on and refusing


def test_a_larger_sweep_keeps_what_is_done(here) -> None:
    sweep(orders=1, regularizers=["none"])
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("results.json")}
    methods = CONFIG["methods"] + [{**CONFIG["methods"][0], "name": "x"}]
    sweep(orders=1, checkpoints=[0, 1, 2, 3], methods=methods)
    after = {path: path.stat().st_mtime_ns for path in Path("out").rglob("results.json")}
    assert before.items() <= after.items()
    assert len(before) == 3 and len(after) == 1 + 4 * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 3}, "limit 4, now 3"),
        ({"log_samples": False}, "log_samples true, now false"),
        ({"seed": 1}, r"seed \[0, 1234, 1234, 1234\], now \[1, 1, 1, 1\]"),
        ({"tasks": ["rect_nli"]}, "rect_sentiment"),
        ({"edits": "facts.json[1:]"}, "other edits"),
        ({"edits": "facts.json[0:3]", "orders": 1}, "model_args.edits"),
    ],
)
def test_changed_settings_are_refused_and_nothing_is_touched(
    finished: Path, changes: dict[str, Any], message: str
) -> None:
    before = files(finished / "out")
    with pytest.raises(UserError, match=f"(made with|has) .*{message}.*another output folder") as error:
        sweep(**changes)
    assert "\n" not in str(error.value)
    assert files(finished / "out") == before


@pytest.mark.parametrize("changed", ["rows/rte.jsonl", "hparams.json", "model/model.safetensors"])
def test_changed_files_are_noticed(finished: Path, changed: str) -> None:
    top, path = finished / changed.split("/")[0], finished / changed
    source = top.resolve()
    top.unlink()
    (shutil.copytree if source.is_dir() else shutil.copy)(source, top)
    if changed.endswith("jsonl"):
        path.write_text(path.read_text().replace("It was wet", "It was dry"))
    elif changed.endswith(".json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"v_lr": 0.1}))
    else:
        weights = load_file(path)
        weights["transformer.h.1.mlp.c_fc.weight"][0, 0] += 1
        save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="made with"):
        sweep()


def test_a_foreign_results_file_is_not_written_over(here) -> None:
    path = Path("out/model/unedited/results.json")
    path.parent.mkdir(parents=True)
    path.write_text('{"results": {}}')
    with pytest.raises(UserError, match="not written by a sweep"):
        sweep()
    assert path.read_text() == '{"results": {}}'


@pytest.mark.parametrize("name", ["results.json", "samples_rect_zsre.jsonl"])
def test_a_damaged_evaluation_is_set_aside_and_made_again(
    finished: Path, name: str, undisturbed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = finished / "out/model/rome/order0/edits_003" / name
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(UserError, match="is not the file that was written"):
        loaded = load(path.with_name("results.json"))
        loaded.samples("rect_zsre")
    sweep()
    assert f"{name} is not the file that was written" in caplog.text
    (aside := path.with_name("results.json.damaged")).unlink()
    assert files(finished / "out") == files(undisturbed) and not aside.exists()


def test_two_sweeps_in_one_folder_and_several_processes_are_refused(
    here, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out").mkdir()
    with FileLock("out/.lock"), pytest.raises(UserError, match="another sweep is running"):
        sweep()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        sweep()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": [*CONFIG["methods"], {"method": "r_rome", "hparams": "no-such"}]}, "no-such"),
        ({"tasks": ["rect_nly"]}, "there is no task 'rect_nly'"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_evaluated(
    here, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sweep(**changes)
    assert not list(Path("out").rglob("results.json"))


# --------------------------------------------------------------------------------------------------- showing


def test_a_dry_run_prints_the_plan_and_its_cost_and_writes_nothing(
    here, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(here.rglob("*")) | {here / "sweep.yaml"}
    sweep(dry_run=True)
    assert set(here.rglob("*")) == before
    shown = capsys.readouterr().out
    total = next(line for line in shown.splitlines() if line.startswith("│ total")).split("│")
    # 8 general requests each; the editing tasks ask for a token or a target at a time.
    assert [cell.strip() for cell in total[2:4]] == ["12", "9"]
    assert int(total[4]) > 9 * 8
    assert "0 evaluations are done already" in shown and "from a short measurement" in shown


def test_a_dry_run_knows_what_is_done_and_how_long_things_took(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(dry_run=True)
    assert "9 evaluations are done already" in capsys.readouterr().out
    (finished / "out/model/rome/order0/edits_003/results.json").unlink()
    sweep(dry_run=True)
    shown = capsys.readouterr().out
    assert "8 evaluations are done already" in shown and "from earlier runs" in shown


def test_the_command_prints_its_time_and_exits_with_0_or_2(
    here, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    only = CONFIG | {"orders": 1, "regularizers": ["none"], "checkpoints": [1]}
    Path("sweep.yaml").write_text(yaml.safe_dump(only))
    levels = [logging.getLogger(name).level for name in ("lm_eval", "harness_rect.hparams")]
    assert cli.main(["sweep", "sweep.yaml"]) == 0
    assert [logging.getLogger(name).level for name in ("lm_eval", "harness_rect.hparams")] == levels
    shown = capsys.readouterr()
    assert "besides editing and evaluating: " in " ".join(shown.out.split())
    Path("sweep.yaml").write_text(yaml.safe_dump(only | {"limit": 0}))
    assert cli.main(["sweep", "sweep.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: sweep.yaml: limit: ")


def test_threads_are_recorded_and_others_make_a_result_no_other(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (finished / "out").rglob("results.json"):
        results = json.loads(path.read_text())
        assert results["sweep"]["made_of"]["computed_on"] == computed_on(torch.device("cpu"))
        if results["sweep"]["n_edits"] == 0:  # as sweeps before this record
            del results["sweep"]["made_of"]["computed_on"]
        else:
            results["sweep"]["made_of"]["computed_on"] = {"threads": 8}
        path.write_text(json.dumps(results))
        write_sums(path.parent)
    caplog.set_level(logging.WARNING)
    sweep()
    assert caplog.text.count("8 evaluations that are done were computed on") == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [("config", {"layer_norm_epsilon": 0.5}), ("generation_config", {"top_k": 7})],
)
def test_evaluations_of_a_model_that_computes_differently_are_refused(
    finished: Path, name: str, change: dict[str, float]
) -> None:
    model = finished / "model"
    source = model.resolve()
    model.unlink()
    shutil.copytree(source, model)
    settings = json.loads((model / f"{name}.json").read_text()) | change
    (model / f"{name}.json").write_text(json.dumps(settings))
    shutil.rmtree(finished / "out/model/rome")  # the unedited evaluation is left, and one method
    with pytest.raises(UserError, match=r"unedited.*made with.*computation"):
        sweep()


def test_results_without_their_checksums_are_made_again(finished: Path, caplog) -> None:
    path = finished / "out/model/unedited/results.json"
    assert read_results(path) is not None
    (path.parent / "SHA256SUMS").unlink()
    assert read_results(path) is None and "is damaged: " in caplog.text
    path.write_text("{}")
    with pytest.raises(UserError, match="not written by a sweep"):
        read_results(path)


def test_what_is_not_of_the_sweep_stays_and_what_is_no_time_is_not_read(finished: Path, capsys) -> None:
    for name in (".mine.tmp", ".shard-a-of-b.lock"):
        (finished / "out" / name).write_text("mine")
    (finished / "out/.sweep.json.x.tmp").write_text("half")
    index = json.loads((finished / "out/sweep.json").read_text())
    for row in index["timing"].values():
        row["seconds_per_edit"] = float("inf")
    (finished / "out/sweep.json").write_text(json.dumps(index))
    sweep(dry_run=True)
    sweep()
    assert {path.name for path in (finished / "out").glob(".*.*")} == {".mine.tmp", ".shard-a-of-b.lock"}


def test_a_sweep_whose_results_were_removed_meanwhile_fails(finished: Path, monkeypatch) -> None:
    monkeypatch.setattr(Worker, "run", lambda *given: shutil.rmtree(finished / "out/model/unedited"))
    with pytest.raises(Failed, match="1 evaluations are gone"):
        sweep()
