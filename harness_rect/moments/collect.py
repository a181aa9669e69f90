"""Second moments of several layers from one pass over text, resumable.

A sample is the first ``tokens`` tokens of the text, document by document, each cut into windows the model
can read. Sums are kept in float64 and saved with the number of batches done, so an interrupted collection
goes on where it was and ends with the same bits. Several processes share the batches out and add up
their sums at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from harness_rect.errors import UserError
from harness_rect.io.progress import progress_bar
from harness_rect.io.resume import Resumable
from harness_rect.io.rows import as_text, json_lines, paragraphs
from harness_rect.models import EditableLM
from harness_rect.models.forwards import fused_gelu
from harness_rect.models.lm import Batch, chunks, stop_forward, unflatten
from harness_rect.precision import has_double
from harness_rect.processes import ALONE, Processes

log = logging.getLogger(__name__)

#: Tokens collected by default: several times the width of a 7B model's MLP, minutes rather than days.
DEFAULT_TOKENS = 50_000
WINDOW = 512
#: Width of the blocks of columns in which a sum is taken.
BLOCK = 1024
BATCH_TOKENS = 2048


def windows(lm: EditableLM, texts: Iterable[str], tokens: int) -> tuple[list[list[int]], int]:
    """Token windows of the first ``tokens`` tokens of the texts, and how many documents they came from.

    Raises:
        UserError: if the texts hold no tokens at all.
    """
    length = min(WINDOW, lm.max_length)
    found: list[list[int]] = []
    documents = total = 0
    for text in texts:
        if not text.strip():
            continue
        ids = lm.encoder.ids(text)[: tokens - total]
        documents += 1
        total += len(ids)
        found += [ids[i : i + length] for i in range(0, len(ids), length)]
        if total >= tokens:
            break
    if not total:
        raise UserError("the text for second moments is empty")
    if total < tokens:
        log.warning("the text for second moments has only %d tokens; %d were wanted", total, tokens)
    return found, documents


def _batches(sequences: list[list[int]]) -> list[list[list[int]]]:
    """Windows of like length together, the longest first: what does not fit into memory shows at once."""
    found = chunks([len(ids) for ids in sequences], BATCH_TOKENS)
    return [[sequences[i] for i in chunk] for chunk in reversed(found)]


def collect(
    lm: EditableLM,
    layers: Sequence[int],
    sequences: list[list[int]],
    partial: Path,
    fingerprint: str,
    processes: Processes = ALONE,
) -> tuple[dict[int, Tensor], int]:
    """Sum k k^T over all tokens of the windows for each layer, in one pass that ends at the deepest.

    Args:
        partial: file in which an unfinished collection is kept; removed when done. Of several processes each
            keeps one of its own beside it.
        fingerprint: a partial file with another one is not continued.
        processes: process r of n, all called alike, takes every n-th batch from the r-th on.

    Returns:
        layer -> sum (d_mlp, d_mlp) float64 on the CPU, and the number of tokens, over all processes.
    """
    width = lm.architecture.d_mlp
    device = lm.weight(lm.architecture.weight_name(min(layers))).device
    dtype = torch.float64 if has_double(device) else torch.float32
    sums = {layer: torch.zeros(width, width, dtype=dtype, device=device) for layer in layers}
    fingerprint = f"{fingerprint} window={WINDOW} batch={BATCH_TOKENS} block={BLOCK}"
    rank, number = processes.rank, processes.number
    if number > 1:
        partial = partial.with_name(f"{partial.stem}.{rank}-of-{number}{partial.suffix}")
    layers = sorted(sums)
    unfinished = Resumable(partial, f"{fingerprint} layers={layers} rank={rank} of {number}")
    done, count = _resume(unfinished, sums)
    batches = _batches(sequences)[rank::number]
    deepest = max(layers)

    def hook_for(layer: int, batch: Batch) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            keys = unflatten(args[0], batch)[batch.mask.bool().to(args[0].device)].float()
            total = sums[layer]
            # k k^T is symmetric: what lies above the blocks is not computed.
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


def _symmetric(total: Tensor) -> Tensor:
    """``total`` with its lower triangle above the diagonal, too; in place, block by block."""
    for start in range(0, len(total), BLOCK):
        stop = min(start + BLOCK, len(total))
        total[start:stop, stop:] = total[stop:, start:stop].T
        diagonal = total[start:stop, start:stop]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
    return total


def _resume(unfinished: Resumable, sums: dict[int, Tensor]) -> tuple[int, int]:
    """Load the sums of an interrupted collection in place; (batches done, tokens counted)."""
    found = unfinished.load()
    if found is None:
        return 0, 0
    tensors, state = found
    for layer, total in sums.items():
        total.copy_(tensors[str(layer)])
    log.info("resuming an interrupted collection after %d batches", state["done"])
    return state["done"], state["count"]


def texts_of(source: str) -> Iterator[str]:
    """Documents of a text source.

    Args:
        source: a path to a text file (a document is a run of lines up to a blank one), to a .jsonl file with
            a ``text`` field, or ``wikipedia`` / ``wikitext``, which are streamed from the hub.

    Raises:
        UserError: naming the source and what is accepted.
    """
    path = Path(source)
    if path.is_file():
        return _jsonl_texts(path) if path.suffix == ".jsonl" else paragraphs(path)
    if source in HUB_TEXTS:
        return _hub_texts(source)
    raise UserError(
        f"text for second moments: {source!r} is neither a file nor one of {', '.join(HUB_TEXTS)}"
    )


HUB_TEXTS = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}


def _jsonl_texts(path: Path) -> Iterator[str]:
    for row in json_lines(path):
        yield as_text(row.object().get("text"), f"{row.where}: text")


def _hub_texts(name: str) -> Iterator[str]:
    import datasets

    repository, configuration = HUB_TEXTS[name]
    try:
        stream = datasets.load_dataset(repository, configuration, split="train", streaming=True)
        for row in stream:
            yield row["text"]
    except (OSError, ValueError) as error:
        raise UserError(
            f"text {name!r} cannot be read from the hub ({type(error).__name__}); offline, give second"
            " moments with stats=DIR (made by `harness-rect stats --text FILE`), or mom2_adjustment: false"
        ) from None
