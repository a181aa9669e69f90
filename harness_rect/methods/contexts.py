"""Context templates: short texts of the unedited model put before a prompt, so that an edit holds there too.

``context_template_length_params: [[5, 10], [10, 10]]`` means 10 texts of at most 5 tokens and 10 of at most
10 tokens, the start word included, shared out over five start words (EasyEdit's ROME, which the paper used;
the original ROME starts from the end-of-text token). A text becomes the template ``{text}. {}``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harness_rect.errors import UserError
from harness_rect.models import EditableLM

START_WORDS = ("The", "Therefore", "Because", "I", "You")
#: Each token is drawn from this many, the most probable ones.
TOP_K = 5
BARE = "{}"
#: The most templates, and the most tokens of one that is sampled.
MOST_TEMPLATES, MOST_TOKENS = 1000, 1000


def fill(template: str, text: str) -> str:
    """The template with ``text`` at its marker; braces inside ``text`` stay as they are."""
    before, _, after = template.partition(BARE)
    return before + text + after


def check_number(templates: int) -> None:
    """Refuse more templates than would ever be searched to the end.

    Raises:
        UserError: there are too many.
    """
    if templates > MOST_TEMPLATES:
        raise UserError(f"{templates} context templates; expected at most {MOST_TEMPLATES}")


def check_templates(templates: Sequence[str]) -> list[str]:
    """A flat list of templates, each with the marker ``{}`` exactly once.

    Raises:
        UserError: naming the offending template, or see :func:`check_number`.
    """
    check_number(len(templates))
    for template in templates:
        if not isinstance(template, str) or template.count(BARE) != 1:
            raise UserError(f"context_templates: {template!r} must be a text with {{}} in it exactly once")
    if not templates:
        raise UserError("context_templates is empty; it needs at least '{}'")
    return list(templates)


def sample_templates(lm: EditableLM, length_params: Sequence[tuple[int, int]], seed: int) -> list[str]:
    """``{}`` and the sampled templates of ``length_params``, the same for the same model and seed.

    Args:
        length_params: (longest length in tokens, number of texts) pairs.
        seed: of the CPU generator the next tokens are drawn with.
    """
    generator = torch.Generator().manual_seed(seed)
    templates = [BARE]
    for length, count in length_params:
        starts = [START_WORDS[i * len(START_WORDS) // count] for i in range(count)]
        for text in _sample(lm, starts, length, generator):
            clean = text.replace("{", " ").replace("}", " ")
            templates.append(f"{clean}. {BARE}")
    return templates


@torch.no_grad()
def _sample(lm: EditableLM, starts: Sequence[str], length: int, generator: torch.Generator) -> list[str]:
    tokenizer = lm.encoder.tokenizer
    special = set(tokenizer.all_special_ids)
    sequences = [lm.encoder.tokens(start) for start in starts]
    begin = [sum(token in special for token in ids) for ids in sequences]  # BOS does not count as text
    while any(len(ids) - b < length for ids, b in zip(sequences, begin, strict=True)):
        batch = lm.batch(sequences)
        logits = lm.logits(batch).float().cpu()
        for row, ids in enumerate(sequences):
            if len(ids) - begin[row] >= length:
                continue
            last = logits[row, len(ids) - 1]
            last[[token for token in special if token < len(last)]] = -torch.inf  # never ends a document
            best = torch.topk(last, min(TOP_K, last.numel()))
            choice = torch.multinomial(torch.softmax(best.values, 0), 1, generator=generator)
            ids.append(int(best.indices[choice]))
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in sequences]
