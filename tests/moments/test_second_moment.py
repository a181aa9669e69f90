"""Second moments on disk: the public layout in all its places, damaged files, and the solve."""

from __future__ import annotations

import logging
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness_rect.errors import UserError
from harness_rect.moments import read_moment, solve_moment, write_moment
from harness_rect.moments.layout import find_moment
from harness_rect.moments.second_moment import SecondMoment, condition_of, factor_moment

D = 6
MODULE = "transformer.h.5.mlp.c_proj"


def a_sum(seed: int = 0, rank: int = 50, d: int = D) -> torch.Tensor:
    keys = torch.randn(rank, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return keys.T @ keys


def public_file(path: Path, total=None, count=50) -> Path:
    """As the published code writes it, with arrays of its own that mean nothing here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        "mom2.constructor": np.asarray("util.runningstats.SecondMoment()"),
        "mom2.count": np.asarray(count),
        "mom2.mom2": a_sum().float().numpy() if total is None else total,
        "sample_size": np.asarray(7),
    }
    np.savez(path, **arrays)
    return path


def refused(path: Path, d: int = D) -> str:
    with pytest.raises(UserError) as error:
        read_moment(path, d)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# -- files --------------------------------------------------------------------------------------------


def test_a_public_file_is_a_sum_and_a_count(tmp_path):
    moment = read_moment(public_file(tmp_path / "m.npz", count=40), D)
    assert moment.count == 40
    assert moment.origin == str(tmp_path / "m.npz")
    assert moment.mean.dtype == torch.float64
    torch.testing.assert_close(moment.mean, a_sum().float().double() / 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_written_is_read_back(dtype, tmp_path):
    total = a_sum().to(dtype)
    path = tmp_path / "new" / "m.npz"
    write_moment(path, total, 50, 7, '{"text": "x"}')
    moment = read_moment(path, D)
    assert torch.equal(moment.total, total) and moment.total.dtype == dtype and moment.count == 50
    with np.load(path, allow_pickle=False) as arrays:
        assert {"mom2.mom2", "mom2.count", "sample_size", "fingerprint"} <= set(arrays)
        assert arrays["mom2.mom2"].dtype == dtype.__str__().removeprefix("torch.")
        assert int(arrays["sample_size"]) == 7 and str(arrays["fingerprint"]) == '{"text": "x"}'
    assert [p.name for p in path.parent.iterdir()] == ["m.npz"]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "m.npz"
    write_moment(path, a_sum(), 50, 7, "old")

    def fails(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(KeyboardInterrupt):
        write_moment(path, a_sum(1), 50, 7, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["m.npz"]
    assert torch.equal(read_moment(path, D).total, a_sum())


def test_numbers_of_another_machine_are_read(tmp_path):
    for kind in (">f8", "<i4", "f2"):
        moment = read_moment(public_file(tmp_path / "m.npz", total=a_sum().numpy().astype(kind)), D)
        torch.testing.assert_close(moment.total.double(), a_sum(), atol=1, rtol=0.01)


def test_another_width_is_refused_with_both_numbers(tmp_path):
    message = refused(public_file(tmp_path / "m.npz"), d=8)
    assert "(6, 6)" in message and "8" in message


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.mkdir, (self.path,))


def test_pickled_arrays_are_never_opened(tmp_path):
    trap = np.empty((D, D), dtype=object)
    trap[:] = Trap(tmp_path / "opened")
    for name in ("mom2.mom2", "mom2.count"):
        arrays: dict[str, Any] = {"mom2.mom2": np.eye(D), "mom2.count": np.asarray(3), name: trap}
        np.savez(tmp_path / "m.npz", **arrays)
        refused(tmp_path / "m.npz")
    assert not (tmp_path / "opened").exists()


def damaged(path, damage, save: Any = np.savez):
    """Bytes of a file of second moments, changed."""
    save(path, **{"mom2.mom2": a_sum().float().numpy(), "mom2.count": np.asarray(3)})
    path.write_bytes(damage(path.read_bytes()))


def flipped(content: bytes) -> bytes:
    """The same, with one byte of the numbers (or 40 of the compressed ones) inverted."""
    start = content.find(a_sum().float().numpy().tobytes()[:16])
    first, last = (start + 20, start + 21) if start >= 0 else (80, 120)
    return content[:first] + bytes(byte ^ 0xFF for byte in content[first:last]) + content[last:]


def replaced(path: Path, **arrays: Any) -> None:
    """A file as we write it, with other arrays in it."""
    write_moment(path, a_sum(), 50, 7, "text")
    with np.load(path) as written:
        np.savez(path, **(dict(written) | arrays))


def claiming(path: Path) -> None:
    """A member whose header claims 10^18 elements."""
    public_file(path)
    with zipfile.ZipFile(path, "w") as file:
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 1000000000), }"
        header += b" " * (117 - len(header)) + b"\n"
        file.writestr("mom2.mom2.npy", b"\x93NUMPY\x01\x00v\x00" + header)


def encrypted(content: bytes) -> bytes:
    """With the flag of encryption set in every header."""
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        parts = content.split(mark)
        content = mark.join([parts[0], *(p[: place - 4] + b"\x01" + p[place - 3 :] for p in parts[1:])])
    return content


DAMAGE = {
    "no zip": lambda path: path.write_bytes(b"these are no arrays"),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: damaged(path, lambda content: content[: len(content) // 2]),
    "flipped": lambda path: damaged(path, flipped),
    "flipped in compressed": lambda path: damaged(path, flipped, np.savez_compressed),
    "one array": lambda path: np.save(path.open("wb"), np.eye(D)),
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "other arrays": lambda path: np.savez(path, other=np.eye(D)),
    "text": lambda path: public_file(path, total=np.full((D, D), "x")),
    "complex": lambda path: public_file(path, total=np.eye(D) * 1j),
    "several counts": lambda path: public_file(path, count=[1, 2]),
    "not symmetric": lambda path: public_file(path, total=np.triu(a_sum().numpy())),
    "bits that its checksum does not have": lambda path: replaced(path, sha256=np.asarray("0" * 64)),
    "a member that claims gigabytes": lambda path: claiming(path),
    "encrypted": lambda path: damaged(path, lambda content: encrypted(content)),
    "no tokens": lambda path: public_file(path, count=0),
    "not finite": lambda path: public_file(path, total=np.full((D, D), np.nan)),
    "a vector": lambda path: public_file(path, total=np.ones(D)),
}
if hasattr(os, "mkfifo"):
    DAMAGE["a pipe"] = lambda path: os.mkfifo(path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_in_one_line(damage, tmp_path):
    DAMAGE[damage](tmp_path / "m.npz")
    refused(tmp_path / "m.npz")


def test_no_bit_of_a_file_of_ours_can_flip_unseen(tmp_path):
    """Not even one that neither zipfile nor numpy reads, such as the date of a member."""
    written, path = tmp_path / "written.npz", tmp_path / "m.npz"
    write_moment(written, a_sum(d=2).float(), 50, 7, "{}")
    assert read_moment(written, 2).count == 50
    content = written.read_bytes()
    for place in range(len(content)):
        path.write_bytes(bytes([*content[:place], content[place] ^ 1 << place % 8, *content[place + 1 :]]))
        refused(path, 2)


# -- places -------------------------------------------------------------------------------------------


def find(folder: Path, samples: int = 100, dtype: str = "float32") -> Path | None:
    return find_moment(folder, MODULE, "org/gpt2-xl", "wikipedia", dtype, samples)


PLACES = ["org_gpt2-xl/wikipedia_stats", "wikipedia_stats", "."]


@pytest.mark.parametrize("place", PLACES)
def test_the_public_layout_is_found_wherever_the_user_points(place, tmp_path):
    path = public_file(tmp_path / place / f"{MODULE}_float32_mom2_100.npz")
    assert find(tmp_path) == path
    # A file of another sample size or dtype serves if it is the only one.
    assert find(tmp_path, samples=5) == path
    assert find(tmp_path, dtype="float64") == path


def test_other_layers_models_and_texts_are_not_taken(tmp_path):
    for name in (
        "transformer.h.15.mlp.c_proj_float32_mom2_100.npz",
        "transformer.h.5.mlp.c_fc_float32_mom2_100.npz",
        f"{MODULE}_float32_mom2_100.npz.tmp",
        f"x{MODULE}_float32_mom2_100.npz",
        "transformerxhx5.mlp.c_proj_float32_mom2_100.npz",
        f"{MODULE}_float32_mom3_100.npz",
    ):
        public_file(tmp_path / name)
        if name.endswith(".tmp"):
            (tmp_path / f"{name}.npz").rename(tmp_path / name)
    public_file(tmp_path / "org_other/wikipedia_stats" / f"{MODULE}_float32_mom2_100.npz")
    public_file(tmp_path / "wikitext_stats" / f"{MODULE}_float32_mom2_100.npz")
    assert find(tmp_path) is None


def test_the_exact_file_wins_and_the_nearest_place_first(tmp_path):
    far = public_file(tmp_path / f"{MODULE}_float32_mom2_100.npz")
    public_file(tmp_path / PLACES[0] / f"{MODULE}_float32_mom2_5.npz")
    assert find(tmp_path) == far
    near = public_file(tmp_path / PLACES[0] / f"{MODULE}_float32_mom2_100.npz")
    assert find(tmp_path) == near


def test_several_files_that_fit_are_an_error_with_their_names(tmp_path):
    for samples in (10, 20):
        public_file(tmp_path / f"{MODULE}_float32_mom2_{samples}.npz")
    with pytest.raises(UserError) as error:
        find(tmp_path)
    message = str(error.value)
    assert "_mom2_10.npz" in message and "_mom2_20.npz" in message and "mom2_n_samples" in message
    assert "\n" not in message
    assert find(tmp_path, samples=20) == tmp_path / f"{MODULE}_float32_mom2_20.npz"


# -- the solve ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1e1, 1e6])
def test_the_solve_is_that_of_float64(condition, caplog):
    basis = torch.linalg.qr(a_sum(3, d=40)).Q
    c = basis @ torch.diag(torch.logspace(0, -math.log10(condition), 40, dtype=torch.float64)) @ basis.T
    c = (c + c.T) / 2
    key = torch.randn(40, generator=torch.Generator().manual_seed(1))
    solution = solve_moment(c, key)
    expected = torch.linalg.solve(c, key.double())
    assert solution.dtype == torch.float32
    torch.testing.assert_close(solution.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
def test_a_singular_moment_gets_a_ridge_and_a_warning(dtype, seed, caplog):
    """Fewer tokens than dimensions: as stored, rounding decides whether the matrix looks singular."""
    c = a_sum(seed, rank=12, d=40).to(dtype).double() / 12
    key = torch.randn(40, generator=torch.Generator().manual_seed(seed))
    with caplog.at_level(logging.WARNING):
        solution = solve_moment(c, key).double()
    (record,) = caplog.records
    assert "singular" in record.message and "ridge" in record.message and "\n" not in record.message
    assert torch.isfinite(solution).all()
    # The ridge outweighs rounding: the part of the key outside the sample is amplified, not scrambled.
    ridge = record.args[1] * float(c.diagonal().mean())
    values, basis = torch.linalg.eigh(a_sum(seed, rank=12, d=40) / 12)
    expected = basis @ ((basis.T @ key.double()) / (values + ridge))
    assert torch.nn.functional.cosine_similarity(solution, expected, dim=0) > 0.99


def test_a_matrix_that_is_no_moment_is_refused():
    with pytest.raises(UserError, match="second moments") as error:
        solve_moment(-torch.eye(5, dtype=torch.float64), torch.ones(5))
    assert "\n" not in str(error.value)


def with_condition(condition: float) -> torch.Tensor:
    """A matrix of unit diagonal whose condition is about ``condition``."""
    basis = torch.linalg.qr(a_sum(3, d=40)).Q
    c = basis @ torch.diag(torch.logspace(0, -math.log10(condition), 40, dtype=torch.float64)) @ basis.T
    return (c + c.T) / 2


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10])
@pytest.mark.parametrize("scales", [1.0, 1e6])
def test_the_condition_is_that_of_the_matrix_scaled_to_ones(condition, scales):
    scale = torch.logspace(0, math.log10(scales), 40, dtype=torch.float64)
    c = with_condition(condition) * scale * scale[:, None]
    root = c.diagonal().sqrt()
    exact = float(torch.linalg.cond(c / root / root[:, None], 1))
    assert exact / 3 <= condition_of(c, torch.linalg.cholesky(c)) <= 1.01 * exact


def test_only_what_rounding_of_the_sums_dominates_is_damped(caplog):
    c = with_condition(1e9)
    exact = torch.linalg.cholesky(c)
    whole = factor_moment(c, torch.float64)
    assert torch.equal(whole.lower, exact) and whole.ridge == 0 and not caplog.records
    damped = factor_moment(c, torch.float32)
    assert damped.ridge == 1e-4 and 1e4 < damped.condition < 1 / torch.finfo(torch.float32).eps
    (record,) = caplog.records
    assert "a ridge of 0.0001 times the mean eigenvalue" in record.message and "\n" not in record.message
    kept = SecondMoment((c * 100).float(), 100, "file")
    kept.solve(torch.ones(40))
    assert kept.worst is not None and kept.worst.ridge > 0
