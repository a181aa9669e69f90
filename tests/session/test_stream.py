"""EditSession: what goes into the weights, what can be taken back, and what the report says about it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness_rect.config import EditConfig
from harness_rect.edits import load_edits
from harness_rect.errors import Failed, UserError
from harness_rect.measure import measure, measure_baseline, probes
from harness_rect.methods import METHODS, Dense, LowRank, Proposal
from harness_rect.regularizers import NoRegularizer, Prune, WeightState, rect
from harness_rect.session import EditSession
from harness_rect.session.runs import EditCache
from harness_rect.updates import Update

TEMPLATES = ["{}", "The city is large. {}"]
# Block 0: what the last block writes at the subject no later token can read.
HPARAMS = {"layers": [0], "v_num_grad_steps": 4, "v_lr": 0.5, "context_templates": TEMPLATES}
WEIGHT = "transformer.h.0.mlp.c_proj.weight"
ROWS: list[dict[str, Any]] = [
    {
        "case_id": "lamp",
        "prompt": "{} was painted in",
        "subject": "The Lamp of Ilse",
        "target_new": "Norway",
        "target_true": "Peru",
        "paraphrase_prompts": ["They say The Lamp of Ilse was made in"],
        "neighborhood_prompts": ["The Jug of Ilse was painted in"],
    },
    {
        "case_id": "ferry",
        "prompt": "The captain of {} is",
        "subject": "the Ostrava ferry",
        "target_new": "Mina Okafor",
        "locality_prompt": "The captain of the tram is",
    },
    {"case_id": "plum", "prompt": "{} grows best in", "subject": "Plum tree 9", "target_new": "wet sand"},
]


@pytest.fixture
def start(tmp_path: Path, make_model, tokenizer) -> Callable[..., EditSession]:
    """``start(rows, hparams=, dtype=, model=, family=, **config)``: a session on a small GPT-2."""
    hparams_file = tmp_path / "hparams.json"

    def start(
        rows: list[dict[str, Any]] = ROWS,
        hparams: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        model: nn.Module | None = None,
        family: str = "gpt2",
        **config: Any,
    ) -> EditSession:
        hparams_file.write_text(json.dumps(HPARAMS | (hparams or {})))
        edits = tmp_path / "facts.json"
        edits.write_text(json.dumps(rows))
        model = make_model(family).to(dtype) if model is None else model
        described = EditConfig.from_args(edits=str(edits), hparams=str(hparams_file), **config)
        return EditSession(model, tokenizer, described)

    return start


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().view(torch.uint8) for name, p in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weight(session: EditSession, name: str = WEIGHT) -> Tensor:
    return session.lm.weight(name).detach().clone()


def watch(session: EditSession, change: Callable[[int, Proposal], Proposal] | None = None) -> list[Proposal]:
    """Record what the method proposes; ``change(call number, proposal)`` may replace it."""
    seen: list[Proposal] = []
    propose = session.method.propose

    def watched(*arguments: Any) -> Proposal:
        proposal = propose(*arguments)
        if change is not None:
            proposal = change(len(seen), proposal)
        seen.append(proposal)
        return proposal

    session.method = dataclasses.replace(session.method, propose=watched)
    return seen


def scaled(proposal: Proposal, factor: float) -> Proposal:
    updates: dict[str, Update] = {
        name: LowRank(u.left * factor, u.right) for name, u in proposal.updates.items()
    }
    return Proposal(updates, proposal.details)


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# ------------------------------------------------------------------------------------------- taking back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_revert_brings_back_every_bit(start, dtype: torch.dtype) -> None:
    session = start(dtype=dtype, rect="60%")
    with torch.no_grad():
        session.lm.weight(WEIGHT)[0, :4] = torch.tensor([-0.0, 0.0, 1e-42, -1e4])
    before = bits(session.lm.model)
    session.run()
    after = bits(session.lm.model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [WEIGHT]
    session.revert()
    assert same(bits(session.lm.model), before)


@pytest.mark.parametrize("error", [RuntimeError("out of memory, say"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_the_middle_of_the_stream_leaves_the_model_as_it_was(start, error) -> None:
    session = start()

    def fail_at_the_third(call: int, proposal: Proposal) -> Proposal:
        if call == 2:
            raise error
        return proposal

    before = bits(session.lm.model)
    method = session.method
    watch(session, fail_at_the_third)
    with pytest.raises(type(error)):
        session.run()
    assert same(bits(session.lm.model), before)
    session.method = method
    assert session.run()["n_edits"] == 3, "the session can be used again"


def test_revert_after_a_run_from_the_cache(start, tmp_path: Path) -> None:
    cache = EditCache(tmp_path / "runs")
    start().run(cache)
    session = start()
    before = bits(session.lm.model)
    assert session.run(cache)["from_cache"] is True
    assert not same(bits(session.lm.model), before)
    session.revert()
    assert same(bits(session.lm.model), before)


def test_a_second_run_needs_a_revert_and_then_gives_the_same(start) -> None:
    session = start(ROWS[:2])
    session.run()
    first = weight(session)
    with pytest.raises(UserError, match="revert"):
        session.run()
    assert torch.equal(weight(session), first)
    session.revert()
    session.run()
    assert torch.equal(weight(session), first)


def test_training_mode_and_gradient_flags_are_given_back(start) -> None:
    session = start(ROWS[:1])
    model = session.lm.model
    model.train()
    model.transformer.wte.weight.requires_grad_(False)
    session.run()
    assert model.training
    assert not model.transformer.wte.weight.requires_grad
    assert session.lm.weight(WEIGHT).requires_grad
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------- into the weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_the_float32_sum_rounded_once(start, dtype: torch.dtype) -> None:
    session = start(dtype=dtype)
    original = weight(session)
    proposals = watch(session)
    session.run()
    master = original.float()
    rounded_each_time = original.clone()
    for proposal in proposals:
        update = proposal.updates[WEIGHT].dense()
        master += update
        rounded_each_time = (rounded_each_time.float() + update).to(dtype)
    assert torch.equal(weight(session), master.to(dtype))
    assert not torch.equal(rounded_each_time, master.to(dtype)), "too few edits to tell the two apart"


def test_rect_trims_every_step_relative_to_the_weight_just_before_it(start) -> None:
    session = start(rect=0.3)
    current = original = weight(session)
    proposals = watch(session)
    session.run()
    against_original = original
    for proposal in proposals:
        update = proposal.updates[WEIGHT].dense()
        current = current + rect(update, current, keep=0.3)
        against_original = against_original + rect(update, original, keep=0.3)
    assert torch.equal(weight(session), current)
    assert not torch.equal(against_original, current)


def test_alphaedits_convention_keeps_one_element_more(start) -> None:
    reports = [start(ROWS[:1], rect=0.3, rect_convention=name).run() for name in ("paper", "alphaedit")]
    paper, alphaedit = (r["steps"][0]["weights"][WEIGHT]["kept"] * 48 * 32 for r in reports)
    assert (round(paper), round(alphaedit)) == (1536 - int(1536 * 0.7), 1536 - int(1536 * 0.7) + 1)


def test_random_masks_follow_the_seed_and_differ_from_step_to_step(start) -> None:
    def states(seed: int) -> list[Tensor]:
        session = start(regularizer="random", keep=0.5, edit_seed=seed)
        found: list[Tensor] = []
        watch(session, lambda call, proposal: found.append(weight(session)) or proposal)
        session.run()
        return [*found, weight(session)]

    found = states(3)
    assert torch.equal(found[-1], states(3)[-1])
    assert not torch.equal(found[-1], states(4)[-1])
    masks = [(b != a) for a, b in itertools.pairwise(found)]
    assert len(masks) == 3
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("regularizer", ["rect", "random"])
def test_keeping_everything_is_no_regularizer_bit_for_bit(start, regularizer: str) -> None:
    plain = start()
    plain.run()
    kept = start(regularizer=regularizer, keep="100%")
    kept.run()
    assert torch.equal(weight(kept), weight(plain))


def test_edits_accumulate_as_if_each_had_a_session_of_its_own(start, make_model) -> None:
    together = start()
    together.run()
    model = make_model("gpt2")
    for row in ROWS:
        start([row], model=model).run()
    assert torch.equal(weight(together), model.get_parameter(WEIGHT))


def test_two_layers_are_edited_and_reverted_together(start, make_model) -> None:
    session = start(hparams={"layers": [1, 0]}, model=make_model("gpt2", n_layer=3))
    before = bits(session.lm.model)
    report = session.run()
    names = [WEIGHT, "transformer.h.1.mlp.c_proj.weight"]
    assert sorted(report["weights"]) == names
    assert all(not torch.equal(weight(session, n).view(torch.uint8), before[n]) for n in names)
    session.revert()
    assert same(bits(session.lm.model), before)


def test_edits_of_one_model_end_in_the_reverse_order(start, make_model) -> None:
    model = make_model("gpt2")
    before = bits(model)
    outer, inner = start(ROWS[:1], model=model), start(ROWS[1:2], model=model)
    outer.run()
    between = bits(model)
    inner.run()
    edited = bits(model)
    with pytest.raises(UserError, match="edited again later"):
        outer.revert()
    assert same(bits(model), edited)
    inner.revert()
    assert same(bits(model), between)
    outer.revert()
    assert same(bits(model), before)
    forgotten = start(model=model)
    forgotten.run()
    last = start(ROWS[:1], model=model)
    last.run()
    del forgotten
    last.revert()


def test_a_session_is_not_reverted_while_it_edits(start) -> None:
    session = start()
    with pytest.raises(UserError, match="still editing"):
        session.run(on_step=lambda done: session.revert())
    assert not session.originals


def test_a_checkpoint_that_no_step_ends_at_is_refused(start) -> None:
    for wrong in (-1, 4):
        with pytest.raises(UserError, match=f"checkpoints: {wrong}: expected a number from 0 to 3"):
            start().run(checkpoints=[wrong])


def test_layers_that_share_a_matrix_are_not_edited_together(start, make_model) -> None:
    model = make_model("gpt2", n_layer=3)
    model.transformer.h[1].mlp.c_proj.weight = model.transformer.h[0].mlp.c_proj.weight
    with pytest.raises(UserError, match=r"h\.0\..* and .*h\.1\..* are one matrix"):
        start(hparams={"layers": [0, 1]}, model=model)
    start(model=model)


def test_a_token_without_an_embedding_is_named(start, make_model, tokenizer) -> None:
    session = start()
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["zzz"])
    session.lm.encoder.tokenizer = more
    with pytest.raises(UserError, match=r"'a zzz' has the token 'zzz', number \d+, and the model has"):
        session.lm.encoder.tokens("a zzz")


def test_it_computes_in_the_dtypes_of_the_model_whatever_surrounds_it(start) -> None:
    plain = start()
    plain.run()
    surrounded = start()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            surrounded.run()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(weight(plain), weight(surrounded))


@pytest.mark.parametrize("wrong", ["model", "tokenizer", "config"])
def test_arguments_of_another_kind_are_named(start, tokenizer, wrong: str) -> None:
    session = start()
    given = {"model": session.lm.model, "tokenizer": tokenizer, "config": session.config} | {wrong: "rome"}
    with pytest.raises(UserError, match=f"{wrong}: expected"):
        EditSession(**given)


def test_a_batching_method_gets_the_stream_in_batches(start, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[list[str]] = []

    def propose(lm: Any, edits: Any, hparams: Any, context: Any) -> Proposal:
        sizes.append([edit.id for edit in edits])
        only = METHODS["rome"].propose(lm, edits[:1], hparams, context)
        return Proposal(only.updates, only.details * len(edits))

    pairs = dataclasses.replace(METHODS["rome"], name="pairs", batches=True, propose=propose)
    monkeypatch.setitem(METHODS, "pairs", pairs)
    report = start(method="pairs", edit_batch_size=2).run()
    assert sizes == [["lamp", "ferry"], ["plum"]]
    assert [step["edits"] for step in report["steps"]] == sizes
    assert [record["id"] for record in report["edits"]] == ["lamp", "ferry", "plum"]


def test_methods_for_single_facts_refuse_batches(start) -> None:
    with pytest.raises(UserError, match="one fact at a time"):
        start(edit_batch_size=2)


# ------------------------------------------------------------------------------------------- the report


def test_right_after_each_edit_and_at_the_end_are_different_moments(start) -> None:
    alone = start(ROWS[:1]).run()
    session = start()
    report = session.run()
    first = report["edits"][0]
    assert first["before"] == alone["edits"][0]["before"]
    assert first["after"] == alone["edits"][0]["end"] == alone["edits"][0]["after"]
    assert first["end"] != first["after"]

    final = copy.deepcopy(session.lm.model)
    session.revert()
    stream = load_edits(session.config.edits)
    probed = {edit.id: probes(session.lm, edit, TEMPLATES) for edit in stream}
    baseline = measure_baseline(session.lm, probed)
    session.lm.model.load_state_dict(final.state_dict())
    assert {r["id"]: r["end"] for r in report["edits"]} == measure(
        session.lm, probed, baseline, [edit.id for edit in stream]
    )
    for moment in ("before", "after", "end"):
        mean = session.report.averages(moment)
        reliability = [record[moment]["reliability"] for record in report["edits"]]
        assert mean["reliability"] == pytest.approx(sum(reliability) / 3)
        assert mean["generalization"] == first[moment]["generalization"], "only one row has it"


def test_norms_and_shares_of_every_step_and_of_the_whole(start) -> None:
    session = start(rect=0.3)
    original = weight(session)
    proposals = watch(session)
    report = session.run()
    current = original
    for step, proposal in zip(report["steps"], proposals, strict=True):
        numbers = step["weights"][WEIGHT]
        update = proposal.updates[WEIGHT].dense()
        trimmed = rect(update, current, keep=0.3)
        assert numbers["weight_norm"] == pytest.approx(current.norm().item())
        assert numbers["update_norm"] == pytest.approx(update.norm().item())
        assert numbers["applied_norm"] == pytest.approx(trimmed.norm().item())
        assert numbers["applied_norm"] < numbers["update_norm"]
        assert numbers["kept"] == pytest.approx((1536 - int(1536 * 0.7)) / 1536)
        assert numbers["changed"] == pytest.approx((current + trimmed != current).float().mean().item())
        current = current + trimmed
        assert step["applied"] is True
        assert step["seconds"] > 0
        assert step["measuring_seconds"] > 0
    total = report["weights"][WEIGHT]
    assert total["frobenius_distance"] == pytest.approx((current - original).norm().item())
    assert total["manhattan_distance"] == pytest.approx((current - original).abs().sum().item(), rel=1e-5)
    assert total["changed"] == pytest.approx((current != original).float().mean().item())
    assert total["dtype"] == "float32"
    assert report["seconds_per_edit"] == pytest.approx(sum(s["seconds"] for s in report["steps"]) / 3)


def test_the_report_says_what_the_run_consisted_of(start) -> None:
    session = start([*ROWS, ROWS[0]], rect="40%", edit_seed=7)
    report = session.run()
    assert report == strict_json(session.report.to_json()), "plain JSON all through"
    assert report["method"] == "rome"
    assert report["hparams"]["v_num_grad_steps"] == 4
    assert report["hparams"]["context_templates"] == TEMPLATES
    assert report["edit_ids"] == ["lamp", "ferry", "plum", "lamp#2"]
    assert (report["regularizer"], report["keep"], report["rect_convention"]) == ("rect", 0.4, "paper")
    assert report["edit_seed"] == 7
    assert "repeat an earlier one" in report["edit_warnings"][0]
    assert report["versions"]["torch"] == torch.__version__
    assert len(report["edits_sha256"]) == len(report["model_fingerprint"]) == 64


def test_templates_that_were_sampled_are_recorded(start) -> None:
    hparams = {"context_templates": None, "context_template_length_params": [[3, 2]]}
    report = start(ROWS[:1], hparams).run()
    templates = report["hparams"]["context_templates"]
    assert templates[0] == "{}"
    assert len(templates) == 3
    again = start(ROWS[:1], hparams).run()
    assert again["hparams"]["context_templates"] == templates
    other = start(ROWS[:1], hparams, edit_seed=1).run()
    assert other["hparams"]["context_templates"] != templates


# ----------------------------------------------------------------------------- edits that came to nothing


def test_an_edit_of_which_nothing_is_kept_is_reported(start, caplog: pytest.LogCaptureFixture) -> None:
    session = start(rect=0)
    before = bits(session.lm.model)
    report = session.run()
    assert same(bits(session.lm.model), before)
    assert report["flagged"] == {"no_change": ["lamp", "ferry", "plum"]}
    assert "3 of 3 edits changed no weight: lamp, ferry, plum" in caplog.text
    assert report["weights"][WEIGHT]["changed"] == 0


@pytest.mark.parametrize(
    ("dtype", "factor", "flag"),
    [
        (torch.bfloat16, 1e-9, "no_change"),  # lost in rounding
        (torch.float16, 1e6, "not_finite"),  # beyond what float16 can hold
        (torch.float32, 1e30, None),  # breaks the model
        (torch.float32, -1.0, "no_gain"),
    ],
)
def test_an_update_that_comes_to_nothing_is_named(start, dtype, factor: float, flag: str | None) -> None:
    session = start(ROWS[:2], dtype=dtype)
    watch(session, lambda call, proposal: scaled(proposal, factor if call == 0 else 1.0))
    report = session.run()
    strict_json(session.report.to_json())
    assert torch.isfinite(weight(session)).all()
    if flag is not None:
        assert report["flagged"].get(flag) == ["lamp"]
        changed = report["steps"][0]["weights"][WEIGHT]["changed"]
        assert (changed > 0) == (flag == "no_gain")
    if flag == "no_gain":
        first = report["edits"][0]
        assert first["after"]["target_probability"] <= first["before"]["target_probability"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_update_is_not_applied_and_named(start, caplog, value: float) -> None:
    def spoil(call: int, proposal: Proposal) -> Proposal:
        if call != 1:
            return proposal
        update = proposal.updates[WEIGHT]
        left = update.left.clone()
        left[3, 0] = value
        details = [detail | {"loss": value} for detail in proposal.details]
        return Proposal({WEIGHT: LowRank(left, update.right)}, details)

    session = start(rect=0.5)
    watch(session, spoil)
    report = session.run()
    assert report["flagged"] == {"not_finite": ["ferry"]}
    assert "non-finite update, which was not applied: ferry" in caplog.text
    assert report["steps"][1]["applied"] is False
    assert report["edits"][1]["before"] == report["edits"][1]["after"]
    strict_json(session.report.to_json())

    others = start([ROWS[0], ROWS[2]], rect=0.5)
    others.run()
    assert torch.equal(weight(session), weight(others)), "as if that edit had not been there"


def test_one_bad_layer_keeps_the_whole_step_out(start) -> None:
    def spoil(call: int, proposal: Proposal) -> Proposal:
        bad = LowRank(proposal.updates[WEIGHT].left * float("nan"), proposal.updates[WEIGHT].right)
        return Proposal({**proposal.updates, WEIGHT: bad}, proposal.details)

    session = start(ROWS[:1], hparams={"layers": [0, 1]})
    before = bits(session.lm.model)
    watch(session, spoil)
    assert session.run()["flagged"] == {"not_finite": ["lamp"]}
    assert same(bits(session.lm.model), before)


# --------------------------------------------------------------------------------------------- too long


def test_prompts_too_long_for_the_model_are_left_out_and_counted(start) -> None:
    long = "a very long way " * 40
    row = ROWS[0] | {
        "paraphrase_prompts": [long + "The Lamp of Ilse is in", "The Lamp of Ilse hangs in"],
        "neighborhood_prompts": [long, "The Jug of Ilse was painted in", long + "x"],
    }
    short = ROWS[0] | {"paraphrase_prompts": row["paraphrase_prompts"][1:]}
    report = start([row, ROWS[1]]).run()
    assert report["prompts_too_long"] == 3
    assert report["edits"][0]["end"] == start([short, ROWS[1]]).run()["edits"][0]["end"]
    report = start([ROWS[0] | {"paraphrase_prompts": [long], "neighborhood_prompts": [long]}]).run()
    assert set(report["at_the_end"]) == {"reliability", "target_probability"}


@pytest.mark.parametrize(
    ("hparams", "row"),
    [
        ({}, ROWS[2] | {"prompt": "on and on and on, " * 30 + "{} is"}),
        ({"context_templates": ["{}", "of all " * 60 + "{}"]}, ROWS[2]),
        # Fewer characters than the other template, but far more tokens.
        ({"context_templates": ["{}", "The city is large. " * 6 + "{}", "#~" * 50 + "{}"]}, ROWS[2]),
    ],
)
def test_a_row_too_long_is_named_before_anything_is_edited(
    start, hparams: dict[str, Any], row: dict[str, Any]
) -> None:
    session = start([ROWS[0], row] if not hparams else [row], hparams)
    before = bits(session.lm.model)
    proposals = watch(session)
    with pytest.raises(UserError, match=r"facts\.json, row \d: .*tokens") as error:
        session.run()
    assert "\n" not in str(error.value)
    assert proposals == []
    assert same(bits(session.lm.model), before)


def test_a_checkpoint_is_what_a_run_of_the_edits_so_far_gives(start) -> None:
    seen: list[tuple[dict[str, Any], Tensor]] = []
    session = start(rect=0.4)
    weight = session.lm.weight(WEIGHT)
    whole = session.run(
        checkpoints=[1, 2], on_checkpoint=lambda report: seen.append((report, weight.detach().clone()))
    )
    assert [report["n_edits"] for report, _ in seen] == [1, 2] and whole["n_edits"] == 3
    for n, (report, at_checkpoint) in enumerate(seen, start=1):
        alone = start(ROWS[:n], rect=0.4)
        again = alone.run()
        assert torch.equal(alone.lm.weight(WEIGHT), at_checkpoint)
        assert report["run"] == again["run"]
        for key in ("at_the_end", "right_after_each_edit", "weights", "flagged"):
            assert report[key] == again[key]


class Stop(BaseException):
    """A sudden end: not even saved on the way out, as Ctrl-C is."""


def stop(*arguments: Any) -> None:
    raise Stop


def untimed(report: dict[str, Any]) -> dict[str, Any]:
    steps = [{k: v for k, v in step.items() if "seconds" not in k} for step in report["steps"]]
    return {key: value for key, value in report.items() if "seconds" not in key} | {"steps": steps}


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_a_run_that_dies_at_a_checkpoint_comes_back_to_it(start, tmp_path: Path, dies_at: int) -> None:
    def run(session: EditSession, cache: EditCache | None, checkpoints: list[int], die: int = 0) -> dict:
        seen = {}

        def reached(report: dict[str, Any]) -> None:
            n = report["n_edits"]
            if n == die:
                raise Stop
            seen[n] = (untimed(report), session.lm.weight(WEIGHT).detach().clone())

        session.run(cache, checkpoints=checkpoints, on_checkpoint=reached, on_step=steps.append)
        return seen

    steps: list[int] = []

    reference = run(start(rect=0.4), None, [1, 2, 3])
    cache, session = EditCache(tmp_path), start(rect=0.4)
    original = session.lm.weight(WEIGHT).detach().clone()
    with pytest.raises(Stop):
        run(session, cache, [1, 2, 3], die=dies_at)
    assert torch.equal(session.lm.weight(WEIGHT), original)
    again = start(rect=0.4)
    steps.clear()
    seen = run(again, cache, [n for n in (1, 2, 3) if n >= dies_at])
    assert steps == list(range(dies_at, 4))
    assert seen.keys() == {n for n in (1, 2, 3) if n >= dies_at}
    for n, (report, weight) in seen.items():
        assert report == reference[n][0]
        assert torch.equal(weight, reference[n][1])


def test_a_saved_state_beyond_a_checkpoint_is_not_used(start, tmp_path: Path) -> None:
    cache = EditCache(tmp_path)
    with pytest.raises(Stop):
        start().run(cache, checkpoints=[2], on_checkpoint=stop)
    seen: list[int] = []
    steps: list[int] = []
    start().run(cache, [1, 3], lambda report: seen.append(report["n_edits"]), steps.append)
    assert seen == [1, 3] and steps == [0, 1, 2, 3]


def test_a_finished_run_serves_the_checkpoint_at_its_end_alone(start, tmp_path: Path) -> None:
    cache = EditCache(tmp_path)
    start().run(cache)
    for checkpoints, expected in (([3], [3]), ([2, 3], [0, 1, 2, 3])):
        seen: list[int] = []
        steps: list[int] = []
        start().run(cache, checkpoints, lambda report, to=seen: to.append(report["n_edits"]), steps.append)
        assert seen == checkpoints and steps == expected


def test_a_failure_at_the_checkpoint_of_a_finished_run_restores_the_model(start, tmp_path: Path) -> None:
    cache = EditCache(tmp_path)
    start().run(cache)
    session = start()
    original = weight(session)
    with pytest.raises(Stop):
        session.run(cache, checkpoints=[3], on_checkpoint=stop)
    assert torch.equal(weight(session), original)


def test_what_a_method_remembers_is_saved_with_a_checkpoint(start, tmp_path: Path) -> None:
    """With a method whose updates grow with the number of steps it has seen."""

    def forgetful(session: EditSession) -> EditSession:
        method = session.method

        def propose(lm: Any, edits: Any, hparams: Any, context: Any) -> Proposal:
            proposal = method.propose(lm, edits, hparams, context)
            seen = float(context.state.get("steps", torch.zeros(1)))
            updates: dict[str, Update] = {
                n: Dense(u.dense() * (1 + seen)) for n, u in proposal.updates.items()
            }
            return Proposal(updates, proposal.details)

        def after_step(lm: Any, edits: Any, hparams: Any, context: Any) -> None:
            context.state["steps"] = context.state.get("steps", torch.zeros(1)) + 1

        session.method = dataclasses.replace(method, propose=propose, after_step=after_step)
        return session

    whole = forgetful(start())
    whole.run()
    cache = EditCache(tmp_path)
    with pytest.raises(Stop):
        forgetful(start()).run(cache, checkpoints=[2], on_checkpoint=stop)
    again = forgetful(start())
    again.run(cache)
    assert torch.equal(weight(again), weight(whole))


# -- regularizers of low-rank updates ----------------------------------------------------------------


def enlarged(session: EditSession, factor: float = 30) -> EditSession:
    """Its updates are large enough to be restrained by PRUNE."""
    watch(session, lambda call, proposal: scaled(proposal, factor))
    return session


LAYERS = {"layers": [0, 1]}


def with_updates(session: EditSession, *steps: Sequence[Update]) -> EditSession:
    """A session whose method proposes these updates of the two layers instead, step by step."""

    def replaced(call: int, proposal: Proposal) -> Proposal:
        return Proposal(dict(zip(proposal.updates, steps[call], strict=True)), proposal.details)

    watch(session, replaced)
    return session


def test_each_layer_has_a_random_mask_of_its_own(start) -> None:
    ones = Dense(torch.ones(48, 32))
    session = with_updates(start(ROWS[:1], LAYERS, regularizer="random", keep=0.5), [ones, ones])
    before = [weight(session, name) for name in session.weight_names]
    session.run()
    masks = [weight(session, n) != old for n, old in zip(session.weight_names, before, strict=True)]
    assert not torch.equal(*masks)


@pytest.mark.parametrize(("family", "transposed"), [("gpt2", True), ("llama", False)])
def test_a_regularizer_is_told_how_the_weight_is_stored(start, family: str, transposed: bool) -> None:
    seen: list[bool] = []

    class Recording(NoRegularizer):
        def trim(self, update: Update, weight: Tensor, original: Tensor, state: WeightState) -> Update:
            seen.append(state.transposed)
            return update

    session = start(ROWS[:1], family=family)
    session.config = session.config.model_copy(update={"regularizer": Recording()})
    session.run()
    assert seen == [transposed]


def test_an_edit_that_changes_one_of_two_layers_has_changed_a_weight(start) -> None:
    session = with_updates(start(ROWS[:1], LAYERS), [Dense(torch.zeros(48, 32)), Dense(torch.ones(48, 32))])
    assert "no_change" not in session.run()["flagged"]


def test_an_edit_that_leaves_the_probability_of_its_target_as_it_was_is_flagged(start) -> None:
    session = start(ROWS[:1])
    first = session.lm.model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        first.bias[0] = -1e4  # this neuron is never active, so its row of the weight has no effect
    update = LowRank(torch.eye(48)[:, :1], torch.ones(32, 1))
    watch(session, lambda call, proposal: Proposal({WEIGHT: update}, proposal.details))
    assert session.run()["flagged"] == {"no_gain": ["lamp"]}


def test_prune_has_a_memory_for_each_layer_and_forgets_a_step_that_was_refused(start) -> None:
    def session(rows: list[dict[str, Any]], *steps: Sequence[Update]) -> EditSession:
        run = with_updates(start(rows, LAYERS, regularizer="prune"), *steps)
        run.run()
        return run

    generator = torch.Generator().manual_seed(0)
    large = [
        LowRank(3 * torch.randn(48, 1, generator=generator), torch.randn(32, 1, generator=generator))
        for _ in range(4)
    ]
    infinite = LowRank(large[0].left * torch.inf, large[0].right)
    refused = session(ROWS, large[:2], [large[3], infinite], large[2:])
    assert refused.report.flagged["not_finite"] == ["ferry"]
    without = session([ROWS[0], ROWS[2]], large[:2], large[2:])
    for position, name in enumerate(refused.weight_names):
        assert torch.equal(weight(refused, name), weight(without, name))
        expected, memory = weight(start(), name), dict[str, Tensor]()
        original = expected.clone()
        for update in large[position::2]:
            state = WeightState(memory, torch.Generator(), transposed=True)
            expected += Prune().trim(update, expected, original, state).dense()
        torch.testing.assert_close(weight(without, name), expected)


@pytest.mark.parametrize("name", ["prune", "revive"])
def test_an_interrupted_regularizer_goes_on_with_its_memory(name, start, tmp_path, monkeypatch) -> None:
    whole = enlarged(start(regularizer=name))
    whole.run()
    monkeypatch.setattr("harness_rect.io.resume.SAVE_SECONDS", 0.0)
    cut = enlarged(start(regularizer=name))
    with pytest.raises(Stop):
        cut.run(EditCache(tmp_path), on_step=lambda done: stop() if done == 2 else None)
    monkeypatch.setattr(torch.linalg, "eigh", None)  # no weight is decomposed again
    resumed = enlarged(start(regularizer=name))
    resumed.run(EditCache(tmp_path))
    assert torch.equal(weight(resumed), weight(whole))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("regularizer", "factor", "restrained", "tolerance"),
    [("prune", 30, 0.9, 1e-4), ("sphere", 1, 1.0, 1e-5)],
)
def test_low_rank_updates_are_trimmed_in_factors_as_they_are_as_matrices(
    start, monkeypatch, family: str, regularizer: str, factor: float, restrained: float, tolerance: float
) -> None:
    module = sys.modules[f"harness_rect.regularizers.{regularizer}"]
    in_factors, calls = getattr(module, f"{regularizer}_factors"), []
    counted = lambda *args, **named: calls.append(args) or in_factors(*args, **named)  # noqa: E731
    monkeypatch.setattr(module, f"{regularizer}_factors", counted)

    def densely(call: int, proposal: Proposal) -> Proposal:
        return Proposal({n: Dense(u.dense()) for n, u in proposal.updates.items()}, proposal.details)

    low_rank, dense = (enlarged(start(regularizer=regularizer, family=family), factor) for _ in range(2))
    watch(dense, densely)
    norms = []
    for session in (low_rank, dense):
        weights = [w for step in session.run()["steps"] for w in step["weights"].values()]
        norms.append([w["applied_norm"] / w["update_norm"] for w in weights])
        assert len(calls) == len(ROWS), "once a step, for low-rank updates alone"
    assert all(any(ratio < restrained for ratio in ratios) for ratios in norms)
    if regularizer == "sphere":
        assert all(0 < ratio < 1 for ratios in norms for ratio in ratios)
    a, b = (weight(session, low_rank.weight_names[0]) for session in (low_rank, dense))
    assert (a - b).norm() / b.norm() < tolerance


def test_a_caller_in_inference_mode_gets_the_same_edits(start) -> None:
    plain, inside = start(), start()
    plain.run()
    with torch.inference_mode():
        inside.run()
    assert torch.equal(weight(inside), weight(plain))


def test_a_revert_that_does_not_bring_back_every_bit_is_an_error(start) -> None:
    session = start()
    session.run()
    session.originals[WEIGHT][0, 0] += 1
    with pytest.raises(Failed, match=f"{WEIGHT} is not as it was before editing"):
        session.revert()
