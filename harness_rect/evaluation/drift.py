"""``rect_drift``: how far the edited model's predictions are from the unedited model's, on a fixed text.

The text is cut into windows that the model can read, and a document is a segment of at most SEGMENT tokens,
read after what stands before it in its window.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers

from harness_rect import embedded
from harness_rect.compat.lm_eval import COMPARE_IDS, SCORE_IDS, IdRequest, request_fields
from harness_rect.errors import UserError, one_line_errors
from harness_rect.evaluation.catalogue import TASKS
from harness_rect.evaluation.data import data_choice, file_in, folder_of
from harness_rect.evaluation.task import RectTask, load_tokenizer
from harness_rect.io.rows import read_text
from harness_rect.models.lm import TextEncoder
from harness_rect.models.load import load_errors

#: Read where ``data`` names no folder with a text of its own.
TEXT = Path(__file__).with_name("drift.txt")
#: Tokens of a document.
SEGMENT = 128
#: The most tokens of a window, so that models that read more are compared on the same terms.
WINDOW = 1024


def segments(**metadata: Any) -> dict[str, datasets.Dataset]:
    """The documents of the text (``custom_dataset``): text, context (token ids before it) and ids.

    Args:
        **metadata: ``data`` names the text; the tokenizer is that of the model, as for editing tasks.

    Raises:
        UserError: the text or the tokenizer cannot be read, or the text is too short.
    """
    with one_line_errors():
        file = _file(data_choice(metadata))
        encoder = load_tokenizer(metadata)
        ids = encoder.tokens(read_text(file))
        documents = list(_documents(ids, _window(metadata, encoder), encoder))
        if not documents:
            raise UserError(f"rect_drift: {file} has no two tokens; put a longer text there")
        return {"test": datasets.Dataset.from_list(documents)}


def _file(data: str) -> Path:
    folder = folder_of(data)
    if folder is not None and not folder.is_dir():
        raise UserError(f"rect_drift: data={data} is not a folder; expected hub, tiny or a folder")
    return file_in(folder, TASKS["rect_drift"].file) or TEXT


def _window(metadata: dict[str, Any], encoder: TextEncoder) -> int:
    """How many tokens the model reads at once, and at most WINDOW."""
    metadata = embedded.of_tasks(metadata)
    name = embedded.resolve_model(metadata.get("pretrained"))
    asked = metadata.get("max_length")
    if asked is not None and not (re.fullmatch(r"\d{1,9}", str(asked), re.ASCII) and int(asked) > 1):
        raise UserError(f"rect_drift: max_length={str(asked)[:100]}: expected a number from 2 on")
    lengths = [asked, encoder.tokenizer.model_max_length]
    if isinstance(name, str):
        with load_errors(f"pretrained={name}"):
            config = transformers.AutoConfig.from_pretrained(
                name,
                revision=str(metadata.get("revision", "main")),
                trust_remote_code=bool(metadata.get("trust_remote_code", False)),
                subfolder=metadata.get("subfolder") or "",
            )
        lengths.append(getattr(config.get_text_config(), "max_position_embeddings", None))
    return min(WINDOW, *(int(length) for length in lengths if length))


def _documents(ids: list[int], window: int, encoder: TextEncoder) -> Iterator[dict[str, Any]]:
    """Every token is predicted once, but for the first of all where no BOS stands before it."""
    bos = encoder.tokenizer.bos_token_id
    start = [ids[0]] if ids and ids[0] == bos else []
    body = ids[len(start) :]
    at = 0 if start else 1
    while at < len(body):
        context = start or body[at - 1 : at]  # a window without BOS begins with the token before it
        end = min(at + window - len(context), len(body))
        for first in range(at, end, SEGMENT):
            part = body[first : min(first + SEGMENT, end)]
            yield {
                "text": encoder.tokenizer.decode(part),
                "context": context + body[at:first],
                "ids": part,
            }
        at = end


class DriftTask(RectTask):
    """Compares distributions of the next token at each place of the text.

    kl: mean over the tokens of KL(unedited || edited), in nats. perplexity: exp of the edited model's mean
    NLL; perplexity_unedited: of the unedited model's. argmax_changed: share of tokens at which the likeliest
    next token is another one. Model classes that do not know the unedited model have the perplexity only.
    """

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **kwargs: Any) -> list[IdRequest]:
        arguments = (doc["text"], doc["context"], doc["ids"])
        fields = {"doc": doc, "arguments": arguments, **request_fields(self, kwargs)}
        return [
            IdRequest(request_type=kind, idx=index, **fields)
            for index, kind in enumerate((SCORE_IDS, COMPARE_IDS))
        ]

    def process_results(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        (log_likelihood, _), compared = results
        tokens = len(doc["ids"])
        values = {"perplexity": -log_likelihood}
        if compared is not None:
            kl, changed, before = compared
            values |= {"kl": kl, "argmax_changed": changed, "perplexity_unedited": -before}
        return {metric: (value, tokens) for metric, value in values.items()}
