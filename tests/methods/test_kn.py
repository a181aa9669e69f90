"""KN: the published neurons and weights, and integrated gradients against a brute-force loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import FAMILIES, make_edit
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness_rect.config import EditConfig
from harness_rect.errors import UserError
from harness_rect.methods.kn import attribution, continuation, value_change
from harness_rect.session import EditSession

CASE = Path(__file__).parent.parent / "data" / "goldens" / "kn_gpt2"
MODEL = CASE.parent / "tiny_gpt2"


@pytest.mark.parametrize("order", ["fresh", "seq"])
def test_neurons_tokens_and_weights_are_the_published_ones(order):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    golden = load_file(CASE / "golden.safetensors")
    spec = str(CASE / "requests.json")
    for index in range(4):
        config = EditConfig(
            method="kn", edits=f"{spec}[{index}:{index + 1}]", hparams=str(CASE / "hparams.json")
        )
        session = EditSession(model, tokenizer, config)
        if index == 1:
            lm = session.lm
            (edit,) = session.edits
            truth = tokenizer(edit.target_old)["input_ids"]
            scores = golden[f"{order}.edit1.scores"]
            found = attribution(lm, lm.encoder.ids(edit.text), truth, 20)
            assert (found - scores).abs().max() / scores.abs().max() < 1e-5
        detail = session.run()["edits"][0]["search"]
        neurons = [[int(layer), n] for layer, row in detail["neurons"].items() for n in row]
        assert neurons == golden[f"{order}.edit{index}.neurons"].tolist()
        assert detail["old_tokens"] == golden[f"{order}.edit{index}.old_argmax_ids"].tolist()
        if order == "fresh":
            session.revert()
    if order == "seq":
        name = "transformer.h.0.mlp.c_proj.weight"
        final = golden[f"seq.final.{name}"]
        assert (model.get_parameter(name).detach() - final).abs().max() / final.abs().max() < 1e-6


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_a_brute_force_loop(family, steps, make_lm, monkeypatch):
    """One forward and one backward pass for each token, block and step, in float64, through the module
    itself.
    """
    lm = make_lm(family)
    lm.model.double()
    prompt, truth = lm.encoder.ids("LeBron James plays the"), [7, 30]
    monkeypatch.setattr("harness_rect.methods.kn.PASS_TOKENS", 5 * len(prompt))  # several passes
    width = lm.architecture.d_mlp
    ids = torch.tensor([prompt])
    wanted = torch.zeros(2, width, dtype=torch.float64)
    for layer in range(2):
        module = lm.first_projection(layer)
        seen: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out.detach()))
        lm.model(ids)
        handle.remove()
        a = seen[0].view(1, len(prompt), -1)[0, -1, :width].clone()
        for token in truth:
            for k in range(steps):
                z = (a * (k / (steps - 1) if steps > 1 else 0)).requires_grad_(True)

                def put(m, args, out, z=z):
                    flat = out.view(-1, out.shape[-1])
                    row = torch.cat([z, flat[-1, width:]])
                    return torch.cat([flat[:-1], row.unsqueeze(0)]).view_as(out)

                handle = module.register_forward_hook(put)
                lm.model(ids).logits[0, -1].softmax(-1)[token].backward()
                handle.remove()
                wanted[layer] += a / steps * z.grad / len(truth)
    with lm.frozen():
        found = attribution(lm, prompt, truth, steps)
    assert (found.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # all 0 for a ReLU at 0


def test_the_greedy_continuation_is_the_models_own(make_lm):
    lm = make_lm("gpt2")
    text, tokens = "The city", continuation(lm, "The city", 3)
    for token in tokens:
        ids = torch.tensor([lm.encoder.ids(text)])
        assert int(lm.model(ids).logits[0, -1].argmax()) == token
        text += lm.encoder.tokenizer.decode([token])


def test_one_token_targets_take_the_old_value_out_twice():
    embedding = torch.arange(12.0).view(4, 3)
    assert torch.equal(value_change(embedding, [1], [2]), embedding[2] - 2 * embedding[1])
    both = embedding[2] + embedding[3] - embedding[0] - embedding[1]
    assert torch.equal(value_change(embedding, [0, 1], [2, 3]), both)


def test_edits_without_the_old_answer_are_refused_before_anything_is_done(make_lm):
    lm = make_lm("gpt2")
    edits = [make_edit(id="0", target_old="x"), make_edit(id="17", source="facts.json row 17")]
    with pytest.raises(UserError, match=r"facts\.json row 17: kn .* ground_truth"):
        EditSession(lm.model, lm.encoder.tokenizer, EditConfig(method="kn", edits="e"), edits)


def test_hparams_of_other_settings_are_refused(make_lm, tmp_path):
    from harness_rect.hparams import resolve_hparams
    from harness_rect.methods import METHODS

    file = tmp_path / "h.json"
    file.write_text(json.dumps({"refine": True}))
    with pytest.raises(UserError, match="refine"):
        resolve_hparams(METHODS["kn"], str(file), make_lm("gpt2"))
