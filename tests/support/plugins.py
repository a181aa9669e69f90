"""A package that adds a method and a regularizer, as an installer would leave it in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CODE = """
import torch
from harness_rect.methods import METHODS, LowRank, Method, Proposal
from harness_rect.methods.base import HyperParameters
from harness_rect.regularizers import Regularizer
from harness_rect.updates import Dense
from pydantic import Field


class Clip(Regularizer):
    name = "clip"
    title = "Clip"
    paper = "none"
    summary = "no element larger than `limit`"

    limit: float = Field(default=0.5, gt=0, description="largest absolute value of an element")

    def trim(self, update, weight, original, state):
        return Dense(update.dense().to(weight).clamp(-self.limit, self.limit))


class OnesHyperParameters(HyperParameters):
    layers: list[int]
    size: float = 0.25


def propose(lm, edits, hparams, context):
    updates = {}
    for layer in hparams.layers:
        name = lm.architecture.weight_name(layer)
        rows, columns = lm.weight(name).shape
        updates[name] = LowRank(hparams.size * torch.ones(rows, 1), torch.ones(columns, 1))
    return Proposal(updates, [{} for _ in edits])


ONES = Method("ones", OnesHyperParameters, lambda architecture: {"layers": [0]}, propose)
"""


def install(
    folder: Path, entry_points: Mapping[str, Mapping[str, str]], code: str = CODE, name: str = "clipping"
) -> Path:
    """Write the module ``name`` and its metadata; ``folder`` is to be put on ``sys.path``.

    Args:
        entry_points: group without "harness_rect." -> name -> object.
    """
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / f"{name}.py").write_text(code)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, entries in entry_points.items():
        lines += [f"[harness_rect.{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder
