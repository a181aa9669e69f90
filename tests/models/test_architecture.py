"""Are blocks, down projections, norm and head found in every family, and is the rest refused?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import D_MLP, D_MODEL, FAMILIES, N_LAYERS, VOCABULARY
from torch import nn

from harness_rect.errors import UserError
from harness_rect.methods import LowRank
from harness_rect.models import EditableLM, locate
from harness_rect.models.architecture import check_floating, is_transposed

TEXTS = ["LeBron James plays the sport of", "The city"]

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_located_by_name(family, make_model):
    expected = FAMILIES[family]
    found = locate(make_model(family))
    assert found.blocks == tuple(f"{expected.blocks}.{i}" for i in range(N_LAYERS))
    assert found.down_projections == tuple(f"{expected.blocks}.{i}.{expected.down}" for i in range(N_LAYERS))
    assert found.norm == expected.norm
    assert found.head in expected.head.split("|")
    assert (found.d_model, found.d_mlp, found.n_layers) == (D_MODEL, D_MLP, N_LAYERS)
    assert found.weight_name(1) in dict(make_model(family).named_parameters())


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "opt", "llama", "phi3"])
def test_down_projection_is_found_when_the_mlp_is_as_wide_as_the_model(family, make_model):
    width = {"gpt2": "n_inner", "gptj": "n_inner", "opt": "ffn_dim"}.get(family, "intermediate_size")
    found = locate(make_model(family, **{width: D_MODEL}))
    assert found.down_projections[0].endswith(FAMILIES[family].down)
    assert found.d_mlp == D_MODEL


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_keys_and_outputs_are_the_modules_own(family, make_lm):
    lm = make_lm(family)
    sequences = [lm.encoder.ids(text) for text in TEXTS]
    positions = [3, len(sequences[1]) - 1]
    captured = lm.down_projection_io([0, 1], lm.batch(sequences), positions)
    for layer in (0, 1):
        module = lm.model.get_submodule(f"{FAMILIES[family].blocks}.{layer}.{FAMILIES[family].down}")
        for row, (ids, position) in enumerate(zip(sequences, positions, strict=True)):
            seen: list[Any] = []
            handle = module.register_forward_hook(lambda m, args, out, seen=seen: seen.append((args[0], out)))
            with torch.no_grad():
                lm.model(input_ids=torch.tensor([ids]))
            handle.remove()
            key, output = (tensor.reshape(len(ids), -1)[position] for tensor in seen[0])
            torch.testing.assert_close(captured[layer][0][row], key, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(captured[layer][1][row], output, rtol=1e-4, atol=1e-5)


def test_capture_ends_at_the_deepest_layer_and_leaves_no_hooks(make_lm):
    lm = make_lm("llama")
    later = []
    handle = lm.down_projection(1).register_forward_hook(lambda *a: later.append(1))
    lm.down_projection_io([0], lm.batch([lm.encoder.ids(TEXTS[0])]), [1])
    handle.remove()
    assert not later
    assert all(not module._forward_hooks for module in lm.model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_oriented_update_maps_its_key_to_its_value(family, make_lm):
    """(W + a b^T) applied to k is W k + left (right . k), whichever way the weight is stored."""
    lm = make_lm(family)
    module = lm.down_projection(1)
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(D_MODEL, 2, generator=generator)
    right = torch.randn(D_MLP, 2, generator=generator)
    key = torch.randn(D_MLP, generator=generator)
    update = LowRank(*lm.oriented(1, left, right)).dense()
    assert update.shape == module.weight.shape
    with torch.no_grad():
        before = module(key.view(1, 1, -1)).flatten()
        module.weight += update
        after = module(key.view(1, 1, -1)).flatten()
    torch.testing.assert_close(after - before, left @ (right.T @ key), rtol=1e-4, atol=1e-4)


def test_only_conv1d_is_transposed(make_lm):
    assert is_transposed(make_lm("gpt2").down_projection(0))
    assert not is_transposed(make_lm("llama").down_projection(0))


def test_a_layer_that_does_not_exist_is_named(make_lm):
    lm = make_lm("gpt2")
    for layer in (2, -1):
        with pytest.raises(UserError) as error:
            lm.down_projection(layer)
        assert f"layer {layer}" in one_line(error)
        assert "0 to 1" in str(error.value)


# -- refusals -------------------------------------------------------------------------------------


class Strange(nn.Module):
    """A causal LM of an unknown kind: its blocks hold convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig()
        self.config.hidden_size, self.config.num_hidden_layers = 8, 2
        self.towers = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(2))


class Ambiguous(Strange):
    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.ModuleDict({"one": nn.Linear(4, 8), "two": nn.Linear(4, 8)}) for _ in range(2)
        )


@pytest.mark.parametrize("model", [Strange, Ambiguous])
def test_an_unknown_tree_is_refused_naming_what_was_looked_for(model):
    with pytest.raises(UserError) as error:
        locate(model())
    message = one_line(error)
    for word in (model.__name__, "towers", "ModuleList", "2 blocks", "d_model=8", "down_proj", "c_proj"):
        assert word in message


MOE = {
    "MixtralConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeConfig": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
    },
    # Has one ordinary down projection a block, of the shared expert, beside the routed ones.
    "Qwen2MoeConfig": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
}


@pytest.mark.parametrize("config", MOE)
def test_mixtures_of_experts_are_refused(config):
    settings = getattr(transformers, config)(**SMALL, **MOE[config])
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with pytest.raises(UserError, match="mixtures of experts"):
        locate(model)


def test_an_encoder_decoder_is_refused(tokenizer):
    settings = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=1,
        num_heads=2,
    )
    settings.decoder_start_token_id = 0
    with pytest.raises(UserError, match="encoder-decoder") as error:
        EditableLM(transformers.T5ForConditionalGeneration(settings), tokenizer)
    assert "t5" in one_line(error)


def test_a_quantised_model_is_refused_by_its_config_and_by_its_weights(make_model):
    model = make_model("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UserError, match="quantised") as error:
        locate(model)
    one_line(error)
    model = make_model("llama")
    model.is_quantized = True
    with pytest.raises(UserError, match="quantised") as error:
        locate(model)
    one_line(error)


@pytest.mark.parametrize(
    "weight, word",
    [
        (torch.zeros(2, 2, dtype=torch.int8), "int8"),
        (torch.zeros(2, 2, dtype=torch.float8_e4m3fn), "float8"),
        (torch.zeros(2, 2, device="meta"), "offloaded"),
    ],
)
def test_weights_that_cannot_take_an_update_are_refused(weight, word):
    with pytest.raises(UserError, match=word) as error:
        check_floating(weight, "h.0.mlp.weight")
    assert "h.0.mlp.weight" in one_line(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sixteen_and_thirty_two_bits_are_accepted(dtype):
    check_floating(torch.zeros(2, 2, dtype=dtype), "w")
