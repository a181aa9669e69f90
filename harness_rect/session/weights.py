"""The edited weights of a model: the originals, and float32 copies to which updates are added."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness_rect.errors import Failed, UserError
from harness_rect.models import EditableLM
from harness_rect.weight_change import weight_change

#: Model -> those that edit it, in the order in which they began.
_EDITED: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[EditedWeights]]] = weakref.WeakKeyDictionary()


def _editing(model: nn.Module) -> list[weakref.ref[EditedWeights]]:
    found = [one for one in _EDITED.get(model, ()) if one() is not None]
    _EDITED[model] = found
    return found


class EditedWeights:
    """The weights that a stream edits.

    An update is added to a float32 copy, which is then rounded once to the model's dtype.

    Attributes:
        originals: the weights before all edits, in the model's dtype, until :meth:`revert`.
        masters: the float32 copies, from :meth:`start` on.
    """

    def __init__(self, lm: EditableLM, names: Sequence[str]) -> None:
        self.lm, self.names = lm, list(names)
        self.originals: dict[str, Tensor] = {}
        self.masters: dict[str, Tensor] = {}
        self._sha256: dict[str, str] = {}  # of the originals

    def _remember(self, name: str, weight: Tensor) -> None:
        """Copy the original of a weight, once."""
        if not self.originals:
            _editing(self.lm.model).append(weakref.ref(self))
        if name not in self.originals:
            self._sha256[name] = sha256_of(weight)
            self.originals[name] = weight.clone()

    def start(self) -> None:
        """Copy all weights as they are now."""
        for name in self.names:
            weight = self.lm.weight(name).detach()
            self._remember(name, weight)
            self.masters[name] = weight.float().clone()

    @torch.no_grad()
    def install(self, masters: Mapping[str, Tensor]) -> None:
        """Round float32 weights into the model; their originals are remembered first."""
        for name, master in masters.items():
            weight = self.lm.weight(name)
            self._remember(name, weight.detach())
            weight.copy_(master)

    def resume(self, masters: Mapping[str, Tensor]) -> None:
        """Continue from the float32 copies of an interrupted stream; after :meth:`start`."""
        self.masters = {name: master.to(self.masters[name]) for name, master in masters.items()}
        self.install(self.masters)

    def hashes(self) -> dict[str, str]:
        """Name -> sha256 (hex) of the weight in the model, in its dtype and row by row."""
        return {name: sha256_of(self.lm.weight(name)) for name in self.masters}

    def changes(self) -> dict[str, Any]:
        """Name -> dtype, hashes, and how far the float32 copy is from the original, for the report."""
        return {
            name: weight_change(master, self.originals[name].float())
            | {
                "dtype": str(self.lm.weight(name).dtype).removeprefix("torch."),
                "sha256": sha256_of(self.lm.weight(name)),
                "sha256_unedited": self._sha256[name],
            }
            for name, master in self.masters.items()
        }

    @torch.no_grad()
    def add(self, name: str, update: Tensor) -> float:
        """Add a dense float32 update to a weight.

        Returns:
            the share of the stored elements that changed: in 16 bits a small update can vanish by rounding.
        """
        weight = self.lm.weight(name)
        before = weight.detach().clone()
        self.masters[name] += update
        weight.copy_(self.masters[name])
        return int((weight != before).sum()) / before.numel()

    @torch.no_grad()
    def revert(self) -> None:
        """Put the original weights back, bit for bit. Does nothing on an unedited model.

        Raises:
            UserError: others edited the model later, and are to be reverted first; nothing is changed then.
            Failed: the model does not have the bits then that it had before editing.
        """
        if not self.originals:
            return
        begun = _editing(self.lm.model)
        if begun[-1]() is not self:
            raise UserError("the model was edited again later: end that edit first, then this one")
        for name, original in self.originals.items():
            self.lm.weight(name).copy_(original)
        wrong = [name for name in self.originals if sha256_of(self.lm.weight(name)) != self._sha256[name]]
        begun.pop()
        self.originals.clear()
        self.masters.clear()
        if wrong:
            raise Failed(f"{wrong[0]} is not as it was before editing: load the model again")


def sha256_of(tensor: Tensor) -> str:
    """sha256 (hex) of a tensor's elements, row by row."""
    plain = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(plain.view(torch.uint8).numpy().data).hexdigest()
