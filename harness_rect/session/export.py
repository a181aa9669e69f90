"""A kept run in formats of other programs: a LoRA adapter of PEFT, a checkpoint of differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from harness_rect.errors import UserError
from harness_rect.io.files import check_output, folder_written_whole
from harness_rect.regularizers import Regularizer
from harness_rect.session.checkpoint import save_checkpoint
from harness_rect.session.replay import regularizer_of, replayed
from harness_rect.session.report import BESIDE, EditReport
from harness_rect.session.runs import KeptRun
from harness_rect.session.weights import EditedWeights
from harness_rect.updates import LowRank


@torch.no_grad()
def save_delta(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    weights: EditedWeights,
    report: EditReport,
) -> float:
    """Write edited - base as a checkpoint of all parameters, most of them zero; ``model`` becomes that.

    This is what lm-eval's argument ``delta`` and mergekit's linear merge without normalization add to a base.

    Args:
        weights: the edited ones, as :func:`~harness_rect.session.replay.put` left them.

    Returns:
        the share of edited elements in which base + difference, in the model's dtype, is not the edited one.
    """
    inexact = total = 0
    for name, tensor in model.state_dict().items():
        original = weights.originals.get(name)
        if original is None:
            tensor.zero_()
            continue
        edited = tensor.clone()
        tensor.copy_(edited.float() - original.float())
        inexact += int(torch.count_nonzero(original + tensor != edited))
        total += tensor.numel()
    save_checkpoint(folder, model, tokenizer, report)
    return inexact / max(1, total)


def save_adapter(
    folder: Path,
    run: KeptRun,
    weights: EditedWeights,
    base: str,
    report: EditReport,
    regularizer: Regularizer | None = None,
    revision: str | None = None,
) -> int:
    """Write the updates as a LoRA adapter in float32; the model becomes the base model again.

    The rank for each weight is the sum of the ranks of its updates.

    Args:
        base: name or folder of the base model, as PEFT looks for it. report: of what is exported.
        regularizer: another one, for the first step alone. revision: of the base model.

    Returns:
        the largest rank.

    Raises:
        UserError: an update is a matrix, also because of the regularizer; or the ranks add up to a full one.
    """
    from peft import LoraConfig

    check_output(folder)
    weights.revert()
    factors = _factors(run, weights, report, regularizer)
    weights.revert()
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    transposed = False
    for name, (left, right) in factors.items():
        module, rank = name.removesuffix(".weight"), left.shape[1]
        if rank >= min(len(left), len(right)):
            raise UserError(
                f"--format peft: the updates of {name} have rank {rank} together, which is no lower than the"
                f" weight's own ({min(len(left), len(right))}); use --format delta or full"
            )
        transposed = weights.lm.is_transposed(name)
        inputs, outputs = (left, right) if transposed else (right, left)
        tensors[f"base_model.model.{module}.lora_A.weight"] = inputs.T.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = outputs.float().contiguous()
        ranks[module] = rank
    if not ranks:
        raise UserError("--format peft: no update was applied, so there is nothing to export")
    most = max(ranks.values())
    config = LoraConfig(
        base_model_name_or_path=base,
        revision=revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=most,
        lora_alpha=most,  # a scale of 1
        rank_pattern={module: rank for module, rank in ranks.items() if rank != most},
        alpha_pattern={module: rank for module, rank in ranks.items() if rank != most},
        target_modules=sorted(ranks),
        fan_in_fan_out=transposed,
        lora_dropout=0.0,
    )
    with folder_written_whole(folder) as temporary:
        config.save_pretrained(str(temporary))
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / BESIDE).write_text(report.to_json(), encoding="utf-8")
    return most


def _factors(
    run: KeptRun, weights: EditedWeights, report: EditReport, regularizer: Regularizer | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight -> the factors of all of its updates, side by side."""
    weights.start()
    lefts: dict[str, list[Tensor]] = {}
    rights: dict[str, list[Tensor]] = {}
    chosen, edits = regularizer or regularizer_of(run), 0
    steps = iter(run.history.steps or ())
    for added in replayed(run, weights, chosen, again=regularizer is not None):
        step = next(steps)
        for name, update in added.items():
            if not isinstance(update, LowRank):
                proposed = step.updates[name].proposed
                cause = (
                    f"regularizer {chosen.name}"
                    if isinstance(proposed, LowRank)
                    else f"method {run.report.method}"
                )
                raise UserError(
                    f"--format peft: {cause} leaves a matrix of full rank for {name}, which a LoRA adapter"
                    " cannot hold; use --format delta or full"
                )
            lefts.setdefault(name, []).append(update.left)
            rights.setdefault(name, []).append(update.right)
        edits += step.edits
        if edits >= report.n_edits:
            break
    return {name: (torch.cat(lefts[name], 1), torch.cat(rights[name], 1)) for name in lefts}
