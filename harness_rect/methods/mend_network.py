"""The hypernetworks of MEND; the equations are in :mod:`harness_rect.methods.mend`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

#: Added to a standard deviation before dividing by it.
EPSILON = 1e-7
N_LAYERS = 2


class ResidualLayer(nn.Module):
    """h + max(scale_m * (U V h + b) + shift_m, 0).

    Args:
        u: (d, r). v: (r, d). bias: (d,). mode_scale, mode_shift: (modes, d).
    """

    def __init__(self, u: Tensor, v: Tensor, bias: Tensor, mode_scale: Tensor, mode_shift: Tensor) -> None:
        super().__init__()
        self.u, self.v, self.bias = nn.Parameter(u), nn.Parameter(v), nn.Parameter(bias)
        self.mode_scale, self.mode_shift = nn.Parameter(mode_scale), nn.Parameter(mode_shift)

    def forward(self, h: Tensor, mode: int) -> Tensor:
        inner = h @ self.v.T @ self.u.T + self.bias
        # clamp_min, not relu: initially everything is exactly 0, where the gradient of relu is 0.
        return h + (self.mode_scale[mode] * inner + self.mode_shift[mode]).clamp_min(0)


class HyperNetwork(nn.Module):
    """Maps pairs (x, g) to pairs (x~, g~), for all weights of one shape.

    Args:
        layers: in order, each the arguments of :class:`ResidualLayer` with d = a + b.
        x_mean, x_std: (a,). g_mean, g_std: (b,). Standard deviations as they are, without the 1e-7.
    """

    x_mean: Tensor
    x_std: Tensor
    g_mean: Tensor
    g_std: Tensor

    def __init__(
        self,
        layers: Sequence[Mapping[str, Tensor]],
        x_mean: Tensor,
        x_std: Tensor,
        g_mean: Tensor,
        g_std: Tensor,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ResidualLayer(**layer) for layer in layers)
        for name, value in (("x_mean", x_mean), ("x_std", x_std), ("g_mean", g_mean), ("g_std", g_std)):
            self.register_buffer(name, value)

    @classmethod
    def identity(
        cls, x_width: int, g_width: int, modes: int, rank: int, generator: torch.Generator | None = None
    ) -> HyperNetwork:
        """The initial network: U = 0, means of 0 and deviations of 1, so that x~ and g~ are x and g.

        V is random with rows of unit length on average; r = min(rank, x_width + g_width). float32, on the
        CPU.
        """
        d = x_width + g_width
        r = min(rank, d)
        layers = [
            {
                "u": torch.zeros(d, r),
                "v": torch.randn(r, d, generator=generator) / d**0.5,
                "bias": torch.zeros(d),
                "mode_scale": torch.ones(modes, d),
                "mode_shift": torch.zeros(modes, d),
            }
            for _ in range(N_LAYERS)
        ]
        zeros, ones = torch.zeros, torch.ones
        return cls(layers, zeros(x_width), ones(x_width), zeros(g_width), ones(g_width))

    def forward(self, x: Tensor, g: Tensor, mode: int) -> tuple[Tensor, Tensor]:
        """(x~ (n, a), g~ (n, b)) of x (n, a) and g (n, b), row by row."""
        x = (x - self.x_mean) / (self.x_std + EPSILON)
        g = (g - self.g_mean) / (self.g_std + EPSILON)
        h = torch.cat([x, g], -1)
        for layer in self.layers:
            h = layer(h, mode)
        return h[..., : x.shape[-1]], h[..., x.shape[-1] :]


class Editor(nn.Module):
    """All that is trained: a network for each distinct shape and a scalar for each weight.

    Args:
        inner_params: weight name -> (inputs, outputs); a weight's mode is its index among those of its
            shape.
        networks: "x{inputs}_g{outputs}" -> network. lr: (weights,), in the order of ``inner_params``.
    """

    def __init__(
        self, inner_params: Mapping[str, tuple[int, int]], networks: Mapping[str, HyperNetwork], lr: Tensor
    ) -> None:
        super().__init__()
        self.weights = dict(inner_params)
        self.networks = nn.ModuleDict(networks)
        self.lr = nn.Parameter(lr)

    @classmethod
    def identity(
        cls, inner_params: Mapping[str, tuple[int, int]], rank: int, lr: float, seed: int = 0
    ) -> Editor:
        """The initial networks, see :meth:`HyperNetwork.identity`."""
        generator = torch.Generator().manual_seed(seed)
        networks = {
            network_key(widths): HyperNetwork.identity(*widths, modes, rank, generator)
            for widths, modes in Counter(inner_params.values()).items()
        }
        return cls(inner_params, networks, torch.full((len(inner_params),), lr))

    def key(self, name: str) -> str:
        """The name in ``networks`` of a weight's network."""
        return network_key(self.weights[name])

    def of(self, name: str) -> tuple[HyperNetwork, int, Tensor]:
        """A weight's network, its mode there, and its scalar ()."""
        network = cast(HyperNetwork, self.networks[self.key(name)])
        shared = [other for other, widths in self.weights.items() if widths == self.weights[name]]
        return network, shared.index(name), self.lr[list(self.weights).index(name)]


def network_key(widths: tuple[int, int]) -> str:
    return f"x{widths[0]}_g{widths[1]}"
