"""Digests of models and of descriptions of runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

#: Elements summed at a time, to bound the memory of the 64-bit copies.
CHUNK = 1 << 22
#: Bytes of an element -> the integer type its bits are read as; 8 as two of 4, since sums of 64-bit words
#: lose sign bits.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def digest(description: Mapping[str, Any]) -> str:
    """sha256 (hex) of a JSON description, independent of key order."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()


#: Settings of a model that say where it is from, or how it is used later.
_NAMES = {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def computation_digest(model: Any, tokenizer: Any) -> str:
    """sha256 (hex) of how a model computes: configuration, of generation too, attention, modules, tokenizer.

    Weights alone do not say it: the number of heads, the activation or the epsilon of a norm change no shape.
    """

    def plain(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {k: plain(v) for k, v in value.items() if k not in _NAMES and not str(k).startswith("_")}

    config = model.config
    attention = getattr(config, "_attn_implementation", None)
    described = {"class": type(model).__name__, "config": plain(config.to_dict()), "attention": attention}
    if (generation := getattr(model, "generation_config", None)) is not None:
        described["generation"] = plain(generation.to_dict())
    return digest(described | {"modules": _modules(model), "tokenizer": _described(tokenizer)})


def _modules(model: nn.Module) -> list[Any]:
    """Of each module its class, its settings as it prints them, its numbers and its functions.

    The configuration does not say what was replaced or set after the model was made.
    """
    return [
        [
            name,
            type(module).__qualname__,
            module.extra_repr(),
            {key: found for key, value in sorted(vars(module).items()) if (found := _setting(key, value))},
        ]
        for name, module in model.named_modules()
    ]


def _setting(key: str, value: Any) -> str | None:
    """A number or function that a module holds, as text; :func:`foreign_hook` finds another ``forward``."""
    if key == "forward" or key.startswith("_"):
        return None
    if isinstance(value, float):
        return repr(value)
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, _FUNCTIONS) else None


_FUNCTIONS = types.FunctionType, types.BuiltinFunctionType


def state_digest(model: nn.Module) -> str:
    """sha256 (hex) of a model's weights, modules and hooks: whether it is as it was."""
    weights, hooked = model_fingerprint(model), foreign_hook(model)
    return digest({"weights": weights, "modules": _modules(model), "hook": hooked})


def _described(tokenizer: Any) -> Any:
    """How a tokenizer makes tokens, as plain JSON; not how it was last asked to cut and pad."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    described = json.loads(backend.to_str())
    return {name: value for name, value in described.items() if name not in ("truncation", "padding")}


#: Packages whose hooks do not change what a model computes.
_KNOWN_HOOKS = ("transformers.", "accelerate.", "harness_rect.")


def foreign_hook(model: nn.Module) -> str | None:
    """The first module whose computation something else changes: a forward hook, or a forward of its own.

    Such a change is in no digest.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "every module"
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            hooks.append(vars(module)["forward"])
        if any(not str(getattr(hook, "__module__", "")).startswith(_KNOWN_HOOKS) for hook in hooks):
            return name or type(module).__name__
    return None


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over each parameter and buffer of a checkpoint: name, shape, dtype, sums over its bits.

    Buffers that checkpoints do not hold, such as the frequencies of rotary embeddings, follow from the
    configuration and have other names in other releases of transformers.

    Two 64-bit sums of each chunk, one weighted by position, are computed on the tensor's device, so that a
    large model is not copied from it; a change of any single element changes both.
    """
    total = hashlib.sha256()
    computed = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    for name, tensor in sorted(itertools.chain(model.named_parameters(), model.named_buffers())):
        if name in computed:
            continue
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_sums(tensor)}".encode())
    return total.hexdigest()


def _sums(tensor: Tensor) -> list[int]:
    if tensor.device.type == "meta" or not tensor.numel():
        return []
    bits = tensor.detach().contiguous().flatten().view(BITS[tensor.element_size()])
    weights = torch.arange(1, min(CHUNK, bits.numel()) + 1, device=bits.device)
    sums = []
    for chunk in bits.split(CHUNK):
        wide = chunk.long()
        sums += [wide.sum(), (wide * weights[: len(wide)]).sum()]
    return torch.stack(sums).tolist()
