"""Methods with regularizers and their settings, as a sweep describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from harness_rect import embedded
from harness_rect.experiments.sweep.plan import make_plan, read_config
from harness_rect.methods import METHODS
from harness_rect.regularizers import REGULARIZERS
from harness_rect.session import EditSession

#: Each regularizer with a value for each of its settings that is not the default.
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "rect": {"keep": 0.3, "rect_convention": "alphaedit"},
    "random": {"keep": 0.3},
    "pca": {"keep": 0.3},
    "scale": {"keep": 0.3},
    "norm_matched": {"keep": 0.3, "rect_convention": "alphaedit"},
    "magnitude": {"keep": 0.3},
    "prune": {"base": 1.5},
    "sphere": {"alpha": 0.7, "beta": 0.6},
    "revive": {"keep": 0.3, "revive_spectrum": "squares"},
}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    folder = embedded.resolve_model(embedded.NAME)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer


def test_every_setting_is_tried():
    assert {name: set(kind.model_fields) for name, kind in REGULARIZERS.items()} == {
        name: set(settings) for name, settings in SETTINGS.items()
    }


#: A method of each kind of update (rank one, several weights, single columns, dense): with every regularizer.
#: The others get two regularizers each, in turns, beside none.
KINDS = ("rome", "memit", "kn", "mend")


def regularizers_for(method: str) -> list[str]:
    if method in KINDS:
        return list(SETTINGS)
    others, place = list(SETTINGS)[1:], 2 * list(METHODS).index(method)
    return ["none", *((others * 2)[place % len(others) :][:2])]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_edits_with_regularizers(method: str, loaded, tmp_path: Path) -> None:
    config = {
        "output": str(tmp_path / "out"),
        "models": [embedded.NAME],
        "edits": "tiny[0:1]",
        "methods": [method],
        "regularizers": [{"regularizer": name, **SETTINGS[name]} for name in regularizers_for(method)],
        "checkpoints": [1],
        "tasks": ["rect_zsre"],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config))
    model, tokenizer = loaded
    plan = make_plan(read_config(tmp_path / "sweep.yaml"), "sweep.yaml")
    norms = {}
    for trajectory in plan.trajectories:
        session = EditSession(
            model, tokenizer, trajectory.config, edits=trajectory.edits, model_name=embedded.NAME
        )
        session.run()
        report = session.report
        assert report.regularizer_settings == SETTINGS[report.regularizer]
        assert [step.applied for step in report.steps] == [True]
        norms[report.regularizer] = [w.frobenius_distance for w in report.weights.values()]
        session.revert()
    assert list(norms) == regularizers_for(method)
    # PRUNE restrains large singular values only, and of KN's few columns RECT and Magnitude keep all.
    unchanged = {"none", "prune"} | ({"rect", "norm_matched", "magnitude"} if method == "kn" else set())
    assert [name for name in norms if norms[name] == norms["none"] and name not in unchanged] == []
