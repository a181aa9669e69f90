"""Answering many token-id requests from few forward passes.

A causal model gives the same logits at a token whatever follows it. A request whose sequence is a prefix of
another request's is therefore answered by the other one's pass: the n requests that ask for the n target
tokens under teacher forcing need one pass, not n.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Ids = tuple[int, ...]


def grouped_by_prefix(sequences: Sequence[Ids]) -> dict[Ids, list[int]]:
    """The sequences that are not a prefix of another one, longest first.

    Returns:
        Each with the indices of the sequences that are a prefix of it, its own first; every index occurs in
        one group.
    """
    found: dict[Ids, list[int]] = {}
    longest: Ids = ()
    # In descending order a sequence comes right after those that begin with it.
    for index in sorted(range(len(sequences)), key=sequences.__getitem__, reverse=True):
        if longest[: len(sequences[index])] != sequences[index]:
            longest = sequences[index]
        found.setdefault(longest, []).append(index)
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def score(
    logits: Tensor, ends: Sequence[int], targets: Sequence[Sequence[int]], dtype: torch.dtype | None = None
) -> list[tuple[float, bool]]:
    """lm-eval's answers to several requests on one sequence.

    Args:
        logits: (tokens, vocabulary) of the sequence.
        ends: number of input tokens of each request; the last of them predicts its last target token.
        targets: target ids of each request.
        dtype: dtype of the log-probabilities; None: that of the logits.

    Returns:
        For each request the log-probability of its target (nats), and whether every token is the argmax.
    """
    first = min(end - len(target) for end, target in zip(ends, targets, strict=True))
    log_probs = logits[first : max(ends)].log_softmax(-1, dtype)
    best = log_probs.argmax(-1).tolist()
    answers = []
    for end, target in zip(ends, targets, strict=True):
        places = slice(end - len(target) - first, end - first)
        ids = torch.tensor(target, device=logits.device)
        total = log_probs[places].gather(1, ids[:, None]).sum()
        answers.append((float(total), best[places] == list(target)))
    return answers
