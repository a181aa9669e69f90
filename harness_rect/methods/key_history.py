"""The linear system behind MEMIT and AlphaEdit, with the keys of earlier steps in it.

Both need X = (A + S + K K^T)^-1 K for the keys K (d_mlp, B) of a step, where A is what is to be preserved
(lambda C, or L2 P^+ for AlphaEdit) and S the sum of the key products of all earlier steps. With the earlier
keys J (d_mlp, n), H = [J K] and G = A^-1 H, Woodbury's identity gives

    X = the last B columns of G (I + H^T G)^-1

so a step solves with A for its own keys only, and else with an (n + B) system: J, A^-1 J and J^T A^-1 J are
kept from step to step. Once there are more old keys than dimensions, A^-1 S is kept instead and the full
system is solved. All in float64.

To keep (A + S)^-1 itself instead and update it makes the solve twice as fast, but not solve and update
together, and its errors grow from update to update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]
#: Applies A^-1 to columns: (d_mlp, n) float64 -> (d_mlp, n) float64.
Prior = Callable[[Tensor], Tensor]


def solve_with_history(prior: Prior, keys: Tensor, state: State, name: str) -> Tensor:
    """(A + S + K K^T)^-1 K in float64.

    Args:
        keys: K, (d_mlp, B). state, name: where :func:`remember_keys` keeps S under this name; without an
        entry S = 0.
    """
    k = keys.double()
    g = prior(k)
    folded = _get(state, f"{name}.folded", k)
    if folded is not None:
        return torch.linalg.solve(_plus_identity(folded + g @ k.T), g)
    old = _old_keys(state, name, k)
    if old is None:
        return torch.linalg.solve(_plus_identity(k.T @ g), g, left=False)
    _, solved, gram = old
    system = _plus_identity(_bordered(gram, solved.T @ k, k.T @ g))
    last = torch.zeros(len(system), k.shape[1], dtype=k.dtype, device=k.device)
    last[-k.shape[1] :] = torch.eye(k.shape[1], dtype=k.dtype, device=k.device)
    weights = torch.cholesky_solve(last, torch.linalg.cholesky(system))
    return solved @ weights[: -k.shape[1]] + g @ weights[-k.shape[1] :]


def remember_keys(prior: Prior, keys: Tensor, state: State, name: str) -> None:
    """Add K K^T to S. Arguments as in :func:`solve_with_history`; the state stays on the CPU."""
    k = keys.double()
    g = prior(k)
    folded = _get(state, f"{name}.folded", k)
    if folded is not None:
        state[f"{name}.folded"] = (folded + g @ k.T).cpu()
        return
    parts = k, g, k.T @ g
    if (old := _old_keys(state, name, k)) is not None:
        before, solved, gram = old
        parts = torch.cat([before, k], 1), torch.cat([solved, g], 1), _bordered(gram, solved.T @ k, parts[2])
    if parts[0].shape[1] > len(k):
        for part in _PARTS:
            state.pop(f"{name}.{part}", None)
        state[f"{name}.folded"] = (parts[1] @ parts[0].T).cpu()
    else:
        state.update({f"{name}.{part}": value.cpu() for part, value in zip(_PARTS, parts, strict=True)})


#: J, A^-1 J and J^T A^-1 J, kept together.
_PARTS = ("keys", "solved", "gram")


def _old_keys(state: State, name: str, like: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    if f"{name}.keys" not in state:
        return None
    keys, solved, gram = (state[f"{name}.{part}"].to(like) for part in _PARTS)
    return keys, solved, gram


def _bordered(block: Tensor, side: Tensor, corner: Tensor) -> Tensor:
    """The symmetric [[block, side], [side^T, corner]]."""
    return torch.cat([torch.cat([block, side], 1), torch.cat([side.T, corner], 1)])


def _get(state: State, name: str, like: Tensor) -> Tensor | None:
    found = state.get(name)
    return None if found is None else found.to(like)


def _plus_identity(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
