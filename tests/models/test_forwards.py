"""Activations run as one kernel give what they give step by step, and come back."""

from __future__ import annotations

import pytest
import torch

from harness_rect.models.forwards import STEPWISE_GELU, fused_gelu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", STEPWISE_GELU)
def test_the_fused_gelu_is_the_stepwise_one_within_rounding(kind, dtype):
    module = kind()
    x = torch.linspace(-12, 12, 4001, dtype=dtype, requires_grad=True)
    stepwise = module(x)
    with fused_gelu(module):
        fused = module(x)
    assert fused.grad_fn.name() == "GeluBackward0" != stepwise.grad_fn.name()
    slopes = [torch.autograd.grad(out.sum(), x)[0] for out in (fused, stepwise)]
    limit = 2e-6 if dtype == torch.float32 else 1e-9  # FastGELU's constant has ten digits
    assert (fused - stepwise).abs().max() < limit and (slopes[0] - slopes[1]).abs().max() < limit
    assert module(x).grad_fn.name() == stepwise.grad_fn.name()


@pytest.mark.parametrize("kind", STEPWISE_GELU)
def test_sixteen_bits_keep_the_models_own_roundings(kind):
    module, x = kind(), torch.linspace(-5, 5, 101).bfloat16()
    with fused_gelu(module):
        found = module(x)
    assert torch.equal(found, module(x))


def test_a_family_with_the_stepwise_activation_is_recognised(make_lm):
    lm = make_lm("gpt2")
    with fused_gelu(lm.model):
        replaced = [module for module in lm.model.modules() if "forward" in module.__dict__]
    assert len(replaced) == lm.architecture.n_layers
    assert not any("forward" in module.__dict__ for module in lm.model.modules())
