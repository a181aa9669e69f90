"""Results of the stock lm_eval command on the embedded model, made once for all tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.our_tasks import without_lm_evals_tasks

import harness_rect._autoload  # noqa: F401  lets lm-eval find the model and the tasks

LIMIT = 10


@pytest.fixture(scope="session")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``base`` (unedited) and ``rome`` (two edits): what lm_eval wrote under ``--output_path``."""
    from lm_eval.__main__ import cli_evaluate

    folder = tmp_path_factory.mktemp("evaluations")
    arguments = ["--tasks", "rect_suite", "--log_samples", "--batch_size", "16", "--device", "cpu"]
    models = {"base": "method=none,edits=tiny[0:2]", "rome": "edits=tiny[0:2],regularizer=rect,keep=0.4"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_RECT_CACHE", str(folder / "cache"))
        without_lm_evals_tasks(patch, folder / "empty")
        for name, model in models.items():
            command = ["lm_eval", "--model", "edited_hf", "--model_args", f"pretrained=rect-tiny,{model}"]
            output = ["--limit", str(LIMIT), "--output_path", str(folder / name)]
            patch.setattr(sys, "argv", [*command, *arguments, *output])
            cli_evaluate()
    return {name: folder / name for name in models}
