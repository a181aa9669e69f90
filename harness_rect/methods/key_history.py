"""The linear system behind MEMIT and AlphaEdit, with the keys of earlier steps in it.

Both need X = (A + S + K K^T)^-1 K for the keys K (d_mlp, B) of a step, where A is what is to be preserved
(lambda C, or L2 P^+ for AlphaEdit) and S the sum of the key products of all earlier steps. With the earlier
keys J (d_mlp, n), G_J = A^-1 J and G = A^-1 K, Woodbury's identity, applied to J and then to K, gives

    F F^T = I + J^T G_J,   Y = F^-1 G_J^T K
    X = (G - G_J F^-T Y) (I + K^T G - Y^T Y)^-1

so a step solves with A for its own keys only. J, G_J and the Cholesky factor F are kept from step to step; F
grows by the rows [Y^T, chol(I + K^T G - Y^T Y)]. Once there are more old keys than dimensions, or where
rounding leaves no such factor, A^-1 S is kept instead and X = (I + A^-1 S + G K^T)^-1 G solved in full, as it
is for a step of more keys than dimensions. All in float64.

To keep (A + S)^-1 itself instead and update it makes the solve faster, but not solve and update together,
and its errors grow from update to update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness_rect.precision import in_double

State = dict[str, Tensor]
#: Applies A^-1 to columns: (d_mlp, n) float64 -> (d_mlp, n) float64.
Prior = Callable[[Tensor], Tensor]
#: J, G_J and F, kept together.
_PARTS = ("keys", "solved", "factor")


def solve_with_history(
    prior: Prior,
    keys: Tensor,
    state: State,
    name: str,
    note: Callable[[float], None] = lambda condition: None,
) -> Tensor:
    """(A + S + K K^T)^-1 K in float64.

    Args:
        keys: K, (d_mlp, B). state, name: where :func:`remember_keys` keeps S under this name; without an
        entry S = 0.
        note: called with an upper bound of the condition (2-norm) of the system that is solved: no eigenvalue
            of I + A^-1 (S + K K^T), or of the small system, is below 1, and none above its 1-norm.
    """
    k = in_double(keys)
    g = prior(k)
    if f"{name}.folded" in state:
        folded = state[f"{name}.folded"].to(k)
    else:
        before, solved, factor = _old_keys(state, name, k)
        if k.shape[1] <= len(k):
            y, system = _against_old(solved, factor, k, g)
            if not int(torch.linalg.cholesky_ex(system).info):  # positive definite in spite of rounding
                note(norm_1(system))
                x = g - solved @ torch.linalg.solve_triangular(factor.T, y, upper=True)
                return torch.linalg.solve(system, x, left=False)
        folded = solved @ before.T
    system = _plus_identity(g @ k.T + folded)
    note(norm_1(system))
    return torch.linalg.solve(system, g)


def remember_keys(prior: Prior, keys: Tensor, state: State, name: str) -> None:
    """Add K K^T to S. Arguments as in :func:`solve_with_history`; the state stays on the CPU."""
    k = in_double(keys)
    g = prior(k)
    if f"{name}.folded" in state:
        kept = {"folded": state[f"{name}.folded"].to(k) + g @ k.T}
    else:
        before, solved, factor = _old_keys(state, name, k)
        all_keys, all_solved = torch.cat([before, k], 1), torch.cat([solved, g], 1)
        larger = _extended(factor, solved, k, g) if all_keys.shape[1] <= len(k) else None
        if larger is None:
            kept = {"folded": all_solved @ all_keys.T}
        else:
            kept = dict(zip(_PARTS, (all_keys, all_solved, larger), strict=True))
    for part in _PARTS:
        state.pop(f"{name}.{part}", None)
    # Contiguous, as tensors read from a file are, so that a resumed run gives the same bits.
    state |= {f"{name}.{part}": value.contiguous().cpu() for part, value in kept.items()}


def _old_keys(state: State, name: str, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """J (d_mlp, n), G_J (d_mlp, n) and F (n, n), where ``k`` lies; n = 0 at first."""
    if f"{name}.keys" not in state:
        return k[:, :0], k[:, :0], k.new_empty(0, 0)
    keys, solved, factor = (state[f"{name}.{part}"].to(k) for part in _PARTS)
    return keys, solved, factor


def _extended(factor: Tensor, solved: Tensor, k: Tensor, g: Tensor) -> Tensor | None:
    """F with the rows of new keys, None where rounding leaves no such factor."""
    y, system = _against_old(solved, factor, k, g)
    corner, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        return None
    above = torch.cat([factor, factor.new_zeros(len(factor), len(corner))], 1)
    return torch.cat([above, torch.cat([y.T, corner], 1)])


def _against_old(solved: Tensor, factor: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Y (n, B) and I + K^T G - Y^T Y (B, B)."""
    y = torch.linalg.solve_triangular(factor, solved.T @ k, upper=False)
    return y, _plus_identity(k.T @ g - y.T @ y)


def norm_1(matrix: Tensor) -> float:
    """The largest sum of absolute values in a column."""
    return float(torch.linalg.matrix_norm(matrix, 1))


def _plus_identity(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
