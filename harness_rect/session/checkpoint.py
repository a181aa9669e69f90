"""Edited models as Hugging Face checkpoints, with the edit report beside the weights."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from harness_rect.errors import UserError
from harness_rect.session.report import EditReport


def save_checkpoint(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, report: EditReport) -> None:
    """Write a Hugging Face checkpoint and ``edit_report.json``; the folder appears only when complete.

    Raises:
        UserError: if the folder exists and is not empty.
    """
    check_output(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "edit_report.json").write_text(report.to_json(), encoding="utf-8")
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for path in temporary.iterdir():  # safetensors writes files only their owner can read
            if path.is_file():
                path.chmod(0o666 & ~umask)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_output(folder: Path) -> None:
    """Refuse an output folder that holds something already. Called before long work starts."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; give another folder or remove it")
    check_parent(folder)


def check_parent(path: Path) -> None:
    """Refuse a path that cannot be created where it is."""
    ancestor = next(parent for parent in path.absolute().parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise UserError(f"{path}: cannot be created; {ancestor} is not a folder that can be written")
