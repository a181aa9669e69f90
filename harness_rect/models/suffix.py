"""Running a model again and again from one block and one token on.

The search for a value changes the hidden state at one token of one block, a few dozen times over. Whatever
comes before stays: the blocks below, and, the model being causal, all earlier tokens in every block. So a
batch runs once in full; what enters the first block that matters and the attention keys and values of the
earlier tokens are kept, and each further run computes the rest only.

The model's own forward is what runs both times: blocks below are replaced by what they returned. It therefore
holds for every family, with hooks and weights spread over devices. Sequences are aligned at the token in
question by padding on both sides. The first such run is compared with the full one by
:meth:`Suffix.checked_logits`, and :func:`whole_run` is there for models in which they differ.

In the first of these blocks only the changed token goes through the matrices before attention, the others
having entered it as they did in full; in the last one only the tokens whose logits are read go through the
MLP.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness_rect.compat.transformers import DynamicLayer, cache_arguments, cache_of
from harness_rect.models.forwards import forward_of
from harness_rect.models.lm import EditableLM, hidden_of

log = logging.getLogger(__name__)

#  Largest difference of log-probabilities between a full and a suffix run, by dtype, before the latter is
# given up.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.3}
#: Tokens by whose log-probabilities two runs are compared.
TOKENS_COMPARED = 2048
#: Places for which log-probabilities are computed at once.
PLACES_AT_ONCE = 8
#: Logged when a model is searched by full runs: several times the cost.
FULL_RUN_WARNING = "%s cannot be run from the middle (%s); searches run it in full"
_FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, IndexError)


class CannotResume(Exception):
    """This model does not give from the middle what it gives in full; the text says why."""


@dataclass(frozen=True)
class Suffix:
    """A batch, ready to be run from a block and from a token of each sequence on.

    In what modules see during :meth:`logits`, that token stands in column ``columns[row]``, the tokens after
    it follow.
    ids: (sequences, width) of what is recomputed. mask: (sequences, earlier + width). positions: as ids, or
    None for the model's own. skipped: how many blocks are not run. entry: what the last of them returned.
    cache: a pair for each block that is run: keys and values of the earlier tokens, with room behind them for
    those of ``ids``. held: for matrices of the first block that is run what they gave in full, (sequences,
    width, outputs); then only the tokens ``changed`` (sequences,), counted from the token of each sequence,
    may enter that block differently.
    """

    lm: EditableLM
    columns: Tensor
    ids: Tensor
    mask: Tensor
    positions: Tensor | None
    skipped: int
    entry: Any
    cache: tuple[tuple[Tensor, Tensor], ...]
    held: Mapping[nn.Module, Tensor] = field(default_factory=dict)
    changed: Tensor | None = None

    def logits(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """(n, vocabulary) logits of n places: sequence ``rows[i]``, ``offsets[i]`` tokens after its token.

        rows, offsets: (n,) int64, no place twice. Differentiable in whatever hooks add on the way.
        """
        more: dict[str, Any] = {"use_cache": False}
        if self.positions is not None:
            more["position_ids"] = self.positions
        handed_out: list[_Holding] = []
        if self.cache:
            # Of the skipped blocks only the length of what they hold is asked for.
            every = range(self.skipped + len(self.cache))
            handed_out = [_Holding(*self.cache[max(0, i - self.skipped)], self.ids.shape[1]) for i in every]
            more |= cache_arguments(self.lm.model, cache_of(handed_out))
        places = self.places(rows, offsets)
        with (
            skipping(self.lm, self.skipped, self.entry),
            self._held_but_changed(),
            self._last_mlp_at(rows, places),
        ):
            logits = self.lm.with_head_at(
                rows,
                places,
                lambda: self.lm.model(input_ids=self.ids, attention_mask=self.mask, **more).logits,
            )
        for layer in handed_out:
            layer.check_untouched()
        return logits

    def checked_logits(self, rows: Tensor, offsets: Tensor, expected: Tensor) -> Tensor:
        """:meth:`logits`, compared with those of a full run, of which ``expected`` is :func:`to_compare`.

        Raises:
            CannotResume: if they differ by more than rounding, or the model cannot be run this way.
        """
        try:
            logits = self.logits(rows, offsets)
        except _FAILURES as error:
            raise _unable(error) from error
        off = float((to_compare(logits) - expected).abs().max()) if len(rows) else 0.0
        if math.isnan(off) and not bool(expected.isfinite().all()):
            return logits  # a broken model, in full as from the middle
        if not off <= _TOLERANCE.get(logits.dtype, 0.0):
            raise CannotResume(f"log-probabilities differ by {off:.2g}")
        return logits

    def places(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Columns of the places in what modules see."""
        return offsets + self.columns[rows]

    def select(self, rows: Tensor) -> Suffix:
        """The same for some of the sequences: ``rows`` (n,) int64."""
        return replace(
            self,
            columns=self.columns[rows],
            ids=_rows(self.ids, rows),
            mask=_rows(self.mask, rows),
            positions=None if self.positions is None else _rows(self.positions, rows),
            entry=None if self.entry is None else with_hidden(self.entry, _rows(hidden_of(self.entry), rows)),
            cache=tuple((_rows(k, rows), _rows(v, rows)) for k, v in self.cache),
            held={module: _rows(output, rows) for module, output in self.held.items()},
            changed=None if self.changed is None else _rows(self.changed, rows),
        )

    @contextmanager
    def _held_but_changed(self) -> Iterator[None]:
        """The matrices in ``held`` run on the changed tokens alone."""
        with ExitStack() as stack:
            if self.changed is not None:
                rows = torch.arange(len(self.changed), device=self.changed.device)
                places = self.places(rows, self.changed)
                for module, output in self.held.items():
                    stack.enter_context(self._only_at(module, rows, places, output))
            yield

    @contextmanager
    def _last_mlp_at(self, rows: Tensor, places: Tensor) -> Iterator[None]:
        """The last block's MLP, if it is a module, runs on these places alone and leaves zeros elsewhere."""
        block, last = self.lm.architecture.blocks[-1], self.lm.architecture.down_projections[-1]
        name = last.rpartition(".")[0]
        if name == block:
            yield
            return
        with self._only_at(self.lm.model.get_submodule(name), rows, places, None):
            yield

    @contextmanager
    def _only_at(
        self, part: nn.Module, rows: Tensor, places: Tensor, elsewhere: Tensor | None
    ) -> Iterator[None]:
        """A module that treats tokens alike runs on these places alone; ``elsewhere``: its output at others.

        Not where hooks inside are to see all tokens.
        """
        if any(m._forward_hooks or m._forward_pre_hooks for m in part.modules()):
            yield
            return
        shape = self.ids.shape
        taken: list[bool] = []

        def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            taken[:] = [
                bool(args)
                and all(isinstance(x, Tensor) and x.dim() == 3 and x.shape[:2] == shape for x in args)
                and not any(isinstance(x, Tensor) for x in kwargs.values())
            ]
            if not taken[0]:
                return None
            at = rows.to(args[0].device), places.to(args[0].device)
            return tuple(x[at].unsqueeze(0) for x in args), kwargs

        def scatter(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not taken[0]:
                return None
            whole = output.new_zeros(*shape, output.shape[-1]) if elsewhere is None else elsewhere.clone()
            whole[rows.to(whole.device), places.to(whole.device)] = output[0]
            return whole

        handles = [
            part.register_forward_pre_hook(gather, with_kwargs=True),
            part.register_forward_hook(scatter),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def to_compare(logits: Tensor) -> Tensor:
    """(n, at most TOKENS_COMPARED) float32 log-probabilities of tokens that lie evenly in the vocabulary.

    Logits all come from one hidden state, so what makes any differ shows in these; all would take as much
    memory as the logits of every place of a search.
    """
    every = math.ceil(logits.shape[-1] / TOKENS_COMPARED)
    parts = [part.float() for part in logits.split(PLACES_AT_ONCE)]
    return torch.cat([part[:, ::every] - part.logsumexp(-1, keepdim=True) for part in parts])


@contextmanager
def skipping(lm: EditableLM, count: int, entry: Any) -> Iterator[None]:
    """The first ``count`` blocks return ``entry``, what the last of them returned, without computing it.

    Hooks on them still run.
    """
    with ExitStack() as stack:
        for layer in range(count):
            stack.enter_context(forward_of(lm.block(layer), _returning(entry)))
        yield


@contextmanager
def returned_by(block: nn.Module | None) -> Iterator[list[Any]]:
    """Collects what a block's forward returns, before any hook on the block sees it."""
    found: list[Any] = []
    if block is None:
        yield found
        return
    run = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        found.append(output := run(*args, **kwargs))
        return output

    with forward_of(block, forward):
        yield found


def suffix_run(
    lm: EditableLM,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    skipped: int,
    rows: Tensor,
    offsets: Tensor,
    changed: Tensor | None = None,
) -> tuple[Suffix, Tensor]:
    """Run a batch in full once, and prepare to run it again from block ``skipped`` and from ``starts`` on.

    Args:
        sequences: token ids. starts: index in each sequence of the token at which hidden states will change.
        skipped: how many blocks at the bottom are not run again.
        rows, offsets: places whose logits are wanted, as in :meth:`Suffix.logits`.
        changed: (sequences,) int64, how far behind ``starts`` the only token stands at which what enters
            block ``skipped`` will change; None: it may change anywhere.

    Returns:
        the suffix, and the logits (n, vocabulary) of this first run, without gradient.
    """
    try:
        return _prepare(lm, sequences, starts, skipped, rows, offsets, changed)
    except _FAILURES as error:
        suffix = whole_run(lm, sequences, starts, _unable(error))
    with torch.no_grad():
        return suffix, suffix.logits(rows, offsets)


def whole_run(
    lm: EditableLM, sequences: Sequence[Sequence[int]], starts: Sequence[int], reason: CannotResume
) -> Suffix:
    """A :class:`Suffix` that runs everything each time, for a model of which nothing can be left out."""
    log.warning(FULL_RUN_WARNING, type(lm.model).__name__, reason)
    batch = lm.batch(sequences)
    columns = torch.tensor(starts, device=batch.ids.device)
    return Suffix(lm, columns, batch.ids, batch.mask, None, 0, None, ())


def _unable(error: Exception) -> CannotResume:
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    return CannotResume(" ".join(str(error).split())[:200])


@torch.no_grad()
def _prepare(
    lm: EditableLM,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    skipped: int,
    rows: Tensor,
    offsets: Tensor,
    changed: Tensor | None,
) -> tuple[Suffix, Tensor]:
    earlier = max(starts)
    batch = lm.batch(sequences, [earlier - start for start in starts])
    ids, mask = batch.ids, batch.mask
    positions = (mask.cumsum(1) - 1) * mask
    kept = [_Keeping(earlier if layer >= skipped else 0) for layer in range(lm.architecture.n_layers)]
    past = cache_of(kept)
    held: dict[nn.Module, Tensor] = {}

    def hold(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        held[module] = output[:, earlier:].clone()

    some = changed is not None and 0 < skipped < len(kept) and ids.shape[1] - earlier > 1
    matrices = lm.tokenwise_matrices(skipped) if some else ()
    with (
        returned_by(lm.block(skipped - 1) if skipped else None) as entry,
        lm.hooked(dict.fromkeys(matrices, hold)),
    ):
        logits = lm.with_head_at(
            rows,
            offsets + earlier,
            lambda: (
                lm.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    **cache_arguments(lm.model, past),
                ).logits
            ),
        )
    if len(past.layers) != len(kept) or any(layer.seen != ids.shape[1] for layer in kept):
        raise ValueError("its attention cache is not one of keys and values of all tokens")
    cache: Any = tuple((layer.keys, layer.values) for layer in kept[skipped:]) if earlier else ()
    suffix = Suffix(
        lm,
        torch.zeros(len(sequences), dtype=torch.long, device=ids.device),
        ids[:, earlier:],
        mask,
        positions[:, earlier:],
        skipped,
        with_hidden(entry[0], hidden_of(entry[0])[:, earlier:].clone()) if skipped else None,
        cache,
        held,
        changed,
    )
    return suffix, logits


class _Keeping(DynamicLayer):
    """A block's keys and values in its first run: hands out all, keeps those of the first ``count`` tokens.

    seen: how many tokens there were.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.seen = count, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen = key_states.shape[-2]
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.count:  # copies, so that the rest can be freed
            self.keys, self.values = (_with_room(x, self.count) for x in (key_states, value_states))
        return key_states, value_states


def _with_room(states: Tensor, count: int) -> Tensor:
    """The first ``count`` of these, and room for the others."""
    kept = torch.zeros_like(states, memory_format=torch.contiguous_format)
    kept[..., :count, :] = states[..., :count, :]
    return kept


class _Holding(DynamicLayer):
    """A block's keys and values in later runs: those of earlier tokens are there, the others follow."""

    def __init__(self, keys: Tensor, values: Tensor, new: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.room = keys, values
        self.versions: tuple[int, int] | None = None  # of what was handed out, once it was
        self.keys, self.values = (x[..., : x.shape[-2] - new, :] for x in self.room)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = self.room
        handed_out = _put_behind(keys, key_states), _put_behind(values, value_states)
        self.versions = keys._version, values._version
        return handed_out

    def check_untouched(self) -> None:
        """Whoever overwrites what it was handed has overwritten what later runs are to read."""
        if self.versions is not None and self.versions != tuple(x._version for x in self.room):
            raise RuntimeError("its attention overwrites the keys or values it is given")


def _put_behind(room: Tensor, new: Tensor) -> Tensor:
    if room.shape[-2] < new.shape[-2] or room.shape[:-2] != new.shape[:-2]:
        raise ValueError("its attention cache is not one of keys and values of all tokens")
    return _PutBehind.apply(room.detach(), new)


class _PutBehind(torch.autograd.Function):
    """``new`` written over the last places of ``room``; cat would copy, and keep, the others too."""

    @staticmethod
    def forward(ctx: Any, room: Tensor, new: Tensor) -> Tensor:
        ctx.mark_dirty(room)
        ctx.new = new.shape[-2]
        room[..., room.shape[-2] - ctx.new :, :] = new
        return room

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient[..., gradient.shape[-2] - ctx.new :, :]


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor[rows.to(tensor.device)]


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a block returned, with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
