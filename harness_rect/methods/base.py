"""What every editing method takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.models import Architecture, EditableLM
from harness_rect.models.forwards import fused_gelu
from harness_rect.moments import SecondMoment
from harness_rect.updates import Update

#: The largest whole number that a hyper-parameter may be, and the most steps for an edit.
MOST, MOST_STEPS = 10**9, 100_000
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]


class HyperParameters(BaseModel):
    """Base of every method's hyper-parameters: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _feasible(cls, values: Any) -> Any:
        """Refuse counts with which an edit would never end."""
        for name, value in values.items() if isinstance(values, dict) else ():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, int) and abs(one) > MOST:
                    raise ValueError(f"{name}: expected a number up to {MOST} (got {str(one)[:40]})")
        return values


class MomentHyperParameters(HyperParameters):
    """Which second moments are read, as in published files (see ``harness_rect.moments``).

    mom2_n_samples: texts, up to 10 million.
    """

    mom2_dataset: str = "wikipedia"
    mom2_n_samples: int = Field(default=100_000, ge=1, le=10**7)
    mom2_dtype: Literal["float32", "float64"] = "float32"


@dataclass(frozen=True)
class Proposal:
    """What a method wants to change.

    updates: weight name -> update; empty if all edits are skipped.
    details: for each edit, in order, what the search did (plain numbers).
    skipped: indices of the edits that the method leaves out.
    """

    updates: dict[str, Update]
    details: list[dict[str, Any]]
    skipped: Sequence[int] = ()


def _no_originals(name: str) -> Tensor:
    raise LookupError(f"this context does not know {name} before all edits")


@dataclass(frozen=True)
class Context:
    """What one run gives a method beside the model and the facts.

    templates: prefixes with one ``{}``, as the method's ``contexts`` gave them: a flat list for ROME, a list
        for each context type for MEMIT.
    second_moment: layer -> its second moment C, of the unedited model.
    state: what a method remembers from step to step, by a name of its own; empty at the start of a stream and
        saved with it, so that an interrupted stream goes on with it.
    original: weight name -> that weight before all edits, in the model's dtype.
    conditions: of the systems of keys that a step solved. used: layer -> the second moment that it asked for.
    """

    templates: list[Any]
    second_moment: Callable[[int], SecondMoment]
    state: dict[str, Tensor] = field(default_factory=dict)
    original: Callable[[str], Tensor] = _no_originals
    conditions: dict[str, float] = field(default_factory=dict)
    used: dict[int, SecondMoment] = field(default_factory=dict)

    def note_keys(self, of: int | str) -> Callable[[float], None]:
        """Notes the condition of a system of keys of a layer or module; of several the largest."""
        name = f"keys of {f'layer {of}' if isinstance(of, int) else of}"

        def note(condition: float) -> None:
            self.conditions[name] = max(condition, self.conditions.get(name, 0.0))

        return note

    def take_conditions(self) -> dict[str, float]:
        """The conditions of all systems that were solved since the last call, by what they are."""
        found = dict(self.conditions)
        for layer, moment in self.used.items():
            if (worst := moment.worst) is not None:
                found[f"C of layer {layer}"] = worst.condition
                found |= {f"ridge on C of layer {layer}": worst.ridge} if worst.ridge else {}
        self.conditions.clear()
        self.used.clear()
        return found


def bare_context(lm: EditableLM, hparams: Any, seed: int) -> list[Any]:
    """For methods that read the bare prompt alone."""
    return ["{}"]


def down_projections(lm: EditableLM, hparams: Any) -> list[str]:
    """The down projections of ``hparams.layers``: what most methods edit."""
    return [lm.architecture.weight_name(layer) for layer in sorted(set(hparams.layers))]


def edit_in_order(
    lm: EditableLM, layers: Sequence[int], update_of: Callable[[int, int], Update | None]
) -> dict[str, Update]:
    """Updates of down projections, each computed with those of the layers before it in place.

    Args:
        layers: in increasing order. update_of: (index, layer) -> the update for the model as it is then; None
            ends the edit without any.

    Returns:
        weight name -> update. The model is as it was when this returns.
    """
    names = [lm.architecture.weight_name(layer) for layer in layers]
    updates: dict[str, Update] = {}
    with fused_gelu(lm.model), lm.weights_restored(names[:-1]):
        for index, (layer, name) in enumerate(zip(layers, names, strict=True)):
            update = update_of(index, layer)
            if update is None:
                return {}
            updates[name] = update
            if layer != layers[-1]:
                weight = lm.weight(name).data
                weight += update.dense().to(weight)
    return updates


@dataclass(frozen=True)
class Method:
    """An editing method as the rest of the package sees it.

    name: what users type for ``method=``. title: the name in tables and figures.
    paper: where it was published, as a Markdown link or a citation.
    summary, needs, cost: what it changes, what it needs, and the cost of an edit, for the table of methods.
    default_hparams: hyper-parameters for any model; a preset is used where there is one for it.
    propose: the updates of one step; leaves the model as it was.
    prepare: (model, hyper-parameters, model name, seed) -> the hyper-parameters, completed by what has to be
        measured on the unedited model.
    contexts: the templates of these hyper-parameters, sampled with a seed where they fix none; what it
        returns is also a valid ``context_templates``.
    needs_statistics: which layers' second moments these hyper-parameters read.
    weights: names of the weights these hyper-parameters edit.
    after_step: called with the model as the step left it, trimmed and rounded, and the edits that were not
        skipped; for methods with a memory.
    check: raises UserError for edits the method cannot use; called by :func:`check_edits`.
    batches: whether several facts can be edited in one update.
    at_subject: whether it writes at the subject's last token: the subject has to be in the prompt, and the
        last block is too late.
    presets: folder of its presets, where that is not its name.
    ignored_keys: further keys of its published files that are ignored.
    """

    name: str
    hparams: type[HyperParameters]
    default_hparams: Callable[[Architecture], dict[str, Any]]
    propose: Callable[[EditableLM, Sequence[Edit], Any, Context], Proposal]
    prepare: Callable[[EditableLM, Any, str, int], Any] = lambda lm, hparams, model_name, seed: hparams
    contexts: Callable[[EditableLM, Any, int], list[Any]] = bare_context
    needs_statistics: Callable[[Any], list[int]] = lambda hparams: []
    weights: Callable[[EditableLM, Any], list[str]] = down_projections
    after_step: Callable[[EditableLM, Sequence[Edit], Any, Context], None] = lambda *arguments: None
    check: Callable[[Sequence[Edit]], None] = lambda edits: None
    batches: bool = False
    at_subject: bool = False
    presets: str = ""
    ignored_keys: frozenset[str] = frozenset()
    title: str = ""
    paper: str = ""
    summary: str = ""
    needs: str = "nothing"
    cost: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.name)
