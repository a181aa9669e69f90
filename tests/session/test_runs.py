"""Finished edit runs are found again, interrupted ones go on, and nothing else is ever taken for them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness_rect.config import EditConfig
from harness_rect.errors import UserError
from harness_rect.io import resume
from harness_rect.io.checksums import write_sums
from harness_rect.methods import METHODS
from harness_rect.session import EditSession
from harness_rect.session.report import EditReport
from harness_rect.session.runs import EditCache, KeptRun

ROOT = Path(__file__).resolve().parents[2]
WEIGHT = "transformer.h.0.mlp.c_proj.weight"
HPARAMS = {"layers": [0], "v_num_grad_steps": 3, "context_templates": ["{}", "Then {}"]}
SUBJECTS = ("Lake Arvo", "the old mint", "Tomas the cooper", "Hill 62")
ROWS = [
    {
        "case_id": f"fact-{i}",
        "prompt": "{} belongs to",
        "subject": subject,
        "target_new": f"guild {i}",
        "rephrase_prompt": f"Who owns {subject}? It is",
    }
    for i, subject in enumerate(SUBJECTS)
]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    edits, hparams = tmp_path / "facts.json", tmp_path / "hparams.yaml"
    edits.write_text(json.dumps(ROWS))
    hparams.write_text(json.dumps(HPARAMS))
    return {"edits": edits, "hparams": hparams, "runs": tmp_path / "runs"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_model, tokenizer) -> Path:
    """A cache with one finished run, that of ``run()``."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "facts.json").write_text(json.dumps(ROWS))
    (folder / "hparams.yaml").write_text(json.dumps(HPARAMS))
    paths = {"edits": str(folder / "facts.json"), "hparams": str(folder / "hparams.yaml")}
    session = EditSession(make_model("gpt2"), tokenizer, EditConfig.from_args(rect=0.5, **paths))
    session.run(EditCache(folder / "runs"))
    return folder / "runs"


@pytest.fixture
def kept(made: Path, tmp_path: Path) -> EditCache:
    """A copy of that cache."""
    return EditCache(Path(shutil.copytree(made, tmp_path / "kept")))


class Stop(BaseException):
    """A sudden end: nothing is saved on the way out, as it is at Ctrl-C."""


@pytest.fixture
def run(files: dict[str, Path], make_model, tokenizer) -> Callable[..., tuple[EditSession, int]]:
    """``run(cache, seed=, text=, special=, stop=, **config)``: a finished session and the steps it made.

    ``cache=False`` keeps nothing; ``stop`` is raised when all edits are in the model.
    """

    def run(
        cache: EditCache | bool = True,
        seed: int = 0,
        text: Any = None,
        special: bool | None = None,
        stop: BaseException | None = None,
        **config: Any,
    ) -> tuple[EditSession, int]:
        given = {"edits": str(files["edits"]), "hparams": str(files["hparams"]), "rect": 0.5, **config}
        model, asked = make_model("gpt2", seed=seed), EditConfig.from_args(**given)
        session = EditSession(model, text or tokenizer, asked, add_special_tokens=special)
        if cache is True:
            cache = EditCache(files["runs"])
        return session, steps_of(session, cache or None, stop)

    return run


def steps_of(session: EditSession, cache: EditCache | None, stop: BaseException | None = None) -> int:
    """Run a session; how many steps it made, of those that its report counts."""
    seen: list[int] = []

    def on_step(done: int) -> None:
        seen.append(done)
        if stop is not None and done == len(ROWS):
            raise stop

    session.run(cache, on_step=on_step)
    return seen[-1] - seen[0]


def kept_in(runs: Path) -> Path:
    """The folder of the one finished run."""
    (folder,) = (path for path in runs.iterdir() if path.is_dir() and "." not in path.name)
    return folder


def weight(session: EditSession) -> Tensor:
    return session.lm.weight(WEIGHT).detach()


def without_times(report: EditReport) -> dict[str, Any]:
    """What must be the same however often a run was interrupted."""
    times = {"seconds": True, "seconds_per_edit": True, "from_cache": True}
    return report.model_dump(exclude=times | {"steps": {"__all__": {"seconds", "measuring_seconds"}}})


# ------------------------------------------------------------------------------------------- found again


def test_a_finished_run_is_found_again(run, files: dict[str, Path]) -> None:
    first, steps = run()
    assert steps == 4
    assert first.report.from_cache is False
    second, steps = run()
    assert steps == 0
    assert second.report.from_cache is True
    assert torch.equal(weight(first), weight(second))
    other = {"from_cache": False, "seconds": first.report.seconds}
    assert first.report.to_dict() == second.report.to_dict() | other
    assert sorted(p.suffix for p in files["runs"].iterdir()) == ["", ".lock"]
    plain, _ = run(cache=False)
    assert torch.equal(weight(plain), weight(second))
    assert without_times(plain.report) == without_times(second.report)


def test_the_same_edits_in_another_file_are_the_same_run_under_their_own_name(
    run, files: dict[str, Path], tmp_path: Path
) -> None:
    run()
    other = tmp_path / "copy.jsonl"
    other.write_text("\n".join(map(json.dumps, ROWS)))
    session, steps = run(edits=str(other))
    assert steps == 0
    assert session.report.edits_spec == str(other)


@pytest.mark.parametrize(
    "other",
    [
        {"edit_seed": 1},
        {"rect": 0.6},
        {"rect": None},
        {"rect": None, "regularizer": "random", "keep": 0.5},
        {"rect_convention": "alphaedit"},
        {"method": "r_rome"},
        {"seed": 1},
        {"special": True},
        {"hparams": {"v_lr": 0.4}},
        {"hparams": {"context_templates": ["{}"]}},
        {"hparams": {"layers": [1]}},
    ],
    ids=str,
)
def test_anything_that_changes_the_result_is_another_run(
    run, files: dict[str, Path], other: dict[str, Any], bos_tokenizer
) -> None:
    usual = {"text": bos_tokenizer, "special": False}  # it adds BOS only when told to
    run(**usual)
    if "hparams" in other:
        files["hparams"].write_text(json.dumps(HPARAMS | other["hparams"]))
        other = {}
    _, steps = run(**usual | other)
    assert steps == 4


def test_other_edits_order_or_slice_is_another_run(run, files: dict[str, Path]) -> None:
    run()
    for spec, expected in ((f"{files['edits']}[::-1]", 4), (f"{files['edits']}[0:3]", 3)):
        _, steps = run(edits=spec)
        assert steps == expected
    changed = [ROWS[0] | {"rephrase_prompt": "Lake Arvo is of"}, *ROWS[1:]]
    files["edits"].write_text(json.dumps(changed))
    _, steps = run()
    assert steps == 4, "a prompt that is only measured changes the report"


def test_a_model_edited_before_is_another_model(run, files: dict[str, Path], tokenizer) -> None:
    first, _ = run()
    config = EditConfig.from_args(edits=str(files["edits"]), hparams=str(files["hparams"]), rect=0.5)
    again = EditSession(first.lm.model, tokenizer, config)
    assert steps_of(again, EditCache(files["runs"])) == 4


# -------------------------------------------------------------------------------------- files on the disk


def flip(path: Path, place: float) -> None:
    """Flip one bit of a file, so far into it (0 to 1)."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def written_anew(change: Callable[[dict[str, Any]], Any], name: str = "run.json") -> Callable[[Path], None]:
    """Change a file as another program may have written it, its checksum included."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
        write_sums(folder)

    return damage


def tensors_of(change: Callable[[Tensor], Tensor], parts: str = "left") -> Callable[[Path], None]:
    """Change factors of the updates; their checksum too."""

    def damage(folder: Path) -> None:
        tensors = load_file(file := folder / "updates.safetensors")
        changed = {n: change(t).contiguous() if n.endswith(parts) else t for n, t in tensors.items()}
        save_file(changed, file)
        write_sums(folder)

    return damage


NO_MATRIX = "left is no matrix of floating-point numbers"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor's bit": (lambda f: flip(f / "updates.safetensors", 1.0), "updates.safetensors is not the file"),
    "a header's bit": (lambda f: flip(f / "updates.safetensors", 0.1), "updates.safetensors is not the file"),
    "a report's bit": (lambda f: flip(f / "report.json", 0.5), "report.json is not the file"),
    "cut": (lambda f: os.truncate(f / "run.json", 50), "run.json is not the file"),
    "missing": (lambda f: (f / "edits.json").unlink(), "edits.json is missing"),
    "no checksums": (lambda f: (f / "SHA256SUMS").write_bytes(b"\xff"), "run.json is not the file"),
    "another format": (written_anew(lambda run: run.update(format=2)), "of format 2"),
    "another run": (written_anew(lambda run: run.update(key="0" * 64)), "another run's"),
    "no weights": (written_anew(lambda run: run.update(weights=["x"])), "not as harness-rect writes it"),
    "no format": (written_anew(lambda run: run.clear()), "not as harness-rect writes it"),
    "a base that is no name": (written_anew(lambda run: run["base"].update(model=5)), "base.model: Input"),
    "no such form": (
        written_anew(lambda run: run["steps"][0]["updates"].update({WEIGHT: "x"})),
        "steps.0.updates",
    ),
    "an edit": (written_anew(lambda edits: edits[0].update(prompt=None), "edits.json"), "edits.0.prompt"),
    "a row": (tensors_of(lambda left: left[0]), NO_MATRIX),
    "booleans": (tensors_of(lambda left: left > 0), NO_MATRIX),
    "8 bits": (tensors_of(lambda left: left.to(torch.float8_e5m2)), NO_MATRIX),
    "transposed": (tensors_of(lambda left: left.T), "are no factors of one matrix"),
    "another dtype": (tensors_of(lambda left: left.bfloat16()), "are no factors of one matrix"),
}
if hasattr(os, "mkfifo"):
    DAMAGE["a pipe"] = (
        lambda f: [(f / "run.json").unlink(), os.mkfifo(f / "run.json")],
        "run.json is no file",
    )


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_set_aside_with_a_line(
    kept: EditCache, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, (do, said) = kept_in(kept.folder), DAMAGE[damage]
    key = KeptRun.read(folder).key
    assert kept.load(key) is not None
    do(folder)
    assert kept.load(key) is None
    (line,) = caplog.messages
    assert line.startswith(f"the kept edit run {folder} is damaged: ") and said in line and "\n" not in line
    assert folder.with_name(folder.name + ".damaged").is_dir()
    assert kept.load(key) is None and len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: flip(folder / "updates.safetensors", 1.0), "is not the file that was written"),
        (
            written_anew(lambda run: run["weights"].update({WEIGHT: "0"})),
            "do not come out as the run had them",
        ),
        (written_anew(lambda run: run["steps"][0].update(updates={"x.y": "again"})), "damaged"),
        (written_anew(lambda report: report.update(keep=0.6), "report.json"), "report has another keep"),
        (written_anew(lambda report: report.pop("schema_version"), "report.json"), "another schema_version"),
    ],
    ids=["a bit", "weights that do not come out", "weights that are not there", "report", "old report"],
)
def test_a_run_that_cannot_be_taken_is_made_again(
    run, files: dict[str, Path], kept: EditCache, damage: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(kept_in(kept.folder))
    session, steps = run(kept)
    assert steps == 4 and session.report.from_cache is False
    assert said in caplog.text
    again, steps = run(kept)
    assert steps == 0, "kept anew"
    assert torch.equal(weight(session), weight(again))


def test_a_model_that_changed_after_the_session_was_made_has_a_key_of_its_own(run, files, kept) -> None:
    session, _ = run(kept)
    before = session.key()
    session.revert()
    with torch.no_grad():
        session.lm.model.transformer.h[0].attn.c_proj.weight.mul_(1.5)
    assert steps_of(session, kept) == 4 and session.report.from_cache is False
    assert session.key() != before


def test_with_a_hook_nothing_is_kept_or_taken(run, files, kept, caplog: pytest.LogCaptureFixture) -> None:
    session, _ = run(kept)
    session.revert()
    block, there = session.lm.model.transformer.h[1], sorted(kept.folder.iterdir())
    handle = block.register_forward_hook(lambda module, given, output: output)
    assert steps_of(session, kept) == 4 and sorted(kept.folder.iterdir()) == there
    assert "transformer.h.1 has a hook" in caplog.text
    session.revert()
    handle.remove()
    assert steps_of(session, kept) == 0


def test_a_run_of_another_processor_that_rounds_differently_stays(
    run, kept: EditCache, caplog: pytest.LogCaptureFixture
) -> None:
    folder = kept_in(kept.folder)
    there = {"device": "cpu", "threads": torch.get_num_threads(), "processor": "a Cray-1"}
    written_anew(lambda run: run["weights"].update({WEIGHT: "0"}))(folder)
    written_anew(lambda report: report.update(computed_on=there), "report.json")(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    session, steps = run(kept)
    assert steps == 4 and session.report.from_cache is False
    assert "stays as it is" in caplog.text and "a Cray-1" in caplog.text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path for path in kept.folder.iterdir() if "damaged" in path.name] == []


def test_a_run_that_cannot_be_kept_goes_on_with_a_line(
    run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)  # unfinished states cannot be kept either
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        session, steps = run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps == 4 and session.report.n_edits == 4
    lines = [record.getMessage() for record in caplog.records if "cannot be kept" in record.getMessage()]
    assert lines and all("File too large" in line and "\n" not in line for line in lines)
    assert [path.name for path in files["runs"].iterdir() if not path.name.endswith(".lock")] == []


def test_a_cache_deleted_in_use_is_made_again(run, files: dict[str, Path]) -> None:
    class Deleting(EditCache):
        def save_partial(self, *state: Any) -> None:
            shutil.rmtree(self.folder, ignore_errors=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "SAVE_SECONDS", 0.0)
        run(Deleting(files["runs"]))
    assert run()[1] == 0


def test_runs_not_used_for_longest_go_when_the_limit_is_passed(
    kept: EditCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = KeptRun.read(kept_in(kept.folder))
    (size,) = (entry.bytes for entry in kept.entries())
    monkeypatch.setenv("HARNESS_RECT_CACHE_SIZE", str(int(3.5 * size)))
    cache = EditCache.from_spec(str(kept.folder))
    assert cache is not None

    def keep(digit: str, age: int) -> str:
        key = digit * 64
        with cache.lock(key):
            cache.save(dataclasses.replace(first, key=key))
        os.utime(cache.path(key), (age, age))
        return key

    def left() -> set[str]:
        return {entry.key for entry in cache.entries()}

    os.utime(cache.path(first.key), (1, 1))
    second, third = keep("2", age=2), keep("3", age=3)
    assert len(left()) == 3, "the limit is not passed yet"
    with cache.lock(first.key):  # the oldest one is in use
        assert cache.load(second) is not None
        keep("4", age=4)
        assert left() == {key[:32] for key in (first.key, second, "4" * 32)}
        assert third[:32] not in left()
    damaged = cache.path("5" * 64).with_suffix(".damaged")
    shutil.copytree(cache.path(second), damaged)
    keep("6", age=6)
    assert not damaged.exists() and first.key[:32] not in left(), "damaged ones first, then the oldest"
    monkeypatch.setenv("HARNESS_RECT_CACHE_SIZE", "1")
    cache = EditCache.from_spec(str(kept.folder))
    with caplog.at_level(logging.INFO, "harness_rect"):
        keep("7", age=7)
    assert left() == {"7" * 32}, "the one just made stays"
    assert "removed 3 unused entries" in caplog.text


def test_a_link_is_removed_itself_and_never_followed(tmp_path: Path) -> None:
    cache = EditCache(tmp_path / "runs")
    (theirs := tmp_path / "theirs").mkdir()
    (theirs / "large").write_bytes(b"x" * 10**6)
    for digit, target in (("e", theirs), ("d", theirs / "large"), ("c", tmp_path / "nowhere")):
        cache.folder.mkdir(exist_ok=True)
        cache.path(digit * 64).symlink_to(target)
    assert all(0 < entry.bytes < 10**3 for entry in cache.entries())
    assert len(cache.prune(0)) == 3
    cache.remove_locks()
    assert not list(cache.folder.iterdir()) and (theirs / "large").stat().st_size == 10**6


def test_off_keeps_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HARNESS_RECT_CACHE", str(tmp_path / "cache"))
    assert EditCache.from_spec("off") is None
    default = EditCache.from_spec(None)
    assert default is not None and default.folder == tmp_path / "cache" / "edits"
    named = EditCache.from_spec(str(tmp_path / "runs"))
    assert named is not None and named.folder == tmp_path / "runs"


def test_without_a_cache_nothing_is_written(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HARNESS_RECT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    before = sorted(tmp_path.rglob("*"))
    run(cache=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_made_is_an_error_before_any_edit(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"edit_cache=.*cannot be written"):
        run(EditCache(tmp_path / "file" / "runs"))


# ------------------------------------------------------------------------------- interrupted, in parallel

DRIVER = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from support.tiny_models import make_model, train_tokenizer
from harness_rect.io import resume
from harness_rect.config import EditConfig
from harness_rect.session import EditSession
from harness_rect.session.runs import EditCache

resume.SAVE_SECONDS = 0.0
edits, hparams, runs, kill_at, pause = sys.argv[1:6]
config = EditConfig.from_args(edits=edits, hparams=hparams, regularizer="random", keep=0.5)
session = EditSession(make_model("gpt2"), train_tokenizer(bos=False), config)
seen = []

def on_step(done):
    seen.append(done)
    if done == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(pause))

session.run(EditCache(Path(runs)), on_step=on_step)
print(*seen)
"""


@pytest.fixture
def driver(files: dict[str, Path], tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """``driver(kill_at, pause, hash_seed)``: a process that edits into ``runs``, saving after each step."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.format(root=str(ROOT), tests=str(ROOT / "tests")))

    def start(kill_at: int = -1, pause: float = 0.0, hash_seed: int = 0) -> subprocess.Popen[str]:
        arguments = [files["edits"], files["hparams"], files["runs"], kill_at, pause]
        return subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.posix
def test_a_killed_run_goes_on_where_it_was(run, driver, files: dict[str, Path]) -> None:
    killed = driver(kill_at=3)
    _, err = killed.communicate(timeout=120)
    assert killed.returncode == -9, err
    assert [p.name for p in files["runs"].glob("*.partial.safetensors")], "nothing was saved on the way"

    settings = {"rect": None, "regularizer": "random", "keep": 0.5}
    resumed, steps = run(**settings)
    assert steps == 1
    assert not list(files["runs"].glob("*.partial.safetensors"))
    assert not list(files["runs"].glob("*.tmp"))
    whole, _ = run(cache=False, **settings)
    assert torch.equal(weight(resumed), weight(whole))
    assert without_times(resumed.report) == without_times(whole.report)


def test_a_damaged_partial_file_means_starting_over(
    run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    with pytest.raises(Stop):
        run(stop=Stop())
    (partial,) = files["runs"].glob("*.partial.safetensors")
    partial.write_bytes(partial.read_bytes()[:100])
    again, steps = run()
    assert steps == 4
    assert f"the saved state {partial} is damaged" in caplog.text
    whole, _ = run(cache=False)
    assert torch.equal(weight(again), weight(whole))


def test_an_interrupt_keeps_what_was_done(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "SAVE_SECONDS", 1e9)
    for stop, left in ((Stop(), 4), (KeyboardInterrupt(), 0)):
        with pytest.raises(type(stop)):
            run(stop=stop, edit_seed=left)
        _, steps = run(edit_seed=left)
        assert steps == left


def test_two_processes_with_the_same_run_compute_it_once(driver) -> None:
    """Whatever the seed of the hashes of text in each of them."""
    both = [driver(pause=0.3, hash_seed=seed) for seed in (1, 2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted(out for out, _ in outputs) == ["0 1 2 3 4\n", "4\n"]


# ---------------------------------------------------------------------------------- the code that edits


@pytest.mark.parametrize(
    "replaced",
    [
        *("METHODS", "methods.rome.edit_in_order", "session.step.measure"),
        *("regularizers.Rect.trim", "models.EditableLM.batch"),
    ],
)
def test_a_run_by_a_function_that_was_replaced_is_not_taken(
    run, monkeypatch: pytest.MonkeyPatch, replaced: str
) -> None:
    def raises(*arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError("replaced")

    run()
    if replaced == "METHODS":
        monkeypatch.setitem(METHODS, "rome", dataclasses.replace(METHODS["rome"], propose=raises))
    else:
        monkeypatch.setattr(f"harness_rect.{replaced}", raises)
    with pytest.raises(RuntimeError, match="replaced"):
        run()
