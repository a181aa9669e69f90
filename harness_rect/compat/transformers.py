"""Names of transformers that editing uses and that are not documented as stable.

All other modules use documented names only. ``tests/contracts`` has a test for each name here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

__all__ = ["STEPWISE_GELU", "Conv1D", "DynamicCache", "cache_arguments", "cache_of"]

#: Modules that compute 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) step by step.
STEPWISE_GELU = (NewGELUActivation, FastGELUActivation)

#: How many tensors a layer is initialized with: the keys alone in transformers 4.57, then keys and values.
_INITIAL = len(inspect.signature(DynamicLayer.lazy_initialization).parameters) - 1


class _Layer(DynamicLayer):
    """Keys and values of one block: those of earlier tokens, followed by space for ``new`` tokens."""

    def __init__(self, keys: Tensor, values: Tensor, new: int) -> None:
        super().__init__()
        self.lazy_initialization(*(keys, values)[:_INITIAL])
        self._whole = keys.detach(), values.detach()
        self.keys, self.values = (x[..., : x.shape[-2] - new, :] for x in self._whole)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.keys, self.values = self._whole
        self.keys[..., -key_states.shape[-2] :, :] = key_states
        self.values[..., -key_states.shape[-2] :, :] = value_states
        return self._whole


def cache_of(pairs: Sequence[tuple[Tensor, Tensor]], new: int) -> DynamicCache:
    """A cache for one pass over ``new`` tokens, whose keys and values overwrite the last ones of ``pairs``.

    The cache of transformers would copy the keys and values of earlier tokens, and the backward pass would
    keep the copies.

    Args:
        pairs: keys and values of each block, (sequences, heads, earlier + new, head width). new: at least 1.
    """
    cache = DynamicCache()
    cache.layers = [_Layer(*pair, new) for pair in pairs]
    return cache


def cache_arguments(model: PreTrainedModel, cache: DynamicCache) -> dict[str, Any]:
    """Arguments of the model's forward that make it use ``cache``.

    From 5.24 on transformers calls the argument ``cache``; before that, and in models with code of their own,
    it is ``past_key_values``, which transformers 5.40 no longer takes.
    """
    base = getattr(model, "get_base_model", lambda: model)()  # the model within a PEFT adapter
    renamed = "cache" in inspect.signature(type(base).forward).parameters
    return {"cache" if renamed else "past_key_values": cache, "use_cache": True}
