"""Hashes of the edited weights of every method and regularizer on the embedded models.

    python -m tools.weight_hashes > hashes.txt

One line a run: model, method, regularizer, and the SHA-256 of all edited weights after a stream of three
edits by ``harness-rect edit``. Run before and after a change that must not change any bit, and compare.
One thread is used, since the order of sums depends on the number of threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

from harness_rect.cli import main

EDITS = "tiny[0:3]"
METHODS = (
    ("rome", 1),
    ("r_rome", 1),
    ("memit", 1),
    ("memit", 3),
    ("emmet", 1),
    ("lyaplock", 1),
    ("alphaedit", 1),
    ("evoedit", 1),
    ("kn", 1),
    ("mend", 1),
    ("ft", 1),
    ("ft_l", 1),
    ("locft_bf", 3),
    ("ultraedit", 1),
)
REGULARIZERS: tuple[tuple[str, ...], ...] = (
    ("none",),
    ("rect", "--keep", "0.4"),
    ("rect", "--keep", "0.4", "--rect-convention", "alphaedit"),
    ("random", "--keep", "0.4"),
    ("pca", "--keep", "0.4"),
    ("scale", "--keep", "0.4"),
    ("norm_matched", "--keep", "0.4"),
    ("magnitude", "--keep", "0.4"),
    ("prune",),
    ("sphere",),
    ("revive",),
)
MODELS = {"rect-tiny": REGULARIZERS, "rect-tiny-llama": REGULARIZERS[:3]}


def edited_weights_hash(model: str, method: str, batch: int, regularizer: tuple[str, ...]) -> str:
    """SHA-256 (hex) over names and bytes of the weights in the run's report, or the command's error."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "edited"
        arguments = ["edit", "--model", model, "--method", method, "--edits", EDITS, "--device", "cpu"]
        arguments += ["--edit-batch-size", str(batch), "--edit-cache", "off", "--output", str(output)]
        errors = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            status = main([*arguments, "--regularizer", *regularizer])
        if status:
            return errors.getvalue().strip()
        names = json.loads((output / "edit_report.json").read_text(encoding="utf-8"))["weights"]
        total = hashlib.sha256()
        with safe_open(output / "model.safetensors", framework="np") as file:
            for name in sorted(names):
                total.update(name.encode())
                total.update(file.get_tensor(name).tobytes())
        return total.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for model, regularizers in MODELS.items():
        for (method, batch), regularizer in itertools.product(METHODS, regularizers):
            found = edited_weights_hash(model, method, batch, regularizer)
            setting = " ".join(regularizer)
            print(f"{model} {method} batch={batch} {setting}: {found}", flush=True)
