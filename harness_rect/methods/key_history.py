"""The linear system behind MEMIT and AlphaEdit, with the keys of earlier steps in it.

Both need X = (A + S + K K^T)^-1 K for the keys K (d_mlp, B) of a step, where A is what is to be preserved
(lambda C, or L2 P^+ for AlphaEdit) and S the sum of the key products of all earlier steps. With
M = (A + S)^-1, Woodbury's identity gives

    X = M K (I + K^T M K)^-1
    (A + S + K K^T)^-1 = M - X (M K)^T

so that a step costs products with B columns instead of a factorization, whatever the number of earlier keys.
M is formed once, when the first keys are remembered, and kept up to date. What is saved with a stream is the
keys alone: M is made again from them, batch by batch as before, so that an interrupted stream goes on with
the same bits. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]
#: Applies A^-1, a symmetric matrix, to columns: (d_mlp, n) float64 -> (d_mlp, n) float64.
Prior = Callable[[Tensor], Tensor]


def solve_with_history(prior: Prior, keys: Tensor, state: State, derived: State, name: str) -> Tensor:
    """(A + S + K K^T)^-1 K in float64.

    Args:
        keys: K, (d_mlp, B). state, name: where :func:`remember_keys` keeps the earlier keys under this name;
            without an entry S = 0. derived: where M is kept.
    """
    k = keys.double()
    return _solve(_solved(prior, k, state, derived, name), k)


def remember_keys(keys: Tensor, state: State, name: str) -> None:
    """Add K K^T to S. Arguments as in :func:`solve_with_history`; ``state`` stays on the CPU."""
    mine = keys.cpu()
    count = torch.tensor([mine.shape[1]])
    if f"{name}.keys" in state:
        mine = torch.cat([state[f"{name}.keys"], mine], 1)
        count = torch.cat([state[f"{name}.counts"], count])
    state.update({f"{name}.keys": mine, f"{name}.counts": count})


def _solved(prior: Prior, k: Tensor, state: State, derived: State, name: str) -> Tensor:
    """M K."""
    if f"{name}.keys" not in state:
        return prior(k)
    batches = state[f"{name}.keys"].split(state[f"{name}.counts"].tolist(), dim=1)
    done = int(derived.get(f"{name}.batches", torch.tensor(0)))
    if done == 0:
        derived[f"{name}.inverse"] = prior(torch.eye(len(k), dtype=k.dtype, device=k.device))
    inverse = derived[f"{name}.inverse"]
    for batch in batches[done:]:
        old = batch.to(k)
        solved = inverse @ old
        inverse.sub_(_solve(solved, old) @ solved.T)
    derived[f"{name}.batches"] = torch.tensor(len(batches))
    return inverse @ k


def _solve(solved: Tensor, k: Tensor) -> Tensor:
    """M K (I + K^T M K)^-1 from M K and K."""
    system = k.T @ solved
    system.diagonal().add_(1.0)
    return torch.linalg.solve(system, solved, left=False)
