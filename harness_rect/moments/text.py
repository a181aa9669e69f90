"""Texts from which second moments are computed, split into windows of tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness_rect.errors import UserError
from harness_rect.io.rows import as_text, json_lines, paragraphs
from harness_rect.models import EditableLM

log = logging.getLogger(__name__)

#: Number of tokens read by default: several times the width of a 7B model's MLP; takes minutes.
DEFAULT_TOKENS = 50_000
#: Maximum number of tokens in a window.
WINDOW = 512
HUB_TEXTS = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}


def texts_of(source: str) -> Iterator[str]:
    """Documents of a text source.

    Args:
        source: a path to a text file (a document is a run of lines up to a blank one), to a .jsonl file with
            a ``text`` field, or ``wikipedia`` / ``wikitext``, which are streamed from the hub.

    Raises:
        UserError: it is none of these; raised before the first document is read.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".jsonl":
            return paragraphs(path)
        return (as_text(row.object().get("text"), f"{row.where}: text") for row in json_lines(path))
    if source in HUB_TEXTS:
        return _hub_texts(source)
    raise UserError(
        f"text for second moments: {source!r} is neither a file nor one of {', '.join(HUB_TEXTS)}"
    )


def _hub_texts(name: str) -> Iterator[str]:
    import datasets

    repository, configuration = HUB_TEXTS[name]
    try:
        for row in datasets.load_dataset(repository, configuration, split="train", streaming=True):
            yield row["text"]
    except (OSError, ValueError) as error:
        raise UserError(
            f"text {name!r} cannot be read from the hub ({type(error).__name__}); offline, give second"
            " moments with stats=DIR (made by `harness-rect stats --text FILE`), or mom2_adjustment: false"
        ) from None


def windows(lm: EditableLM, texts: Iterable[str], tokens: int) -> tuple[list[list[int]], int]:
    """Windows of the first ``tokens`` tokens of the texts, and the number of documents they are from.

    A window is part of one document and at most as long as the model can read.

    Raises:
        UserError: the texts have no tokens.
    """
    length = min(WINDOW, lm.max_length)
    found: list[list[int]] = []
    documents = total = 0
    for text in texts:
        if not text.strip():
            continue
        ids = lm.encoder.tokens(text)[: tokens - total]
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
