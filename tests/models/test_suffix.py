"""Running a model from the middle equals running it whole, for every family, in float32 and bfloat16."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import FAMILIES, depth, make_edit
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from harness_rect.errors import UserError
from harness_rect.methods import value_search
from harness_rect.methods.value_search import Request, SearchHyperParameters, search_values
from harness_rect.models import suffix
from harness_rect.models.forwards import forward_of
from harness_rect.models.suffix import CannotResume, suffix_run

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


def batch(lm):
    sequences = [lm.encoder.ids(text) for text, _ in TEXTS]
    starts = [start for _, start in TEXTS]
    places = [
        (row, o)
        for row, (ids, start) in enumerate(zip(sequences, starts, strict=True))
        for o in range(len(ids) - start)
    ]
    rows, offsets = (torch.tensor(p) for p in zip(*places, strict=True))
    return sequences, starts, rows, offsets


def only_whole_runs(monkeypatch):
    def in_full(*args):
        raise ValueError("not for this test")

    monkeypatch.setattr(suffix, "_prepare", in_full)


@pytest.mark.parametrize("skipped", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_in_the_middle_is_seen_as_in_a_whole_run(family, dtype, skipped, make_lm, caplog):
    lm = make_lm(family, **depth(family, 4))
    lm.model.to(dtype)
    sequences, starts, rows, offsets = batch(lm)
    run, first = suffix_run(lm, sequences, starts, skipped, rows, offsets)
    assert not caplog.records  # no model of these needs the full runs
    assert run.ids.shape[1] < max(map(len, sequences)) and run.skipped == skipped
    change = torch.randn(3, lm.architecture.d_model, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen: list[torch.Tensor] = []
    for sequence, start, added in zip(sequences, starts, change, strict=True):

        def add(module, args, out, start=start, added=added):
            out.view(1, -1, out.shape[-1])[:, start] += added
            return out

        with torch.no_grad(), lm.hooked({lm.down_projection(3): add}):
            seen.append(lm.model(torch.tensor([sequence])).logits[0, start:])
    wanted = torch.cat(seen).float().log_softmax(-1)

    def add_all(module, args, out):
        shaped = out.view(*run.ids.shape, -1).clone()
        shaped[torch.arange(3), run.columns] += change
        return shaped.view_as(out)

    with torch.no_grad(), lm.hooked({lm.down_projection(3): add_all}):
        found = run.logits(rows, offsets).float().log_softmax(-1)
    assert (first.float().log_softmax(-1) - wanted).abs().max() > 0.5  # the change is felt
    off = (found - wanted).abs()
    if dtype == torch.float32:
        assert off.max() < 2e-4
    else:
        assert off.mean() < 0.05


@pytest.mark.full_runs
@pytest.mark.parametrize("at_block", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_finds_what_each_fact_finds_alone_in_whole_runs(family, at_block, make_lm, monkeypatch):
    lm = make_lm(family, **depth(family, 3))
    settings = SearchHyperParameters(v_num_grad_steps=5, v_lr=0.3, v_weight_decay=0.01, clamp_norm_factor=2)
    requests = [
        Request(edit, torch.full((lm.architecture.d_model,), 0.1 * (i + 1))) for i, edit in enumerate(EDITS)
    ]
    with lm.frozen():
        together = search_values(lm, requests, TEMPLATES, 0, settings, at_block=at_block)
        only_whole_runs(monkeypatch)
        alone = [search_values(lm, [r], TEMPLATES, 0, settings, at_block=at_block)[0] for r in requests]
    for (d, trace), (wanted, reference) in zip(together, alone, strict=True):
        assert (d - wanted).norm() / wanted.norm() < 1e-2
        assert trace["evaluations"] == reference["evaluations"]
        assert trace["nll"] == pytest.approx(reference["nll"], rel=1e-3, abs=1e-4)


def test_facts_that_are_done_leave_the_batch_and_the_others_do_not_notice(make_lm, monkeypatch):
    lm = make_lm("gpt2")
    easy = [
        make_edit(prompt, subject, "in", id=prompt)
        for prompt, subject in (
            ("You can visit the {}", "Vatican Library"),
            ("{}", "LeBron"),
            ("The {}", "city"),
        )
    ]
    settings = SearchHyperParameters(v_num_grad_steps=40, v_lr=0.5, clamp_norm_factor=9, mpes=True)
    requests = [Request(edit, torch.full((lm.architecture.d_model,), 0.4)) for edit in (*easy, EDITS[1])]
    sizes: list[int] = []
    select = suffix.Suffix.select
    monkeypatch.setattr(
        suffix.Suffix, "select", lambda self, rows: sizes.append(len(rows)) or select(self, rows)
    )
    with lm.frozen():
        together = search_values(lm, requests, TEMPLATES, 0, settings, at_block=False)
        shrunk = list(sizes)
        alone = [search_values(lm, [r], TEMPLATES, 0, settings, at_block=False)[0] for r in requests]
    counts = [trace["evaluations"] for _, trace in together]
    assert len(set(counts)) > 1 and shrunk
    for (d, trace), (wanted, reference) in zip(together, alone, strict=True):
        assert trace["evaluations"] == reference["evaluations"]
        assert (d - wanted).norm() / wanted.norm() < 1e-2


def test_the_kl_term_is_read_where_a_prompt_begins_with_the_subject(make_lm, monkeypatch):
    lm = make_lm("llama", num_hidden_layers=3)
    settings = SearchHyperParameters(v_num_grad_steps=6, v_lr=0.3, kl_factor=2.0)
    request = Request(EDITS[0], torch.full((lm.architecture.d_model,), 0.1))
    rows = value_search._rows

    def with_a_prompt_of_its_own(lm, fact, edit, templates):
        found = rows(lm, fact, edit, templates)
        (shared,) = [row for row in found if row.kl is not None]
        subject = shared.start + shared.subject
        alone = value_search._Row(fact, shared.sequence[: subject + 1], subject, 0, [], [], 0.0, kl=0)
        return [*(value_search.replace(row, kl=None) for row in found), alone]

    with lm.frozen():
        ((found, trace),) = search_values(lm, [request], TEMPLATES, 0, settings, at_block=True)
        monkeypatch.setattr(value_search, "_rows", with_a_prompt_of_its_own)
        ((wanted, reference),) = search_values(lm, [request], TEMPLATES, 0, settings, at_block=True)
    assert trace["kl"] == pytest.approx(reference["kl"], rel=1e-3) and trace["kl"] > 1e-3
    assert (found - wanted).norm() / wanted.norm() < 1e-3


@pytest.mark.parametrize("loss_layer", [None, 1])
def test_parts_of_any_size_find_the_same(loss_layer, make_lm, monkeypatch):
    """Also those that hold KL prompts alone, and none at all."""
    lm = make_lm("llama", num_hidden_layers=4)
    settings = SearchHyperParameters(v_num_grad_steps=5, v_lr=0.3, v_weight_decay=0.01, clamp_norm_factor=2)
    requests = [Request(edit, torch.full((lm.architecture.d_model,), 0.1)) for edit in EDITS]

    def search():
        with lm.frozen():
            return search_values(lm, requests, TEMPLATES, 0, settings, at_block=True, loss_layer=loss_layer)

    whole = search()
    monkeypatch.setattr(value_search, "PART_TOKENS", 8)
    monkeypatch.setattr(value_search, "MANY_ROWS", 1)
    for (d, trace), (wanted, reference) in zip(search(), whole, strict=True):
        assert (d - wanted).norm() / wanted.norm() < 1e-2
        assert trace["nll"] == pytest.approx(reference["nll"], rel=1e-3, abs=1e-4)


def test_many_facts_are_split_into_batches_that_fit(make_lm, monkeypatch):
    lm = make_lm("gpt2")
    settings = SearchHyperParameters(v_num_grad_steps=2)
    requests = [Request(edit, torch.ones(lm.architecture.d_model)) for edit in EDITS]
    sizes: list[int] = []
    run = value_search.suffix_run
    monkeypatch.setattr(
        value_search, "suffix_run", lambda lm, s, *rest: sizes.append(len(s)) or run(lm, s, *rest)
    )
    with lm.frozen():
        whole = search_values(lm, requests, TEMPLATES, 0, settings, at_block=False)
        monkeypatch.setattr(value_search, "CPU_TOKENS", 1)
        split = search_values(lm, requests, TEMPLATES, 0, settings, at_block=False)
    assert sizes[0] == 11 and sorted(sizes[1:]) == [3, 4, 4]  # one prompt begins with its subject
    for (a, _), (b, _) in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.full_runs
def test_a_model_that_cannot_start_in_the_middle_runs_whole_and_says_so(make_lm, monkeypatch, caplog):
    lm = make_lm("gpt2")
    sequences, starts, rows, offsets = batch(lm)
    _, wanted = suffix_run(lm, sequences, starts, 1, rows, offsets)
    forward = lm.model.forward
    monkeypatch.setattr(
        lm.model,
        "forward",
        lambda input_ids, attention_mask, use_cache: forward(input_ids, attention_mask=attention_mask),
    )
    run, logits = suffix_run(lm, sequences, starts, 1, rows, offsets)
    assert "in full" in caplog.text and run.columns.tolist() == starts
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.full_runs
def test_a_wrong_middle_is_noticed_and_the_search_runs_in_full(make_lm, monkeypatch, caplog):
    lm = make_lm("gpt2")
    sequences, starts, rows, offsets = batch(lm)
    settings = SearchHyperParameters(v_num_grad_steps=3)
    request = Request(EDITS[0], torch.ones(lm.architecture.d_model))
    with lm.frozen():
        ((wanted, _),) = search_values(lm, [request], TEMPLATES, 0, settings, at_block=True)
        assert not caplog.records
        monkeypatch.setattr(
            suffix,
            "_returning",
            lambda output: (
                lambda *args, **kwargs: suffix.with_hidden(output, suffix.hidden_of(output) * 1.05)
            ),
        )
        run, first = suffix_run(lm, sequences, starts, 1, rows, offsets)
        with pytest.raises(CannotResume, match="differ"):
            run.checked_logits(rows, offsets, suffix.to_compare(first))
        ((found, _),) = search_values(lm, [request], TEMPLATES, 0, settings, at_block=True)
    assert "differ" in caplog.text and "in full" in caplog.text
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_hook_of_the_users_on_a_skipped_block_counts_once(make_lm, caplog):
    lm = make_lm("gpt2", n_layer=4)

    def louder(module, args, output):
        return suffix.with_hidden(output, suffix.hidden_of(output) * 1.3)

    lm.block(1).register_forward_hook(louder)
    sequences, starts, rows, offsets = batch(lm)
    run, first = suffix_run(lm, sequences, starts, 2, rows, offsets)
    with torch.no_grad():
        found = run.checked_logits(rows, offsets, suffix.to_compare(first))
        torch.testing.assert_close(found, first, rtol=1e-3, atol=1e-4)
    assert not caplog.records


@pytest.mark.full_runs
@pytest.mark.parametrize("loss_layer", [None, 2])
def test_a_wrong_middle_is_noticed_whatever_the_loss_reads(loss_layer, make_lm, monkeypatch, caplog):
    lm = make_lm("llama", num_hidden_layers=4)
    settings = SearchHyperParameters(v_num_grad_steps=3)
    request = Request(EDITS[1], torch.ones(lm.architecture.d_model))
    monkeypatch.setattr(value_search, "MANY_ROWS", 1)  # prompts with a target apart from the others

    def search():
        with lm.frozen():
            return search_values(lm, [request], TEMPLATES, 0, settings, at_block=True, loss_layer=loss_layer)

    ((wanted, _),) = search()
    monkeypatch.setattr(
        suffix,
        "_returning",
        lambda output: lambda *args, **kwargs: suffix.with_hidden(output, suffix.hidden_of(output) * 1.5),
    )
    ((found, _),) = search()
    assert caplog.text.count("in full") == 2
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_the_last_mlp_sees_only_what_is_read_unless_a_hook_is_inside(make_lm):
    lm = make_lm("gpt2")
    sequences, starts, rows, offsets = batch(lm)
    run, first = suffix_run(lm, sequences, starts, 1, rows, offsets)
    some = torch.tensor([0, len(rows) - 1])
    mlp, tokens = lm.model.transformer.h[-1].mlp, []
    watch = mlp.c_fc.register_forward_hook(lambda module, args, output: tokens.append(args[0].numel()))
    with torch.no_grad():
        seen = run.logits(rows[some], offsets[some])  # the hook inside sees all tokens
        watch.remove()
        outside = lm.model.transformer.h[-1].register_forward_hook(
            lambda module, args, output: tokens.append(len(output[0].shape))
        )
        alone = run.logits(rows[some], offsets[some])
        outside.remove()
    assert tokens[0] == run.ids.numel() * lm.architecture.d_model
    torch.testing.assert_close(alone, seen, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, first[some], rtol=1e-4, atol=1e-4)


def test_blocks_are_themselves_again_afterwards(make_lm):
    lm = make_lm("gpt2")
    sequences, starts, rows, offsets = batch(lm)
    before = lm.model(torch.tensor([sequences[0]])).logits
    run, _ = suffix_run(lm, sequences, starts, 2, rows, offsets)
    with torch.no_grad():
        run.logits(rows, offsets)
    assert all("forward" not in lm.block(i).__dict__ for i in range(2))
    assert torch.equal(lm.model(torch.tensor([sequences[0]])).logits, before)


@pytest.mark.full_runs
def test_prompts_that_are_too_long_are_refused_as_ever(make_lm):
    lm = make_lm("gpt2")
    with pytest.raises(UserError, match="longer than the 96"):
        suffix_run(lm, [[1] * 97], [3], 1, torch.tensor([0]), torch.tensor([0]))


def compared_with_whole_runs(lm, monkeypatch, **changes):
    """d of one fact as it is searched, and in whole runs without padding in front."""
    settings = SearchHyperParameters(v_num_grad_steps=6, v_lr=0.3, **changes)
    request = Request(EDITS[1], torch.full((lm.architecture.d_model,), 0.1))

    def search():
        with lm.frozen():
            return search_values(lm, [request], TEMPLATES, 0, settings, at_block=True)[0][0]

    found = search()
    only_whole_runs(monkeypatch)
    return found, search()


@pytest.mark.full_runs
def test_attention_that_overwrites_its_keys_is_run_in_full(make_lm, monkeypatch, caplog):
    def halved(module, query, key, value, mask, **more):
        key.mul_(0.5)
        return sdpa_attention_forward(module, query, key, value, mask, **more)

    AttentionInterface.register("halved", halved)
    AttentionMaskInterface.register("halved", sdpa_mask)
    lm = make_lm("llama", num_hidden_layers=4)
    lm.model.config._attn_implementation = "halved"
    found, wanted = compared_with_whole_runs(lm, monkeypatch)
    assert "overwrites" in caplog.text
    assert (found - wanted).norm() / wanted.norm() < 1e-4


@pytest.mark.full_runs
def test_where_padding_changes_a_model_the_kl_term_starts_from_its_whole_runs(make_lm, monkeypatch, caplog):
    lm = make_lm("gpt2", n_layer=4)

    def with_the_token_before(module, args, kwargs):
        hidden, *others = args
        return (hidden + 0.5 * hidden.roll(1, dims=1), *others), kwargs

    lm.block(1).attn.register_forward_pre_hook(with_the_token_before, with_kwargs=True)
    found, wanted = compared_with_whole_runs(lm, monkeypatch, kl_factor=2.0)
    assert "differ" in caplog.text
    assert (found - wanted).norm() / wanted.norm() < 1e-4


@pytest.mark.full_runs
def test_logits_in_another_order_than_they_were_computed_in(make_lm, monkeypatch):
    lm = make_lm("gpt2", n_layer=3)
    head = lm.model.get_output_embeddings()

    def transposed(hidden):
        return (head.weight @ hidden[0].T).T.unsqueeze(0)

    with forward_of(head, transposed):
        found, wanted = compared_with_whole_runs(lm, monkeypatch)
    plain, _ = compared_with_whole_runs(lm, monkeypatch)
    for d in (found, wanted):
        assert (d - plain).norm() / plain.norm() < 1e-3


def test_logits_that_their_own_gradient_needs_are_not_overwritten(make_lm):
    lm = make_lm("gpt2", n_layer=3)
    settings = SearchHyperParameters(v_num_grad_steps=6, v_lr=0.3)
    request = Request(EDITS[0], torch.full((lm.architecture.d_model,), 0.1))

    def search():
        with lm.frozen():
            return search_values(lm, [request], TEMPLATES, 0, settings, at_block=True)[0]

    head = lm.model.get_output_embeddings()
    with lm.hooked({head: lambda module, args, output: 4 * torch.tanh(output / 4)}):
        wanted, reference = search()
    plain = head.forward
    with forward_of(head, lambda hidden: _Capped.apply(plain(hidden))):
        found, trace = search()
    assert (found - wanted).norm() / wanted.norm() < 1e-4
    assert trace["nll"] == pytest.approx(reference["nll"], rel=1e-3)


class _Capped(torch.autograd.Function):
    """4 tanh(x / 4), its gradient computed from the result."""

    @staticmethod
    def forward(ctx, x):
        result = 4 * torch.tanh(x / 4)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        (result,) = ctx.saved_tensors
        return gradient * (1 - (result / 4) ** 2)


def test_a_model_without_numbers_is_not_blamed_on_the_middle(make_lm, caplog):
    lm = make_lm("gpt2", n_layer=3)
    with torch.no_grad():
        lm.weight(lm.architecture.weight_name(0)).fill_(torch.nan)
    request = Request(EDITS[0], torch.ones(lm.architecture.d_model))
    settings = SearchHyperParameters(v_num_grad_steps=2)
    with lm.frozen():
        search_values(lm, [request], TEMPLATES, 1, settings, at_block=True)
    assert not caplog.records
