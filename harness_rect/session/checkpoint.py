"""Edited models as Hugging Face checkpoints, with the edit report beside the weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from harness_rect.io.files import check_output, folder_written_whole
from harness_rect.session.report import BESIDE, EditReport
from harness_rect.session.weights import sha256_of


def save_checkpoint(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, report: EditReport) -> None:
    """Write a Hugging Face checkpoint and ``edit_report.json``; the folder appears only when complete.

    Raises:
        UserError: if the folder exists and is not empty.
    """
    check_output(folder)
    edited = {n: p for n, p in model.named_parameters() if n in report.weights and p.device.type != "meta"}
    report = report.model_copy(update={"weights_sha256": {n: sha256_of(p) for n, p in edited.items()}})
    with folder_written_whole(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / BESIDE).write_text(report.to_json(), encoding="utf-8")


def checkpoint_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name -> sha256 (hex) of those of the weights that a checkpoint has under these names."""
    wanted = set(names)
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: sha256_of(tensors.get_tensor(name)) for name in wanted & set(tensors.keys())}
    return found
