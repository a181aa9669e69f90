"""Find the parts of a causal LM that editing touches, from its module tree.

In all supported families the decoder is a list of equal blocks, each with attention and an MLP whose last
matrix, the down projection, maps d_mlp to d_model. This structure is searched for, not the name of the model;
the three tables of names below decide where several modules fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from harness_rect.compat.transformers import Conv1D
from harness_rect.errors import UserError

# A matrix under one of these belongs to attention, whose output projection has the same output width.
ATTENTION_NAMES = ("attn", "attention")
# Names of the matrix whose output enters the nonlinearity, where several read the residual stream.
FIRST_PROJECTION_NAMES = ("gate_proj", "gate_up_proj")
# Names of down projections, for blocks in which several matrices have the right output width.
DOWN_PROJECTION_NAMES = ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2")


@dataclass(frozen=True)
class Architecture:
    """Names (as in ``model.named_modules()``) of what editing needs.

    Attributes:
        blocks: one name per decoder block, in order.
        down_projections: one name per block: the matrix d_mlp -> d_model.
        mlp_matrices: for each block the names of all its MLP matrices, the down projection last.
        first_projections: one name per block: the MLP matrix whose output enters the nonlinearity, in its
            first d_mlp columns (Phi-3 keeps gate and up projection in one matrix).
        norm: the norm after the last block, or None where the model has none.
        head: the output embedding (unembedding), or None where it is not a module of the tree.
        d_model: width of the residual stream.
        d_mlp: input width of the down projection (the dimension of an MLP key).
    """

    blocks: tuple[str, ...]
    down_projections: tuple[str, ...]
    mlp_matrices: tuple[tuple[str, ...], ...]
    first_projections: tuple[str, ...]
    norm: str | None
    head: str | None
    d_model: int
    d_mlp: int

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    def weight_name(self, layer: int) -> str:
        """Name of the down projection's weight in block ``layer``, as in ``model.named_parameters()``."""
        return f"{self.down_projections[layer]}.weight"


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its matrix as (inputs, outputs), as GPT-2's ``Conv1D`` does."""
    return isinstance(module, Conv1D)


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a matrix module, or None for any other module."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def _down_projection(block: nn.Module, d_model: int) -> str | None:
    """Name within ``block`` of its only MLP matrix that maps to d_model, or None if that is not unique."""
    found = []
    for name, module in block.named_modules():
        if (
            name.rpartition(".")[2] == "experts"
        ):  # the matrix of a shared expert would be taken for the only one
            return None
        widths = _widths(module)
        if widths is None or widths[1] != d_model:
            continue
        if any(word in part.lower() for part in name.split(".") for word in ATTENTION_NAMES):
            continue
        found.append(name)
    if len(found) > 1:
        found = [name for name in found if name.rpartition(".")[2] in DOWN_PROJECTION_NAMES]
    return found[0] if len(found) == 1 else None


def _into_mlp(block: nn.Module, d_model: int, d_mlp: int) -> list[str]:
    """Names within ``block`` of the MLP matrices that read the residual stream."""
    found = []
    for name, module in block.named_modules():
        widths = _widths(module)
        if widths is None or widths[0] != d_model or widths[1] not in (d_mlp, 2 * d_mlp):
            continue
        if not any(word in part.lower() for part in name.split(".") for word in ATTENTION_NAMES):
            found.append(name)
    return found


def check_editable(model: PreTrainedModel) -> None:
    """Refuse models whose weights cannot be edited: encoder-decoders and quantised ones.

    Raises:
        UserError: with one line that names the reason.
    """
    refuse_config(model.config)
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UserError(
            "this model is quantised; editing changes weights by small amounts that quantised weights cannot"
            " hold: load it in float32, bfloat16 or float16"
        )


def refuse_config(config: object) -> None:
    """The checks of :func:`check_editable` that need only the configuration, not the weights."""
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model type {getattr(config, 'model_type', '?')!r} is an encoder-decoder; editing is defined"
            " here for decoder-only (causal) language models"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            "this checkpoint is quantised (its config has a quantization_config); edit the unquantised"
            " checkpoint and quantise the result"
        )


def locate(model: PreTrainedModel) -> Architecture:
    """Find blocks, down projections, final norm and head of a causal LM.

    Raises:
        UserError: the model is not editable, or its module tree is not understood; the message names
            what was looked for.
    """
    check_editable(model)
    config = model.config.get_text_config()
    d_model, n_layers = int(config.hidden_size), int(config.num_hidden_layers)
    modules = dict(model.named_modules())

    lists = [n for n, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    located = []
    for name in lists:
        downs = [_down_projection(block, d_model) for block in modules[name]]
        if all(downs):
            located.append((name, downs))
    if len(located) != 1:
        seen = ", ".join(lists) or "none"
        raise UserError(
            f"cannot find the MLP down projections of {type(model).__name__}: looked for one ModuleList of"
            f" {n_layers} blocks (found: {seen}), each with exactly one matrix outside attention that maps to"
            f" d_model={d_model} (or one named {', '.join(DOWN_PROJECTION_NAMES)}); mixtures of experts"
            " are not supported"
        )
    list_name, downs = located[0]
    parent = list_name.rpartition(".")[0]
    norms = [n for n, m in modules[parent].named_children() if "norm" in type(m).__name__.lower()]
    head = model.get_output_embeddings()
    names = {id(m): n for n, m in modules.items()}
    down_names = tuple(f"{list_name}.{i}.{down}" for i, down in enumerate(downs))
    widths = _widths(modules[down_names[0]])
    d_mlp = widths[0] if widths else 0
    matrices, first = [], []
    for i, down in enumerate(down_names):
        block = f"{list_name}.{i}"
        into = [
            f"{block}.{name}"
            for name in _into_mlp(modules[block], d_model, d_mlp)
            if f"{block}.{name}" != down
        ]
        named = [name for name in into if name.rpartition(".")[2] in FIRST_PROJECTION_NAMES]
        first += named or into[:1]
        matrices.append((*into, down))
    if len(first) != n_layers:
        raise UserError(
            f"cannot find the first MLP projections of {type(model).__name__}: looked in each block for"
            f" one matrix outside attention from d_model={d_model} to d_mlp={d_mlp}"
        )
    return Architecture(
        blocks=tuple(f"{list_name}.{i}" for i in range(n_layers)),
        down_projections=down_names,
        mlp_matrices=tuple(matrices),
        first_projections=tuple(first),
        norm=f"{parent}.{norms[-1]}" if parent and norms else (norms[-1] if norms else None),
        head=names.get(id(head)),
        d_model=d_model,
        d_mlp=d_mlp,
    )


def offloaded(name: str) -> UserError:
    """The error of a weight that lies on a disk, or in main memory while it is computed elsewhere."""
    return UserError(
        f"{name} is offloaded, and what is edited must stay in memory, as must the input embedding: raise"
        " max_memory_per_gpu (without a GPU max_cpu_memory), leave parallelize out, or give in Python a"
        " device_map that has a device for each of these modules"
    )


def check_floating(weight: torch.Tensor, name: str) -> None:
    """Refuse a weight that arithmetic cannot change in place (integer storage, or offloaded to meta)."""
    if weight.device.type == "meta":
        raise offloaded(name)
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise UserError(
            f"{name} has dtype {weight.dtype}; editing needs float32, bfloat16 or float16 weights"
        )
