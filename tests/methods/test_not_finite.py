"""With every method, an edit in which something is not finite is named and left out; the stream goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.every_method import EDITS, config_of, write_moments

from harness_rect import embedded
from harness_rect.config import EditConfig
from harness_rect.methods import METHODS
from harness_rect.session import EditSession

#: Whose condition a method reports: of the second moment of each layer, and of its system of keys.
SOLVES = {
    **{name: {"C of layer", "keys of layer"} for name in ("memit", "emmet", "lyaplock")},
    **{name: {"keys of layer"} for name in ("alphaedit", "evoedit")},
    **{"r_rome": {"C of layer"}, "ultraedit": {"keys of"}},
}


@pytest.fixture(scope="module")
def moments(tmp_path_factory) -> Path:
    return write_moments(tmp_path_factory.mktemp("moments"))


def session_of(method: str, folder: Path, moments: Path, make_model: Any, tokenizer: Any) -> EditSession:
    if method == "mend":  # its networks are those of the embedded model
        place = embedded.resolve_model(embedded.NAME)
        model = transformers.AutoModelForCausalLM.from_pretrained(place).eval()
        config = EditConfig(method="mend", edits="tiny[0:2]")
        return EditSession(model, transformers.AutoTokenizer.from_pretrained(place), config)
    config = config_of(method, folder, moments, "none").model_copy(update={"edit_batch_size": 1})
    return EditSession(make_model("gpt2"), tokenizer, config, EDITS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.full_runs
def test_an_edit_that_is_not_finite_is_left_out_by_id(
    method: str, tmp_path: Path, moments: Path, make_model, tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    session = session_of(method, tmp_path, moments, make_model, tokenizer)
    good, bad = session.edits
    session.edits = (bad, good)
    ids = [set(session.lm.encoder.ids(edit.text)) for edit in (good, bad)]
    poisoned = min(ids[1] - ids[0])

    def poison(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((given[0] == poisoned).unsqueeze(-1), torch.nan)

    session.lm.model.get_input_embeddings().register_forward_hook(poison)
    report = session.run()
    assert report["flagged"]["not_finite"] == [bad.id]
    assert [step["applied"] for step in report["steps"]] == [False, True]
    assert f"1 of 2 edits had a non-finite update, which was not applied: {bad.id}" in caplog.text
    for name in report["weights"]:
        assert torch.isfinite(session.lm.weight(name)).all()
    json.loads(json.dumps(report), parse_constant=pytest.fail)
    assert report["conditions"] == report["steps"][1]["conditions"]
    assert {name.rpartition(" ")[0] for name in report["conditions"]} == SOLVES.get(method, set())
    assert all(1 <= value < 1e4 for value in report["conditions"].values())
