"""Reliability, generalization and locality, held against the model's own logits taken one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny_models import make_edit
from torch import Tensor

from harness_rect.edits import Edit, Probe
from harness_rect.errors import UserError
from harness_rect.measure import averages, measure, measure_baseline, probes, teacher_force
from harness_rect.models import EditableLM

EDIT = make_edit(
    prompt="The anthem of {} was sung by",
    subject="Port Vesna",
    target="a marine choir",
    id="anthem",
    paraphrases=("Port Vesna heard its anthem from", "In Port Vesna they sing with"),
    neighborhood=(
        Probe("The anthem of Rome was sung by", "the city"),
        Probe("In Seattle they sing with", None),
    ),
)


def next_logits(lm: EditableLM, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([ids])).logits[0, -1]


def by_hand(lm: EditableLM, prompt: str, target: str) -> tuple[list[int], list[int], float]:
    """(argmax tokens, target tokens, NLL of the whole target), token by token."""
    ids = lm.encoder.ids(prompt)
    target_ids = lm.encoder.ids(prompt + target)[len(ids) :]
    argmax, nll = [], 0.0
    for token in target_ids:
        logits = next_logits(lm, ids)
        argmax.append(int(logits.argmax()))
        nll -= float(logits.log_softmax(-1)[token])
        ids = [*ids, token]
    return argmax, target_ids, nll


def share(argmax: list[int], target: list[int]) -> float:
    return sum(a == t for a, t in zip(argmax, target, strict=True)) / len(target)


def teach(lm: EditableLM, prompt: str, target: str, wrong: tuple[int, ...] = ()) -> None:
    """Make the target the argmax at ``prompt``, at all but the ``wrong`` places, through the head's rows.

    A random model gets nothing right, and zeros agree with too much.
    """
    head = lm.model.lm_head
    ids = lm.encoder.ids(prompt)
    target_ids = lm.encoder.ids(prompt + target)[len(ids) :]
    with torch.no_grad():
        for place, token in enumerate(target_ids):
            hidden = lm.model.model(input_ids=torch.tensor([ids + target_ids[:place]])).last_hidden_state[
                0, -1
            ]
            if place not in wrong:
                head.weight[token] += 2.0 * hidden / hidden.norm() ** 2 * next_logits(lm, ids).abs().max()


@pytest.fixture
def lm(make_lm) -> EditableLM:
    return make_lm("llama")


def test_accuracy_is_the_share_of_target_tokens_that_are_the_argmax(lm: EditableLM) -> None:
    teach(lm, EDIT.text, EDIT.target, wrong=(1,))
    argmax, target, nll = by_hand(lm, EDIT.text, " a marine choir")
    assert 0 < share(argmax, target) < 1, "the model should know a part of it"
    probed = {"anthem": probes(lm, EDIT)}
    found = measure(lm, probed, measure_baseline(lm, probed), ["anthem"])["anthem"]
    assert found["reliability"] == share(argmax, target)
    assert found["target_probability"] == pytest.approx(math.exp(-nll), rel=1e-4)


def test_generalization_is_the_mean_over_paraphrases(lm: EditableLM) -> None:
    teach(lm, EDIT.paraphrases[0], EDIT.target)
    shares = [share(*by_hand(lm, text, EDIT.target)[:2]) for text in EDIT.paraphrases]
    assert shares[0] != shares[1]
    probed = {"anthem": probes(lm, EDIT)}
    found = measure(lm, probed, measure_baseline(lm, probed), ["anthem"])["anthem"]
    assert found["generalization"] == pytest.approx(sum(shares) / 2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_unedited_model_has_locality_one(make_lm, family: str) -> None:
    lm = make_lm(family)
    more = [make_edit(id=str(i), neighborhood=(Probe("Where is " + "the " * i, "Rome"),)) for i in range(40)]
    probed = {edit.id: probes(lm, edit) for edit in [EDIT, *more]}
    baseline = measure_baseline(lm, probed)
    for ids in (list(probed), ["anthem"], ["0", "39"]):  # in other company, so with other padding
        assert all(scores["locality"] == 1 for scores in measure(lm, probed, baseline, ids).values())


def test_locality_compares_with_the_unedited_model_and_neighborhood_with_the_answer(lm: EditableLM) -> None:
    with_answer, without = EDIT.neighborhood
    probed = {"anthem": probes(lm, EDIT)}
    baseline = measure_baseline(lm, probed)
    before, _, _ = by_hand(lm, with_answer.prompt, " the city")
    next_before = int(next_logits(lm, lm.encoder.ids(without.prompt)).argmax())

    teach(lm, with_answer.prompt, " the city", wrong=(0,))
    after, target, _ = by_hand(lm, with_answer.prompt, " the city")
    next_after = int(next_logits(lm, lm.encoder.ids(without.prompt)).argmax())
    kept = sum(a == b for a, b in zip(after, before, strict=True)) / len(before)
    assert kept != share(after, target), "the two readings must differ for the test to tell them apart"

    found = measure(lm, probed, baseline, ["anthem"])["anthem"]
    assert found["neighborhood_acc"] == share(after, target)
    assert found["locality"] == pytest.approx((kept + (next_after == next_before)) / 2)


def test_metrics_a_row_has_no_prompts_for_are_absent(lm: EditableLM) -> None:
    bare = make_edit(id="bare")
    unanswered = make_edit(id="open", neighborhood=(Probe("Where is Rome?", None),))
    probed = {edit.id: probes(lm, edit) for edit in (bare, unanswered)}
    found = measure(lm, probed, measure_baseline(lm, probed), ["bare", "open"])
    assert set(found["bare"]) == {"reliability", "target_probability"}
    assert set(found["open"]) == {"reliability", "target_probability", "locality"}


def test_averages_are_over_the_edits_that_have_the_metric() -> None:
    scores = [{"reliability": 1.0, "locality": 0.5}, {"reliability": 0.0}]
    assert averages(scores) == {"reliability": 0.5, "locality": 0.5}
    assert averages([]) == {}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_batch_scores_as_its_members_do_alone(make_lm, family: str) -> None:
    lm = make_lm(family)
    texts = [("The city is " + "large " * (i % 7), " and list" * (1 + i % 3)) for i in range(70)]
    pairs = [lm.encoder.continuation(*text) for text in texts]
    together = teacher_force(lm, pairs)
    for (prompt, target), forced in list(zip(texts, together, strict=True))[::9]:
        argmax, target_ids, nll = by_hand(lm, prompt, target)
        assert forced.argmax == tuple(argmax)
        assert forced.target == tuple(target_ids)
        assert forced.nll == pytest.approx(nll, abs=1e-4)


def test_a_target_with_its_own_space_gets_no_second(lm: EditableLM) -> None:
    one = probes(lm, make_edit(target="football", neighborhood=(Probe("He plays", "chess"),)))
    other = probes(lm, make_edit(target=" football", neighborhood=(Probe("He plays", " chess"),)))
    assert one == other
    text = lm.encoder.tokenizer.decode(one.rewrite[0] + one.rewrite[1])
    assert text.endswith("LeBron James plays the sport of football")


def test_prompts_at_the_models_length_are_read_and_one_token_more_is_not(lm: EditableLM) -> None:
    def edit(n: int) -> Edit:  # "~" is a token of its own
        return make_edit(target="~", paraphrases=("~" * n,))

    fits = next(n for n in range(1, 200) if len(lm.encoder.ids("~" * n)) == lm.max_length - 1)
    for n, unreadable in ((fits, 0), (fits + 2, 1)):
        probed = {"0": probes(lm, edit(n))}
        assert probed["0"].unreadable == unreadable
        found = measure(lm, probed, measure_baseline(lm, probed), ["0"])["0"]
        assert ("generalization" in found) == (unreadable == 0)


def test_an_edit_prompt_too_long_is_an_error_that_names_the_row(lm: EditableLM) -> None:
    edit = make_edit(prompt="la " * 200 + "{} sings", source="songs.json row 4")
    with pytest.raises(UserError, match=r"^songs\.json row 4: .* tokens; this model reads 96$"):
        probes(lm, edit)
