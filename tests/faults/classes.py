"""Classes of faults: each injects one, chosen by a generator, and returns what was wrong, or None if it did
not hit anything.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

from faults.forks import Ended, Fork, deleted, file_size, fuse, run, signalled, without_rights
from faults.works import WORKS, done, events, world

from harness_rect.io.checksums import write_sums

Class = Callable[[random.Random], list[str] | None]
RESUMED = ("edit", "stats", "train-mend", "sweep", "lm_eval")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def killed(work: str, rng: random.Random) -> list[str] | None:
    """A signal at an event or after some time, perhaps a second one while it goes on; then undisturbed."""
    with world(work) as one:
        hit = False
        for _ in range(rng.choice((1, 1, 2))):
            number, before = rng.choice(SIGNALS), set(one.half_written())
            if rng.random() < 0.75:
                ended = one.run(fuse(rng.randint(1, events(work)), signalled(number)))
            else:
                fork = one.start()
                time.sleep(rng.random() * _seconds(work))
                fork.kill(number)
                ended = fork.wait()
            if ended.status == 0 and not ended.problem:
                break  # it was faster
            if ended.status == 2 and "exists already" in ended.said:
                break  # the first signal came after its end
            if number == signal.SIGINT and _before_ours(ended):
                continue
            hit = True
            if problem := ended.problem or (
                "" if ended.status in (130, -number) else f"status {ended.status}"
            ):
                return [f"{problem} after signal {number}: {ended.said[-900:]}"]
            if number == signal.SIGINT and (left := set(one.half_written()) - before):
                return sorted(left)
        return one.again() if hit else None


def _before_ours(ended: Ended) -> bool:
    """Whether Ctrl-C came where no code of ours had been entered or called: lm-eval shows its traceback."""
    return "Traceback" in ended.said and "harness_rect" not in ended.said.partition("Traceback")[2]


@cache
def _seconds(work: str) -> float:
    started = time.monotonic()
    with world(work) as one:
        one.run()
    return time.monotonic() - started


def full_disk(rng: random.Random) -> list[str] | None:
    """No room: files may not grow beyond a size, or a file system is full. Then there is room again."""
    work = rng.choice([*WORKS, "edit", "stats", "train-mend", "sweep"])
    with world(work) as one:
        if rng.random() < 0.5 and _can_mount():
            unmounted = one.folder / "unmounted"
            shutil.copytree(one.disk, unmounted)
            used = sum(path.stat().st_size for path in one.disk.rglob("*") if path.is_file())
            used += 4096 * sum(1 for _ in one.disk.rglob("*"))
            size = used + int(2 ** rng.uniform(12, 22))
            few = rng.choice((0, 0, sum(1 for _ in one.disk.rglob("*")) + rng.randint(2, 30)))
            with mounted(one.disk, size, few):
                shutil.copytree(unmounted, one.disk, dirs_exist_ok=True)
                ended = one.run()
                left = one.half_written()
                shutil.rmtree(unmounted)
                shutil.copytree(one.disk, unmounted)
            one.put(unmounted)
        else:
            ended = one.run(file_size(int(2 ** rng.uniform(0, 21))))
            left = one.half_written()
        if ended.problem or ended.status not in (0, 1):
            return [f"{work}: {ended.problem or ended.status}: {ended.said[-900:]}"]
        if left:
            return [f"{work}: {line}" for line in left]
        if ended.status == 0:
            return one.differences()
        return [f"{work}: {line}" for line in one.again()]


@contextmanager
def mounted(folder: Path, size: int, inodes: int) -> Iterator[None]:
    """A small file system in a folder. inodes: how many files it may hold, 0 for any number."""
    more = f",nr_inodes={inodes}" if inodes else ""
    mount = ("mount", "-t", "tmpfs", "-o", f"size={size}{more}", "tmpfs", str(folder))
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(("umount", "-l", str(folder)), check=True)


@cache
def _can_mount() -> bool:
    with world("stats") as one:
        try:
            with mounted(one.disk, 4096, 0):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def read_only(rng: random.Random) -> list[str] | None:
    """A folder that may not be written, or that is a file."""
    work = rng.choice([*WORKS, *RESUMED])
    with world(work) as one:
        if rng.random() < 0.4:
            place = one.disk / rng.choice(("out", "cache", "user"))
            if place.exists():
                return None
            place.write_text("a file")
            ended = one.run()
            place.unlink()
        else:
            if work == "edit" and rng.random() < 0.5:
                one.put(done("edit"))
                (one.disk / "out").rename(one.disk / "before")
            folders = [one.disk, *(path for path in one.disk.rglob("*") if path.is_dir())]
            (rng.choice(folders)).chmod(0o555)
            ended = one.run(without_rights)
            for folder in folders:
                folder.chmod(0o755)
        if ended.problem or ended.status not in (0, 2):
            return [f"{work}: {ended.problem or ended.status}: {ended.said[-900:]}"]
        if ended.status == 2 and one.half_written():
            return one.half_written()
        return one.differences() if ended.status == 0 else one.again()


# -- damage -------------------------------------------------------------------------------------------------


def damage(rng: random.Random, path: Path) -> str:
    """Change a file, and say how; empty if it is as it was."""
    before = path.read_bytes()
    how = rng.choice(("bit", "bit", "cut", "zeros", "longer", "empty", "gone", "folder", "other"))
    data = bytearray(before)
    if how == "bit" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[rng.randrange(len(data) + 1) :]
    elif how == "zeros":
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice((1, 64, 512, 4096)))
        data[start:stop] = bytes(stop - start)
    elif how == "longer":
        data += data[-rng.randint(1, 600) :]
    elif how == "empty":
        data.clear()
    elif how == "other":
        data = bytearray(rng.randbytes(rng.choice((3, 300, 3000))))
    if how in ("gone", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
        return how
    path.write_bytes(data)
    return how if data != before else ""


def damaged(which: str, rng: random.Random) -> list[str] | None:
    """A kept file is changed: it is said, and made again or refused, and never used."""
    work, place = DAMAGED[which]
    with world(work) as one:
        one.put(_before(which))
        files = sorted(path for path in one.disk.glob(place) if path.is_file())
        path = rng.choice(files)
        if not (how := damage(rng, path)):
            return None
        what = f"{how} {path.relative_to(one.disk)}"
        if which == "kept runs" and how != "gone":
            verified = run(one.folder, ("harness-rect", "cache", "verify", "--edit-cache", "disk/cache"))
            if verified.status != 1 and path.name != "SHA256SUMS":
                return [f"{what}: cache verify: {verified.status} {verified.said[-300:]}"]
        ended = one.run()
        if ended.problem or ended.status not in (0, 2):
            return [f"{what}: {ended.problem or ended.status}: {ended.said[-900:]}"]
        if ended.status == 2:
            return (
                [] if path.name in ended.said or path.parent.name in ended.said else [f"{what}: {ended.said}"]
            )
        if found := one.differences():
            return [f"{what}: {line}" for line in found] + [ended.said[-400:]]
        unread = how in ("gone", "longer") or path.name in ("SHA256SUMS", "sweep.json")
        return [] if unread or "damaged" in ended.said else [f"{what}: not said: {ended.said[-900:]}"]


#: Kind of files -> the work that reads them, and where they lie.
DAMAGED = {
    "kept runs": ("edit", "cache/*/*"),
    "cached second moments": ("edit", "user/stats/*/*.npz"),
    "given second moments": ("edit with stats", "stats/*h.1.*.npz"),
    "MEND networks": ("edit by MEND", "mend/mend.*"),
    "unfinished edits": ("edit", "cache/*.partial.safetensors"),
    "unfinished second moments": ("stats", "out/.partial.safetensors"),
    "unfinished trainings": ("train-mend", "out/.training.safetensors"),
    "unfinished trajectories": ("sweep", "out/.states/*.partial.safetensors"),
    "sweep results": ("sweep", "out/**/*.json*"),
    "sweep checksums": ("sweep", "out/**/SHA256SUMS"),
}


@cache
def _before(which: str) -> Path:
    """The files before they are damaged: those of a finished work, or of one that was killed."""
    work, place = DAMAGED[which]
    if "with" in work or "by" in work:
        with world(work) as one:
            return Path(shutil.copytree(one.disk, done(work).with_name(which)))
    if not which.startswith("unfinished"):
        kept = Path(shutil.copytree(done(work), done(work).with_name(which)))
        if work == "edit":
            shutil.rmtree(kept / "out")
        if which == "cached second moments":
            shutil.rmtree(kept / "cache")
        return kept
    for moment in range(events(work) // 4, events(work), 3):  # the first state that is there
        with world(work) as one:
            one.run(fuse(moment, signalled(signal.SIGKILL)))
            if any(one.disk.glob(place)):
                return Path(shutil.copytree(one.disk, done(work).with_name(which)))
    raise RuntimeError(f"{work} saves no state")


def damaged_checkpoint(rng: random.Random) -> list[str] | None:
    """An edited checkpoint whose files are cut or something else is refused in one line, or still whole."""
    with world("stats") as one:
        model = one.folder / "model"
        model.unlink()
        shutil.copytree(done("edit") / "out", model)
        path = rng.choice(sorted(model.iterdir()))
        if not damage(rng, path):
            return None
        ended = one.run()
        good = not ended.problem and ended.status in (0, 2)
        return [] if good else [f"{path.name}: {ended.problem or ended.status} {ended.said[-900:]}"]


def other_version(rng: random.Random) -> list[str] | None:
    """What another version of this package kept is not used, and does not stop this one."""
    with world("edit") as one:
        one.put(_before("kept runs"))
        folder = next(path for path in (one.disk / "cache").iterdir() if path.is_dir())
        name, key, value = rng.choice(
            (
                ("run.json", "format", rng.choice((0, 2, 10**9, "1", None))),
                ("run.json", "steps", rng.choice((7, [{}], [{"edits": 1}], {"0": 1}))),
                ("run.json", "weights", rng.choice(({}, [], {"x": "y"}))),
                ("run.json", "base", rng.choice((None, "x", {}))),
                ("run.json", "key", rng.choice(("0" * 64, None, 3))),
                ("report.json", "schema_version", rng.choice((99, "x", -1))),
                ("report.json", "method", rng.choice(("newer", None, 1))),
                ("report.json", "regularizer", "newer"),
                ("report.json", "n_edits", rng.choice(("two", None))),
            )
        )
        content = json.loads((folder / name).read_text())
        if rng.random() < 0.3:
            content.pop(key)
        else:
            content[key] = value
        (folder / name).write_text(json.dumps(content))
        write_sums(folder)
        ended = one.run()
        if ended.problem or ended.status:
            return [f"{name}: {key}={value}: {ended.problem or ended.status} {ended.said[-900:]}"]
        if key == "format" and "is damaged" not in ended.said:
            return [f"format {value}: not said: {ended.said[-900:]}"]
        return one.differences()


# -- several processes --------------------------------------------------------------------------------------


def together(rng: random.Random) -> list[str] | None:
    """Two or four processes with one cache, one of which may be killed: the others have the same bits."""
    with world("edit") as one:
        number, victim = rng.choice((2, 4)), rng.choice((0, None))
        forks = []
        for index in range(number):
            command = [*one.command[:-1], f"disk/out{index}"]
            moment = fuse(rng.randint(1, events("edit")), signalled(signal.SIGKILL))
            forks.append(Fork(one.folder, command, moment if index == victim else None))
        ends = [fork.wait() for fork in forks]
        for index, ended in enumerate(ends):
            if index == victim and ended.status == -signal.SIGKILL:
                continue
            if ended.status or ended.problem:
                return [f"{ended.problem or ended.status}: {ended.said[-900:]}"]
            (one.disk / f"out{index}").rename(one.disk / "out")
            if found := one.differences():
                return found
            shutil.rmtree(one.disk / "out")
        kept = [
            path.name for path in (one.disk / "cache").iterdir() if path.is_dir() and "." not in path.name
        ]
        return [] if len(kept) == 1 else [f"kept: {kept}"]


def sweeps_together(rng: random.Random) -> list[str] | None:
    """Two or four sweeps in one folder: shards share the work, a second whole sweep is refused."""
    with world("sweep") as one:
        number = rng.choice((1, 2, 4))
        shards = [[] if number == 1 else ["--shard", f"{i + 1}/{number}"] for i in range(max(2, number))]
        ends = [fork.wait() for fork in [Fork(one.folder, [*one.command, *shard]) for shard in shards]]
        for ended in ends:
            refused = number == 1 and ended.status == 2 and "another sweep is running" in ended.said
            if ended.problem or not (refused or ended.status == 0):
                return [f"{ended.problem or ended.status}: {ended.said[-900:]}"]
        return one.differences()


def cache_deleted(rng: random.Random) -> list[str] | None:
    """A cache that is removed while it is used is made again."""
    work = rng.choice(("edit", "edit", "lm_eval", "sweep"))
    gone = (
        rng.choice(("disk/cache", "disk/user"))
        if work != "sweep"
        else rng.choice(("disk/out/.states", "disk/user"))
    )
    with world(work) as one:
        ended = one.run(fuse(rng.randint(1, events(work)), deleted(gone)))
        if ended.problem or ended.status:
            return [f"{work}, {gone}: {ended.problem or ended.status}: {ended.said[-900:]}"]
        return [f"{work}, {gone}: {line}" for line in one.differences()]


#: What :func:`prepared` sets, for a process that is no fork of this one: batches decide last bits.
AS_PREPARED = """
import sys
from harness_rect.cli import main
try:
    from harness_rect.io import resume
    from harness_rect.moments import accumulate
except KeyboardInterrupt:
    sys.exit(130)
resume.SAVE_SECONDS, accumulate.BATCH_TOKENS = 0.0, 80
sys.exit(main())
"""


def real_process(rng: random.Random) -> list[str] | None:
    """As :func:`killed`, with a process of its own that has to import everything first."""
    work = rng.choice(("edit", "stats", "train-mend"))
    number = rng.choice(SIGNALS)
    with world(work) as one:
        process = subprocess.Popen(
            [sys.executable, "-c", AS_PREPARED, *one.command[1:]],
            cwd=one.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            env=os.environ | {"HARNESS_RECT_CACHE": "disk/user", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        wanted, used = rng.uniform(0.3, 9), 0.0
        while process.poll() is None and used < wanted:
            time.sleep(0.05)
            used = _cpu_seconds(process.pid)
        process.send_signal(number)
        said, _ = process.communicate(timeout=600)
        ended = Ended(process.returncode, said)
        if ended.status == 0:
            return None
        if ended.problem or ended.status not in (130, -number):
            return [f"{ended.problem or ended.status} after signal {number}: {ended.said[-900:]}"]
        return one.again()


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


CLASSES: dict[str, Class] = {
    **{f"killed: {work}": partial(killed, work) for work in RESUMED},
    "full disk": full_disk,
    "read-only": read_only,
    **{f"damaged: {which}": partial(damaged, which) for which in DAMAGED},
    "damaged: checkpoints": damaged_checkpoint,
    "another version": other_version,
    "together: edits": together,
    "together: sweeps": sweeps_together,
    "cache deleted": cache_deleted,
    "real processes": real_process,
}
