"""Every failure that can be foreseen is one line and an exit status; a bug keeps its traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError

from harness_rect import cli, errors
from harness_rect.errors import Failed, UserError, described, one_line, tell
from harness_rect.io.files import folder_written_whole, written_whole
from harness_rect.models.load import load_errors

ROOT = Path(__file__).resolve().parents[1]


def system(number: int, name: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("facts.json, row 3: no"), 2, "facts.json, row 3: no"),
        (Failed("half way"), 1, "half way"),
        (system(errno.EACCES, "a"), 2, "a: Permission denied"),
        (system(errno.ELOOP, "a"), 2, "a: Too many levels of symbolic links"),
        (system(errno.ENOSPC, "a"), 1, "a: No space left on device"),
        (system(errno.EFBIG), 1, "File too large"),
        (ConnectionError("no route"), 1, "no route"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 2, "not valid UTF-8"),
        (RecursionError("deep"), 2, "nested too deeply"),
        (MemoryError(), 1, "not enough memory"),
        (torch.OutOfMemoryError("CUDA"), 1, "not enough memory: CUDA"),
        (yaml.YAMLError("x\ny"), 2, "not valid YAML: x y"),
        (SafetensorError("header"), 2, "not a safetensors file: header"),
        (SafetensorError("full (os error 28)"), 1, "full (os error 28)"),
        (zipfile.BadZipFile("x"), 2, "not a zip file: x"),
        (zlib.error("x"), 2, "damaged compressed data: x"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_can_be_foreseen_has_a_status_and_a_line(error: BaseException, status: int, line: str, capsys):
    found = described(error)
    assert found is not None and found[0] == status and line in found[1]
    assert tell(error) == status
    [shown] = capsys.readouterr().err.splitlines()
    assert line in shown


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (system(errno.ENOSPC, "a"), Failed),
        (SafetensorError("full (os error 28)"), Failed),
        (system(errno.ENOENT, "a"), UserError),
        (OSError("gpt3 is not a local folder"), UserError),
        (AttributeError("dtype"), UserError),
        (RuntimeError("can't allocate memory"), RuntimeError),
        (UserError("said already"), UserError),
    ],
)
def test_what_cannot_be_loaded_was_asked_wrongly_or_failed_on_the_way(error: Exception, kind: type) -> None:
    with pytest.raises(kind) as raised, load_errors("pretrained=x"):
        raise error
    assert type(raised.value) is kind


def test_ctrl_c_that_an_import_wraps_is_ctrl_c():
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("Error calling __set_name__") from error
    except RuntimeError as error:
        wrapped = ModuleNotFoundError("Could not import module")
        wrapped.__cause__ = error
    assert described(wrapped)[0] == 130
    assert described(RuntimeError("a bug")) is None


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RuntimeError("x"), AssertionError()])
def test_a_bug_shows_its_traceback_and_where_to_report_it(error: Exception, capsys, monkeypatch):
    monkeypatch.setattr(cli, "make_parser", lambda argv: (_ for _ in ()).throw(error))
    assert cli.main(["edit"]) == 1
    *trace, last = capsys.readouterr().err.splitlines()
    assert trace[0].startswith("Traceback") and "please report it" in last


def test_the_traceback_of_an_error_is_shown_on_request(capsys, monkeypatch):
    monkeypatch.setenv("HARNESS_RECT_DEBUG", "1")
    assert tell(UserError("wrong")) == 2
    *trace, last = capsys.readouterr().err.splitlines()
    assert trace and last == "error: wrong"


def test_a_line_is_one_line_whatever_a_file_holds(capsys):
    tell(UserError("a\nb\x1b[31m\u2028c" + "x" * 5000))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(r"error: a\nb\x1b[31m\u2028c") and line.endswith("...")
    assert len(one_line("x" * 5000)) == errors.LONGEST


@pytest.mark.parametrize("writer", [written_whole, folder_written_whole])
@pytest.mark.parametrize(
    "error", [system(errno.ENOSPC), *(kind("full (os error 28)") for kind in (SafetensorError, Exception))]
)
def test_a_failed_write_names_what_was_to_be_written(writer, error: Exception, tmp_path: Path):
    with pytest.raises(OSError, match="No space left") as raised, writer(tmp_path / "out"):
        raise error
    assert raised.value.filename == str(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def run(code: str, **more) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120, **more)


LM_EVAL = """
import sys
sys.argv = ["lm_eval"]
from harness_rect.errors import UserError, one_line_errors
with one_line_errors():
    {inside}
{outside}
"""


@pytest.mark.parametrize(
    ("inside", "outside", "status", "says"),
    [
        ("raise OSError(2, 'No such file', 'facts.json')", "", 2, "error: facts.json: No such file"),
        ("raise KeyboardInterrupt", "", 130, "interrupted"),
        ("pass", "raise KeyboardInterrupt", 130, "interrupted"),
        ("pass", "raise UserError('late')", 2, "error: late"),
    ],
)
def test_lm_eval_ends_in_one_line(inside: str, outside: str, status: int, says: str):
    done = run(LM_EVAL.format(inside=inside, outside=outside))
    assert done.returncode == status
    [line] = done.stderr.splitlines()
    assert line.startswith(says)


PRINTING = """
from types import SimpleNamespace as Made
from harness_rect import cli
arguments = Made(run=lambda arguments: print("much" * 10_000))
cli.make_parser = lambda argv: Made(parse_args=lambda argv: arguments)
raise SystemExit(cli.main([]))
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = run(PRINTING, stdout=full)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: standard output: No space left on device"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
