"""A short training of MEND on a few facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from support.tiny_models import make_edit

from harness_rect.edits import Edit, Probe
from harness_rect.models import EditableLM
from harness_rect.training.mend import MendTrainer, MendTraining

TOWNS = ("Ulm", "Brno", "Ghent", "Turku", "Split", "Rome", "Paris", "Vienna", "Oslo", "Bonn")
WORDS = ("football", "library", "English", "marine", "capital")


def facts(towns: Sequence[str] = TOWNS) -> list[Edit]:
    return [
        make_edit(
            "{} is known for",
            town,
            WORDS[i % len(WORDS)],
            id=town,
            paraphrases=(f"What is in {town}? The", f"You can go to {town} for"),
            neighborhood=(Probe("The Space Needle is in", "Seattle"), Probe("The mother tongue is", None)),
        )
        for i, town in enumerate(towns)
    ]


def settings(**changes: Any) -> MendTraining:
    usual: dict[str, Any] = {
        "layers": [1],
        "rank": 4,
        "steps": 6,
        "batch_size": 4,
        "lr": 1e-2,
        "edit_lr": 1e-2,
    }
    return MendTraining(**usual | changes)


def trainer(lm: EditableLM, **changes: Any) -> MendTrainer:
    return MendTrainer(lm, facts(TOWNS[:7]), facts(TOWNS[7:]), settings(**changes), "a model")
