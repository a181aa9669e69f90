"""What runs on a GPU gives what runs on a CPU. Skipped where there is none."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES, depth, make_edit

from harness_rect.hparams import HyperParameters
from harness_rect.methods import METHODS, Context
from harness_rect.methods.memit import MemitHyperParameters
from harness_rect.methods.rome import RomeHyperParameters
from harness_rect.models import EditableLM, graphs
from harness_rect.moments import SecondMoment
from harness_rect.moments.accumulate import accumulate
from harness_rect.regularizers import rect

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

EDITS = [
    make_edit("{} plays the sport of", "LeBron James", "football", id="a"),
    make_edit("To visit the {} you must travel to", "Vatican Library", "old Vienna, Austria", id="b"),
]
TEMPLATES = ["{}", "The city is large. {}", "Because it was raining, the mother tongue. {}"]


def a_moment(width):
    factor = torch.randn(width, 2 * width, generator=torch.Generator().manual_seed(0))
    return SecondMoment(factor @ factor.T, 2 * width, "random")


def propose(lm, method):
    moment = a_moment(lm.architecture.d_mlp)
    h: HyperParameters
    templates: list[Any]
    if method == "rome":
        h = RomeHyperParameters(layers=[1], v_num_grad_steps=6, v_lr=0.1, mom2_adjustment=True)
        edits, templates = EDITS[:1], TEMPLATES
    else:
        h = MemitHyperParameters(layers=[0, 1], v_num_grad_steps=6, v_lr=0.1, mom2_update_weight=10)
        edits, templates = EDITS, [TEMPLATES[:1], TEMPLATES[1:]]
    with lm.frozen():
        updates = METHODS[method].propose(lm, edits, h, Context(templates, lambda layer: moment)).updates
    return {name: update.dense().double().cpu() for name, update in updates.items()}


def off(found, wanted):
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


@pytest.fixture
def recordings(monkeypatch):
    """Which searches were recorded as CUDA graphs."""
    made: list[bool] = []
    recorded = graphs.recorded

    def watch(*args):
        made.append((replay := recorded(*args)) is not None)
        return replay

    monkeypatch.setattr(graphs, "recorded", watch)
    return made


@pytest.mark.parametrize("method", ["rome", "memit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_edits_as_a_cpu_with_recorded_steps_and_without(
    family, method, make_lm, recordings, monkeypatch
):
    on_cpu = make_lm(family, **depth(family, 3))
    lm = EditableLM(copy.deepcopy(on_cpu.model).cuda(), on_cpu.encoder.tokenizer)
    wanted, found = propose(on_cpu, method), propose(lm, method)
    assert all(recordings) or family != "gpt2"  # GPT-J's forward, for one, cannot be recorded
    assert off(found, wanted) < 1e-3
    monkeypatch.setattr(graphs, "GRAPH_TOKENS", 0)
    assert off(propose(lm, method), found) < 1e-3


def test_bfloat16_steps_are_recorded_too(make_lm, recordings, monkeypatch):
    on_cpu = make_lm("gpt2", n_layer=3)
    lm = EditableLM(copy.deepcopy(on_cpu.model).cuda().bfloat16(), on_cpu.encoder.tokenizer)
    found = propose(lm, "rome")
    assert all(recordings) and recordings
    monkeypatch.setattr(graphs, "GRAPH_TOKENS", 0)
    assert off(propose(lm, "rome"), found) < 0.1


def test_rect_keeps_the_same_elements():
    update, weight = (torch.randn(64, 300, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for keep in (0.2, 0.4, 1.0):
        assert torch.equal(
            rect(update.cuda(), weight.cuda(), keep=keep).cpu(), rect(update, weight, keep=keep)
        )


def test_second_moments_are_the_same(make_lm, tmp_path):
    on_cpu = make_lm("llama")
    lm = EditableLM(copy.deepcopy(on_cpu.model).cuda(), on_cpu.encoder.tokenizer)
    sequences = [
        on_cpu.encoder.ids(text) for text in ("The city is large.", "I went to Rome to see it, too.")
    ]
    wanted, count = accumulate(on_cpu, [0, 1], sequences, tmp_path / "a", "x")
    found, same = accumulate(lm, [0, 1], sequences, tmp_path / "b", "x")
    assert count == same and off(found, wanted) < 1e-5


def test_the_default_command_runs_on_a_gpu(tmp_path):
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "edited_hf", "--tasks", "rect_suite", "--device", "cuda",
         "--limit", "10", "--output_path", str(tmp_path / "out")],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert "rect_sentiment" in json.loads(results.read_text())["results"]
