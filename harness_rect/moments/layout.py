"""The public layout of second moments (ROME's statistics): names of folders and files, and their content.

``<model>/<dataset>_stats/<module>_<dtype>_mom2_<n>.npz`` holds ``mom2.mom2``, the SUM of outer products
(d_mlp, d_mlp); ``mom2.count``, the number of tokens; and ``sample_size``, the number of documents. Ours add
``fingerprint``, a JSON text that describes the sample, ``sha256`` of the numbers, and a checksum of the whole
file as the comment of the zip file. Pickled data is never loaded, and no member of a file that claims to be
larger than the sum can be.
"""

from __future__ import annotations

import json
import lzma
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness_rect.errors import UserError
from harness_rect.io.checksums import Damaged, check_zip_sum, write_zip_sum
from harness_rect.io.files import written_whole
from harness_rect.moments.second_moment import SecondMoment


def layout_name(model: str) -> str:
    """The name of a model in the layout: its hub name, or the last part of a local path."""
    return Path(model).name if Path(model).is_dir() else model


def folder_name(model: str) -> str:
    """The folder of a model: its name with underscores for slashes."""
    return model.replace("/", "_")


def file_name(module: str, dtype: str, samples: int) -> str:
    """The file of one module. samples: ``mom2_n_samples``, or the number of tokens if we computed it."""
    return f"{module}_{dtype}_mom2_{samples}.npz"


def find_moment(folder: Path, module: str, model: str, dataset: str, dtype: str, samples: int) -> Path | None:
    """The file of one module in a user's folder.

    Searched for in ``<folder>/<model>/<dataset>_stats/``, ``<folder>/<dataset>_stats/`` and ``<folder>/``; a
    file of another sample size or dtype is used if it is the only one.

    Args:
        model: :func:`layout_name`.

    Raises:
        UserError: several fit equally well.
    """
    # The public cache names a model without its owner ("gpt2-xl"), the hub with it.
    models = [folder_name(model), model.rpartition("/")[2]]
    stats, exact = f"{dataset}_stats", file_name(module, dtype, samples)
    places = [*(folder / name / stats for name in models if name), folder / stats, folder]
    for place in places:
        if (place / exact).is_file():
            return place / exact
    pattern = re.compile(re.escape(module) + r"_(float32|float64)_mom2_\d+\.npz")
    for place in places:
        found = sorted(p for p in place.glob("*.npz") if pattern.fullmatch(p.name))
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise UserError(
                f"{place}: several files of second moments for {module}: {names}; set mom2_n_samples"
            )
        if found:
            return found[0]
    return None


#: What numpy and zipfile raise for damaged, foreign, encrypted and oversized files.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, OverflowError, MemoryError, RuntimeError),
    *(SyntaxError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError, Damaged),
)


def _check_claims(path: Path, most: int) -> None:
    """Raise ValueError if an archive claims to hold more bytes than second moments of the model take, and
    Damaged if it has a checksum and is not what was written."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is a folder, a pipe or a device")
    with zipfile.ZipFile(path) as archive:
        if (claimed := sum(entry.file_size for entry in archive.infolist())) > most:
            raise ValueError(f"it claims to hold {claimed} bytes, for this model at most {most} are expected")
    check_zip_sum(path)


#: The array that says as JSON what the sum is of; published files have none.
DESCRIPTION = "fingerprint"


def _model_in(described: str | None) -> str | None:
    """The fingerprint of the model in such a description."""
    try:
        return str(json.loads(described or "")["model"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def read_moment(path: Path, d_mlp: int) -> SecondMoment:
    """Read one file.

    Raises:
        UserError: it is no npz file, is damaged, lacks arrays, or its sum is of another width, not finite or
            not symmetric; the message names the file.
    """
    try:
        _check_claims(path, 16 * d_mlp**2 + 2**16)
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("it holds a single array")
        with arrays:
            total, count = arrays["mom2.mom2"], int(arrays["mom2.count"])
            written, described = (
                str(arrays[k]) if k in arrays.files else None for k in ("sha256", DESCRIPTION)
            )
        if total.dtype.kind not in "fiu":
            raise ValueError(f"mom2.mom2 holds {total.dtype}")
        wide = total.dtype.itemsize > 4
        moment = torch.from_numpy(total.astype(np.float64 if wide else np.float32, copy=False))
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: not a file of second moments (expected an npz with mom2.mom2 and mom2.count): {reason}"
        ) from None
    if moment.shape != (d_mlp, d_mlp):
        fit = f"do not fit this model, whose keys have {d_mlp} elements"
        raise UserError(f"{path}: second moments of shape {total.shape} {fit}")
    if count <= 0 or not torch.isfinite(moment).all():
        expected = f"must be finite and over at least one token (count is {count})"
        raise UserError(f"{path}: second moments {expected}")
    if (apart := _asymmetry(moment)) > ASYMMETRY:
        raise UserError(
            f"{path}: second moments must be symmetric, and two elements that should be equal differ by"
            f" {apart:.2g} of the largest; the file is damaged or holds something else"
        )
    found = SecondMoment(moment, count, str(path), _model_in(described))
    if written not in (None, found.sha256):
        raise UserError(f"{path}: second moments are not those that were written, by their checksum")
    return found


def verify_moment(path: Path) -> None:
    """Check a file of second moments of any width.

    Raises:
        UserError: as :func:`read_moment`.
    """
    try:
        _check_claims(path, 2**36)
        with np.load(path, allow_pickle=False) as arrays:
            width = len(arrays["mom2.mom2"])
    except (*_UNREADABLE, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a file of second moments: {' '.join(str(error).split())}") from None
    read_moment(path, width)


#: How much elements (i, j) and (j, i) may differ by rounding, as a share of the largest element.
ASYMMETRY = 1e-3


def _asymmetry(total: Tensor) -> float:
    """The largest difference of two elements that should be equal, as a share of the largest."""
    rows = max(1, (1 << 24) // len(total))
    starts = range(0, len(total), rows)
    apart = max(float((total[i : i + rows] - total[:, i : i + rows].T).abs().max()) for i in starts)
    largest = float(total.abs().max())
    return apart / largest if largest else 0.0


def write_moment(path: Path, total: Tensor, count: int, documents: int, fingerprint: str) -> None:
    """Write one file atomically."""
    arrays = {
        "mom2.mom2": total.numpy(),
        "mom2.count": np.asarray(count),
        "sample_size": np.asarray(documents),
        DESCRIPTION: np.asarray(fingerprint),
        "sha256": np.asarray(SecondMoment(total, count, "").sha256),
    }
    with written_whole(path) as temporary:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        write_zip_sum(temporary)
