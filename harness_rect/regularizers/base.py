"""What every regularizer is: validated settings and a function that trims the update of one weight."""

from __future__ import annotations

import abc
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from harness_rect.errors import UserError
from harness_rect.updates import Update


def parse_share(value: object, name: str) -> float:
    """A share in [0, 1] from 0.4, "0.4" or "40%".

    Raises:
        UserError: for anything else; 40 without a percent sign is refused, not guessed.
    """
    text = str(value).strip()
    percent = text.endswith("%")
    try:
        share = float(text.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        share = float("nan")
    if not 0 <= share <= 1:
        raise UserError(
            f"{name}={text}: expected a share from 0 to 1 such as 0.4, or a percentage such as 40%"
        )
    return share


def _share(value: Any) -> float:
    return parse_share(value, "keep")


#: A setting that may be written as 0.4 or 40%.
Share = Annotated[float, BeforeValidator(_share)]


@dataclass(frozen=True)
class WeightState:
    """What a regularizer is given beside the tensors, for one weight in one step.

    memory: CPU tensors that the regularizer keeps from step to step for this weight, by names of its own;
        empty at the first step, and saved with an interrupted run.
    generator: a CPU generator for everything random, seeded by ``edit_seed``, the step and the weight.
    transposed: whether the weight is stored as (inputs, outputs), as in GPT-2's Conv1D.
    """

    memory: MutableMapping[str, Tensor]
    generator: torch.Generator
    transposed: bool = False

    def outputs_first(self, matrix: Tensor) -> Tensor:
        """A matrix of the stored orientation as (outputs, inputs), and back."""
        return matrix.T if self.transposed else matrix


class Regularizer(BaseModel, abc.ABC):
    """A regularizer with its settings; a subclass adds its settings as fields and :meth:`trim`.

    The fields are the arguments that users type (``keep=0.4`` in model_args, ``--keep 0.4``,
    ``keep: 0.4`` in a sweep), and their descriptions the help texts.

    Attributes:
        name: what users type for ``regularizer=``.
        title: the name in tables and figures.
        paper: where it was published, as a Markdown link or a citation.
        summary: what is left of an update dW, in one line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]

    @abc.abstractmethod
    def trim(self, update: Update, weight: Tensor, original: Tensor, state: WeightState) -> Update:
        """The part of an update that is applied.

        Args:
            update: the proposed dW, finite, in the stored weight's own orientation (rows, columns).
            weight: W just before this step, float32, (rows, columns).
            original: W before all edits, in the model's dtype, (rows, columns).
            state: this weight's memory, random generator and orientation.

        Returns:
            dW', low-rank or dense; added to W by the session.
        """

    def elements_left(self, update: Tensor) -> int | None:
        """How many elements of a dense dW are not zero after :meth:`trim`; None where that is not fixed."""
        return None


class NoRegularizer(Regularizer):
    """Applies every update as it is proposed."""

    name = "none"
    title = "no regularizer"
    paper = ""
    summary = "all of it"

    def trim(self, update: Update, weight: Tensor, original: Tensor, state: WeightState) -> Update:
        return update


#: The share of an update that rect, random, pca and magnitude keep.
KEEP = Field(description="share of each update that is kept: 0.4 or 40%")
