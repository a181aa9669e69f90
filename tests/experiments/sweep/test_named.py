"""The sweeps that come with the package: what they say, their small versions, and MEND's training."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from harness_rect import cli, embedded
from harness_rect.compat.lm_eval import KeptTasks
from harness_rect.errors import UserError
from harness_rect.experiments.sweep import dry_run, evaluate, named, networks
from harness_rect.experiments.sweep.plan import MethodEntry, SweepConfig, make_plan
from harness_rect.experiments.sweep.runner import run_sweep
from harness_rect.io.resume import Resumable
from harness_rect.training.mend import MendTrainer

PAPER = [name for name in named.names() if name.startswith("paper/")]
MINI = [name for name in named.names() if name.startswith("mini/")]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # All of lm-eval's own tasks take seconds to list.
    monkeypatch.setattr(evaluate, "KeptTasks", functools.partial(KeptTasks, include_defaults=False))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The models whose networks were trained, in order."""
    seen: list[str] = []
    run = MendTrainer.run

    def running(trainer: MendTrainer, folder: Path) -> Any:
        seen.append(trainer.model_name)
        return run(trainer, folder)

    monkeypatch.setattr(MendTrainer, "run", running)
    yield seen


def batch_of(entry: MethodEntry, config: SweepConfig) -> int:
    return int(entry.arguments.get("edit_batch_size", config.edit_batch_size))


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        str(path.parent.relative_to(folder)): json.loads(path.read_text(encoding="utf-8"))
        for path in folder.rglob("results.json")
    }


# ------------------------------------------------------------------------------------------- what they say


def test_every_method_model_and_arrangement_of_the_paper_is_there() -> None:
    every = [named.read_sweep(name) for name in PAPER]
    edited = {
        (model.pretrained.rpartition("/")[2], method.method)
        for config in every
        for model in config.models
        for method in config.methods
    }
    for model in ("gpt2-xl", "llama-7b", "Llama-2-7b-hf"):
        for method in ("kn", "mend", "rome", "memit"):
            assert (model, method) in edited
    assert {("Meta-Llama-3-8B-Instruct", method) for method in ("memit", "alphaedit")} <= edited
    assert {f"paper/{name}" for name in ("instance-single", "batch-single", "batch-sequential")} < set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_a_file_says_its_figure_its_setting_and_what_differs(name: str) -> None:
    text = (named.FOLDER / f"{name.partition('/')[2]}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert text.startswith("# ") and "Setting of " in comment and "Known to differ:" in comment
    config = named.read_sweep(name)
    assert config.title and config.output == f"results/{name.partition('/')[2]}"
    mend = any(entry.method == "mend" for entry in config.methods)
    assert mend == (config.train_mend is not None)


@pytest.mark.parametrize("name", PAPER)
def test_the_small_version_has_the_same_structure(name: str) -> None:
    whole, mini = named.read_sweep(name), named.read_sweep(name.replace("paper", "mini"))
    assert mini.output == f"results/mini/{name.partition('/')[2]}"
    assert [entry.method for entry in mini.methods] == [entry.method for entry in whole.methods]
    assert (mini.regularizers, mini.tasks, mini.title) == (whole.regularizers, whole.tasks, whole.title)
    assert (0 in mini.checkpoints) == (0 in whole.checkpoints)
    assert {embedded.is_embedded(model.pretrained) for model in mini.models} == {True}
    for entry, entry_of_whole in zip(mini.methods, whole.methods, strict=True):
        points, more = mini.checkpoints_of(entry), whole.checkpoints_of(entry_of_whole)
        assert min(2, len(more)) <= len(points) <= len(more) and points[-1] <= 20
        batches = (batch_of(entry, mini), batch_of(entry_of_whole, whole))
        assert (
            len(
                {
                    (size == 1, size == first)
                    for size, first in zip(batches, (points[0], more[0]), strict=True)
                }
            )
            == 1
        )


def test_the_list_has_whole_names_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["sweep", "--list"]) == 0
    out = capsys.readouterr().out
    assert set(named.names()) <= set(out.split())
    assert out.count("\n") < 4 * len(named.names())


def test_the_list_counts_what_the_plans_have(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["sweep", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    below = {line.split()[0]: after.strip() for line, after in pairwise(lines) if line.strip()}
    assert set(named.names()) <= set(below)
    assert "MEMIT, AlphaEdit; edits: 2000; " in below["paper/alphaedit-stream"]
    for name in MINI:
        config = named.read_sweep(name)
        made = make_plan(config, name)
        assert named.evaluations(config) == len(made.evaluations)
        edits = max(len(trajectory.edits) for trajectory in made.trajectories)
        assert below[name].endswith(f"; edits: {edits}; evaluations: {len(made.evaluations)}")


# --------------------------------------------------------------------------------------- other models, names


def test_other_models_and_another_folder_can_be_put_in() -> None:
    config = named.read_sweep("paper/batch-single", "elsewhere", ["gpt2", "models/mine"])
    assert config.output == "elsewhere"
    assert [model.pretrained for model in config.models] == ["gpt2", "models/mine"]
    with pytest.raises(UserError, match=r"paper/overfitting: models\.1\.pretrained"):
        named.read_sweep("paper/overfitting", models=["gpt2", ""])


def test_a_preset_does_not_stay_with_another_model_but_a_file_does() -> None:
    methods = [
        "kn",
        {"method": "rome", "hparams": "gpt2-xl-original"},
        {"method": "memit", "hparams": "m.json"},
    ]
    usual = {"output": "out", "model": "gpt2-xl", "edits": "tiny", "checkpoints": [1], "tasks": ["rect_nli"]}
    Path("mine.yaml").write_text(yaml.safe_dump(usual | {"methods": methods}))
    kept = [entry.arguments.get("hparams") for entry in named.read_sweep("mine.yaml").methods]
    assert kept == [None, "gpt2-xl-original", "m.json"]
    config = named.read_sweep("mine.yaml", models=["rect-tiny"])
    assert [entry.arguments.get("hparams") for entry in config.methods] == [None, None, "m.json"]
    assert [model.pretrained for model in config.models] == ["rect-tiny"]


def test_a_copy_of_a_file_is_a_sweep_once_it_has_an_output() -> None:
    text = (named.FOLDER / "overfitting.yaml").read_text(encoding="utf-8")
    Path("copy.yaml").write_text(text + "output: mine\n")
    assert named.read_sweep("copy.yaml") == named.read_sweep("paper/overfitting", "mine")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["paper/overfiting"], "there is no sweep paper/overfiting: did you mean 'paper/overfitting'?"),
        (["mini"], "there is no sweep mini"),
        (["paper/overfitting.yaml"], "paper/overfitting.yaml: cannot be read"),
        ([], "what to run is missing"),
        (["missing.yaml", "--list-all"], "unrecognized arguments"),
        (["missing.yaml", "--cpus", "2"], "--cpus 2: for workers of Ray; give --backend ray too"),
        (["missing.yaml", "--backend", "ray", "--cpus", "0"], "--cpus 0: expected more than 0"),
        (["missing.yaml", "--backend", "ray", "--cpus", "nan"], "--cpus nan: expected more than 0"),
        (["missing.yaml", "--backend", "ray", "--gpus", "-1"], "--gpus -1: expected 0 or more"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(asked: list[str], message: str, capsys) -> None:
    with contextlib.suppress(SystemExit):  # of argparse
        assert cli.main(["sweep", *asked]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------------ the small ones


@pytest.mark.parametrize("name", MINI)
def test_a_small_version_runs(name: str, trained: list[str]) -> None:
    run_sweep(name)
    folder = Path("results") / name
    assert len(results(folder)) == named.evaluations(named.read_sweep(name))
    assert not trained  # rect-tiny has networks
    if name == MINI[0]:  # that a second run finds everything done does not depend on the sweep
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("results.json")}
        run_sweep(name)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("results.json")} == before


# -------------------------------------------------------------------------------------------- MEND's networks

MEND: dict[str, Any] = {
    "output": "out",
    "models": ["rect-tiny", "rect-tiny-llama"],
    "edits": "tiny[0:2]",
    "methods": ["mend"],
    "train_mend": {"train": "tiny[100:130]", "steps": 3, "rank": 2, "batch_size": 2},
    "checkpoints": [1, 2],
    "tasks": ["rect_zsre"],
    "batch_size": 8,
    "device": "cpu",
}


def sweep(dry: bool = False, **changes: Any) -> None:
    Path("mend.yaml").write_text(yaml.safe_dump(MEND | changes))
    run_sweep("mend.yaml", dry)


def test_networks_are_trained_once_for_a_model_that_has_none(trained: list[str]) -> None:
    sweep()
    assert trained == ["rect-tiny-llama"]
    made = results(Path("out"))
    assert len(made) == 4
    for place, one in made.items():
        hparams = one["config"]["edit"]["hparams"]
        own = "rect-tiny" if place.startswith("rect-tiny/") else str(Path("out/mend/rect-tiny-llama"))
        assert hparams["weights"] == own
    sweep(checkpoints=[2])
    assert trained == ["rect-tiny-llama"]
    tensors = Path("out/mend/rect-tiny-llama/mend.safetensors")
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + b"\0")
    sweep(checkpoints=[2])
    assert trained == ["rect-tiny-llama"] * 2 and tensors.read_bytes() == whole
    assert Path("out/mend/rect-tiny-llama.damaged").is_dir()
    with pytest.raises(UserError, match="MEND's networks there were trained with other steps"):
        sweep(train_mend=MEND["train_mend"] | {"steps": 4})
    with pytest.raises(UserError, match="other train_sha256"):
        sweep(train_mend=MEND["train_mend"] | {"train": "tiny[101:131]"})


def test_an_interrupted_training_goes_on(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    save = Resumable.save

    def interrupted(unfinished: Resumable, tensors: Any, state: Any) -> None:
        save(unfinished, tensors, state)
        if state["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("harness_rect.io.resume.SAVE_SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(Resumable, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(models=["rect-tiny-llama"])
    with caplog.at_level("INFO", "harness_rect.training.mend"):
        sweep(models=["rect-tiny-llama"])
    assert "resuming an interrupted training after 2 steps" in caplog.text


def test_the_preset_of_the_model_says_how_to_train() -> None:
    """On the shape alone: blocks and rank as published, and what the file gives itself."""
    from harness_rect.experiments.sweep.memory import skeleton

    for name, shape, blocks in (
        ("xl", transformers.GPT2Config(n_layer=48, n_embd=1600, n_head=25), [45, 46, 47]),
        (
            "llama",
            transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008),
            [29, 30, 31],
        ),
    ):
        shape.save_pretrained(name)
        transformers.AutoTokenizer.from_pretrained(embedded.resolve_model("rect-tiny")).save_pretrained(name)
        config = SweepConfig(**MEND | {"models": [name], "train_mend": {"train": "zsre", "seed": 3}})
        given = config.train_mend
        settings = given.settings(skeleton(config.models[0])) if given else None
        assert settings and settings.layers == blocks and settings.seed == 3
        published = (settings.rank, settings.lr, settings.edit_lr, settings.c_edit, settings.c_loc)
        assert published == (1920, 1e-6, 1e-4, 0.1, 1.0)
        assert settings.steps * settings.batch_size == 100_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 3}, "train_mend: unknown key 'step': did you mean 'steps'"),
        ({"steps": 0}, "train_mend: steps: Input should be greater"),
        ({"train": ""}, "train_mend.train"),
    ],
)
def test_wrong_settings_of_the_training_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep(train_mend=MEND["train_mend"] | changes)


# ------------------------------------------------------------------------------------------------ dry runs


def test_a_dry_run_tells_memory_and_the_time_of_a_training(trained, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(dry_run, "seconds_of_a_step", lambda lm, given: 100.0)
    sweep(dry=True)
    out = capsys.readouterr().out
    assert not trained and not Path("out").exists()
    assert "memory on cpu" in out and "rect-tiny mend" in out and "free on cpu" in out
    assert "rect-tiny, evaluating 8 x 100 tokens" in out
    [training] = [line for line in out.splitlines() if "training MEND, at most 3 steps" in line]
    assert training.split("│")[-2].strip() == "300"
    assert "rect-tiny-llama: without the time of edits with MEND" in out
    [llama] = [line for line in out.splitlines() if "rect-tiny-llama/mend/order0" in line]
    assert llama.split("│")[2:4] == ["     2 ", "           2 "]


def test_a_training_step_is_timed_without_leaving_anything(trained) -> None:
    from harness_rect.experiments.sweep.checked import load_model
    from harness_rect.models import EditableLM

    config = SweepConfig(**MEND)
    lm = load_model(config.models[0], config)
    given = config.train_mend
    assert given and networks.seconds_of_a_step(EditableLM(lm.model, lm.tokenizer), given) > 0
    assert not trained and not list(Path().iterdir())


@pytest.mark.parametrize("lacks", ["memory", "weights", "device"])
def test_a_dry_run_of_a_model_that_cannot_be_loaded_says_what_it_needs(
    lacks: str, capsys, monkeypatch, place: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    model, device, reason = "rect-tiny", "cpu", "cannot be loaded"
    if lacks == "memory":
        monkeypatch.setattr(dry_run, "free_on", lambda device: 1024)
        reason = "rect-tiny takes 5.7 MiB, and 0.0 MiB are free on cpu"
    elif lacks == "device":
        device, reason = "cuda:99", "device=cuda:99: cannot be used here: "
    else:
        model = str(place / "shape")
        folder = embedded.resolve_model("rect-tiny")
        transformers.AutoConfig.from_pretrained(folder).save_pretrained(model)
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(model)
    given = {"methods": ["rome"], "models": [model], "device": device}
    Path("rome.yaml").write_text(yaml.safe_dump(MEND | given))
    assert cli.main(["sweep", "rome.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "requests and seconds need its weights in memory" in out and reason in out
    assert "5.7 MiB" in out  # the memory it needs is told all the same
    [row] = [line for line in out.splitlines() if "/rome/order0" in line]
    assert [cell.strip() for cell in row.split("│")[2:6]] == ["2", "2", "-", "-"]
    assert (f"free on {device}, which is not here" in out) == (lacks == "device")
    if lacks != "memory":  # and a run ends with the same line
        assert cli.main(["sweep", "rome.yaml"]) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert reason in line
