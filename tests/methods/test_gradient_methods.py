"""Fine-tuning and UltraEdit against plain autograd on the model's own weights."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tiny_models import FAMILIES, make_edit

from harness_rect.errors import UserError
from harness_rect.methods import METHODS, Context
from harness_rect.methods.ft import FtHyperParameters
from harness_rect.methods.gradients import inputs_and_gradients, targets_of, token_nll
from harness_rect.methods.ultraedit import EPSILON, UltraEditHyperParameters
from harness_rect.moments import SecondMoment

EDITS = [
    make_edit("{} plays the sport of", "LeBron James", "football", id="a"),
    make_edit("To visit the {} you must go to", "Vatican Library", "old Vienna, Austria", id="b"),
    make_edit("{} speaks", "Giulia Rossi", "English", id="c"),
]


def no_moments(layer: int) -> SecondMoment:
    raise AssertionError("second moments were not asked for")


def propose(lm, method, h, edits=EDITS, context=None):
    with lm.frozen():
        return METHODS[method].propose(lm, edits, h, context or Context(["{}"], no_moments))


def mean_nll(lm, edits=EDITS) -> torch.Tensor:
    """Each fact's mean over its target tokens, one unpadded forward pass each."""
    losses = []
    for edit in edits:
        prompt, target = lm.encoder.continuation(edit.text, edit.target)
        logits = lm.model(torch.tensor([prompt + target])).logits[0]
        where = range(len(prompt) - 1, len(prompt) + len(target) - 1)
        losses.append(torch.nn.functional.cross_entropy(logits[list(where)].float(), torch.tensor(target)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_of_fine_tuning_is_adam_on_the_mean_loss(family, make_lm):
    lm = make_lm(family)
    h = FtHyperParameters(layers=[1], num_steps=1, lr=1e-3)
    (update,) = propose(lm, "ft", h).updates.values()
    weight = lm.weight(lm.architecture.weight_name(1))
    weight.requires_grad_(True)
    (gradient,) = torch.autograd.grad(mean_nll(lm), weight)
    wanted = -h.lr * gradient / (gradient.abs() + 1e-8)  # Adam's first step
    clear = gradient.abs() > 1e-6
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(update.dense()[clear], wanted[clear], rtol=1e-3, atol=1e-7)


def test_fine_tuning_learns_its_facts_and_the_box_holds(make_lm):
    lm = make_lm("llama")
    before = mean_nll(lm).item()
    (update,) = propose(lm, "ft", FtHyperParameters(layers=[1], num_steps=30, lr=5e-3)).updates.values()
    (boxed,) = propose(
        lm, "ft_l", FtHyperParameters(layers=[1], num_steps=30, lr=5e-3, norm_constraint=2e-3)
    ).updates.values()
    assert boxed.dense().abs().max() == pytest.approx(2e-3, rel=1e-3)
    losses = []
    for change in (boxed, update):
        weight = lm.weight(lm.architecture.weight_name(1))
        original = weight.detach().clone()
        with torch.no_grad():
            weight += change.dense()
            losses.append(float(mean_nll(lm)))
            weight.copy_(original)
    assert losses[1] < losses[0] < before
    assert losses[1] < before - 2


def test_a_published_file_without_a_box_says_false():
    assert FtHyperParameters(layers=[0], norm_constraint=False).norm_constraint is None


def test_breadth_first_tuning_teaches_the_end_of_the_answer(make_lm):
    lm = make_lm("gpt2")
    end = lm.encoder.tokenizer.eos_token_id

    def end_probability() -> float:
        ids = lm.encoder.ids(EDITS[0].text + EDITS[0].target)
        return float(lm.model(torch.tensor([ids])).logits[0, -1].softmax(-1)[end])

    h = FtHyperParameters(layers=[0, 1], num_steps=20, lr=5e-3, batch_size=2)
    results = []
    for method in ("ft", "locft_bf"):
        updates = propose(lm, method, h).updates
        with torch.no_grad():
            for name, update in updates.items():
                lm.weight(name).add_(update.dense())
            results.append(end_probability())
            for name, update in updates.items():
                lm.weight(name).sub_(update.dense())
    assert results[1] > 5 * results[0]


def test_a_tokenizer_without_end_of_text_is_refused(make_lm):
    lm = make_lm("gpt2")
    lm.encoder.tokenizer = copy.deepcopy(lm.encoder.tokenizer)
    lm.encoder.tokenizer.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        propose(lm, "locft_bf", FtHyperParameters(layers=[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_outer_products_of_inputs_and_gradients_are_the_weights_gradient(family, make_lm):
    lm = make_lm(family)
    if family != "gemma2":  # its mask overflows in float64 where padding is longer than the sliding window
        lm.model.double()
    names = [f"{name}.weight" for matrices in lm.architecture.mlp_matrices for name in matrices]
    targets = targets_of(lm, [lm.encoder.continuation(e.text, e.target) for e in EDITS])
    with lm.frozen():
        found = inputs_and_gradients(lm, names, targets.batch, lambda: token_nll(lm, targets).sum())
    weights = [lm.weight(name).requires_grad_(True) for name in names]
    dense = torch.autograd.grad(token_nll(lm, targets).sum(), weights)
    for name, gradient in zip(names, dense, strict=True):
        x, g = (t.flatten(0, 1).to(gradient) for t in found[name])
        outer = x.T @ g if lm.is_transposed(name) else g.T @ x
        assert (outer - gradient).abs().max() / gradient.abs().max() < 1e-4, name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ultraedit_over_two_batches_equals_its_formula(family, make_lm):
    """Rows gathered fact by fact, statistics over all rows so far, the d x d system solved as it stands."""
    lm = make_lm(family)
    h = UltraEditHyperParameters(layers=[1], lr=1e-3)
    context = Context(["{}"], no_moments)
    seen: list[torch.Tensor] = []
    module = lm.down_projection(1)
    for edits in (EDITS[:2], EDITS[2:]):
        (update,) = propose(lm, "ultraedit", h, edits, context).updates.values()
        keys, gradients = [], []
        for edit in edits:
            prompt, target = lm.encoder.continuation(edit.text, edit.target)
            held: dict[str, torch.Tensor] = {}

            def hook(m, args, out, held=held):
                held["h"] = args[0].detach()
                held["out"] = out
                out.retain_grad()

            weight = lm.weight(lm.architecture.weight_name(1)).requires_grad_(True)
            handle = module.register_forward_hook(hook)
            logits = lm.model(torch.tensor([prompt + target[:-1]])).logits[0]
            handle.remove()
            where = list(range(len(prompt) - 1, len(prompt) - 1 + len(target)))
            torch.nn.functional.cross_entropy(logits[where], torch.tensor(target)).backward()
            weight.requires_grad_(False)
            keys.append(held["h"][0, where].double())
            gradients.append(held["out"].grad[0, where].double())
        k, g = torch.cat(keys), torch.cat(gradients)
        seen.append(torch.cat([k, g], 1))
        rows = torch.cat(seen)
        normal = (seen[-1] - rows.mean(0)) / (rows.std(0) + EPSILON)
        k_hat, g_hat = normal.split([k.shape[1], g.shape[1]], 1)
        v = -h.lr * (k_hat**2).sum(1, keepdim=True) * g_hat
        wanted = torch.linalg.solve(k.T @ k + torch.eye(k.shape[1]), k.T @ v)
        wanted = wanted if lm.is_transposed(lm.architecture.weight_name(1)) else wanted.T
        assert (update.dense() - wanted).abs().max() / wanted.abs().max() < 1e-3


def test_one_token_alone_has_no_deviation_and_changes_nothing(make_lm):
    lm = make_lm("gpt2")
    edit = make_edit("You can visit the {}", "Vatican Library", "in")
    assert len(lm.encoder.continuation(edit.text, edit.target)[1]) == 1
    (update,) = propose(lm, "ultraedit", UltraEditHyperParameters(layers=[1]), [edit]).updates.values()
    assert not update.dense().any()


@pytest.mark.parametrize("token", ["ans", "mask"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_ultraedit_edits_the_matrices_a_published_file_names(family, token, make_lm):
    lm = make_lm(family)
    names = [matrices[0] for matrices in lm.architecture.mlp_matrices]
    h = UltraEditHyperParameters(inner_params=names, lr=1e-3, token=token)
    assert METHODS["ultraedit"].weights(lm, h) == [f"{name}.weight" for name in names]
    for name, update in propose(lm, "ultraedit", h).updates.items():
        assert update.dense().shape == lm.weight(name).shape and update.dense().any()
    with pytest.raises(UserError, match="not an MLP matrix"):
        METHODS["ultraedit"].weights(lm, UltraEditHyperParameters(inner_params=["lm_head"]))


def test_published_names_of_ultraedit_are_found_whatever_the_text_model_is_called(make_lm):
    published = ["language_model.model.layers.1.mlp.gate_proj", "language_model.model.layers.0.mlp.up_proj"]
    found = METHODS["ultraedit"].weights(
        make_lm("gemma3_text"), UltraEditHyperParameters(inner_params=published)
    )
    assert found == ["model.layers.1.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"]
