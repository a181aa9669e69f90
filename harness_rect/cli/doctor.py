"""``harness-rect doctor``: what is found on this machine, and whether an edit and an evaluation work."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants as hub
import psutil
import requests
import torch

import harness_rect
from harness_rect.errors import UserError
from harness_rect.experiments import results
from harness_rect.io.cache import ROOT, cache_folder, human
from harness_rect.io.files import check_folder

PACKAGES = ("lm_eval", "torch", "transformers", "datasets", "accelerate", "numpy")
#: Package that only some commands need -> what needs it.
OPTIONAL = {"vllm": "--model edited_vllm", "ray": "sweep --backend ray"}
#: The smallest run: one edit, two rows of one general task and the edit itself.
RUN = (
    *("--model", "edited_hf", "--tasks", "rect_nli,rect_zsre", "--limit", "2", "--batch_size", "2"),
    *("--model_args", "pretrained=rect-tiny,method=rome,edits=tiny[1060],edit_cache=off"),
)
#: Seconds that the hub has to answer, and the smallest run to end.
HUB_SECONDS, RUN_SECONDS = 5, 600


class Found(NamedTuple):
    """A line of the output. works: None where nothing depends on it."""

    name: str
    text: str
    works: bool | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    """Print what is found, a line or two for each; 1 if something that is needed does not work."""
    works = True
    for found in findings():
        works &= found.works is not False
        mark = {True: "ok", False: "FAILED", None: ""}[found.works]
        print(
            textwrap.fill(f"{mark:8}{found.name:10}{found.text}", 79, subsequent_indent=" " * 18), flush=True
        )
    print("all that is needed works" if works else "something that is needed does not work: see FAILED")
    return 0 if works else 1


def findings() -> Iterator[Found]:
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    memory = human(psutil.virtual_memory().total)
    yield Found(
        "here",
        f"harness-rect {harness_rect.__version__}, Python {platform.python_version()}, {system}, {memory}",
    )
    yield _packages()
    yield Found("GPU", _gpu())
    yield Found("hub", _hub())
    root = cache_folder("edits").parent
    kinds = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    sizes = ", ".join(f"{path.name} {human(size_of(path))}" for path in kinds) or "empty"
    try:
        check_folder(root)
        yield Found("cache", f"{root}: {sizes}")
    except UserError as error:
        yield Found("cache", f"{error}; set {ROOT} to one", False)
    yield Found("", f"{hub.HF_HUB_CACHE}: {human(size_of(Path(hub.HF_HUB_CACHE)))}")
    missing = [f"{name} ({what})" for name, what in OPTIONAL.items() if find_spec(name) is None]
    yield Found("extras", f"not installed: {', '.join(missing)}" if missing else "all installed")
    yield Found("run", "one edit and one evaluation by lm_eval, a minute or two")
    yield _smallest_run()


def _packages() -> Found:
    texts, works = [], True
    for name in PACKAGES:
        try:
            texts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            texts.append(f"{name} MISSING")
            works = False
    return Found("packages", ", ".join(texts), works)


def _gpu() -> str:
    if torch.cuda.is_available():
        cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return ", ".join(f"{card.name} ({human(card.total_memory)})" for card in cards)
    return "Apple (device=mps)" if torch.backends.mps.is_available() else "none; models run on the CPU"


def _hub() -> str:
    if hub.HF_HUB_OFFLINE:
        return "not used (HF_HUB_OFFLINE): embedded, cached and local models and data work"
    try:
        started = time.perf_counter()
        requests.head(hub.ENDPOINT, timeout=HUB_SECONDS)
        return f"{hub.ENDPOINT} answers in {time.perf_counter() - started:.1f} s"
    except requests.RequestException as error:
        problem = type(error).__name__
        return f"{hub.ENDPOINT} cannot be reached ({problem}): embedded, cached and local models work"


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; links count as nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                pass  # gone meanwhile
    return total


def _smallest_run() -> Found:
    """An edit and an evaluation by a stock ``lm_eval``, which has to find the model class and the tasks."""
    name = "lm_eval"
    if os.environ.get("HARNESS_RECT_AUTOLOAD") == "0":
        return Found(name, "HARNESS_RECT_AUTOLOAD=0 keeps it from finding edited_hf and the tasks", False)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lm_eval", *RUN, "--output_path", folder]
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        try:
            done = subprocess.run(
                command, env=offline, cwd=folder, capture_output=True, text=True, timeout=RUN_SECONDS
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no output"]
                return Found(name, f"ended with {done.returncode}: {lines[-1]}", False)
            edit = results.load(results.newest(folder)[0]).edit
        except subprocess.TimeoutExpired:
            return Found(name, f"did not end within {RUN_SECONDS} s", False)
        except UserError as error:
            return Found(name, f"wrote no results: {error}", False)
    if edit is None or edit.n_edits != 1:
        return Found(name, "edited nothing", False)
    return Found(
        name,
        f"finds edited_hf and the tasks; edited and evaluated in {time.perf_counter() - started:.0f} s",
        True,
    )
