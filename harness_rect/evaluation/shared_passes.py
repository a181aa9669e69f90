"""Answering many token-id requests from few forward passes.

A causal model says the same at a token whatever follows it. A request whose sequence is the beginning of
another request's is therefore answered by the other one's pass: the n requests that ask for n target tokens
under teacher forcing need one pass, not n.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Ids = tuple[int, ...]


def carriers(sequences: Sequence[Ids]) -> dict[Ids, list[int]]:
    """The sequences that are no beginning of another one, longest first.

    Returns:
        Each with the indices of all sequences that it begins with or equals; every index stands once, that
        of the sequence itself first.
    """
    found: dict[Ids, list[int]] = {}
    carrier: Ids = ()
    # Sorted, a sequence stands right before those that it begins.
    for index in sorted(range(len(sequences)), key=sequences.__getitem__, reverse=True):
        if carrier[: len(sequences[index])] != sequences[index]:
            carrier = sequences[index]
        found.setdefault(carrier, []).append(index)
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def score(
    logits: Tensor, ends: Sequence[int], targets: Sequence[Sequence[int]], dtype: torch.dtype | None = None
) -> list[tuple[float, bool]]:
    """What lm-eval answers a request with, for several requests on one sequence.

    Args:
        logits: (tokens, vocabulary) of the sequence.
        ends: of each request, the number of its input tokens; the logits there are those of its last target
            token.
        targets: of each request, the target ids.
        dtype: of the log-probabilities; None leaves that of the logits.

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
