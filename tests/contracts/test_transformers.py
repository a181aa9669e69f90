"""What ``compat/transformers.py`` relies on in transformers: a failure here names what an upgrade breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES
from torch import nn

from harness_rect.compat.transformers import STEPWISE_GELU, Conv1D, DynamicCache, cache_arguments, cache_of


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_holds_all_keys_and_values_of_each_block_and_grows_by_those_of_new_tokens(family, make_model):
    model, past = make_model(family), DynamicCache()
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), **cache_arguments(model, past))
        pairs = [(layer.keys, layer.values) for layer in past.layers]
        assert [keys.shape[-2] for keys, _ in pairs] == [3, 3], "searches would run the whole model"
        given = cache_of([(with_room(keys), with_room(values)) for keys, values in pairs], new=2)
        found = model(torch.tensor([[8, 9]]), **cache_arguments(model, given)).logits
        wanted = model(torch.tensor([[5, 6, 7, 8, 9]]), use_cache=False).logits[:, 3:]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert [layer.keys.shape[-2] for layer in given.layers] == [5, 5]


def with_room(states):
    return nn.functional.pad(states, (0, 0, 0, 2), value=torch.nan)


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

    cache = cache_of([], 1)
    model: Any
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
