"""ROME and r-ROME against their equations, against a second implementation, and on every family."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from support.tiny_models import D_MLP, FAMILIES, LENGTH, make_edit

from harness_rect.errors import UserError
from harness_rect.measure import teacher_force
from harness_rect.methods import METHODS, Context, value_search
from harness_rect.methods.rome import RomeHyperParameters, _keys
from harness_rect.methods.value_search import LOSS_FLOOR, search_value
from harness_rect.models import EditableLM
from harness_rect.moments import SecondMoment

TEMPLATES = ["{}", "The city is large. {}", "Because it was raining. {}"]
EDITS = {
    "start": make_edit("{} plays the sport of", "LeBron James", "football"),
    "middle": make_edit("The mother tongue of {} is", "Danielle Darrieux", " English"),
    "end": make_edit("Where is the {}", "Toodyay Fire Station", "? It stands in old Vienna, Austria"),
}
# One target token right after the subject: even a random model can be made to say it.
EASY = make_edit("You can visit the {}", "Vatican Library", "in")


def hparams(**changes: Any) -> RomeHyperParameters:
    usual: dict[str, Any] = {
        "layers": [0],
        "v_num_grad_steps": 8,
        "v_lr": 0.3,
        "v_weight_decay": 0.01,
        "clamp_norm_factor": 3,
    }
    return RomeHyperParameters(**usual | {"context_templates": TEMPLATES} | changes)


def no_moments(layer: int) -> torch.Tensor:
    raise AssertionError("second moments were not asked for")


def a_moment(seed: int = 3) -> torch.Tensor:
    factor = torch.randn(D_MLP, D_MLP, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return factor @ factor.T / D_MLP + 0.1 * torch.eye(D_MLP, dtype=torch.float64)


def propose(lm, edit, h, method="rome", moment=no_moments):
    with lm.frozen():
        return METHODS[method].propose(lm, [edit], h, Context(h.context_templates, moment))


@torch.no_grad()
def apply(lm: EditableLM, proposal) -> None:
    for name, update in proposal.updates.items():
        assert update.left.dtype == update.right.dtype == torch.float32
        lm.weight(name).add_(update.dense())


def target_nll(lm: EditableLM, edit) -> float:
    pair = lm.encoder.continuation(edit.text, edit.target)
    return teacher_force(lm, [pair])[0].nll


def key_and_output(lm: EditableLM, edit, layer: int, templates=("{}",)) -> tuple[torch.Tensor, torch.Tensor]:
    averaged, _ = _keys(lm, edit, list(templates), layer)
    return averaged.key, averaged.output


# -- a second implementation, straight from the formulas --------------------------------------------


class Reference:
    """ROME in float64 with plain loops: one full forward pass for each context, Adam written out."""

    def __init__(self, lm: EditableLM, edit, layer: int, h: RomeHyperParameters) -> None:
        self.model, self.tokenizer = lm.model, lm.encoder.tokenizer
        self.module = lm.model.get_submodule(lm.architecture.down_projections[layer])
        self.edit, self.h = edit, h

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def position(self, text: str, end: int) -> int:
        """Tokens are byte pieces: the first one with which the text up to ``end`` is complete."""
        length = 0
        for index, token in enumerate(self.tokenizer.convert_ids_to_tokens(self.ids(text))):
            length += 0 if token == self.tokenizer.bos_token else len(token)
            if length >= len(text[:end].encode()):
                return index
        raise AssertionError

    def forward(self, ids, position=None, d=None):
        """Logits, and the down projection's input and output, with d added to the output at one place."""
        seen = {}

        def hook(module, args, output):
            seen["key"], seen["output"] = args[0].reshape(len(ids), -1), output.reshape(len(ids), -1)
            if d is None:
                return None
            bump = torch.zeros(len(ids), len(d), dtype=torch.float64)
            bump[position] = 1
            return (seen["output"] + bump * d).reshape(output.shape)

        handle = self.module.register_forward_hook(hook)
        logits = self.model(input_ids=torch.tensor([ids])).logits[0]
        handle.remove()
        return logits, seen["key"], seen["output"]

    def key_at(self, template: str):
        text = template.replace("{}", self.edit.text)
        end = template.index("{}") + self.edit.subject_span[1]
        _, key, output = self.forward(self.ids(text))
        place = self.position(text, end)
        return key[place].detach(), output[place].detach()

    def loss(self, d, v0, kl_before):
        nlls = []
        for template in self.h.context_templates:
            text = template.replace("{}", self.edit.text)
            whole, prompt = self.ids(text + self.edit.target), self.ids(text)
            assert whole[: len(prompt)] == prompt
            place = self.position(text, template.index("{}") + self.edit.subject_span[1])
            logits, _, _ = self.forward(whole, place, d)
            nll = torch.zeros((), dtype=torch.float64)
            for index in range(len(prompt), len(whole)):
                nll = nll - torch.log_softmax(logits[index - 1], 0)[whole[index]]
            nlls.append(nll / (len(whole) - len(prompt)))
        kl_text = self.edit.subject + " is a"
        place = self.position(kl_text, len(self.edit.subject))
        after = torch.log_softmax(self.forward(self.ids(kl_text), place, d)[0][place], 0)
        kl = torch.zeros((), dtype=torch.float64)
        if kl_before is not None:
            for a, b in zip(after, kl_before, strict=True):
                kl = kl + a.exp() * (a - b)
        decay = self.h.v_weight_decay * d.norm() / (v0.norm() ** 2)
        return sum(nlls) / len(nlls) + self.h.kl_factor * kl + decay, after.detach()

    def run(self, moment=None, average_key_everywhere=False):
        keys = [self.key_at(template) for template in self.h.context_templates]
        mean_key = sum(k for k, _ in keys) / len(keys)
        mean_output = sum(o for _, o in keys) / len(keys)
        key, v0 = self.key_at("{}")
        u = mean_key if moment is None else torch.linalg.inv(moment) @ mean_key
        u = u / u.norm()
        d = torch.zeros_like(v0, requires_grad=True)
        first, second = torch.zeros_like(v0), torch.zeros_like(v0)
        kl_before = None
        for step in range(1, self.h.v_num_grad_steps + 1):
            loss, distribution = self.loss(d, v0, kl_before)
            if kl_before is None:
                kl_before = distribution
            if loss < 0.05 or step == self.h.v_num_grad_steps:
                break
            (gradient,) = torch.autograd.grad(loss, d)
            with torch.no_grad():
                first = 0.9 * first + 0.1 * gradient
                second = 0.999 * second + 0.001 * gradient**2
                corrected = (second / (1 - 0.999**step)).sqrt() + 1e-8
                d = d - self.h.v_lr * first / (1 - 0.9**step) / corrected
                longest = self.h.clamp_norm_factor * v0.norm()
                if d.norm() > longest:
                    d = d * longest / d.norm()
            d.requires_grad_()
        d = d.detach()
        if average_key_everywhere:
            key, output = mean_key, mean_output
        else:
            output = v0
        r = (v0 + d - output) / (key @ u)
        return d, r, u, step, loss.item()


@pytest.mark.parametrize("moments", [False, True], ids=["no mom2", "mom2"])
@pytest.mark.parametrize("where", EDITS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["rome", "r_rome"])
def test_agrees_with_a_plain_implementation(method, family, where, moments, make_lm):
    edit, h = EDITS[where], hparams(mom2_adjustment=moments)
    # Adam divides by the gradient's size, so rounding shows where one happens to be near zero: float64, and a
    # seed for which none is.
    lm = make_lm(family, seed=1)
    lm.model.double()
    c: Any = a_moment() if moments else None
    moment = (lambda layer: SecondMoment(c, 1, "test")) if moments else no_moments
    proposal = propose(lm, edit, h, method, moment)
    _, v0 = key_and_output(lm, edit, 0)
    with lm.frozen():
        d, _ = search_value(lm, edit, TEMPLATES, 0, v0, h, at_block=False)
    update = next(iter(proposal.updates.values()))
    left, right = (update.right, update.left) if family == "gpt2" else (update.left, update.right)
    report = proposal.details[0]["layers"]["0"]

    want_d, want_r, want_u, evaluations, loss = Reference(lm, edit, 0, h).run(c, method == "r_rome")
    for got, want in ((d, want_d), (left[:, 0], want_r), (right[:, 0], want_u)):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert report["evaluations"] == evaluations
    assert report["loss"] == pytest.approx(loss, rel=1e-4)


# -- the equations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_writes_its_fact_on_every_family(family, make_lm):
    lm, edit = make_lm(family), EASY
    h = hparams(v_num_grad_steps=40, v_lr=0.5, v_weight_decay=0.0, clamp_norm_factor=100, kl_factor=0.0)
    key, output = key_and_output(lm, edit, 0)
    before = target_nll(lm, edit)
    proposal = propose(lm, edit, h)
    with lm.frozen():
        d, _ = search_value(lm, edit, TEMPLATES, 0, output, h, at_block=False)
    apply(lm, proposal)
    # (W + dW) k = v0 + d: the subject's key now gives the value searched for.
    key_after, output_after = key_and_output(lm, edit, 0)
    torch.testing.assert_close(key_after, key, rtol=1e-5, atol=1e-6)
    scale = float((output + d).abs().max())
    torch.testing.assert_close(output_after, output + d, rtol=0, atol=1e-4 * scale)
    after = target_nll(lm, edit)
    assert after < before - 1, f"nll {before:.2f} -> {after:.2f}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_sixteen_bit_models_are_searched_in_float32(dtype, family, make_lm):
    h = hparams(v_num_grad_steps=12)
    full, half = make_lm(family), make_lm(family)
    half.model.to(dtype)
    edit = EDITS["start"]
    expected = next(iter(propose(full, edit, h).updates.values()))
    proposal = propose(half, edit, h)
    update = next(iter(proposal.updates.values()))
    assert update.left.dtype == update.right.dtype == torch.float32
    assert torch.isfinite(update.dense()).all()
    assert all(p.dtype == dtype for p in half.model.parameters())
    # u is the key's direction: the same up to rounding, and clearly the same edit.
    cosine = torch.nn.functional.cosine_similarity(
        update.dense().flatten(), expected.dense().flatten(), dim=0
    )
    assert cosine > 0.9


def test_several_layers_are_edited_one_after_the_other(make_lm):
    """As published: each layer's update is computed with the layers before it updated already."""
    lm, edit, h = make_lm("llama"), EDITS["middle"], hparams()
    names = [lm.architecture.weight_name(layer) for layer in (0, 1)]
    both = propose(lm, edit, hparams(layers=[1, 0]))
    assert list(both.updates) == names
    assert set(both.details[0]["layers"]) == {"0", "1"}
    first = propose(lm, edit, h)
    torch.testing.assert_close(both.updates[names[0]].dense(), first.updates[names[0]].dense())
    apply(lm, first)
    second = propose(lm, edit, hparams(layers=[1]))
    torch.testing.assert_close(both.updates[names[1]].dense(), second.updates[names[1]].dense())


# -- the search --------------------------------------------------------------------------------------


def search(lm: EditableLM, edit=EDITS["start"], **changes):
    h = hparams(**changes)
    _, v0 = key_and_output(lm, edit, 0)
    with lm.frozen():
        d, trace = search_value(lm, edit, list(h.context_templates or ()), 0, v0, h, at_block=False)
    return d, trace, v0


def test_the_last_evaluation_takes_no_step(make_lm):
    lm = make_lm("gpt2")
    d, trace, _ = search(lm, v_num_grad_steps=1)
    assert trace["evaluations"] == 1
    assert torch.equal(d, torch.zeros_like(d))
    d, trace, _ = search(lm, v_num_grad_steps=2, v_lr=0.01)
    assert trace["evaluations"] == 2
    # Adam's first step is the learning rate in every coordinate.
    torch.testing.assert_close(d.abs(), torch.full_like(d, 0.01), rtol=1e-2, atol=0)


def test_the_search_stops_under_the_floor_before_its_step(make_lm):
    lm = make_lm("llama")
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(6)  # certainty is within reach
    easy = {
        "v_num_grad_steps": 200,
        "v_lr": 0.5,
        "v_weight_decay": 0.0,
        "kl_factor": 0.0,
        "clamp_norm_factor": 1e3,
    }
    d, trace, _ = search(lm, EASY, **easy)
    assert 2 < trace["evaluations"] < 200
    assert trace["loss"] < LOSS_FLOOR == 0.05
    shorter, before, _ = search(lm, EASY, **{**easy, "v_num_grad_steps": trace["evaluations"] - 1})
    assert before["loss"] >= LOSS_FLOOR
    same, _, _ = search(lm, EASY, **{**easy, "v_num_grad_steps": trace["evaluations"]})
    assert torch.equal(d, same)
    assert not torch.equal(d, shorter)


def test_the_step_is_clamped_to_a_multiple_of_the_old_value(make_lm):
    lm = make_lm("gpt2")
    d, trace, v0 = search(lm, clamp_norm_factor=0.75, v_lr=1.0)
    assert d.norm().item() == pytest.approx(0.75 * v0.norm().item(), rel=1e-5)
    assert trace["d_norm"] == pytest.approx(d.norm().item())
    free, _, _ = search(lm, clamp_norm_factor=1e6, v_lr=1.0)
    assert free.norm() > 0.76 * v0.norm()


@pytest.mark.full_runs
def test_a_prompt_longer_than_the_model_is_one_line(make_lm):
    lm = make_lm("gpt2")
    edit = make_edit("{} is " + "large " * LENGTH, "The city", "Paris")
    with pytest.raises(UserError) as error:
        propose(lm, edit, hparams())
    assert "\n" not in str(error.value)
    assert all(not module._forward_hooks for module in lm.model.modules())


def test_layers_that_need_second_moments_are_named():
    needs = METHODS["rome"].needs_statistics
    assert needs(hparams(layers=[1, 0], mom2_adjustment=True)) == [0, 1]
    assert needs(hparams(mom2_adjustment=False)) == []


# -- options of follow-up work, off by default --------------------------------------------------------


def test_what_a_search_holds_is_freed_at_its_end_and_not_by_a_later_collection(make_lm, monkeypatch):
    lm, held = make_lm("gpt2"), []
    opened = value_search.open_forward

    def opening(*arguments):
        forward, before = opened(*arguments)
        held.append(weakref.ref(forward))
        return forward, before

    monkeypatch.setattr(value_search, "open_forward", opening)
    h = RomeHyperParameters(layers=[0], v_num_grad_steps=2)
    edit = make_edit("{} is in", "Vienna", "Paris")
    gc.collect()
    gc.disable()
    try:
        with lm.frozen():
            search_value(lm, edit, ["{}"], 0, torch.ones(lm.architecture.d_model), h, at_block=False)
        assert [forward() for forward in held] == [None]
    finally:
        gc.enable()


def test_the_search_stops_as_soon_as_the_target_is_the_most_probable_token(make_lm):
    lm = make_lm("gpt2")
    h = hparams(v_num_grad_steps=40, v_lr=0.5, clamp_norm_factor=9)
    usual, early = (propose(lm, EASY, h.model_copy(update={"mpes": on})) for on in (False, True))
    first, second = (p.details[0]["layers"]["0"] for p in (early, usual))
    assert first["evaluations"] < second["evaluations"]
    # One evaluation less, and some context still says something else.
    shorter = h.model_copy(update={"v_num_grad_steps": first["evaluations"] - 1})
    for steps, all_said in ((h.model_copy(update={"mpes": True}), True), (shorter, False)):
        assert all(said(lm, EASY, steps)) == all_said


def said(lm, edit, h) -> list[bool]:
    """For each context whether the target is the argmax with the d of this search in place."""
    module, found = lm.down_projection(0), []
    _, bare = key_and_output(lm, edit, 0)
    with lm.frozen():
        d, _ = search_value(lm, edit, h.context_templates, 0, bare, h, at_block=False)
    for template in h.context_templates:
        text = template.replace("{}", edit.text)
        prompt, target = lm.encoder.continuation(text, edit.target)
        where = lm.encoder.token_at(text, template.index("{}") + edit.subject_span[1] - 1)

        def add(m, args, out, where=where):
            out[:, where] += d
            return out

        handle = module.register_forward_hook(add)
        with torch.no_grad():
            logits = lm.model(torch.tensor([prompt + target[:-1]])).logits[0]
        handle.remove()
        found.append(logits[len(prompt) - 1 :].argmax(-1).tolist() == target)
    return found
