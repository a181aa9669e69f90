"""Every method but mend with small hyper-parameters, and what its edits need on every model family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support.regularizers import settings_of
from support.tiny_models import FAMILIES, make_edit

from harness_rect.config import EditConfig
from harness_rect.methods import METHODS
from harness_rect.moments import write_moment

SEARCH: dict[str, Any] = {"v_num_grad_steps": 6, "v_lr": 0.5, "v_weight_decay": 0.01, "clamp_norm_factor": 4}
MASS = SEARCH | {"layers": [0, 1], "context_templates": [["{}"], ["The city is large. {}"]]}
HPARAMS: dict[str, dict[str, Any]] = {
    "rome": SEARCH | {"layers": [0], "context_templates": ["{}", "Because. {}"]},
    "r_rome": SEARCH | {"layers": [0], "context_templates": ["{}", "Because. {}"], "mom2_adjustment": True},
    "memit": MASS | {"mom2_update_weight": 0.1, "history": "keys"},
    "emmet": MASS | {"layers": [0]},
    "lyaplock": MASS | {"mom2_update_weight": 0.1},
    "alphaedit": MASS | {"nullspace_threshold": 0.9, "L2": 0.1},
    "evoedit": MASS | {"nullspace_threshold": 0.9, "L2": 0.1},
    "kn": {"steps": 5},
    "ft": {"layers": [1], "num_steps": 4},
    "ft_l": {"layers": [1], "num_steps": 4, "norm_constraint": 1e-4},
    "locft_bf": {"layers": [0, 1], "num_steps": 4, "batch_size": 1},
    "ultraedit": {"layers": [0, 1], "lr": 1e-4},
}
EDITS = [
    make_edit("{} plays the sport of", "LeBron James", "football", id="a", target_old="a"),
    make_edit("To visit the {} you must go to", "Vatican Library", "old Vienna", id="b", target_old="Rome"),
]


def write_moments(folder: Path) -> Path:
    """Second moments that fit every family: they are found by their module's name."""
    width = 48
    factor = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    total = factor @ factor.T / width + 0.1 * torch.eye(width)
    for family in FAMILIES.values():
        for layer in (0, 1):
            name = f"{family.blocks}.{layer}.{family.down}"
            write_moment(folder / f"{name}_float32_mom2_100000.npz", total, 1, 1, "test")
    return folder


def config_of(method: str, folder: Path, moments: Path, regularizer: str = "rect", **more: Any) -> EditConfig:
    """The method with its hyper-parameters and ``more``, written to a file in the folder."""
    hparams = folder / "hparams.json"
    hparams.write_text(json.dumps(HPARAMS[method] | more))
    arguments = {
        "method": method,
        "edits": "two",
        "edit_batch_size": 2 if METHODS[method].batches else 1,
        "hparams": str(hparams),
        "stats": str(moments),
        "regularizer": regularizer,
    }
    return EditConfig.model_validate(arguments | settings_of(regularizer))
