"""The folder of a trained MEND: the tensors, ``mend.safetensors``, and their description, ``mend.yaml``.

The description is written last and has the hash of the tensors and one of itself, so an incomplete or damaged
folder is not read.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load, save

from harness_rect import embedded
from harness_rect.errors import UserError
from harness_rect.fingerprint import digest
from harness_rect.io.files import expanded, written_whole
from harness_rect.io.rows import read_bytes
from harness_rect.io.yaml_files import read_yaml
from harness_rect.methods.mend_network import Editor
from harness_rect.validation import validated

TENSORS, DESCRIPTION = "mend.safetensors", "mend.yaml"


class Description(BaseModel):
    """inner_params: weight name -> (inputs, outputs), in the order of the modes. sha256: of the tensors.

    description_sha256: of all else here; None in older files.
    model, dtype, model_fingerprint: the model it was trained for. training, validation: settings and scores,
    for information only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    dtype: str
    model_fingerprint: str
    inner_params: dict[str, tuple[int, int]] = Field(min_length=1)
    rank: int = Field(ge=1, le=10_000)
    sha256: str
    training: dict[str, Any] = {}
    validation: dict[str, float] = {}
    description_sha256: str | None = None

    def checksum(self) -> str:
        return digest(self.model_dump(mode="json", exclude={"description_sha256"}))


def weights_folder(name: str) -> Path:
    """The folder of a path, or of ``rect-tiny`` for the embedded weights."""
    return embedded.MEND if name == embedded.NAME else Path(expanded(name))


def read_description(folder: Path) -> Description:
    """The content of ``mend.yaml``.

    Raises:
        UserError: the folder was not written by ``harness-rect train-mend``, or is damaged.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(
            f"{folder}: no trained MEND there ({DESCRIPTION} is missing); make one with `harness-rect"
            f" train-mend --model M --train FILE --output {folder}`"
        )
    try:
        if not isinstance(given := read_yaml(path), dict):
            raise TypeError(f"expected a mapping, found {type(given).__name__}")
        found = validated(Description, given, "")
    except (TypeError, UserError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a description of a trained MEND: {reason}") from None
    if found.description_sha256 not in (None, found.checksum()):
        raise UserError(f"{path}: not the description that was written, by its checksum")
    return found


def load_editor(folder: Path) -> Editor:
    """The trained networks in float32; kept in memory until another folder or content is loaded.

    Raises:
        UserError: the file is missing, damaged, or not the one described.
    """
    return _load(folder, read_description(folder).sha256)


@lru_cache(maxsize=1)
def _load(folder: Path, sha256: str) -> Editor:
    path = folder / TENSORS
    description = read_description(folder)
    data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path}: damaged, or not the file that {DESCRIPTION} beside it describes")
    editor = Editor.identity(description.inner_params, description.rank, 0.0)
    try:
        editor.load_state_dict(load(data))
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: not the tensors of a MEND of rank {description.rank}: {reason}") from None
    return editor.requires_grad_(False)


def save_editor(folder: Path, editor: Editor, **description: Any) -> Description:
    """Write the tensors, then their description.

    Args:
        description: the fields of :class:`Description` except ``sha256`` and ``inner_params``.
    """
    data = save({name: tensor.detach().cpu() for name, tensor in editor.state_dict().items()})
    described = Description(
        inner_params=editor.weights, sha256=hashlib.sha256(data).hexdigest(), **description
    )
    with written_whole(folder / TENSORS) as temporary:
        temporary.write_bytes(data)
    with written_whole(folder / DESCRIPTION) as temporary:
        described = described.model_copy(update={"description_sha256": described.checksum()})
        whole = described.model_dump(mode="json")
        # The checksum comes first, so that it is not cut off with others.
        checksum = {"description_sha256": whole.pop("description_sha256")}
        text = yaml.safe_dump(checksum | whole, sort_keys=False)
        temporary.write_text(text, encoding="utf-8")
    return described
