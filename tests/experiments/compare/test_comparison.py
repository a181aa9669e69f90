"""Comparisons of results files: which test they get, what is refused, and the gate."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from support.lm_eval_files import DATE, content, mean_task, with_group, write

from harness_rect.errors import UserError
from harness_rect.experiments.compare import Gate, compare
from harness_rect.experiments.compare.rendering import short
from harness_rect.experiments.results import Results, load

RNG = np.random.default_rng(0)
RIGHT = (RNG.random(100) < 0.8).astype(float)
FEWER = np.where(RNG.random(100) < 0.3, 0.0, RIGHT)
ROUGE = RNG.random(40)

Make = Callable[..., Results]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(tasks, samples=True, group=None, **content)``: a results file, read."""
    count = iter(range(1000))

    def make(tasks: dict[str, Any], samples: bool = True, group: float | None = None, **more: Any) -> Results:
        made = content(tasks, **more)
        if group is not None:
            made = with_group(made, "rect_general", list(tasks), group)
        return load(write(tmp_path / str(next(count)), made, tasks, samples))

    return make


def nli(values=RIGHT, **more: Any) -> dict[str, Any]:
    return {"rect_nli": mean_task("acc", values, **more)}


# ------------------------------------------------------------------------------------------ which test


def test_right_and_wrong_on_the_same_documents_is_mcnemar(make: Make) -> None:
    [row] = compare(make(nli()), [make(nli(FEWER))]).rows
    lost, gained = int((RIGHT > FEWER).sum()), int((RIGHT < FEWER).sum())
    assert (row.test, row.n) == ("mcnemar", 100) and row.method == "paired McNemar, n=100"
    assert row.p == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    assert row.change == pytest.approx(FEWER.mean() - RIGHT.mean())
    assert row.retention == pytest.approx(FEWER.mean() / RIGHT.mean())
    assert row.low < row.change < row.high < 0


def test_other_metrics_on_the_same_documents_are_bootstrapped(make: Make) -> None:
    base, other = (
        make({"rect_summarization": mean_task("rouge", values)}) for values in (ROUGE, ROUGE * 0.9)
    )
    [row] = compare(base, [other]).rows
    assert (row.test, row.method) == ("paired_bootstrap", "paired bootstrap, n=40")
    assert row.low < row.change < row.high < 0 and row.p < 0.001


def test_without_samples_it_is_unpaired_and_says_so(make: Make) -> None:
    sides = make(nli()), make(nli(FEWER), samples=False)
    [row] = compare(sides[0], [sides[1]]).rows
    assert row.test == "unpaired" and row.method == f"unpaired: no samples beside results_{DATE}.json"
    z = row.change / math.hypot(*(values.std(ddof=1) / 10 for values in (RIGHT, FEWER)))
    assert row.p == pytest.approx(2 * stats.norm.cdf(-abs(z)))


def test_without_samples_or_standard_errors_only_the_scores_are_given(make: Make) -> None:
    task = {"rect_ner": mean_task("f1", RIGHT) | {"stderr": None}}
    [row] = compare(make(task, samples=False), [make(task, samples=False)]).rows
    assert (row.test, row.p, row.low, row.p_holm) == ("none", None, None, None)
    assert row.retention == 1


def test_a_score_that_is_not_a_number_claims_nothing_and_passes_no_gate(make: Make) -> None:
    report = compare(make(nli()), [make(nli(value=math.nan))], gates=[Gate(0.1)])
    assert report.rows[0].test == "none" and report.failed == report.rows
    infinite = compare(make(nli()), [make(nli(value=math.inf))], gates=[Gate(0.5)])
    for rows in (report.failed, infinite.failed):
        assert rows[0].retention is None
        assert short(rows[0]).partition(", ")[2].startswith("a score is not finite, at least")


def test_the_same_file_twice_is_no_change(make: Make) -> None:
    tasks = nli() | {"rect_summarization": mean_task("rouge", ROUGE)}
    base = make(tasks)
    for row in compare(base, [base]).rows:
        assert (row.change, row.retention, row.p, row.p_holm) == (0, 1, 1, 1)


def test_the_mean_of_the_tasks_is_resampled_within_each(make: Make) -> None:
    def side(factor: float) -> Results:
        scores = {("rect_nli", "acc"): RIGHT, ("rect_summarization", "rouge"): ROUGE * factor}
        tasks = {
            name: mean_task(metric, values, more={"score,none": float(values.mean())})
            for (name, metric), values in scores.items()
        }
        return make(tasks, group=float(np.mean([values.mean() for values in scores.values()])))

    rows = compare(side(1), [side(0.8)]).rows
    assert [row.task for row in rows] == ["rect_nli", "rect_summarization", "rect_general"]
    group = rows[-1]
    assert group.method == "paired bootstrap within tasks, n=140 documents of 2 tasks"
    # nli did not change, so all of the change is half of the other task's
    assert group.change == pytest.approx(rows[1].change / 2)
    assert (group.low, group.high) == pytest.approx((rows[1].low / 2, rows[1].high / 2), abs=0.002)


def test_holm_corrects_over_all_files_of_one_command(make: Make) -> None:
    base = make(nli())
    alone = compare(base, [make(nli(FEWER))]).rows[0]
    twice = compare(base, [make(nli(FEWER)), make(nli(1 - FEWER))]).rows
    assert alone.p_holm == alone.p
    assert twice[0].p == alone.p and twice[0].p_holm == pytest.approx(2 * min(alone.p, 0.5), abs=alone.p)
    assert all(row.p_holm >= row.p for row in twice)


def test_all_metrics_are_compared_when_asked_for(make: Make) -> None:
    task = {"rect_nli": mean_task("acc", RIGHT, more={"valid_rate,none": 1.0, "score,none": 0.5})}
    rows = compare(make(task), [make(task)], all_metrics=True).rows
    assert [row.metric for row in rows] == ["acc", "valid_rate"]


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("task", "file", "message"),
    [
        ({"version": 2.0}, {}, "version of rect_nli: 1.0 and 2.0"),
        ({"shots": 5}, {}, "num_fewshot of rect_nli: 0 and 5"),
        ({"metadata": {"data": "tiny"}}, {}, "data of rect_nli: hub and tiny"),
        ({}, {"config": {"limit": 10.0}}, "limit none and 10.0"),
        ({}, {"config": {"numpy_seed": 7}}, "numpy_seed 1234 and 7"),
        ({}, {"config": {"model_args": "pretrained=gpt2-xl,max_length=9"}}, "max_length its default and 9"),
        (
            {},
            {"config": {"model_args": {"softmax_dtype": "float32"}}},
            "softmax_dtype its default and float32",
        ),
        ({}, {"chat_template_sha": "abc"}, "chat template none and abc"),
        (
            {},
            {"config": {"gen_kwargs": "temperature=3,do_sample=True"}},
            "gen_kwargs of rect_nli: none and do_sample=true,temperature=3.0",
        ),
    ],
)
@pytest.mark.parametrize("samples", [True, False])
def test_a_difference_is_named_and_refused_unless_allowed(make: Make, task, file, message, samples) -> None:
    base = make(nli(), samples, config={"gen_kwargs": {}})
    other = make(nli(FEWER, **task), samples, **file)
    with pytest.raises(UserError, match=message):
        compare(base, [other])
    report = compare(base, [other], allow_differences=True)
    assert any(message in line for line in report.differences)
    assert report.rows[0].test == ("mcnemar" if samples else "unpaired")


def test_arguments_at_their_defaults_are_no_difference(make: Make) -> None:
    given = {"max_length": None, "truncation": "False", "enable_thinking": True, "device": "cpu"}
    other = make(nli(), config={"model_args": {"pretrained": "gpt2-xl"} | given})
    assert compare(make(nli()), [other]).differences == []


@pytest.mark.parametrize(("name", "usual"), [("prompt_context", "bare"), ("judge", "none")])
def test_what_editing_tasks_are_told_must_agree(make: Make, name, usual) -> None:
    def side(**metadata: Any) -> Results:
        return make({"rect_autoregressive": mean_task("reliability", RIGHT, metadata=metadata)}, False)

    assert compare(side(), [side()]).differences == []
    with pytest.raises(UserError, match=f"{name} of rect_autoregressive: {usual} and other"):
        compare(side(), [side(**{name: "other"})])


def test_all_differences_are_named_at_once_and_tasks_share_a_line(make: Make) -> None:
    def tasks(**more: Any) -> dict[str, Any]:
        return {name: mean_task("acc", RIGHT, **more) for name in ("rect_nli", "rect_sentiment")}

    other = make(tasks(version=2.0), config={"limit": 5})
    with pytest.raises(UserError) as refusal:
        compare(make(tasks()), [other])
    assert "limit none and 5.0; version of rect_nli, rect_sentiment: 1.0 and 2.0" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_version_is_the_same_number_however_it_is_written(make: Make) -> None:
    assert compare(make(nli(version=1)), [make(nli(version="1.0"))]).differences == []


@pytest.mark.parametrize("given", [None, "", {}, "absent"])
def test_no_generation_arguments_are_the_same_however_they_are_written(make: Make, given) -> None:
    config = {} if given == "absent" else {"gen_kwargs": given}
    assert compare(make(nli(), config={"gen_kwargs": {}}), [make(nli(), config=config)]).differences == []
    alike = [make(nli(), config={"gen_kwargs": one}) for one in ({"top_p": 1, "do_sample": True}, TEXT)]
    assert compare(alike[0], alike[1:]).differences == []


TEXT = "do_sample=true,top_p=1.0"


def test_few_shots_in_other_turns_of_a_chat_differ(make: Make) -> None:
    def side(shots: int, turns: bool | None, template: str | None = "abc") -> Results:
        return make(nli(shots=shots), fewshot_as_multiturn=turns, chat_template_sha=template)

    with pytest.raises(UserError, match="fewshot_as_multiturn of rect_nli: True and False"):
        compare(side(5, True), [side(5, False)])
    compare(side(0, True), [side(0, False)])
    compare(side(5, True, None), [side(5, False, None)])  # no chat: lm-eval's default
    compare(side(5, True), [side(5, None)])


def test_sweeps_have_the_same_data_if_their_requests_are_the_same(make: Make) -> None:
    def side(digest: str, folder: str = "/data") -> Results:
        made_of = {"tasks": {"rect_nli": {"requests_sha256": digest}}}
        task = nli(metadata={"data": folder})
        return make(task, samples=False, sweep={"made_of": made_of})

    with pytest.raises(UserError, match="requests of rect_nli: aaaaaaaaaaaa and bbbbbbbbbbbb"):
        compare(side("a" * 64), [side("b" * 64)])
    compare(side("a" * 64), [side("a" * 64, "/copy")])
    with pytest.raises(UserError, match=r"data of rect_nli: .*/data and .*/other"):
        compare(side("a" * 64, "/data"), [make(nli(metadata={"data": "/other"}), samples=False)])


def test_other_weights_under_one_name_differ(make: Make) -> None:
    def side(said: str | None, edited: str | None = None, **args: Any) -> Results:
        config = {"provenance": {"model_fingerprint": said}, "model_args": {"pretrained": "/x/P"} | args}
        edit = {"method": "rome", "n_edits": 1, "model_fingerprint": edited} if edited else None
        return make(nli(), config=config | {"edit": edit})

    with pytest.raises(UserError, match="weights of /x/P aaaaaaaaaaaa and bbbbbbbbbbbb"):
        compare(side("a" * 64), [side("b" * 64, "b" * 64)])
    for other in (side("a" * 64, "a" * 64), side("unknown"), side(None), side("b" * 64, delta="D")):
        assert compare(side("a" * 64), [other]).differences == []


def test_runs_edited_with_different_seeds_differ_but_an_unedited_one_has_no_seed(make: Make) -> None:
    edited = {"method": "rome", "n_edits": 1}
    plain, first, second = (
        make(nli(), config={"edit": edit})
        for edit in ({"method": "none"}, edited | {"edit_seed": 0}, edited | {"edit_seed": 1})
    )
    assert compare(plain, [first, second]).differences == []
    with pytest.raises(UserError, match="edit_seed 0 and 1"):
        compare(first, [second])


def test_the_embedded_model_reads_the_embedded_rows_unless_told_otherwise(make: Make) -> None:
    tiny = make(nli(), config={"model": "edited_hf", "model_args": {"pretrained": "rect-tiny"}})
    default = make(nli(), config={"model": "edited_hf", "model_args": {}})
    said = make(nli(metadata={"data": "tiny"}), config={"model_args": {"pretrained": "edited"}})
    assert compare(tiny, [default, said]).differences == []
    with pytest.raises(UserError, match="data of rect_nli: tiny and hub"):
        compare(tiny, [make(nli())])


def test_edits_are_the_data_of_the_editing_tasks(make: Make) -> None:
    def side(edits: str, samples: bool, sha256: str | None = None) -> Results:
        config = {"edit": {"method": "rome", "n_edits": 1, "edits_sha256": sha256}}
        task = mean_task("reliability", RIGHT, metadata={"edits": edits})
        return make({"rect_zsre": task}, samples, config=config)

    with pytest.raises(UserError, match=r"edits of rect_zsre: a.json and b.json"):
        compare(side("a.json", False), [side("b.json", False)])
    assert compare(side("a.json", True), [side("b.json", True)]).differences == []  # the same documents
    others = [side("b.json", False, "x"), side("a.json", False)]  # the same edits in another file, no digest
    assert compare(side("a.json", False, "x"), others).differences == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"rect_nli-3"',
            '"other"',
            "documents of rect_nli: 1 of 100 are not the same, the first is doc_id 3",
        ),
        ('"prompt-rect_nli-4"', '"other"', "prompts of rect_nli: 1 of 100"),
    ],
)
def test_samples_of_other_documents_or_prompts_are_refused(make: Make, old, new, message) -> None:
    base, other = make(nli()), make(nli(FEWER))
    samples = other.path.with_name(f"samples_rect_nli_{DATE}.jsonl")
    samples.write_text(samples.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        compare(base, [other])
    # Allowed: other prompts for the same documents stay paired, other documents do not.
    [row] = compare(base, [other], allow_differences=True).rows
    assert row.test == ("mcnemar" if "prompt" in old else "unpaired")


def test_other_numbers_of_documents_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"number of documents of rect_nli: 100 and 50.*50 only in the first"):
        compare(make(nli()), [make(nli(RIGHT[:50]))])


def test_what_a_file_does_not_say_is_not_held_against_it(make: Make) -> None:
    old = {
        "results": {"rect_nli": {"acc,none": 0.5, "acc_stderr,none": 0.05}},
        "config": {"model": "vllm", "model_args": "pretrained=gpt2-xl"},
    }
    base = make(nli())
    other = load(write(base.path.parent / "old", old, {}))
    [row] = compare(base, [other]).rows
    assert row.test == "unpaired" and row.score_other == 0.5


# ----------------------------------------------------------------------------- tasks that only one side has


def test_only_common_tasks_are_compared_and_the_others_are_named(make: Make) -> None:
    both = nli() | {"rect_zsre": mean_task("reliability", RIGHT)}
    report = compare(make(nli()), [make(both)], gates=[Gate(0.9)])
    assert [row.task for row in report.rows] == ["rect_nli"]
    assert len(report.left_out) == 1 and report.left_out[0].endswith(": rect_zsre")
    with pytest.raises(UserError, match="no task in common"):
        compare(make(nli()), [make({"rect_ner": mean_task("f1", RIGHT)})])


def test_a_gate_on_everything_does_not_pass_over_a_task_that_is_missing(make: Make) -> None:
    both = nli() | sentiment()
    with pytest.raises(UserError, match="lacks rect_sentiment"):
        compare(make(both), [make(nli())], gates=[Gate(0.9)])
    assert compare(make(both), [make(nli())], tasks=["rect_nli"], gates=[Gate(0.9)]).failed == []


def test_a_group_of_other_tasks_is_left_out(make: Make) -> None:
    two = nli() | sentiment()
    report = compare(make(two, group=0.5), [make(nli(), group=0.5)])
    assert [row.task for row in report.rows] == ["rect_nli"]
    assert any("rect_general" in line for line in report.left_out)


def test_chosen_tasks_include_those_of_a_group_and_only_their_differences_count(make: Make) -> None:
    def side(version: float) -> Results:
        made = content(nli() | {"rect_zsre": mean_task("reliability", RIGHT, version=version)})
        made = with_group(made, "rect_general", ["rect_nli"], 0.7)
        base = make(nli())
        return load(write(base.path.parent / "grouped", made, {}))

    report = compare(side(1.0), [side(2.0)], tasks=["rect_general"])
    assert [row.task for row in report.rows] == ["rect_nli", "rect_general"]


def test_an_unknown_task_is_refused_with_the_nearest_name(make: Make) -> None:
    base = make(nli())
    with pytest.raises(UserError, match="did you mean 'rect_nli'"):
        compare(base, [base], tasks=["rect_nil"])
    with pytest.raises(UserError, match="--min-retention: no results have rect_nly"):
        compare(base, [base], gates=[Gate(0.9, "rect_nly")])
    with pytest.raises(UserError, match=r"has no em in .*; it has acc"):
        compare(base, [base], gates=[Gate(0.9, "rect_nli", "em")])


# ------------------------------------------------------------------------------------------------ gates


def test_gates_are_read() -> None:
    assert Gate.parse("0.94") == Gate.parse("94%") == Gate(0.94)
    assert Gate.parse("rect_nli=0.9") == Gate(0.9, "rect_nli")
    assert Gate.parse("rect_nli/valid_rate=1") == Gate(1.0, "rect_nli", "valid_rate")


@pytest.mark.parametrize(
    "text", ["", "much", "=0.9", "rect_nli=", "/acc=0.9", "rect_nli/=0.9", "-1", "94", "nan", "inf"]
)
def test_what_is_no_gate_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"expected 0\.94"):
        Gate.parse(text)


def scores(make: Make, **values: float) -> Results:
    """Headlines of these values, without samples."""
    return make({name: mean_task("acc", [0, 1]) | {"value": value} for name, value in values.items()}, False)


def test_the_most_specific_gate_applies(make: Make) -> None:
    sides = scores(make, rect_nli=0.5, rect_sentiment=0.5), [scores(make, rect_nli=0.46, rect_sentiment=0.46)]
    assert [row.task for row in compare(*sides, gates=[Gate(0.95)]).failed] == ["rect_nli", "rect_sentiment"]
    assert [row.task for row in compare(*sides, gates=[Gate(0.95), Gate(0.9, "rect_nli")]).failed] == [
        "rect_sentiment"
    ]
    strict = [Gate(0.9), Gate(0.9, "rect_nli"), Gate(0.95, "rect_nli", "acc")]
    assert [row.task for row in compare(*sides, gates=strict).failed] == ["rect_nli"]
    assert [row.passed for row in compare(*sides, gates=[Gate(0.9, "rect_nli")]).rows] == [True, None]


def test_a_gated_metric_gets_a_row(make: Make) -> None:
    task = {"rect_nli": mean_task("acc", RIGHT, more={"valid_rate,none": 0.5})}
    worse = {"rect_nli": mean_task("acc", RIGHT, more={"valid_rate,none": 0.4})}
    report = compare(make(task), [make(worse)], gates=[Gate(0.9, "rect_nli", "valid_rate")])
    assert [(row.metric, row.passed) for row in report.rows] == [("acc", None), ("valid_rate", False)]


@pytest.mark.parametrize(
    ("base", "other", "higher_is_better", "kept", "passed"),
    [
        (0.5, 0.47, True, 0.94, True),  # exactly what was asked is enough
        (0.5, 0.4699, True, 0.9398, False),
        (0, 0, True, None, True),  # of nothing no share is left: nothing may be lost
        (0, 0.5, True, None, True),
        (-0.9, 0.5, True, None, True),
        (-0.2, -0.3, True, None, False),
        (10, 20, False, 0.5, False),  # of a perplexity, a rise is a loss
        (10, 5, False, 2, True),
        (0, 0.5, False, None, False),  # of no errors nothing can be kept
        (0.5, -0.1, True, None, False),  # less than nothing is no share
    ],
)
def test_a_gate_asks_for_a_share_of_the_base(make: Make, base, other, higher_is_better, kept, passed) -> None:
    task = mean_task("acc", [0, 1], higher_is_better=higher_is_better)
    sides = [make({"a": task | {"value": value}}, False) for value in (base, other)]
    [row] = compare(sides[0], sides[1:], gates=[Gate(0.94)]).rows
    assert (row.retention, row.change, row.passed) == (kept and pytest.approx(kept), other - base, passed)


# -------------------------------------------------------------------------------- gates that meet no row


def sentiment() -> dict[str, Any]:
    return {"rect_sentiment": mean_task("acc", RIGHT)}


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("gate", ["rect_nli=0.9", "rect_nli/acc=0.9", "0.9"])
def test_a_gate_whose_task_the_other_lacks_cannot_pass(make: Make, gate: str, allow: bool) -> None:
    base, other = make(nli() | sentiment()), make(sentiment())
    with pytest.raises(UserError, match="rect_nli"):
        compare(base, [other], gates=[Gate.parse(gate)], allow_differences=allow)


def test_a_gate_whose_task_is_not_chosen_cannot_pass(make: Make) -> None:
    sides = [make(nli() | sentiment()) for _ in range(2)]
    with pytest.raises(UserError, match="rect_nli is not compared"):
        compare(sides[0], sides[1:], tasks=["rect_sentiment"], gates=[Gate.parse("rect_nli=0.9")])
