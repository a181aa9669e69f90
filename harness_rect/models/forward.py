"""Logits of a model as a function of a vector added to one hidden state of each sequence.

A search for a value adds a vector d to the hidden state of one token in one block and reads the logits after
it, a few dozen times. :class:`FullForward` is the definition: the whole model on whole sequences each time.
:class:`PrefixForward` gives the same logits but runs only once what cannot change: the blocks below the
changed one and, since attention is causal, all tokens before the changed one, whose keys and values are kept.
Both call the model's own forward, so both work for every family, with hooks, and with weights on several
devices. :func:`open_forward` returns the fast one if it agrees with a full pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from harness_rect.compat.transformers import DynamicCache, cache_arguments, cache_of
from harness_rect.models.forwards import forward_of, returned_by, skipping, with_hidden
from harness_rect.models.lm import EditableLM, hidden_of

log = logging.getLogger(__name__)

#: Largest difference of log-probabilities between a partial and a full pass, by dtype.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.3}
#: Logged when full passes have to be used, at several times the cost.
FULL_RUN_WARNING = "%s cannot be run from an inner block (%s); value searches use full passes"
_FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, IndexError)


@dataclass(frozen=True)
class Prompts:
    """Token sequences, where a hidden state of each changes, and where logits are read.

    Attributes:
        sequences: token ids.
        changed: (sequences,) int64, index of the token whose hidden state changes.
        layer, at_block: the change is made to the output of this block, or of its down projection.
        rows, positions: (n,) int64, the sequence and the token index of each place read; no place twice.
        loss_layer, early: the first ``early`` places are read from this block's output through the final norm
            and the head; None: like all others, from the model's own logits.
    """

    sequences: Sequence[list[int]]
    changed: Tensor
    layer: int
    at_block: bool
    rows: Tensor
    positions: Tensor
    loss_layer: int | None = None
    early: int = 0


class Forward(Protocol):
    """Logits at the places of some :class:`Prompts` as a function of what is added at the changed tokens."""

    def logits(self, added: Tensor) -> Tensor:
        """(n, vocabulary); ``added``: (sequences, d_model), float32. Differentiable."""


class FullForward:
    """The whole model on whole sequences each time."""

    def __init__(self, lm: EditableLM, prompts: Prompts) -> None:
        self.lm, self.prompts = lm, prompts
        self.batch = lm.batch(prompts.sequences)

    def logits(self, added: Tensor) -> Tensor:
        shift = torch.zeros_like(self.prompts.changed)
        with _adding(self.lm, self.prompts, added, self.batch.ids.shape, shift):
            return _read(self.lm, self.prompts, shift, lambda: self.lm.logits(self.batch))


class PrefixForward:
    """Runs the model from the changed block and, in each sequence, from the first token needed.

    That is the changed token, or an earlier one whose logits are read. Sequences are aligned at it by padding
    on both sides. The constructor makes one full pass, whose results are kept.

    Attributes:
        before: (n, vocabulary) logits of that pass, with nothing added; removed by :func:`open_forward`.
        start: (sequences,) int64, index of the first token needed.
        ids, position_ids: (sequences, width), from that token on. mask: (sequences, earlier + width).
        entry: what the block below the change returned at these tokens, None if there is no such block.
        cache: keys and values of all tokens, a pair for each block; each pass overwrites those of the tokens
            that it runs, so gradients of a pass cannot be computed after the next one.
    """

    @torch.no_grad()
    def __init__(self, lm: EditableLM, prompts: Prompts) -> None:
        self.lm, self.prompts = lm, prompts
        self.start = prompts.changed.scatter_reduce(0, prompts.rows, prompts.positions, "amin")
        self.skipped = prompts.layer + prompts.at_block  # blocks before the change
        earlier = int(self.start.max())
        batch = lm.batch(prompts.sequences, (earlier - self.start).tolist())
        position_ids = (batch.mask.cumsum(1) - 1) * batch.mask
        past = DynamicCache()  # not made from the configuration: sliding windows would drop earlier tokens
        arguments = cache_arguments(lm.model, past)
        arguments |= {"attention_mask": batch.mask, "position_ids": position_ids}
        with returned_by(lm.block(self.skipped - 1) if self.skipped else None) as entries:
            run = partial(lm.model, input_ids=batch.ids, **arguments)
            self.before = _read(lm, prompts, self.start - earlier, lambda: run().logits)
        layers: list[Any] = past.layers
        pairs: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in layers]
        if len(pairs) != lm.architecture.n_layers or any(k.shape[-2] != batch.ids.shape[1] for k, _ in pairs):
            raise ValueError("its attention cache is not one of keys and values of all tokens")
        self.ids, self.position_ids, self.mask = batch.ids[:, earlier:], position_ids[:, earlier:], batch.mask
        self.entry: Any = None
        if self.skipped:
            self.entry = with_hidden(entries[0], hidden_of(entries[0])[:, earlier:].clone())
        self.cache = [(k.contiguous(), v.contiguous()) for k, v in pairs[self.skipped :]] if earlier else []
        self.cache = self.cache[:1] * self.skipped + self.cache  # of skipped blocks only the length matters

    def logits(self, added: Tensor) -> Tensor:
        arguments: dict[str, Any] = {"use_cache": False}
        if self.cache:
            arguments = cache_arguments(self.lm.model, cache_of(self.cache, self.ids.shape[1]))
        arguments |= {"attention_mask": self.mask, "position_ids": self.position_ids}
        run = partial(self.lm.model, input_ids=self.ids, **arguments)
        with (
            skipping(self.lm, self.skipped, self.entry),
            _adding(self.lm, self.prompts, added, self.ids.shape, self.start),
            self._last_mlp_at_places(),  # after the hook above, since it looks for hooks
        ):
            return _read(self.lm, self.prompts, self.start, lambda: run().logits)

    @contextmanager
    def _last_mlp_at_places(self) -> Iterator[None]:
        """The last block's MLP, if it is a module, runs only at the places that are read."""
        block, down = self.lm.architecture.blocks[-1], self.lm.architecture.down_projections[-1]
        name = down.rpartition(".")[0]
        mlp = self.lm.model.get_submodule(name)
        if name == block or any(m._forward_hooks or m._forward_pre_hooks for m in mlp.modules()):
            yield  # hooks get all tokens
            return
        run, shape = mlp.forward, self.ids.shape
        rows, columns = self.prompts.rows, self.prompts.positions - self.start[self.prompts.rows]

        def forward(hidden: Tensor, *more: Any, **named: Any) -> Any:
            if hidden.shape[:-1] != shape or more or named:
                return run(hidden, *more, **named)
            here = run(hidden[rows.to(hidden.device), columns.to(hidden.device)].unsqueeze(0))
            whole = here.new_zeros(*shape, here.shape[-1])
            whole[rows.to(here.device), columns.to(here.device)] = here[0]
            return whole

        with forward_of(mlp, forward):
            yield


def open_forward(lm: EditableLM, prompts: Prompts) -> tuple[Forward, Tensor]:
    """The fast forward if it agrees with a full pass, else the full one, with a warning.

    Returns:
        the forward, and the logits (n, vocabulary) of a full pass with nothing added, without gradient.

    Raises:
        UserError: if a sequence is longer than the model can read.
    """
    lm.check_length(prompts.sequences)
    with torch.no_grad():
        nothing = torch.zeros(len(prompts.changed), lm.architecture.d_model, device=prompts.changed.device)
        try:
            fast = PrefixForward(lm, prompts)
            before = fast.before
            del fast.before  # as large as the logits of a step
            off = _difference(fast.logits(nothing), before)
            broken = not bool(before.isfinite().all())  # a full pass is not finite either
            if off <= _TOLERANCE.get(before.dtype, 0.0) or broken:
                return fast, before
            reason = f"log-probabilities differ by {off:.2g}"
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            reason = " ".join(str(error).split())[:200]
        log.warning(FULL_RUN_WARNING, type(lm.model).__name__, reason)
        full = FullForward(lm, prompts)
        return full, full.logits(nothing)


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits.float().log_softmax(-1) - expected.float().log_softmax(-1)).abs().max())


@contextmanager
def _adding(
    lm: EditableLM, prompts: Prompts, added: Tensor, shape: torch.Size, shift: Tensor
) -> Iterator[None]:
    """Add to the hidden states of the changed tokens.

    shape: (sequences, width) of the pass. shift: (sequences,), by how many columns tokens are moved left.
    """
    columns = prompts.changed - shift
    every = torch.arange(len(columns), device=columns.device)

    def add(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        hidden = hidden_of(output)
        out = hidden.view(*shape, -1).clone()
        at = every.to(out.device), columns.to(out.device)
        out[at] = (out[at].float() + added.to(out.device)).to(out.dtype)
        return with_hidden(output, out.view_as(hidden))

    module = lm.block(prompts.layer) if prompts.at_block else lm.down_projection(prompts.layer)
    with lm.hooked({module: add}):
        yield


def _read(lm: EditableLM, prompts: Prompts, shift: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """(n, vocabulary) logits at the positions read, from one pass ``run``. shift: as in :func:`_adding`."""
    rows, columns = prompts.rows, prompts.positions - shift[prompts.rows]
    if prompts.loss_layer is None:
        return lm.with_head_at(rows, columns, run)
    found: list[Tensor] = []

    def keep(module: Any, args: tuple[Any, ...], output: Any) -> None:
        found.append(hidden_of(output))

    early = prompts.early
    with lm.hooked({lm.block(prompts.loss_layer): keep}):
        logits = lm.with_head_at(rows[early:], columns[early:], run)
    hidden = found[0]
    states = hidden[rows[:early].to(hidden.device), columns[:early].to(hidden.device)]
    return torch.cat([lm.unembed(states).to(logits.device), logits])
