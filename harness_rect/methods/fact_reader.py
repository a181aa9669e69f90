"""Keys and block outputs of a batch of facts, read while one layer after the other is edited.

An edit of block l changes nothing below it. So what leaves the block before l is kept, for all tokens of all
prompts, and later readings start there: a batch of facts costs little more than one pass through the edited
blocks, whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.methods.contexts import BARE
from harness_rect.methods.value_search import until_subject
from harness_rect.models import EditableLM
from harness_rect.models.forwards import returned_by, skipping, with_hidden
from harness_rect.models.lm import Batch, chunks, hidden_of

#: Tokens a pass that only reads keys or outputs may hold, padding included.
CHUNK_TOKENS = 8192


@dataclass
class _Chunk:
    """Some prompts that are run together, each up to the subject's last token.

    rows: which. bare: whether these are the bare prompts.
    skipped: how many blocks are not run again. entry: what the last of them returned, its hidden states in
    main memory, since thousands of facts have more than a GPU's. device: where they belong.
    """

    rows: list[int]
    bare: bool
    batch: Batch
    skipped: int = 0
    entry: Any = None
    device: torch.device | None = None


class FactReader:
    """Reads at the subject's last token of each fact, under every context, in the model as it is.

    Args:
        groups: the context types, each with its templates.
    """

    def __init__(self, lm: EditableLM, edits: Sequence[Edit], groups: Sequence[Sequence[str]]) -> None:
        self.lm, self.edits, self.groups = lm, edits, groups
        prompts = [(edit, template) for edit in edits for group in groups for template in group]
        self._contexts = range(len(prompts))
        self._bare = [i for i, (_, template) in enumerate(prompts) if template == BARE]
        if len(self._bare) != len(edits):  # not among the contexts, or more than once
            self._bare = list(range(len(prompts), len(prompts) + len(edits)))
            prompts += [(edit, BARE) for edit in edits]
        sequences = [until_subject(lm, edit, template) for edit, template in prompts]
        bare = set(self._bare)
        # The bare prompts apart: they are run further than the others.
        self._chunks: list[_Chunk] = []
        for rows in (self._bare, [i for i in self._contexts if i not in bare]):
            for part in chunks([len(sequences[i]) for i in rows], CHUNK_TOKENS):
                which = [rows[i] for i in part]
                batch = lm.batch([sequences[i] for i in which])
                self._chunks.append(_Chunk(which, rows is self._bare, batch))

    def keys(self, layers: Sequence[int], *, hold: bool = False) -> dict[int, Tensor]:
        """Keys of each fact, from one pass that ends at the deepest layer.

        Args:
            hold: keep what enters the first of these layers, below which nothing will be edited any more, and
                run nothing below it again.

        Returns:
            layer -> (facts, d_mlp) float32: the mean over context types of the mean over their templates.
        """
        found: dict[int, Tensor] = {}
        for chunk in self._chunks:
            read_here = chunk.rows[0] in self._contexts
            if not read_here and not hold:
                continue
            below = min(layers) - 1
            kept = self.lm.block(below) if hold and below >= 0 else None
            with self._resumed(chunk), returned_by(kept) as entering:
                read = self.lm.down_projection_io(layers, chunk.batch, chunk.batch.last)
            if entering:
                hidden = hidden_of(entering[0])
                chunk.skipped, chunk.device = below + 1, hidden.device
                chunk.entry = with_hidden(entering[0], hidden.cpu())
            for layer, (keys, _) in read.items() if read_here else ():
                if layer not in found:
                    found[layer] = keys.new_empty(len(self._contexts), keys.shape[1])
                found[layer][chunk.rows] = keys
        return {layer: self._mean(keys) for layer, keys in found.items()}

    def bare_outputs(self, layer: int) -> Tensor:
        """(facts, d_model) float32: output of block ``layer`` at the bare prompts."""
        return self._at_bare_prompts(lambda batch: self.lm.block_output(layer, batch, batch.last))

    def bare_mlp_outputs(self, layer: int) -> Tensor:
        """(facts, d_model) float32: output of that block's down projection at the bare prompts."""
        return self._at_bare_prompts(
            lambda batch: self.lm.down_projection_io([layer], batch, batch.last)[layer][1]
        )

    def _at_bare_prompts(self, read: Callable[[Batch], Tensor]) -> Tensor:
        found: dict[int, Tensor] = {}
        for chunk in self._chunks:
            if chunk.bare:
                with self._resumed(chunk):
                    found.update(zip(chunk.rows, read(chunk.batch), strict=True))
        return torch.stack([found[row] for row in self._bare])

    def _resumed(self, chunk: _Chunk) -> AbstractContextManager[None]:
        entry = chunk.entry
        if chunk.skipped:
            entry = with_hidden(entry, hidden_of(entry).to(chunk.device))
        return skipping(self.lm, chunk.skipped, entry)

    def _mean(self, keys: Tensor) -> Tensor:
        each = keys.view(len(self.edits), -1, keys.shape[1])
        means = [group.mean(1) for group in each.split([len(group) for group in self.groups], dim=1)]
        return torch.stack(means).mean(0)
