"""Sums of k k^T over the tokens of a text, for several layers in one pass, resumable.

Sums are kept in float64 and saved with the number of batches done, so that an interrupted computation resumes
and ends with the same bits. Several processes divide the batches among them and add up their sums at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from harness_rect.io.progress import progress_bar
from harness_rect.io.resume import Resumable
from harness_rect.models import EditableLM
from harness_rect.models.forwards import fused_gelu
from harness_rect.models.lm import Batch, chunks, stop_forward, unflatten
from harness_rect.moments.text import WINDOW
from harness_rect.precision import has_double
from harness_rect.processes import ALONE, Processes

log = logging.getLogger(__name__)

#: Width of the blocks of columns in which a sum is taken.
BLOCK = 1024
BATCH_TOKENS = 2048


def accumulate(
    lm: EditableLM,
    layers: Sequence[int],
    sequences: list[list[int]],
    partial: Path,
    fingerprint: str,
    processes: Processes = ALONE,
    must: bool = True,
) -> tuple[dict[int, Tensor], int]:
    """Sum k k^T over all tokens of the windows for each layer, in one pass that ends at the deepest.

    Args:
        partial: file of the unfinished sums, removed at the end. Several processes have one file each, whose
            names are made from this one.
        fingerprint: of the model and the text; a file with another fingerprint is not continued.
        must: an error in saving the unfinished sums ends the computation.
        processes: process r of n takes batches r, r + n, r + 2n, ...; all must be called alike.

    Returns:
        layer -> sum (d_mlp, d_mlp) float64 on the CPU, and the number of tokens, over all processes.
    """
    width = lm.architecture.d_mlp
    device = lm.weight(lm.architecture.weight_name(min(layers))).device
    dtype = torch.float64 if has_double(device) else torch.float32
    sums = {layer: torch.zeros(width, width, dtype=dtype, device=device) for layer in layers}
    rank, number = processes.rank, processes.number
    if number > 1:
        partial = partial.with_name(f"{partial.stem}.{rank}-of-{number}{partial.suffix}")
    sizes = f"window={WINDOW} batch={BATCH_TOKENS} block={BLOCK}"
    unfinished = Resumable(partial, f"{fingerprint} layers={sorted(layers)} {sizes}", must)
    done, count = _resume(unfinished, sums)
    batches = _batches(sequences)[rank::number]
    deepest = max(layers)

    def hook_for(layer: int, batch: Batch) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            keys = unflatten(args[0], batch)[batch.mask.bool().to(args[0].device)].float()
            total = sums[layer]
            # k k^T is symmetric: only the diagonal blocks and those below them are computed.
            for start in range(0, width, BLOCK):
                block = slice(start, start + BLOCK)
                total[start:, block] += (keys[:, start:].T @ keys[:, block]).to(total)
            if layer == deepest:
                stop_forward()

        return hook

    with (
        progress_bar(processes.is_main) as progress,
        torch.no_grad(),
        lm.frozen(),
        fused_gelu(lm.model),
    ):
        bar = progress.add_task("second moments", total=len(batches), completed=done)
        for index in range(done, len(batches)):
            batch = lm.batch(batches[index])
            lm.run_hooked({layer: hook_for(layer, batch) for layer in layers}, batch)
            count += sum(batch.lengths)
            progress.advance(bar)
            if unfinished.due:
                tensors = {str(layer): total for layer, total in sums.items()}
                unfinished.save(tensors, {"done": index + 1, "count": count})
    whole = {layer: _symmetric(processes.add_up(sums[layer]).double()) for layer in layers}
    tokens = int(processes.add_up(torch.tensor(count)))
    unfinished.finish()
    return whole, tokens


def _batches(sequences: list[list[int]]) -> list[list[list[int]]]:
    """Batches of windows of similar length; the longest first, so that a lack of memory shows at once."""
    found = chunks([len(ids) for ids in sequences], BATCH_TOKENS)
    return [[sequences[i] for i in chunk] for chunk in reversed(found)]


def _symmetric(total: Tensor) -> Tensor:
    """``total`` with its lower triangle copied above the diagonal; in place, block by block."""
    for start in range(0, len(total), BLOCK):
        stop = min(start + BLOCK, len(total))
        total[start:stop, stop:] = total[stop:, start:stop].T
        diagonal = total[start:stop, start:stop]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
    return total


def _resume(unfinished: Resumable, sums: dict[int, Tensor]) -> tuple[int, int]:
    """Load the sums of an interrupted computation in place; (batches done, tokens counted)."""
    found = unfinished.load()
    if found is None:
        return 0, 0
    tensors, state = found
    for layer, total in sums.items():
        total.copy_(tensors[str(layer)])
    log.info("resuming an interrupted computation after %d batches", state["done"])
    return state["done"], state["count"]
