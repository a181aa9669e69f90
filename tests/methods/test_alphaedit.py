"""AlphaEdit against the published code, and its memory across an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness_rect.config import EditConfig
from harness_rect.session import EditSession
from harness_rect.session.runs import EditCache

CASE = Path(__file__).parent.parent / "data" / "goldens" / "gpt2_alphaedit"
MODEL = CASE.parent / "tiny_gpt2"


@pytest.fixture
def start(tmp_path):
    """A function that makes a session on fresh weights; ``changes`` go over the published settings."""
    stats = tmp_path / "stats"
    stats.mkdir()
    for path in [*CASE.glob("*.npz"), *(CASE.parent / "gpt2_rome_mom2_sequence").glob("*.npz")]:
        shutil.copy(path, stats)
    hparams = json.loads((CASE / "hparams.json").read_text())
    hparams["context_templates"] = json.loads((CASE / "context_templates.json").read_text())

    def make(method: str = "alphaedit", **changes) -> EditSession:
        file = tmp_path / f"{method}.json"
        wanted = hparams | changes
        if method in {"memit", "lyaplock"}:
            wanted = {k: v for k, v in wanted.items() if k not in {"nullspace_threshold", "L2"}}
        file.write_text(json.dumps(wanted))
        model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
        config = EditConfig(
            method=method,
            edits=str(CASE / "requests.json"),
            edit_batch_size=3,
            hparams=str(file),
            stats=str(stats),
        )
        return EditSession(model, tokenizer, config)

    return make


def weights(session: EditSession) -> dict[str, torch.Tensor]:
    return {name: session.lm.weight(name).detach().clone() for name in session.weight_names}


def test_two_batches_end_at_the_published_weights(start):
    session = start()
    session.run()
    golden = load_file(CASE / "golden.safetensors")
    for name, found in weights(session).items():
        wanted = golden[f"final.{name}"]
        assert (found - wanted).abs().max() / wanted.abs().max() < 5e-5


@pytest.mark.parametrize(
    ("method", "changes"),
    [("alphaedit", {}), ("memit", {"history": "keys"}), ("evoedit", {}), ("lyaplock", {})],
)
def test_an_interrupted_stream_goes_on_with_the_keys_it_had(method, changes, start, tmp_path, monkeypatch):
    whole = start(method, **changes)
    whole.run()
    monkeypatch.setattr("harness_rect.io.resume.SAVE_SECONDS", 0.0)
    cut = start(method, **changes)
    cache = EditCache(tmp_path / "cache")

    def stop_after_the_first(done: int) -> None:
        if done == first:
            raise RuntimeError("cut off")

    first = cut.config.edit_batch_size
    with pytest.raises(RuntimeError, match="cut off"):
        cut.run(cache, on_step=stop_after_the_first)
    resumed = start(method, **changes)
    resumed.run(EditCache(tmp_path / "cache"))
    for name, weight in weights(resumed).items():
        assert torch.equal(weight, weights(whole)[name])


def test_memits_history_changes_the_second_batch_only(start):
    with_history, without = start("memit", history="keys").run(), start("memit").run()
    norms = [
        [w["update_norm"] for step in r["steps"] for w in step["weights"].values()]
        for r in (with_history, without)
    ]
    assert norms[0][:2] == norms[1][:2] and norms[0][2:] != norms[1][2:]
