"""The ``harness-rect`` command: what it writes, what it refuses, and that it leaves no half of anything."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pydantic import Field

from harness_rect import cli
from harness_rect.cli.common import parse_layers
from harness_rect.cli.edit import described_by
from harness_rect.config import EditConfig
from harness_rect.errors import UserError, tell
from harness_rect.methods import METHODS
from harness_rect.methods.base import Proposal
from harness_rect.models import EditableLM
from harness_rect.regularizers import REGULARIZERS, NoRegularizer
from harness_rect.session import EditSession

ROOT = Path(__file__).resolve().parents[2]
WEIGHT = "model.layers.0.mlp.down_proj.weight"
HPARAMS = {"layers": [0], "v_num_grad_steps": 2, "v_lr": 0.3, "context_templates": ["{}", "I went. {}"]}
TOWNS = ("Ulm", "Brno", "Ghent", "Turku", "Split")
ROWS = [
    {"prompt": "The mayor of {} is", "subject": town, "target_new": f"Ms {town[0]}", "case_id": town}
    for town in TOWNS
]
TEXT = "The city is large. It was raining there.\n\nYou can use a list here.\n\n" * 4


@pytest.fixture
def place(tmp_path: Path, make_model, bos_tokenizer) -> Path:
    """A folder with ``model``, ``facts.json``, ``hparams.json`` and ``text.txt``."""
    make_model("llama").save_pretrained(tmp_path / "model")
    bos_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "facts.json").write_text(json.dumps(ROWS))
    (tmp_path / "hparams.json").write_text(json.dumps(HPARAMS))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def command(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """``command("edit", keep="40%", edits=None)``: a command line; None leaves an option out."""
    monkeypatch.setenv("HARNESS_RECT_CACHE", str(place / "cache"))
    usual: dict[str, dict[str, Any]] = {
        "edit": {
            "model": place / "model",
            "method": "rome",
            "edits": f"{place / 'facts.json'}[0:2]",
            "hparams": place / "hparams.json",
            "edit_cache": "off",
            "device": "cpu",
            "output": place / "out",
        },
        "stats": {
            "model": place / "model",
            "layers": "0",
            "text": place / "text.txt",
            "tokens": 40,
            "device": "cpu",
            "output": place / "out",
        },
    }

    def command(name: str, *flags: str, **options: Any) -> list[str]:
        given = {key: value for key, value in (usual[name] | options).items() if value is not None}
        pairs = [[f"--{key.replace('_', '-')}", str(value)] for key, value in given.items()]
        return [name, *(word for pair in pairs for word in pair), *flags]

    return command


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def python_config(place: Path, **config: Any) -> EditConfig:
    """The run of ``command("edit")`` as it is described in Python."""
    usual = {"method": "rome", "edits": f"{place / 'facts.json'}[0:2]", "edit_cache": "off"}
    return EditConfig.from_args(**usual | {"hparams": place / "hparams.json"} | config)


def process(arguments: list[str], **more: Any) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "harness_rect", *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def interruptible() -> None:
    """Let Ctrl-C reach this process: it is ignored by background jobs of a shell and their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# ----------------------------------------------------------------------------------------------- edit


def test_the_checkpoint_holds_the_sessions_weights_and_its_report(
    place: Path, command, bos_tokenizer
) -> None:
    running = process(command("edit", regularizer="rect", keep="40%", edit_cache=None))
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert "2 edits by rome" in out and "reliability" in out
    config = python_config(place, rect=0.4)
    session = EditSession(load(place / "model"), bos_tokenizer, config)
    report, expected = session.run(), session.lm.weight(WEIGHT).detach()

    edited, original = load(place / "out"), load(place / "model")
    assert torch.equal(edited.get_parameter(WEIGHT), expected)
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, edited.get_parameter(name)) == (name != WEIGHT), name
    assert transformers.AutoTokenizer.from_pretrained(place / "out")("city") == bos_tokenizer("city")
    written = json.loads((place / "out" / "edit_report.json").read_text())
    assert written["run"] == report["run"]
    assert written["at_the_end"] == report["at_the_end"]
    assert (written["keep"], written["edit_ids"]) == (0.4, ["Ulm", "Brno"])
    names = {path.name for path in (place / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "edit_report.json"} <= names
    assert sorted(path.name for path in place.iterdir() if path.name.startswith(".")) == []
    assert list((place / "cache" / "edits").glob("*/SHA256SUMS")), "kept for the next time"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_checkpoint_keeps_the_dtype_it_was_edited_in(place: Path, command, dtype: str) -> None:
    assert cli.main(command("edit", dtype=dtype)) == 0
    assert load(place / "out").dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)


def test_slices_choose_the_edits(place: Path, command) -> None:
    assert cli.main(command("edit", edits=f"{place / 'facts.json'}[4:0:-2]")) == 0
    assert json.loads((place / "out" / "edit_report.json").read_text())["edit_ids"] == ["Split", "Ghent"]


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"regularizer": "rect", "keep": "0.3"}, {"rect": 0.3}),
        ({"rect": "30%", "rect_convention": "alphaedit"}, {"rect": 0.3, "rect_convention": "alphaedit"}),
        (
            {"regularizer": "random", "keep": "50%", "seed": 5},
            {"regularizer": "random", "keep": 0.5, "edit_seed": 5},
        ),
        ({"method": "r_rome"}, {"method": "r_rome"}),
        ({"method": "memit", "edit_batch_size": 2}, {"method": "memit", "edit_batch_size": 2}),
        ({"regularizer": "prune", "base": "1.5"}, {"regularizer": "prune", "base": 1.5}),
        (
            {"regularizer": "sphere", "alpha": "0.3", "beta": 0.9},
            {"regularizer": "sphere", "alpha": 0.3, "beta": 0.9},
        ),
    ],
)
def test_options_mean_what_they_mean_in_python(
    place: Path, command, options: dict[str, Any], config: dict[str, Any]
) -> None:
    arguments = command("edit", **options)
    described = described_by(cli.make_parser(arguments).parse_args(arguments))
    assert described == python_config(place, **config)


def test_a_path_may_begin_at_home_and_hold_what_looks_like_markup(
    place: Path, command, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(place / "model")
    assert cli.main(command("edit", output="~/out[/x]", edit_cache="~/kept")) == 0
    assert str(place / "out[/x]") in capsys.readouterr().out
    assert (place / "kept").is_dir() and not (place / "model" / "~").exists()


def test_templates_come_from_the_hyper_parameter_file(place: Path, command) -> None:
    (place / "hparams.yaml").write_text(json.dumps(HPARAMS | {"context_templates": ["{}", "Here: {}"]}))
    assert cli.main(command("edit", hparams=place / "hparams.yaml")) == 0
    report = json.loads((place / "out" / "edit_report.json").read_text())
    assert report["hparams"]["context_templates"] == ["{}", "Here: {}"]
    assert report["hparams_origin"] == str(place / "hparams.yaml")


def test_an_empty_output_folder_is_filled(place: Path, command) -> None:
    (place / "out").mkdir()
    assert cli.main(command("edit")) == 0
    assert (place / "out" / "config.json").is_file()


def test_computed_statistics_are_used_by_an_edit(place: Path, command) -> None:
    assert cli.main(command("stats", output=place / "moments")) == 0
    (place / "hparams.json").write_text(json.dumps(HPARAMS | {"mom2_adjustment": True}))
    assert cli.main(command("edit", stats=place / "moments")) == 0
    report = json.loads((place / "out" / "edit_report.json").read_text())
    assert set(report["second_moments"]) == {"0"}


# ------------------------------------------------------------------------------------- what is refused


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_an_existing_output_is_refused_before_any_work(
    place: Path, command, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("mine")

    def no_work(*arguments: Any, **more: Any) -> None:
        raise AssertionError("the model is being loaded")

    monkeypatch.setattr("harness_rect.cli.edit.load_model", no_work)
    before = files_below(place)
    assert cli.main(command("edit")) == 2
    assert "exists already" in capsys.readouterr().err
    assert files_below(place) == before


@pytest.mark.posix
@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("edit", {"edits": "nothing.json"}, "nothing.json"),
        ("edit", {"edits": "facts.xml"}, "facts.xml"),
        ("edit", {"method": "rume"}, "did you mean 'rome'"),
        ("edit", {"method": "none"}, "--method none edits nothing"),
        ("edit", {"model": "no-such-model"}, "--model no-such-model: cannot be loaded"),
        ("edit", {"regularizer": "rect"}, "needs keep="),
        ("edit", {"keep": "0.4"}, "no regularizer"),
        ("edit", {"regularizer": "rect", "keep": "40"}, "keep=40: expected a share"),
        ("edit", {"regularizer": "rect", "keep": "0.4%%"}, "keep=0.4%%: expected a share"),
        ("edit", {"hparams": "boolean.json"}, "boolean.json: layers: expected no true or false"),
        (
            "edit",
            {"hparams": "endless.json"},
            "v_num_grad_steps: Input should be less than or equal to 100000",
        ),
        ("edit", {"edits": "pipe.json"}, "it is a folder, a pipe or a device"),
        ("edit", {"edits": "~nosuchuser/f.json"}, "there is no user 'nosuchuser'"),
        ("edit", {"output": "dangling"}, "is a link to what does not exist"),
        ("stats", {"layers": "0-99999999999"}, "no model has that many layers"),
        ("edit", {"regularizer": "rekt", "keep": "0.4"}, "rekt"),
        ("edit", {"regularizer": "rect", "keep": "0.4", "rect_convention": "papers"}, "papers"),
        ("edit", {"regularizer": "sphere", "alpha": "2"}, "alpha: Input should be less than or equal to 1"),
        ("edit", {"regularizer": "prune", "alpha": "0.3"}, "regularizer=prune does not use it"),
        ("edit", {"hparams": "gpt9-xl"}, "gpt9-xl"),
        ("edit", {"hparams": "gpt2-xl"}, "preset gpt2-xl: layer 17 does not exist"),
        ("edit", {"hparams": "lost.json"}, "lost.json"),
        ("edit", {"stats": "lost", "hparams": "moments.json"}, "stats=lost: no such folder"),
        ("edit", {"edit_batch_size": 2}, "one fact at a time"),
        ("edit", {"edit_batch_size": 0}, "edit_batch_size"),
        ("edit", {"edit_batch_size": "two"}, "--edit-batch-size"),
        ("edit", {"dtype": "int8"}, "--dtype int8"),
        ("edit", {"device": "gpu"}, "--device gpu"),
        ("edit", {"output": None}, "--output"),
        ("edit", {"output": "text.txt/below"}, "cannot be created"),
        ("edit", {"edit_cache": "text.txt"}, "edit_cache=text.txt"),
        ("stats", {"layers": "two"}, "--layers two"),
        ("stats", {"layers": "7"}, "layer 7 does not exist"),
        ("stats", {"layers": "1-0"}, "an empty range"),
        ("stats", {"tokens": 0}, "--tokens 0"),
        ("stats", {"text": "lost.txt"}, "lost.txt"),
        ("stats", {"output": "text.txt"}, "cannot be created"),
    ],
)
def test_errors_are_one_line_with_status_2_and_leave_nothing(
    place: Path,
    command,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
    says: str,
) -> None:
    monkeypatch.chdir(place)
    (place / "moments.json").write_text(json.dumps(HPARAMS | {"mom2_adjustment": True}))
    (place / "boolean.json").write_text(json.dumps(HPARAMS | {"layers": [True]}))
    (place / "endless.json").write_text(json.dumps(HPARAMS | {"v_num_grad_steps": 10**9}))
    (place / "dangling").symlink_to("nowhere")
    os.mkfifo(place / "pipe.json")
    before = files_below(place)
    arguments = command(name, **options)
    capfd.readouterr()
    status: object
    try:
        status = cli.main(arguments)
    except SystemExit as exit:  # argparse's own
        status = exit.code
    lines = [
        line for line in capfd.readouterr().err.splitlines() if line.strip() and "Loading weights" not in line
    ]
    assert status == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ") and says in lines[0]
    assert files_below(place) == before


def test_a_row_that_cannot_be_edited_leaves_no_output(place: Path, command, capsys) -> None:
    (place / "facts.json").write_text(json.dumps([ROWS[0], ROWS[1] | {"prompt": "oh, " * 200 + "{} is"}]))
    assert cli.main(command("edit")) == 2
    assert "facts.json, row 1: " in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_failure_while_writing_leaves_no_output(
    place: Path, command, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def full_disk(self: Any, folder: Any, **more: Any) -> None:
        (Path(folder) / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", full_disk)
    before = files_below(place)
    assert cli.main(command("edit")) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {place / 'out'}: No space left on device"
    assert files_below(place) == before


def test_an_interrupt_while_editing_leaves_no_output(
    place: Path, command, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def propose(*arguments: Any) -> Proposal:
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "rome", dataclasses.replace(METHODS["rome"], propose=propose))
    before = files_below(place)
    assert cli.main(command("edit")) == 130
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]
    assert files_below(place) == before


@pytest.mark.posix
def test_sigterm_while_a_checkpoint_is_written_leaves_nothing(place: Path, command) -> None:
    """As from a batch system whose time is up."""
    before = files_below(place)
    program = (
        "import os, signal, sys\nfrom harness_rect import cli\nfrom harness_rect.session import checkpoint\n"
        "from transformers import PreTrainedModel\nsave = PreTrainedModel.save_pretrained\n"
        "def saved(*given, **named):\n"
        "    save(*given, **named)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "PreTrainedModel.save_pretrained = saved\nsys.exit(cli.main(sys.argv[1:]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, *command("edit")], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGTERM, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("interrupted; ")
    assert files_below(place) == before


@pytest.mark.posix
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_process_stopped_from_outside_leaves_no_output(place: Path, command, how: str) -> None:
    (place / "hparams.json").write_text(json.dumps(HPARAMS | {"v_num_grad_steps": 100_000, "v_lr": 1e-6}))
    before = files_below(place)
    running = process(command("edit"), preexec_fn=interruptible)
    assert running.stderr is not None
    try:
        for line in running.stderr:  # the last thing it says before it edits
            if "hyper-parameters of rome" in line:
                break
        time.sleep(1)
        assert running.poll() is None, "it was over before it could be stopped"
        running.send_signal(getattr(signal, how))
        running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == {"SIGINT": 130, "SIGTERM": -15, "SIGKILL": -9}[how]
    assert files_below(place) == before


# ---------------------------------------------------------------------------------------------- stats


def test_stats_are_sums_of_the_keys_of_the_text(place: Path, command, bos_tokenizer, capsys) -> None:
    assert cli.main(command("stats", "--float64", layers="0-1")) == 0
    names = [f"model.layers.{i}.mlp.down_proj_float64_mom2_40.npz" for i in (0, 1)]
    assert sorted(path.name for path in (place / "out").iterdir()) == names
    assert names[1] in capsys.readouterr().out

    lm = EditableLM(load(place / "model"), bos_tokenizer)
    expected, count = torch.zeros(48, 48, dtype=torch.float64), 0
    for text in TEXT.split("\n\n"):
        ids = lm.encoder.ids(text + "\n")[: 40 - count] if text else []
        for position in range(len(ids)):
            keys, _ = lm.down_projection_io([0], lm.batch([ids]), [position])[0]
            expected += keys.double().T @ keys.double()
        count += len(ids)
    with np.load(place / "out" / names[0], allow_pickle=False) as arrays:
        assert arrays["mom2.mom2"].dtype == np.float64
        assert int(arrays["mom2.count"]) == count == 40
        assert np.allclose(arrays["mom2.mom2"], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_stats_are_float32_unless_asked(place: Path, command) -> None:
    assert cli.main(command("stats")) == 0
    with np.load(place / "out" / "model.layers.0.mlp.down_proj_float32_mom2_40.npz") as arrays:
        assert arrays["mom2.mom2"].dtype == np.float32


@pytest.mark.parametrize(
    ("text", "layers"), [("5", [5]), ("13-15", [13, 14, 15]), ("8,3,5", [3, 5, 8]), ("1-2, 2-3", [1, 2, 3])]
)
def test_layers_are_numbers_lists_and_ranges(text: str, layers: list[int]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "1,,2", "5-3", "1.5", "\u00b2", "1-\u00b2"])
def test_layers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--layers"):
        parse_layers(text)


def test_a_current_folder_that_was_removed_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.main(["report", ".", "-o", "r.html"]) == 2
    assert capsys.readouterr().err == "error: the current folder was removed; change to another one\n"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_closed_output_and_a_terminal_of_no_width_stop_no_command(place: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["cache", "list", "--edit-cache", str(place)]) == 0
    assert "COLUMNS" not in os.environ
    monkeypatch.setattr(sys, "stderr", None)
    assert tell(UserError("nobody reads it")) == 2


def test_help_and_version_name_the_commands(capsys) -> None:
    assert all(name in shown(capsys, "--help") for name in cli.COMMANDS)
    assert shown(capsys, "--version").startswith("0.")


def help_of(name: str) -> str:
    """The help text that a command's own options give."""
    (commands,) = (a for a in cli.make_parser([name])._actions if isinstance(a.choices, dict))
    return commands.choices[name].format_help()


def test_the_help_of_edit_has_every_argument_with_its_help_text_and_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Clip(NoRegularizer):
        name = "clip"
        limit: float = Field(default=0.25, description="largest element, 100% of it")

    monkeypatch.setitem(REGULARIZERS, "clip", Clip)
    text = " ".join(help_of("edit").split())
    for name in ("method", "edits", "edit-batch-size", "rect", "regularizer", "keep", "rect-convention"):
        assert f" --{name} " in text
    for name in ("hparams", "stats", "edit-cache", "seed", "base", "alpha", "beta"):
        assert f" --{name} " in text
    assert "--limit LIMIT largest element, 100% of it (clip) (default 0.25)" in text
    assert all(name in text for name in (*METHODS, *REGULARIZERS))


SHOW_HELP = """
import sys, harness_rect.cli as cli
try: cli.main(sys.argv[1:])
except SystemExit: pass
print([name for name in ("torch", "numpy", "pydantic", "rich") if name in sys.modules])
"""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_is_shown_without_importing_what_the_command_needs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments, text in (([name, "--help"], help_of(name)), (["--help"], "harness-rect")):
        command = [sys.executable, "-c", SHOW_HELP, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert text in done.stdout
        assert done.stdout.splitlines()[-1] == "[]"
