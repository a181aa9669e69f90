"""Reliability, generalization and locality of edits when the model really generates (arXiv 2502.11177).

``measure=generated`` asks the session for them. They are what the task rect_autoregressive reports, with bare
prompts, but right after each edit as well as at the end of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from harness_rect.answers import MAX_NEW_TOKENS, STOPS, cut, same_answer
from harness_rect.edits import Edit
from harness_rect.errors import UserError
from harness_rect.measure import longest_first
from harness_rect.models import EditableLM

#: Edit id -> what the unedited model generates at each of the edit's locality prompts.
Answers = dict[str, list[str]]


class _AllStopped(StoppingCriteria):
    """Ends the sequences whose generated part, from the token ``start`` on, holds a stop."""

    def __init__(self, lm: EditableLM, start: int) -> None:
        self._decode, self._start = lm.encoder.tokenizer.decode, start

    def __call__(self, input_ids: Any, scores: Any, **given: Any) -> Any:
        texts = [self._decode(row) for row in input_ids[:, self._start :].tolist()]
        return torch.tensor([any(s in text for s in STOPS) for text in texts], device=input_ids.device)


@torch.no_grad()
def generate(lm: EditableLM, prompts: Sequence[str]) -> list[str]:
    """Greedy answers of at most MAX_NEW_TOKENS tokens, cut at the first stop, in the order of the prompts.

    A prompt that leaves no room for an answer loses its beginning, as in lm-eval.

    Raises:
        UserError: the model reads no more tokens than an answer has.
    """
    room = lm.max_length - MAX_NEW_TOKENS
    if room < 1:
        raise UserError(f"measure=generated needs a model that reads more than {MAX_NEW_TOKENS} tokens")
    ids = [lm.encoder.ids(prompt)[-room:] for prompt in prompts]
    answers: dict[int, str] = {}
    for chunk in longest_first([len(row) for row in ids]):
        answers |= zip(chunk, _batch(lm, [ids[i] for i in chunk]), strict=True)
    return [answers[i] for i in range(len(ids))]


def _batch(lm: EditableLM, ids: Sequence[Sequence[int]]) -> list[str]:
    """Answers to prompts that are generated together, padded on the left."""
    longest = max(map(len, ids))
    rows = [[lm.pad_id] * (longest - len(row)) + list(row) for row in ids]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
    model: Any = lm.model
    found: Tensor = model.generate(
        input_ids=torch.tensor(rows, device=lm.input_device),
        attention_mask=torch.tensor(mask, device=lm.input_device),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=lm.pad_id,
        stopping_criteria=StoppingCriteriaList([_AllStopped(lm, longest)]),
    )
    decode = lm.encoder.tokenizer.decode
    return [cut(str(decode(row, skip_special_tokens=True))) for row in found[:, longest:].tolist()]


def unedited_answers(lm: EditableLM, edits: Sequence[Edit]) -> Answers:
    """Run the unedited model on all locality prompts of a stream."""
    found = iter(generate(lm, [probe.prompt for edit in edits for probe in edit.neighborhood]))
    return {edit.id: [next(found) for _ in edit.neighborhood] for edit in edits}


def measure_generated(
    lm: EditableLM, edits: Sequence[Edit], unedited: Answers
) -> dict[str, dict[str, float]]:
    """Metrics of ``edits`` on the model as it is now.

    Returns:
        id -> ``reliability_gen`` and, where the edit has prompts for them, ``generalization_gen`` and
        ``locality_gen``: shares of answers that are the target, or the unedited model's, in [0, 1].
    """
    prompts = [
        [edit.text, *edit.paraphrases, *(probe.prompt for probe in edit.neighborhood)] for edit in edits
    ]
    said = iter(generate(lm, [prompt for of in prompts for prompt in of]))
    found: dict[str, dict[str, float]] = {}
    for edit, of in zip(edits, prompts, strict=True):
        answers = [next(said) for _ in of]
        first = 1 + len(edit.paraphrases)
        right = [same_answer(answer, edit.target_new) for answer in answers[:first]]
        same = [now == before for now, before in zip(answers[first:], unedited[edit.id], strict=True)]
        scores = {
            "reliability_gen": right[:1],
            "generalization_gen": right[1:],
            "locality_gen": same,
        }
        found[edit.id] = {name: sum(values) / len(values) for name, values in scores.items() if values}
    return found
