"""What a worker of Ray reserves, without Ray: a cluster is its resources here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness_rect.errors import UserError
from harness_rect.experiments.sweep.plan import SweepConfig, make_plan
from harness_rect.experiments.sweep.ray_workers import Resources, _resources


def reserved(tmp_path: Path, gpus: float, asked: Resources, model: dict[str, Any], **more: Any) -> dict:
    values: dict[str, Any] = {
        "output": str(tmp_path / "out"),
        "models": [{"pretrained": "rect-tiny", **model}],
        "edits": "tiny[0:1]",
        "methods": ["rome"],
        "checkpoints": [1],
        "tasks": ["rect_zsre"],
    }
    config = SweepConfig(**values, **more)
    cluster = SimpleNamespace(cluster_resources=lambda: {"GPU": gpus} if gpus else {})
    return _resources(cluster, make_plan(config, "sweep.yaml"), asked)


@pytest.mark.parametrize(
    ("gpus", "asked", "model", "more", "found"),
    [
        (4, Resources(), {}, {}, 1),
        (4, Resources(), {}, {"device": "cpu"}, None),
        (4, Resources(), {"device": "cpu"}, {}, None),
        (4, Resources(), {"device": "cuda"}, {"device": "cpu"}, 1),
        (0, Resources(), {"parallelize": True}, {}, None),
        (4, Resources(gpus=2), {"parallelize": True}, {}, 2),
    ],
)
def test_a_worker_has_a_gpu_where_the_model_goes_on_one(gpus, asked, model, more, found, tmp_path):
    made = reserved(tmp_path, gpus, asked, model, **more)
    assert made.get("num_gpus") == found and made["num_cpus"] == 1
    assert ("memory" in made) == (found is None)


@pytest.mark.parametrize("model", [{"parallelize": True}, {"device_map": "auto"}])
def test_a_model_over_several_gpus_says_how_many(model, tmp_path):
    with pytest.raises(UserError, match="give --gpus G"):
        reserved(tmp_path, 4, Resources(), model)
