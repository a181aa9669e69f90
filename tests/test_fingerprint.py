"""A model's fingerprint sees every element."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from harness_rect import fingerprint
from harness_rect.fingerprint import computation_digest, digest, foreign_hook, model_fingerprint


def a_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 257), nn.BatchNorm1d(257)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("place", [(0, 0), (256, 95), (100, 17), (slice(None), 40), (9, slice(None))])
def test_a_change_anywhere_is_seen(dtype, place, monkeypatch):
    monkeypatch.setattr(fingerprint, "CHUNK", 1000)
    model = a_model(dtype)
    before = model_fingerprint(model)
    with torch.no_grad():
        model[0].weight[place] *= -1
    after = model_fingerprint(model)
    assert before != after
    with torch.no_grad():
        model[0].weight[place] *= -1
    assert model_fingerprint(model) == before


def test_elements_that_change_places_are_seen():
    model = a_model()
    before = model_fingerprint(model)
    with torch.no_grad():
        model[0].weight[[3, 7]] = model[0].weight[[7, 3]]
    assert model_fingerprint(model) != before


def test_names_and_dtypes_and_buffers_count():
    model = a_model()
    before = model_fingerprint(model)
    model[1].running_mean += 1
    assert len({before, model_fingerprint(model), model_fingerprint(a_model(torch.float16))}) == 3
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_buffers_that_no_checkpoint_holds_do_not_count():
    model = a_model()
    before = model_fingerprint(model)
    model.register_buffer("frequencies", torch.ones(3), persistent=False)
    assert model_fingerprint(model) == before
    model.register_buffer("kept", torch.ones(3))
    assert model_fingerprint(model) != before


def test_what_changes_no_shape_changes_the_digest_of_the_computation(make_model, tokenizer):
    def of(change=lambda config: None, tokenizer=tokenizer):
        model = make_model("llama")
        change(model.config)
        return computation_digest(model, tokenizer)

    changes = [
        lambda config: setattr(config, "num_attention_heads", 1),
        lambda config: setattr(config, "hidden_act", "gelu"),
        lambda config: setattr(config, "rms_norm_eps", 0.1),
        lambda config: setattr(config, "_attn_implementation", "eager"),
    ]
    assert len({of(), *map(of, changes)}) == 5

    class Patched(torch.nn.Linear):
        pass

    later = [
        lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.ReLU()),
        lambda model: setattr(model.model.layers[0].mlp, "function", torch.relu),
        lambda model: setattr(model.model.norm, "variance_epsilon", 0.1),
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.5),
        lambda model: setattr(model.lm_head, "__class__", Patched),
    ]
    digests = {of()}
    for change in later:
        model = make_model("llama")
        change(model)
        digests.add(computation_digest(model, tokenizer))
    assert len(digests) == 1 + len(later)
    assert of(lambda config: setattr(config, "_name_or_path", "elsewhere")) == of()
    tokenizer("how it was last asked", truncation=True, max_length=2)
    another = copy.deepcopy(tokenizer)
    another.add_tokens(["was asked"])
    assert of() == of(tokenizer=copy.deepcopy(tokenizer)) != of(tokenizer=another)


def test_what_else_changes_a_computation_is_found(make_model):
    model = make_model("gpt2")
    assert foreign_hook(model) is None
    model(torch.tensor([[1]]), output_hidden_states=True)  # hooks of transformers
    assert foreign_hook(model) is None
    handle = model.transformer.h[1].register_forward_hook(lambda module, given, output: output)
    assert foreign_hook(model) == "transformer.h.1"
    handle.remove()
    model.transformer.h[0].mlp.forward = lambda hidden: hidden
    assert foreign_hook(model) == "transformer.h.0.mlp"
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, given, output: output)
    try:
        assert foreign_hook(model) == "every module"
    finally:
        handle.remove()
