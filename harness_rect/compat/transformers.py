"""What editing needs of transformers and transformers does not promise.

Everything else of the package uses the library's documented names. ``tests/contracts`` checks each name here.
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


def cache_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache that holds the keys and values of each block, without copies of them."""
    cache = DynamicCache()
    cache.layers = [_layer(*pair) for pair in pairs]
    return cache


def _layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def cache_arguments(model: PreTrainedModel, cache: DynamicCache) -> dict[str, Any]:
    """Arguments of the model's forward that make it use ``cache``.

    From 5.24 on transformers calls the argument ``cache``; before that, and in models with code of their own,
    it is ``past_key_values``, which transformers 5.40 no longer takes.
    """
    base = getattr(model, "get_base_model", lambda: model)()  # the model within a PEFT adapter
    renamed = "cache" in inspect.signature(type(base).forward).parameters
    return {"cache" if renamed else "past_key_values": cache, "use_cache": True}
