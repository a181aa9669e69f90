"""Second moments computed from text: the right numbers, resumable to the bit, computed once."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from support.tiny_models import D_MLP, FAMILIES, TEXT

from harness_rect.errors import UserError
from harness_rect.models import EditableLM
from harness_rect.moments import MomentProvider
from harness_rect.moments import accumulate as module
from harness_rect.moments import provider as provider_module
from harness_rect.moments.accumulate import accumulate
from harness_rect.moments.text import texts_of, windows

DOCUMENTS = [*TEXT.splitlines(), "A short one.", "🦜 東京 " * 30]
PARTIAL = "partial.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setenv("HARNESS_RECT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    return path


def brute_force(lm: EditableLM, layer: int, sequences: list[list[int]]) -> tuple[torch.Tensor, int]:
    """Each sequence alone, each token alone, in float64."""
    total, count = torch.zeros(D_MLP, D_MLP, dtype=torch.float64), 0
    keys: list[torch.Tensor] = []
    down = lm.model.get_submodule(lm.architecture.down_projections[layer])
    handle = down.register_forward_hook(lambda m, args, out: keys.append(args[0].reshape(-1, D_MLP)))
    for ids in sequences:
        keys.clear()
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([ids]))
        for key in keys[0].double():
            total += torch.outer(key, key)
            count += 1
    handle.remove()
    return total, count


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


# -- the numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_unpadded_documents(family, make_lm, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_TOKENS", 200)
    monkeypatch.setattr(module, "BLOCK", 20)  # of 48 columns
    lm = make_lm(family)
    sequences, _ = windows(lm, DOCUMENTS, 10_000)
    sums, count = accumulate(lm, [0, 1], sequences, tmp_path / PARTIAL, "x")
    for layer in (0, 1):
        want, tokens = brute_force(lm, layer, sequences)
        assert tokens == count == sum(map(len, sequences))
        assert sums[layer].dtype == torch.float64
        assert close(sums[layer], want, 1e-5)
        assert torch.equal(sums[layer], sums[layer].T)


def test_sums_of_a_float64_model_are_exact_to_the_products_rounding(make_lm, tmp_path):
    lm = make_lm("gpt2")
    lm.model.double()
    sequences, _ = windows(lm, DOCUMENTS, 300)
    sums, _ = accumulate(lm, [1], sequences, tmp_path / PARTIAL, "x")
    want, _ = brute_force(lm, 1, sequences)
    assert close(sums[1], want, 1e-6)


def test_a_layer_among_others_is_what_it_is_alone_and_the_model_is_left_as_it_was(make_lm, tmp_path):
    lm = make_lm("llama")
    lm.model.train()
    sequences, _ = windows(lm, DOCUMENTS, 400)
    both, _ = accumulate(lm, [1, 0], sequences, tmp_path / PARTIAL, "x")
    for layer in (0, 1):
        alone, _ = accumulate(lm, [layer], sequences, tmp_path / PARTIAL, "x")
        assert torch.equal(both[layer], alone[layer])
    assert lm.model.training and all(p.requires_grad for p in lm.model.parameters())
    assert all(not m._forward_hooks for m in lm.model.modules())


# -- windows ------------------------------------------------------------------------------------------


def test_windows_are_the_first_tokens_document_by_document(make_lm):
    lm = make_lm("llama")
    whole = [lm.encoder.ids(text) for text in DOCUMENTS]
    found, documents = windows(lm, DOCUMENTS, 10**6)
    assert documents == len(DOCUMENTS)
    assert [i for ids in found for i in ids] == [i for ids in whole for i in ids]
    assert max(map(len, found)) <= lm.max_length
    assert any(len(ids) == lm.max_length for ids in found)
    wanted = len(whole[0]) + 3
    found, documents = windows(lm, DOCUMENTS, wanted)
    assert documents == 2
    assert [i for ids in found for i in ids] == [*whole[0], *whole[1][:3]]


def test_empty_documents_do_not_count_too_little_text_is_a_warning_and_none_an_error(make_lm, caplog):
    lm = make_lm("gpt2")
    assert windows(lm, ["", " \n", "The city"], 100)[1] == 1
    assert "100" in caplog.text
    with pytest.raises(UserError, match=r"empty\Z"):
        windows(lm, ["", "  "], 100)


# -- interruption -------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@contextmanager
def passes(stop_after: int | None = None) -> Iterator[list[int]]:
    """A list that grows with every forward pass; after some, the next one is interrupted."""
    run: Any = EditableLM.run_hooked
    done: list[int] = []

    def counted(*args: Any) -> Any:
        if len(done) == stop_after:
            raise Interrupted
        done.append(1)
        return run(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EditableLM, "run_hooked", counted)
        yield done


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "BATCH_TOKENS", 60)
    monkeypatch.setattr("harness_rect.io.resume.SAVE_SECONDS", 0.0)


@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupted_computation_ends_with_the_same_bits(after, make_lm, tmp_path, small_batches):
    lm = make_lm("llama")
    sequences, _ = windows(lm, DOCUMENTS, 10_000)
    partial = tmp_path / PARTIAL
    whole, tokens = accumulate(lm, [0, 1], sequences, partial, "x")
    assert not partial.exists()
    with pytest.raises(Interrupted), passes(after):
        accumulate(lm, [0, 1], sequences, partial, "x")
    assert partial.exists() == (after > 0)
    with passes() as calls:
        resumed, again = accumulate(lm, [0, 1], sequences, partial, "x")
    total = len(module._batches(sequences))
    assert total > 5 and len(calls) == total - after
    assert again == tokens
    assert all(torch.equal(resumed[layer], whole[layer]) for layer in (0, 1))
    assert not partial.exists()


@pytest.mark.parametrize(
    ("layers", "fingerprint"), [([0], "x"), ([1], "another"), (None, "")], ids=["layer", "sample", "damaged"]
)
def test_another_or_a_damaged_partial_file_is_not_continued(
    layers, fingerprint, make_lm, tmp_path, small_batches
):
    lm = make_lm("llama")
    sequences, _ = windows(lm, DOCUMENTS, 10_000)
    partial = tmp_path / PARTIAL
    whole, tokens = accumulate(lm, [1], sequences, partial, "x")
    partial.write_bytes(b"damaged")
    if layers is not None:
        with pytest.raises(Interrupted), passes(3):
            accumulate(lm, layers, sequences, partial, fingerprint)
    sums, count = accumulate(lm, [1], sequences, partial, "x")
    assert count == tokens and torch.equal(sums[1], whole[1])


# -- text ---------------------------------------------------------------------------------------------


def test_documents_of_a_text_and_a_jsonl_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One\nstill one\n\nTwo\n")
    assert list(texts_of(str(path))) == ["One\nstill one\n", "Two\n"]
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "One"}\n{"text": "Two", "n": 1}\n')
    assert list(texts_of(str(path))) == ["One", "Two"]
    for bad in ('{"text": 3}', '["x"]', "{broken"):
        path.write_text('{"text": "One"}\n' + bad + "\n")
        with pytest.raises(UserError, match=r"text\.jsonl, .*line 2.*\Z"):
            list(texts_of(str(path)))
    for damaged in ("Ülm".encode("latin-1"), "One\n".encode("utf-16"), "One\n".encode("utf-16-be")):
        (tmp_path / "text.txt").write_bytes(b"One\n" + damaged)
        with pytest.raises(UserError, match=r"text\.txt, line 2: not UTF-8 text"):
            list(texts_of(str(tmp_path / "text.txt")))
    with pytest.raises(UserError, match=r"wikipedia.*\Z"):
        texts_of(str(tmp_path / "missing.txt"))


# -- provider -----------------------------------------------------------------------------------------


def provider(lm: EditableLM, text: Path, **changes) -> MomentProvider:
    usual = {"folder": None, "model_name": "m", "model_fingerprint": "f", "dataset": str(text), "tokens": 250}
    return MomentProvider(lm, **usual | changes)


@pytest.fixture
def no_computing(monkeypatch):
    """Call it, and from then on nothing may be computed."""

    def forbid():
        def refuse(*args, **kwargs):
            raise AssertionError("computed again")

        monkeypatch.setattr(MomentProvider, "compute_into", refuse)

    return forbid


def test_a_second_run_computes_nothing_and_further_layers_alone(make_lm, text_file, no_computing, cache):
    lm = make_lm("gpt2")
    provider(lm, text_file).load([0])
    (path,) = cache.rglob("*.npz")
    stamp = path.stat().st_mtime_ns
    first = provider(lm, text_file)
    first.load([0, 1])
    assert path.stat().st_mtime_ns == stamp
    sequences, _ = windows(lm, texts_of(str(text_file)), 250)
    want, tokens = brute_force(lm, 1, sequences)
    assert tokens == 250
    assert first.get(1).mean.dtype == torch.float64
    assert close(first.get(1).mean, want / tokens, 1e-5)
    assert len(list(cache.rglob("*.npz"))) == 2

    no_computing()
    text_file = text_file.rename(text_file.with_name("moved.txt"))  # a text is known by its content
    second = provider(lm, text_file)
    second.load([1, 0])
    assert torch.equal(second.get(1).mean, first.get(1).mean)
    assert second.provenance() == first.provenance()
    record: Any = second.provenance()["1"]
    assert record["tokens"] == 250 and len(record["sha256"]) == 64 and Path(record["file"]).is_file()


@pytest.mark.parametrize("change", ["model", "tokens", "dtype", "text", "special tokens", "sums"])
def test_another_model_sample_or_computation_is_computed_anew(change, make_lm, text_file, monkeypatch, cache):
    lm = make_lm("llama")
    provider(lm, text_file).load([0])
    given: dict[str, dict[str, Any]] = {
        "model": {"model_fingerprint": "g"},
        "tokens": {"tokens": 100},
        "dtype": {"dtype": "float64"},
    }
    if change == "text":
        text_file.write_text("Another text. " * 200)
    if change == "special tokens":
        lm = make_lm("llama", bos=False)
    if change == "sums":
        monkeypatch.setattr(module, "BLOCK", 20)
    provider(lm, text_file, **given.get(change, {})).load([0])
    assert len(list(cache.rglob("*.npz"))) == 2


def test_a_damaged_file_of_the_cache_is_set_aside_and_computed_again(make_lm, text_file, cache, caplog):
    lm = make_lm("gpt2")
    first = provider(lm, text_file)
    first.load([0, 1])
    path = Path(first.get(1).origin)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    second = provider(lm, text_file)
    second.load([0, 1])
    assert torch.equal(second.get(1).total, first.get(1).total)
    (line,) = [message for message in caplog.messages if "damaged" in message]
    assert line.startswith(f"the cached file {path} is damaged: ") and "\n" not in line
    assert sorted(file.name for file in cache.rglob("*.damaged")) == [f"{path.name}.damaged"]


def test_a_users_folder_is_read_and_never_filled(make_lm, text_file, tmp_path, no_computing):
    lm = make_lm("gpt2")
    folder = tmp_path / "stats" / "org_m" / "wikipedia_stats"
    folder.mkdir(parents=True)
    name = lm.architecture.down_projections[0]
    total = np.eye(D_MLP, dtype=np.float32) * 30
    arrays: dict[str, Any] = {"mom2.mom2": total, "mom2.count": 10}
    np.savez(folder / f"{name}_float32_mom2_100000.npz", **arrays)
    no_computing()
    given = {"folder": str(tmp_path / "stats"), "model_name": "org/m", "dataset": "wikipedia"}
    found = provider(lm, text_file, **given)
    found.load([0])
    assert torch.equal(found.get(0).mean, 3 * torch.eye(D_MLP, dtype=torch.float64))
    with pytest.raises(UserError) as error:
        provider(lm, text_file, **given).load([0, 1])
    message = str(error.value)
    assert lm.architecture.down_projections[1] in message and "\n" not in message
    assert len(list((tmp_path / "stats").rglob("*.npz"))) == 1
    with pytest.raises(UserError, match="no such folder"):
        provider(lm, text_file, folder=str(tmp_path / "nowhere"))


def test_what_is_computed_says_what_it_is_of(make_lm, text_file, cache, caplog):
    provider(make_lm("gpt2"), text_file).load([0])
    (path,) = cache.rglob("*.npz")
    with np.load(path) as arrays:
        description = json.loads(str(arrays["fingerprint"]))
        assert int(arrays["sample_size"]) >= 1
    lm, folder = make_lm("gpt2"), str(path.parent)
    provider(lm, text_file, folder=folder).load([0])
    assert "other weights" not in caplog.text
    provider(lm, text_file, folder=folder, model_fingerprint="another").load([0])
    assert f"stats={folder}: computed with other weights" in caplog.text
    assert description["model"] == "f" and description["tokens"] == 250 and len(description["sha256"]) == 64


def test_moments_that_cannot_be_kept_are_used_all_the_same(
    make_lm, text_file, monkeypatch, cache, caplog
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    usual = provider(make_lm("gpt2"), text_file)
    usual.load([0])
    shutil.rmtree(cache)
    monkeypatch.setattr(provider_module, "write_moment", full)
    unkept = provider(make_lm("gpt2"), text_file)
    unkept.load([0])
    assert unkept.hashes() == usual.hashes()
    assert "the second moments cannot be kept (No space left on device)" in caplog.text


def test_moments_that_another_process_computed_meanwhile_are_not_computed(
    make_lm, text_file, monkeypatch, no_computing
) -> None:
    first = provider(make_lm("gpt2"), text_file)
    computed: list[Path] = []

    class Lock(FileLock):
        """One for which the other process has the lock first, and computes."""

        def acquire(self, *args: Any, **more: Any) -> Any:
            paths = first.paths_in(Path(self.lock_file).parent, [0, 1])
            first.compute_into(paths)
            computed.extend(paths.values())
            no_computing()
            return super().acquire(*args, **more)

    monkeypatch.setattr("harness_rect.io.files.FileLock", Lock)
    second = provider(make_lm("gpt2"), text_file)
    second.load([0, 1])
    assert [Path(second.get(layer).origin) for layer in (0, 1)] == computed
