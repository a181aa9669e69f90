"""What each step proposed, and what the regularizer left of it: enough to do them again, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness_rect.updates import Dense, LowRank, Update

#: Updates are held in memory until the run ends. Beyond so many bytes (dense ones in many steps) they are
#: dropped, and the edited weights are kept in their place.
LIMIT = 1 << 30
#: What a file may hold.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class KeptUpdate:
    """The update of one weight in one step, on the CPU.

    proposed: by the method, before the regularizer.
    trimmed: what the regularizer left: ``proposed`` itself where it left all, a low-rank update, or None
        where that would be a matrix, which is trimmed again instead.
    """

    proposed: Update
    trimmed: Update | None

    @classmethod
    def of(cls, proposed: Update, trimmed: Update) -> KeptUpdate:
        if trimmed is proposed:
            return cls(on_cpu := _on_cpu(proposed), on_cpu)
        low_rank = isinstance(trimmed, LowRank)
        return cls(_on_cpu(proposed), _on_cpu(trimmed) if low_rank else None)

    @property
    def form(self) -> str:
        """How ``trimmed`` is kept: ``same``, ``low_rank`` or ``again``."""
        return "again" if self.trimmed is None else "same" if self.trimmed is self.proposed else "low_rank"

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(part, tensor) of what has to be kept."""
        for prefix, update in (("", self.proposed), ("kept_", self.trimmed)):
            if update is not None and (not prefix or update is not self.proposed):
                yield from ((prefix + part, tensor) for part, tensor in vars(update).items())


@dataclass(frozen=True)
class KeptStep:
    """edits: their number. updates: weight name -> update, in the method's order; empty if not applied."""

    edits: int
    updates: Mapping[str, KeptUpdate]


class History:
    """All steps so far.

    Attributes:
        steps: None from where on they are not kept.
    """

    def __init__(self, kept: bool = True) -> None:
        self.steps: list[KeptStep] | None = [] if kept else None
        self._bytes = 0

    def add(self, step: KeptStep) -> None:
        if self.steps is None:
            return
        self.steps.append(step)
        self._bytes += sum(t.nbytes for update in step.updates.values() for _, t in update.tensors())
        if self._bytes > LIMIT:
            self.steps = None

    def tensors(self) -> dict[str, Tensor]:
        """``step.position.part`` -> tensor, both counted from 0."""
        return {
            f"{number}.{position}.{part}": tensor
            for number, step in enumerate(self.steps or ())
            for position, update in enumerate(step.updates.values())
            for part, tensor in update.tensors()
        }

    def described(self) -> list[dict[str, Any]] | None:
        """The steps without their tensors, as JSON."""
        if self.steps is None:
            return None
        return [
            {"edits": step.edits, "updates": {name: update.form for name, update in step.updates.items()}}
            for step in self.steps
        ]

    @classmethod
    def restored(
        cls, described: Sequence[Mapping[str, Any]] | None, tensors: Mapping[str, Tensor]
    ) -> History:
        """From what :meth:`described` and :meth:`tensors` returned.

        Raises:
            KeyError: tensors are missing.
            ValueError: they are no updates of one weight each.
        """
        history, shapes = cls(kept=described is not None), dict[str, tuple[int, int]]()
        for number, step in enumerate(described or ()):
            updates: dict[str, KeptUpdate] = {}
            for position, (name, form) in enumerate(step["updates"].items()):
                proposed = _update(tensors, f"{number}.{position}.")
                again, same = form == "again", form == "same"
                kept = None if again else proposed if same else _update(tensors, f"{number}.{position}.kept_")
                updates[name] = KeptUpdate(proposed, kept)
                one = (proposed if kept is None else kept).shape
                if proposed.shape != one or shapes.setdefault(name, one) != one:
                    raise ValueError(f"step {number}: {name}: an update of another shape")
            history.add(KeptStep(int(step["edits"]), updates))
        return history


def _on_cpu(update: Update) -> Update:
    """A copy, since a method may use one tensor for several weights."""
    parts = {part: tensor.detach().to("cpu", copy=True) for part, tensor in vars(update).items()}
    return type(update)(**parts)


def _update(tensors: Mapping[str, Tensor], prefix: str) -> Update:
    if f"{prefix}matrix" in tensors:
        return Dense(matrix_of(tensors, f"{prefix}matrix"))
    left, right = (matrix_of(tensors, f"{prefix}{part}") for part in ("left", "right"))
    if left.shape[1] != right.shape[1] or left.dtype != right.dtype:
        raise ValueError(f"{prefix}left and {prefix}right are no factors of one matrix")
    return LowRank(left, right)


def matrix_of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A copy, whose memory is aligned as that of the session's tensors.

    Raises:
        KeyError: it is missing. ValueError: it is no matrix of numbers that can be multiplied.
    """
    tensor = tensors[name]
    if tensor.dim() != 2 or tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is no matrix of floating-point numbers")
    return tensor.clone()
