"""What ``compat/transformers.py`` relies on in transformers: a failure here names what an upgrade breaks."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from support.tiny_models import FAMILIES
from torch import nn

from harness_rect.compat.transformers import (
    STEPWISE_GELU,
    Conv1D,
    DynamicLayer,
    cache_arguments,
    cache_of,
)


class Recorded(DynamicLayer):
    """A cache layer that keeps nothing and counts the tokens it was given."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def update(self, key_states, value_states, *args, **kwargs):
        self.seen += key_states.shape[-2]
        self.dtype, self.device = key_states.dtype, key_states.device
        return key_states, value_states


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_hands_keys_and_values_to_the_layers_of_the_cache_it_is_given(family, make_model):
    model = make_model(family)
    layers = [Recorded() for _ in range(2)]
    cache = cache_of(layers)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), **cache_arguments(model, cache))
    assert [layer.seen for layer in layers] == [3, 3], "searches from the middle would run in full"
    assert cache.layers == layers, (
        "the cache replaces or adds layers; _Keeping in models/suffix.py is not used"
    )


def test_the_cache_goes_by_the_name_that_the_model_takes_it_under():
    class Renamed(nn.Module):
        def forward(self, input_ids, cache=None, use_cache=None):
            return cache

    class Earlier(nn.Module):
        def forward(self, input_ids, past_key_values=None, use_cache=None):
            return past_key_values

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def get_base_model(self):
            return self.base

        def forward(self, *args, **kwargs):
            return self.base(*args, **kwargs)

    cache = cache_of([])
    for model in (Renamed(), Earlier(), Adapter(Renamed()), Adapter(Earlier())):
        assert model(None, **cache_arguments(model, cache)) is cache


def test_conv1d_stores_inputs_by_outputs():
    module = Conv1D(3, 2)
    assert module.weight.shape == (2, 3), "GPT-2's matrices would be edited the wrong way round"


@pytest.mark.parametrize("activation", STEPWISE_GELU, ids=lambda a: a.__name__)
def test_stepwise_gelu_is_the_tanh_approximation(activation):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    wanted = nn.functional.gelu(x, approximate="tanh")
    assert torch.allclose(activation()(x), wanted), "models/forwards.py replaces it by torch's kernel"


def test_a_layer_of_the_cache_takes_keys_and_values_and_returns_them():
    names = list(inspect.signature(DynamicLayer.update).parameters)
    assert names[:3] == ["self", "key_states", "value_states"], transformers.__version__
