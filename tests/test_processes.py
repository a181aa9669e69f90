"""Several processes: one edits, all end with the same weights, and one writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from support.ranks import run_ranks

WEIGHT = "transformer.h.0.mlp.c_proj.weight"

#: One rank: counts what its editing method proposes, and says what its model and report look like at the end.
RANK = """
import dataclasses, json, os, sys
import torch
torch.set_num_threads(1)
from harness_rect.methods import METHODS
from harness_rect.model_wrappers.edited_hf import EditedHF

rank, calls = int(os.environ["RANK"]), []
propose = METHODS["rome"].propose

def watched(*arguments):
    calls.append(1)
    return propose(*arguments)

METHODS["rome"] = dataclasses.replace(METHODS["rome"], propose=watched)
model = EditedHF(**json.loads(sys.argv[1]), device="cpu")
assert torch.distributed.get_world_size() == 2
with model.unedited():
    unedited = {name: weight.clone() for name, weight in model.model.state_dict().items()}
torch.save(
    {
        "calls": len(calls),
        "report": model.get_model_info()["edit"],
        "weights": model.model.state_dict(),
        "unedited": unedited,
    },
    f"{sys.argv[2]}/rank{rank}.pt",
)
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def place(tmp_path: Path, make_model, tokenizer) -> Path:
    make_model("gpt2").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    facts = [
        {"prompt": "{} is a city in", "subject": subject, "target_new": "Austria", "target_true": "France"}
        for subject in ("Old Ferrol", "New Kassel", "Upper Thun")
    ]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    hparams = {"layers": [0], "v_num_grad_steps": 2, "context_templates": ["{}"]}
    (tmp_path / "hparams.json").write_text(json.dumps(hparams))
    return tmp_path


def test_one_process_edits_and_all_hold_the_same_weights(place: Path) -> None:
    arguments = {
        "pretrained": str(place / "model"),
        "edits": str(place / "facts.json"),
        "hparams": str(place / "hparams.json"),
        "rect": 0.5,
        "edit_cache": "off",
        "save_edited": str(place / "out"),
    }
    (place / "rank.py").write_text(RANK)
    for ended in run_ranks([[str(place / "rank.py"), json.dumps(arguments), str(place)]] * 2):
        assert ended.status == 0, ended.err
    first, second = (torch.load(place / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert (first["calls"], second["calls"]) == (3, 0)
    assert first["report"] == second["report"]
    assert first["weights"].keys() == second["weights"].keys()
    for name, weight in first["weights"].items():
        assert torch.equal(weight.view(torch.uint8), second["weights"][name].view(torch.uint8)), name

    original = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    assert not torch.equal(original.get_parameter(WEIGHT), second["weights"][WEIGHT])
    for name, weight in original.named_parameters():
        assert torch.equal(first["unedited"][name], weight), name
        assert torch.equal(second["unedited"][name], weight), name
    saved = transformers.AutoModelForCausalLM.from_pretrained(place / "out")
    assert torch.equal(saved.get_parameter(WEIGHT), second["weights"][WEIGHT])
    assert not [path for path in place.iterdir() if path.name.startswith(".")], "both have written"
