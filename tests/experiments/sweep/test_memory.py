"""The memory that a dry run tells, against what torch counts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harness_rect import embedded
from harness_rect.errors import UserError
from harness_rect.experiments.sweep.memory import needed, skeleton, weights_of
from harness_rect.experiments.sweep.plan import ModelEntry, SweepConfig, make_plan
from harness_rect.session import EditSession

sys.path.insert(0, str(Path(__file__).parents[3]))  # the benchmarks are not installed
try:
    from benchmarks.measuring import peak_allocated
finally:
    sys.path.pop(0)

CPU = torch.device("cpu")


def planned(model: Any, n: int, method: Any) -> tuple[SweepConfig, Any]:
    config = SweepConfig(
        output="out",
        models=[model],
        edits=f"tiny[0:{n}]",
        methods=[method],
        checkpoints=[n],
        tasks=["rect_nli"],
    )
    return config, make_plan(config, "test").trajectories[0]


def entry(**arguments: Any) -> ModelEntry:
    return ModelEntry.model_validate({"pretrained": "rect-tiny"} | arguments)


@pytest.mark.parametrize(
    ("model", "n", "method"),
    [
        ("rect-tiny", 2, "rome"),
        ("rect-tiny", 12, {"method": "memit", "edit_batch_size": 6}),
        ("rect-tiny", 2, "kn"),
        ("rect-tiny", 2, "ft"),
        ("rect-tiny", 10, {"method": "mend", "edit_batch_size": 5}),
        ("rect-tiny-llama", 2, "rome"),
        ("rect-tiny-llama", 8, {"method": "alphaedit", "edit_batch_size": 4}),
    ],
)
def test_it_is_within_15_percent_of_what_torch_counts(model: str, n: int, method: Any) -> None:
    config, trajectory = planned(model, n, method)
    told = needed(skeleton(config.models[0]), trajectory, config, CPU)
    folder = embedded.resolve_model(model)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    weights = sum(p.numel() * p.itemsize for p in loaded.parameters())
    assert told.weights == weights
    session = EditSession(loaded, tokenizer, trajectory.config, trajectory.edits, model)
    edited = peak_allocated(lambda: session.run(on_step=lambda done: None), "cpu")
    assert told.total == pytest.approx(weights + edited, rel=0.15)


def test_it_follows_dtype_and_shape(tmp_path) -> None:
    shape = transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008)
    shape.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(embedded.resolve_model("rect-tiny")).save_pretrained(tmp_path)
    for dtype, size in (("float32", 4), ("float16", 2)):
        config, trajectory = planned({"pretrained": str(tmp_path), "dtype": dtype}, 1, "memit")
        told = needed(skeleton(config.models[0]), trajectory, config, torch.device("cuda"))
        assert told.weights == size * 6_738_415_616  # LLaMA 7B
        assert told.copies == 5 * 4096 * 11008 * (4 + size)  # five layers
        assert told.moments == 5 * 8 * 11008**2


def test_a_model_without_weights_is_read_from_its_configuration_or_named(tmp_path) -> None:
    lm = skeleton(entry(dtype="bfloat16"))
    assert next(lm.model.parameters()).device.type == "meta"
    assert weights_of(lm) == weights_of(skeleton(entry())) // 2
    with pytest.raises(UserError, match=f"models: {tmp_path}: cannot be loaded"):
        skeleton(entry(pretrained=str(tmp_path)))
    with pytest.raises(UserError, match="torch has no dtype float23"):
        skeleton(entry(dtype="float23"))
