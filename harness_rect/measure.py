"""Reliability, generalization and locality of edits, read directly from a model.

Accuracy is measured under teacher forcing: the share of a target's tokens that are the argmax of the model
given the prompt and the target tokens before them. ``locality`` compares argmax tokens with those of the
unedited model, as EasyEdit and the paper do; ``neighborhood_acc`` compares them with the reference answer, as
ROME's zsRE metric does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp

import torch

from harness_rect.edits import Edit, Probe
from harness_rect.errors import UserError
from harness_rect.methods.contexts import fill
from harness_rect.models import EditableLM

BATCH_SEQUENCES = 32

#: (prompt ids, target ids)
Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Forced:
    """One prompt with a target under teacher forcing: argmax at each target place, target ids, NLL (nats)."""

    argmax: tuple[int, ...]
    target: tuple[int, ...]
    nll: float

    @property
    def accuracy(self) -> float:
        return _share(self.argmax, self.target)


def _share(tokens: Sequence[int], others: Sequence[int]) -> float:
    """The share of places at which two sequences of one length have the same token."""
    return sum(a == b for a, b in zip(tokens, others, strict=True)) / len(others)


def longest_first(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Batches of indices, at most BATCH_SEQUENCES each, those of the greatest lengths first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for first in range(0, len(order), BATCH_SEQUENCES):
        yield order[first : first + BATCH_SEQUENCES]


@torch.no_grad()
def teacher_force(lm: EditableLM, pairs: Sequence[Pair]) -> list[Forced]:
    """Run (prompt ids, target ids) pairs, longest first in batches; results in the order given."""
    results: dict[int, Forced] = {}
    for chunk in longest_first([len(prompt) + len(target) for prompt, target in pairs]):
        batch = lm.batch([pairs[i][0] + pairs[i][1][:-1] for i in chunk])
        lengths = [len(pairs[i][1]) for i in chunk]
        rows = torch.arange(len(chunk)).repeat_interleave(torch.tensor(lengths))
        starts = [len(pairs[i][0]) - 1 for i in chunk]
        positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
        for i, logits in zip(chunk, lm.logits_at(batch, rows, positions).split(lengths), strict=True):
            target = pairs[i][1]
            log_probs = logits.float().log_softmax(-1)
            nll = -log_probs[torch.arange(len(target)), torch.tensor(target)].sum().item()
            results[i] = Forced(tuple(log_probs.argmax(-1).tolist()), tuple(target), nll)
    return [results[i] for i in range(len(pairs))]


@dataclass(frozen=True)
class EditProbes:
    """Token ids of everything one edit is measured on.

    unreadable: number of prompts left out because they are too long for the model.
    answered: for each locality pair, whether the row has a reference answer, which is then the target.
    """

    rewrite: Pair
    paraphrases: list[Pair]
    locality: list[Pair]
    answered: list[bool]
    unreadable: int

    @property
    def pairs(self) -> list[Pair]:
        return [self.rewrite, *self.paraphrases, *self.locality]


def probes(lm: EditableLM, edit: Edit, templates: Sequence[str] = ("{}",)) -> EditProbes:
    """Tokenize an edit's prompts.

    A locality prompt without a reference answer is observed at its next token only.

    Args:
        templates: prefixes the edit prompt will be read with.

    Raises:
        UserError: naming the row, if the model cannot read its prompt under one of the templates or the
            tokenizer has no tokens for its target.
    """
    try:
        longest = max(_length(lm.encoder.continuation(fill(t, edit.text), edit.target)) for t in templates)
        if longest > lm.max_length:
            raise UserError(f"prompt and prefix take {longest} tokens; this model reads {lm.max_length}")
        rewrite = lm.encoder.continuation(edit.text, edit.target)
        paraphrases = [lm.encoder.continuation(text, edit.target) for text in edit.paraphrases]
        locality = [_locality_pair(lm, probe) for probe in edit.neighborhood]
    except UserError as error:
        raise UserError(f"{edit.where}: {error}") from None
    answered = [probe.answer is not None for probe in edit.neighborhood]
    kept = [i for i, pair in enumerate(locality) if _length(pair) <= lm.max_length]
    readable = [pair for pair in paraphrases if _length(pair) <= lm.max_length]
    return EditProbes(
        rewrite=rewrite,
        paraphrases=readable,
        locality=[locality[i] for i in kept],
        answered=[answered[i] for i in kept],
        unreadable=len(paraphrases) - len(readable) + len(locality) - len(kept),
    )


def _length(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1]) - 1


def _locality_pair(lm: EditableLM, probe: Probe) -> Pair:
    if probe.answer is None:
        return lm.encoder.ids(probe.prompt), [0]  # the id is a placeholder: only the argmax is used
    return lm.encoder.continuation(probe.prompt, with_space(probe.answer))


def with_space(answer: str) -> str:
    """The answer as it follows a prompt: one leading space, added only where none is there."""
    return answer if answer.startswith(" ") else " " + answer


#: Edit id -> the argmax tokens of the unedited model at each of the edit's locality prompts.
Baseline = dict[str, list[tuple[int, ...]]]


def measure_baseline(lm: EditableLM, probed: dict[str, EditProbes]) -> Baseline:
    """Run the unedited model on all locality prompts of a stream."""
    results = iter(teacher_force(lm, [pair for p in probed.values() for pair in p.locality]))
    return {id: [next(results).argmax for _ in p.locality] for id, p in probed.items()}


def measure(
    lm: EditableLM, probed: dict[str, EditProbes], baseline: Baseline, ids: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Metrics of the edits ``ids`` on the model as it is now.

    Returns:
        id -> ``reliability``, ``target_probability``, and where the row has prompts for them
        ``generalization``, ``locality``, ``neighborhood_acc``; each in [0, 1].
    """
    pairs = [pair for id in ids for pair in probed[id].pairs]
    results = iter(teacher_force(lm, pairs))
    found: dict[str, dict[str, float]] = {}
    for id in ids:
        p = probed[id]
        rewrite, *others = [next(results) for _ in p.pairs]
        paraphrases, locality = others[: len(p.paraphrases)], others[len(p.paraphrases) :]
        scores = {
            "reliability": [rewrite.accuracy],
            "target_probability": [exp(-rewrite.nll)],
            "generalization": [forced.accuracy for forced in paraphrases],
            "locality": [_share(f.argmax, was) for f, was in zip(locality, baseline[id], strict=True)],
            "neighborhood_acc": [f.accuracy for f, has in zip(locality, p.answered, strict=True) if has],
        }
        found[id] = {name: sum(values) / len(values) for name, values in scores.items() if values}
    return found


def averages(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the edits that have it; a metric that none has is absent."""
    names = sorted({name for s in scores for name in s})
    values = {name: [s[name] for s in scores if name in s] for name in names}
    return {name: sum(of) / len(of) for name, of in values.items()}
