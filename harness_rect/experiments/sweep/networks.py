"""The networks that MEND edits with, trained by a sweep for a model that has none."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from harness_rect.edits import fingerprint, load_edits
from harness_rect.errors import UserError, did_you_mean
from harness_rect.fingerprint import model_fingerprint
from harness_rect.io.checksums import set_aside
from harness_rect.methods.mend_weights import DESCRIPTION, load_editor, read_description
from harness_rect.models import EditableLM
from harness_rect.training.mend import MendTrainer, MendTraining, hold_out, training_rows, usual_settings
from harness_rect.validation import validated


class TrainMend(BaseModel):
    """The key ``train_mend`` of a sweep: training rows, and settings as of ``harness-rect train-mend``.

    A setting that is not given is that of the model's preset, else the default of ``train-mend``.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    train: str = Field(min_length=1)

    @model_validator(mode="after")
    def _checked(self) -> TrainMend:
        known = MendTraining.model_fields
        for key in self.model_extra or {}:
            if key not in known:
                raise ValueError(f"unknown key {key!r}: {did_you_mean(key, ['train', *known])}")
        validated(MendTraining, {"layers": [0]} | (self.model_extra or {}), "")
        return self

    def settings(self, lm: EditableLM) -> MendTraining:
        """The settings of the training for a model."""
        return validated(MendTraining, usual_settings(lm) | (self.model_extra or {}), "train_mend")


def networks_folder(output: Path, model: str) -> Path:
    """The folder in a sweep's output of the networks for the model of this label."""
    return output / "mend" / model


def are_trained(folder: Path) -> bool:
    return (folder / DESCRIPTION).is_file()


def seconds_of_a_step(lm: EditableLM, given: TrainMend) -> float:
    """How long one step of the training takes, measured on a few facts."""
    settings = given.settings(lm)
    facts = load_edits(training_rows(given.train)).edits[: 2 * settings.batch_size]
    trainer = MendTrainer(lm, facts, facts, settings)
    with lm.frozen():
        trainer.step()
        started = time.perf_counter()
        trainer.step()
    return time.perf_counter() - started


def train_networks(lm: EditableLM, given: TrainMend, folder: Path, model_name: str) -> None:
    """Train the networks of a model into ``folder``, unless they are there; resumes an interrupted training.

    Damaged ones are set aside.

    Args:
        model_name: for their description.

    Raises:
        UserError: what is there was trained for other weights or with other settings; or the training cannot
            be done, see :class:`~harness_rect.training.mend.MendTrainer`.
    """
    settings = given.settings(lm)
    if are_trained(folder):
        try:
            load_editor(folder)
        except UserError as error:
            set_aside(folder, "the trained MEND", error)
    train, held_out = hold_out(load_edits(training_rows(given.train)).edits)
    if not are_trained(folder):
        MendTrainer(lm, train, held_out, settings, model_name).run(folder)
        return
    there = read_description(folder)
    wanted = settings.model_dump(mode="json")
    wanted |= lm.encoder.format.describe()
    wanted |= {"train_sha256": fingerprint(train), "validation_sha256": fingerprint(held_out)}
    changed = [key for key, value in wanted.items() if there.training.get(key) != value]
    if there.model_fingerprint != model_fingerprint(lm.model):
        changed.insert(0, "weights of the model")
    if changed:
        raise UserError(
            f"{folder}: MEND's networks there were trained with other {changed[0]}; remove the folder to"
            " train again, or give another output folder"
        )
