"""Partial runs of a model give what full runs give, for every family; a search notices if they do not."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import FAMILIES, depth, make_edit

from harness_rect.errors import UserError
from harness_rect.methods import value_search
from harness_rect.methods.value_search import Request, SearchHyperParameters, search_values
from harness_rect.models import forward, forwards
from harness_rect.models.forward import FullForward, PrefixForward, Prompts, open_forward
from harness_rect.models.forwards import with_hidden
from harness_rect.models.lm import hidden_of

TEXTS = [
    ("Because it was raining. LeBron James plays the sport of", 8),
    ("LeBron James plays", 2),
    ("Therefore I went to Rome to see the Vatican Library and You went to visit it, too", 14),
]
EDITS = [
    make_edit("{} plays the sport of", "LeBron James", "football", id="a"),
    make_edit("To visit the {} you must travel to", "Vatican Library", "old Vienna, Austria", id="b"),
    make_edit("{}", "The Space Needle", "is in Seattle", id="c"),
]
TEMPLATES = ["{}", "The city is large. {}", "Because it was raining, the mother tongue. {}"]


def prompts_of(lm, layer=1, at_block=False, **more):
    """All tokens from the changed one on are read, and in the first sequence the two before it."""
    sequences = [lm.encoder.ids(text) for text, _ in TEXTS]
    changed = [index for _, index in TEXTS]
    places = [
        (row, position)
        for row, (ids, index) in enumerate(zip(sequences, changed, strict=True))
        for position in range(index - 2 * (row == 0), len(ids))
    ]
    rows, positions = (torch.tensor(p) for p in zip(*places, strict=True))
    return Prompts(sequences, torch.tensor(changed), layer, at_block, rows, positions, **more)


def both(lm, prompts, scale=1.0):
    """Log-probabilities and the gradient of their sum of squares, of a full and of a partial run."""
    added = scale * torch.randn(3, lm.architecture.d_model, generator=torch.Generator().manual_seed(0))
    found = []
    with lm.frozen():
        for kind in (FullForward, PrefixForward):
            d = added.clone().requires_grad_()
            log_p = kind(lm, prompts).logits(d).float().log_softmax(-1)
            found.append((log_p.detach(), torch.autograd.grad((log_p**2).sum(), d)[0]))
    return found


@pytest.mark.parametrize(("layer", "at_block"), [(0, False), (0, True), (3, False), (2, True), (3, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_partial_run_gives_what_a_full_run_gives(family, layer, at_block, make_lm):
    lm = make_lm(family, **depth(family, 4))
    prompts = prompts_of(lm, layer, at_block)
    (wanted, slope), (found, ours) = both(lm, prompts)
    assert (found - wanted).abs().max() < 2e-4
    assert (ours - slope).norm() < 1e-3 * slope.norm()
    unchanged = open_forward(lm, prompts)[1].float().log_softmax(-1)
    assert (unchanged - wanted).abs().max() > 0.5  # the change is felt


@pytest.mark.parametrize("family", FAMILIES)
def test_a_partial_run_in_bfloat16_differs_by_rounding(family, make_lm):
    lm = make_lm(family, **depth(family, 4))
    lm.model.bfloat16()
    (wanted, _), (found, _) = both(lm, prompts_of(lm))
    assert (found - wanted).abs().mean() < 0.05


@pytest.mark.parametrize("at_block", [False, True])
def test_an_earlier_loss_layer_is_read_in_partial_runs_too(at_block, make_lm):
    lm = make_lm("llama", num_hidden_layers=4)
    (wanted, slope), (found, ours) = both(lm, prompts_of(lm, at_block=at_block, loss_layer=2, early=5))
    assert (found - wanted).abs().max() < 2e-4 and (ours - slope).norm() < 1e-3 * slope.norm()
    (last, _), _ = both(lm, prompts_of(lm, at_block=at_block))
    same = (last - wanted).abs().amax(1) < 1e-4
    assert not same[:5].any() and same[5:].all()


def test_a_partial_run_is_shorter_and_leaves_the_model_as_it_was(make_lm):
    lm = make_lm("gpt2", n_layer=4)
    prompts, tokens = prompts_of(lm, 2), []
    before = lm.model(torch.tensor([prompts.sequences[0]])).logits
    run = PrefixForward(lm, prompts)
    handles = [
        lm.block(i).register_forward_hook(lambda m, args, output: tokens.append(args[0].shape[1]))
        for i in (1, 3)
    ]
    attention = lm.block(1).attn.register_forward_hook(lambda *args: tokens.append("attention"))
    with torch.no_grad():
        run.logits(torch.zeros(3, lm.architecture.d_model))
    for handle in (*handles, attention):
        handle.remove()
    assert len(tokens) == 2 and max(tokens) < max(map(len, prompts.sequences))
    assert not any("forward" in module.__dict__ for module in lm.model.modules())
    assert torch.equal(lm.model(torch.tensor([prompts.sequences[0]])).logits, before)


def test_hooks_of_the_user_count_once(make_lm, caplog):
    lm = make_lm("gpt2", n_layer=4)
    lm.block(1).register_forward_hook(lambda m, args, output: with_hidden(output, hidden_of(output) * 1.3))
    lm.block(3).mlp.c_fc.register_forward_hook(lambda m, args, output: output * 1.3)
    (wanted, _), (found, _) = both(lm, prompts_of(lm, 2))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert isinstance(open_forward(lm, prompts_of(lm, 2))[0], PrefixForward) and not caplog.records


def test_prompts_that_are_too_long_are_refused(make_lm):
    lm = make_lm("gpt2")
    prompts = Prompts([[1] * 97], torch.tensor([3]), 1, False, torch.tensor([0]), torch.tensor([5]))
    with pytest.raises(UserError, match="longer than the 96"):
        open_forward(lm, prompts)


# -- models that cannot be run in parts ----------------------------------------------------------------


def without_a_cache(lm, patch):
    run = lm.model.forward
    patch.setattr(
        lm.model,
        "forward",
        lambda input_ids, attention_mask, use_cache: run(input_ids, attention_mask=attention_mask),
    )


def with_other_entries(lm, patch):
    kept = forwards.skipping
    patch.setattr(
        forward,
        "skipping",
        lambda lm, count, entry: kept(lm, count, with_hidden(entry, hidden_of(entry) * 1.5)),
    )


def with_the_token_before(lm, patch):
    """Padding changes what this model gives."""

    def add(module, args, kwargs):
        hidden, *others = args
        return (hidden + 0.5 * hidden.roll(1, dims=1), *others), kwargs

    lm.block(1).attn.register_forward_pre_hook(add, with_kwargs=True)


@pytest.mark.full_runs
@pytest.mark.parametrize("loss_layer", [None, 2])
@pytest.mark.parametrize("change", [without_a_cache, with_other_entries, with_the_token_before])
def test_a_model_that_partial_runs_get_wrong_is_searched_in_full_and_says_so(
    change, loss_layer, make_lm, monkeypatch, caplog
):
    lm = make_lm("gpt2", n_layer=4)
    settings = SearchHyperParameters(v_num_grad_steps=5, v_lr=0.3, kl_factor=2.0)
    request = Request(EDITS[1], torch.full((lm.architecture.d_model,), 0.1))

    def search():
        with lm.frozen():
            return search_values(lm, [request], TEMPLATES, 0, settings, at_block=True, loss_layer=loss_layer)

    change(lm, monkeypatch)
    ((found, trace),) = search()
    assert caplog.text.count("value searches use full passes") == 1
    monkeypatch.setattr(value_search, "open_forward", in_full)
    ((wanted, reference),) = search()
    assert (found - wanted).norm() / wanted.norm() < 1e-4
    assert trace["kl"] == pytest.approx(reference["kl"], rel=1e-3)


def in_full(lm, prompts):
    run = FullForward(lm, prompts)
    with torch.no_grad():
        return run, run.logits(torch.zeros(len(prompts.sequences), lm.architecture.d_model))


def test_a_model_with_nan_in_its_weights_is_not_run_in_full(make_lm, caplog):
    lm = make_lm("gpt2", n_layer=3)
    with torch.no_grad():
        lm.weight(lm.architecture.weight_name(0)).fill_(torch.nan)
    assert isinstance(open_forward(lm, prompts_of(lm))[0], PrefixForward)
    assert not caplog.records


# -- searches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_block", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_finds_what_each_fact_finds_alone_in_full_runs(family, at_block, make_lm, monkeypatch):
    lm = make_lm(family, **depth(family, 3))
    settings = SearchHyperParameters(v_num_grad_steps=5, v_lr=0.3, v_weight_decay=0.01, clamp_norm_factor=2)
    requests = [
        Request(edit, torch.full((lm.architecture.d_model,), 0.1 * (i + 1))) for i, edit in enumerate(EDITS)
    ]
    with lm.frozen():
        together = search_values(lm, requests, TEMPLATES, 0, settings, at_block=at_block)
        monkeypatch.setattr(value_search, "open_forward", in_full)
        alone = [search_values(lm, [r], TEMPLATES, 0, settings, at_block=at_block)[0] for r in requests]
    for (d, trace), (wanted, reference) in zip(together, alone, strict=True):
        assert (d - wanted).norm() / wanted.norm() < 1e-2
        assert trace["evaluations"] == reference["evaluations"]
        assert trace["nll"] == pytest.approx(reference["nll"], rel=1e-3, abs=1e-4)


def test_facts_of_a_batch_stop_each_on_its_own(make_lm):
    lm = make_lm("gpt2")
    pairs = [("You can visit the {}", "Vatican Library"), ("{}", "LeBron"), ("The {}", "city")]
    easy = [make_edit(prompt, subject, "in", id=prompt) for prompt, subject in pairs]
    settings = SearchHyperParameters(v_num_grad_steps=40, v_lr=0.5, clamp_norm_factor=9, mpes=True)
    requests = [Request(edit, torch.full((lm.architecture.d_model,), 0.4)) for edit in (*easy, EDITS[1])]
    with lm.frozen():
        together = search_values(lm, requests, TEMPLATES, 0, settings, at_block=False)
        alone = [search_values(lm, [r], TEMPLATES, 0, settings, at_block=False)[0] for r in requests]
    assert len({trace["evaluations"] for _, trace in together}) > 1
    for (d, trace), (wanted, reference) in zip(together, alone, strict=True):
        assert trace["evaluations"] == reference["evaluations"]
        assert (d - wanted).norm() / wanted.norm() < 1e-2


def test_the_kl_term_is_the_same_in_a_prompt_of_its_own(make_lm, monkeypatch):
    lm = make_lm("llama", num_hidden_layers=3)
    settings = SearchHyperParameters(v_num_grad_steps=6, v_lr=0.3, kl_factor=2.0)
    request = Request(EDITS[0], torch.full((lm.architecture.d_model,), 0.1))
    rows = value_search._rows

    def with_a_prompt_of_its_own(lm, fact, edit, templates):
        found = rows(lm, fact, edit, templates)
        (shared,) = [row for row in found if row.kl]
        alone = value_search._Row(fact, shared.sequence[: shared.subject + 1], shared.subject, kl=True)
        return [*(value_search.replace(row, kl=False) for row in found), alone]

    with lm.frozen():
        ((found, trace),) = search_values(lm, [request], TEMPLATES, 0, settings, at_block=True)
        monkeypatch.setattr(value_search, "_rows", with_a_prompt_of_its_own)
        ((wanted, reference),) = search_values(lm, [request], TEMPLATES, 0, settings, at_block=True)
    assert trace["kl"] == pytest.approx(reference["kl"], rel=1e-3) and trace["kl"] > 1e-3
    assert (found - wanted).norm() / wanted.norm() < 1e-3


def test_many_facts_are_split_into_batches_that_fit(make_lm, monkeypatch):
    lm = make_lm("gpt2")
    settings = SearchHyperParameters(v_num_grad_steps=2)
    requests = [Request(edit, torch.ones(lm.architecture.d_model)) for edit in EDITS]
    sizes: list[int] = []
    run = value_search.open_forward
    monkeypatch.setattr(
        value_search, "open_forward", lambda lm, p: sizes.append(len(p.sequences)) or run(lm, p)
    )
    with lm.frozen():
        whole = search_values(lm, requests, TEMPLATES, 0, settings, at_block=False)
        monkeypatch.setattr(value_search, "CPU_TOKENS", 1)
        split = search_values(lm, requests, TEMPLATES, 0, settings, at_block=False)
    assert sizes[0] == 11 and sorted(sizes[1:]) == [3, 4, 4]  # one prompt begins with its subject
    for (a, _), (b, _) in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
