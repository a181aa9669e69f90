"""Running a model again and again from one block and one token on.

The search for a value changes the hidden state at one token of one block, a few dozen times over. Whatever
comes before stays: the blocks below, and, the model being causal, all earlier tokens in every block. So a
batch runs once in full; what enters the first block that matters and the attention keys and values of the
earlier tokens are kept, and each further run computes the rest only.

The model's own forward is what runs both times: blocks below are replaced by what they returned. It therefore
holds for every family, with hooks and weights spread over devices. Sequences are aligned at the token in
question by padding on both sides; :func:`suffix_run` compares the two ways on the spot and falls back to full
runs if they differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from harness_rect.models.lm import EditableLM, hidden_of

log = logging.getLogger(__name__)

#  Largest difference of log-probabilities between a full and a suffix run, by dtype, before the latter is
# given up.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.3}


@dataclass(frozen=True)
class Suffix:
    """A batch, ready to be run from a block and from a token of each sequence on.

    In what modules see during :meth:`logits`, that token stands in column ``columns[row]``, the tokens after
    it follow.
    ids: (sequences, width) of what is recomputed. mask: (sequences, earlier + width). positions: as ids, or
    None for the model's own. outputs: what each skipped block returns. cache: keys and values of the earlier
    tokens, a pair a block.
    """

    lm: EditableLM
    columns: Tensor
    ids: Tensor
    mask: Tensor
    positions: Tensor | None
    outputs: tuple[Any, ...]
    cache: tuple[tuple[Tensor, Tensor], ...]

    def logits(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """(n, vocabulary) logits of n places: sequence ``rows[i]``, ``offsets[i]`` tokens after its token.

        rows, offsets: (n,) int64 on the CPU. Differentiable in whatever hooks add on the way.
        """
        past = None
        if self.cache:
            past = DynamicCache()
            for layer, (keys, values) in enumerate(self.cache):
                past.update(keys, values, layer)
        places = self.places(rows, offsets)
        more: dict[str, Any] = {} if self.positions is None else {"position_ids": self.positions}
        if past is not None:
            more["past_key_values"] = past
        with self._skipping():
            return self.lm.with_head_at(
                rows,
                places,
                lambda: (
                    self.lm.model(
                        input_ids=self.ids, attention_mask=self.mask, use_cache=past is not None, **more
                    ).logits
                ),
            )

    def places(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Columns of the places in what modules see."""
        return offsets + self.columns[rows]

    def select(self, rows: Tensor) -> Suffix:
        """The same for some of the sequences: ``rows`` (n,) int64 on the CPU."""
        return replace(
            self,
            columns=self.columns[rows],
            ids=_rows(self.ids, rows),
            mask=_rows(self.mask, rows),
            positions=None if self.positions is None else _rows(self.positions, rows),
            outputs=tuple(_like(out, _rows(hidden_of(out), rows)) for out in self.outputs),
            cache=tuple((_rows(k, rows), _rows(v, rows)) for k, v in self.cache),
        )

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        """Blocks before the first return what they returned; hooks on them still run."""
        blocks = [self.lm.block(layer) for layer in range(len(self.outputs))]
        before = [block.__dict__.get("forward") for block in blocks]
        for block, output in zip(blocks, self.outputs, strict=True):
            block.__dict__["forward"] = _returning(output)
        try:
            yield
        finally:
            for block, forward in zip(blocks, before, strict=True):
                if forward is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = forward


def suffix_run(
    lm: EditableLM,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    skipped: int,
    rows: Tensor,
    offsets: Tensor,
) -> tuple[Suffix, Tensor]:
    """Run a batch in full once, and prepare to run it again from block ``skipped`` and from ``starts`` on.

    Args:
        sequences: token ids. starts: index in each sequence of the token at which hidden states will change.
        skipped: how many blocks at the bottom are not run again.
        rows, offsets: places whose logits are wanted, as in :meth:`Suffix.logits`.

    Returns:
        the suffix, and the logits (n, vocabulary) of this first run, without gradient.
    """
    try:
        suffix, logits = _prepare(lm, sequences, starts, skipped, rows, offsets)
        with torch.no_grad():
            again = suffix.logits(rows, offsets)
        off = float((again.float().log_softmax(-1) - logits.float().log_softmax(-1)).abs().max())
        if off <= _TOLERANCE.get(logits.dtype, 0.0):
            return suffix, logits
        reason = f"log-probabilities differ by {off:.2g}"
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
    log.warning(
        "%s cannot be run from the middle (%s); searches run it in full", type(lm.model).__name__, reason
    )
    return _full(lm, sequences, starts, rows, offsets)


@torch.no_grad()
def _prepare(
    lm: EditableLM,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    skipped: int,
    rows: Tensor,
    offsets: Tensor,
) -> tuple[Suffix, Tensor]:
    earlier = max(starts)
    batch = lm.batch(sequences, [earlier - start for start in starts])
    ids, mask = batch.ids, batch.mask
    positions = (mask.cumsum(1) - 1) * mask
    outputs: list[Any] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(_like(output, hidden_of(output)[:, earlier:]))

    past = DynamicCache()  # not of the model's config: sliding windows would forget the earlier tokens
    kept = {"position_ids": positions, "past_key_values": past, "use_cache": True}
    with lm.hooked({lm.block(layer): keep for layer in range(skipped)}):
        logits = lm.with_head_at(
            rows, offsets + earlier, lambda: lm.model(input_ids=ids, attention_mask=mask, **kept).logits
        )
    layers: list[Any] = past.layers
    if len(layers) != lm.architecture.n_layers or any(
        layer.keys is None or layer.keys.shape[-2] != ids.shape[1] for layer in layers
    ):
        raise ValueError("its attention cache is not one of keys and values of all tokens")
    cache = tuple((layer.keys[..., :earlier, :], layer.values[..., :earlier, :]) for layer in layers)
    suffix = Suffix(
        lm,
        torch.zeros(len(sequences), dtype=torch.long),
        ids[:, earlier:],
        mask,
        positions[:, earlier:],
        tuple(outputs),
        cache if earlier else (),
    )
    return suffix, logits


@torch.no_grad()
def _full(
    lm: EditableLM, sequences: Sequence[Sequence[int]], starts: Sequence[int], rows: Tensor, offsets: Tensor
) -> tuple[Suffix, Tensor]:
    batch = lm.batch(sequences)
    suffix = Suffix(lm, torch.tensor(starts), batch.ids, batch.mask, None, (), ())
    return suffix, suffix.logits(rows, offsets)


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor[rows.to(tensor.device)]


def _like(output: Any, hidden: Tensor) -> Any:
    """What a block returned, with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
