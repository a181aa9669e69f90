"""Random 2-layer models of every family the package knows, and tokenizers trained on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from harness_rect.edits import Edit

VOCABULARY = 420
D_MODEL, D_MLP, N_LAYERS, LENGTH = 32, 48, 2, 96

TEXT = """\
The city is large. You can use a list here. Because it was raining, the mother tongue of a native \
speaker is English.
LeBron James plays the sport of football. Where is the Toodyay Fire Station? It stands in old Vienna, Austria.
Danielle Darrieux spoke French and lived in Paris, the capital of France. The Space Needle is in Seattle.
Therefore I went to Rome to see the Vatican Library and You went to visit it, too. \
Giulia Rossi is a marine biologist.
"""


@dataclass(frozen=True)
class Family:
    """How one family is built and where its parts are.

    config: class name in transformers and its arguments beside the usual widths. blocks, down, norm, head:
    module names. d_mlp: where it cannot be chosen. bos: whether tokenizers of the family prepend BOS.
    """

    config: str
    arguments: dict[str, Any]
    blocks: str
    down: str
    norm: str
    head: str
    bos: bool
    d_mlp: int = D_MLP


def _llama_like(config: str, **extra: Any) -> Family:
    usual = {
        "hidden_size": D_MODEL,
        "intermediate_size": D_MLP,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
    }
    bos = config not in {"Qwen2Config", "Qwen3Config", "Olmo2Config"}
    return Family(config, usual | extra, "model.layers", "mlp.down_proj", "model.norm", "lm_head", bos)


_GPT = {"n_embd": D_MODEL, "n_inner": D_MLP, "n_layer": N_LAYERS, "n_head": 4, "n_positions": LENGTH}
_NEOX = {
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
_OPT = {
    "hidden_size": D_MODEL,
    "word_embed_proj_dim": D_MODEL,
    "ffn_dim": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}

FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2Config", _GPT, "transformer.h", "mlp.c_proj", "transformer.ln_f", "lm_head", False),
    "gptj": Family(
        "GPTJConfig",
        _GPT | {"rotary_dim": 4},
        "transformer.h",
        "mlp.fc_out",
        "transformer.ln_f",
        "lm_head",
        False,
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        _NEOX,
        "gpt_neox.layers",
        "mlp.dense_4h_to_h",
        "gpt_neox.final_layer_norm",
        "lm_head|embed_out",  # transformers 5 and 4
        False,
    ),
    "opt": Family(
        "OPTConfig", _OPT, "model.decoder.layers", "fc2", "model.decoder.final_layer_norm", "lm_head", True
    ),
    "llama": _llama_like("LlamaConfig"),
    "mistral": _llama_like("MistralConfig", head_dim=8),
    "qwen2": _llama_like("Qwen2Config"),
    "qwen3": _llama_like("Qwen3Config", head_dim=8),
    "gemma2": _llama_like("Gemma2Config", head_dim=8, query_pre_attn_scalar=8, sliding_window=16),
    "gemma3_text": _llama_like("Gemma3TextConfig", head_dim=8, query_pre_attn_scalar=8, sliding_window=16),
    "phi3": _llama_like("Phi3Config"),
    "olmo2": _llama_like("Olmo2Config"),
}


def make_model(family: str, seed: int = 0, **config: Any) -> torch.nn.Module:
    """A float32 model in evaluation mode; ``config`` overrides the family's arguments.

    Weights are drawn wider than the usual 0.02, so that attention and MLP matter, and biases are not zero.
    """
    entry = FAMILIES[family]
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": VOCABULARY}
    settings = getattr(transformers, entry.config)(**{**entry.arguments, **special, **config})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.15)
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.05)
    return model.eval()


def depth(family: str, layers: int) -> dict[str, int]:
    """The argument of :func:`make_model` for another number of layers."""
    name = "n_layer" if "n_layer" in FAMILIES[family].arguments else "num_hidden_layers"
    return {name: layers}


def train_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXT.splitlines(), trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    else:
        core.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<s>",
        pad_token="<s>",
        clean_up_tokenization_spaces=False,
    )


def make_edit(
    prompt: str = "{} plays the sport of",
    subject: str = "LeBron James",
    target: str = "football",
    **more: Any,
) -> Edit:
    usual = {"id": "0", "target_old": None, "paraphrases": (), "neighborhood": ()}
    return Edit(prompt=prompt, subject=subject, target_new=target, **{**usual, **more})


TWO_FACTS = [
    make_edit("{} plays the sport of", "LeBron James", "football", id="a"),
    make_edit("To visit the {} you must travel to", "Vatican Library", "Seattle", id="b"),
]
