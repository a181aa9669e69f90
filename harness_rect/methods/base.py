"""What every editing method takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.models import Architecture, EditableLM
from harness_rect.statistics import SecondMoment


class HyperParameters(BaseModel):
    """Base of every method's hyper-parameters: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class LowRank:
    """An update ``left @ right.T`` in the stored weight's own orientation.

    left: (rows, r), right: (columns, r), of one dtype, float32 or float64.
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The update as a matrix (rows, columns)."""
        return self.left @ self.right.T


@dataclass(frozen=True)
class Proposal:
    """What a method wants to change.

    updates: weight name -> update. details: for each edit, in order, what the search did (plain numbers).
    """

    updates: dict[str, LowRank]
    details: list[dict[str, Any]]


@dataclass(frozen=True)
class Context:
    """What one run gives a method beside the model and the facts.

    templates: prefixes with one ``{}``, as the method's ``contexts`` gave them: a flat list for ROME, a list
        for each context type for MEMIT.
    second_moment: layer -> its second moment C, of the unedited model.
    """

    templates: list[Any]
    second_moment: Callable[[int], SecondMoment]


@dataclass(frozen=True)
class Method:
    """An editing method as the rest of the package sees it.

    default_hparams: hyper-parameters for a model without a preset.
    contexts: the templates of these hyper-parameters, sampled with a seed where they fix none; what it
        returns is also a valid ``context_templates``.
    needs_statistics: whether these hyper-parameters read second moments, and of which layers.
    batches: whether several facts can be edited in one update.
    """

    name: str
    hparams: type[HyperParameters]
    default_hparams: Callable[[Architecture], dict[str, Any]]
    contexts: Callable[[EditableLM, Any, int], list[Any]]
    propose: Callable[[EditableLM, Sequence[Edit], Any, Context], Proposal]
    needs_statistics: Callable[[Any], list[int]]
    batches: bool = False
