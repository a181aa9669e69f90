"""Normalisation and cutting of generated answers."""

from __future__ import annotations

import pickle
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lm_eval.models.utils import postprocess_generated_text

from harness_rect.answers import STOPS, Answer, normalise, same_answer

words = st.lists(
    st.sampled_from(["The", "a", "AN", "than", "Rome", "x-y", "é", "U.S.", "the.", "'"]), max_size=6
)


def by_hand(text: str) -> str:
    """The definition, character by character."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    parts: list[str] = [""]
    for char in kept:
        if char.isspace():
            parts.append("")
        else:
            parts[-1] += char
    return " ".join(part for part in parts if part and part not in {"a", "an", "the"})


@given(words.map(" ".join))
@example("  The  Hague,\tthe\nNetherlands ")
@example("an a the")
def test_normalise_is_its_definition(text: str) -> None:
    assert normalise(text) == by_hand(text)


@given(st.text())
def test_normalise_is_idempotent(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(words, st.sampled_from(["the ", "A ", "\n", " ", "!", "'"]), st.booleans())
def test_articles_punctuation_case_and_space_make_no_difference(found, extra: str, upper: bool) -> None:
    text = " ".join(found)
    other = f"{extra}{text.upper() if upper else text} {extra}"
    assert same_answer(text.lower(), other.lower())
    assert same_answer(text, f"{extra} {text}")


@pytest.mark.parametrize(
    ("generated", "target", "same"),
    [
        (" the Vienna", "Vienna", True),
        (" VIENNA!", " Vienna", True),
        (" Vienna, Austria", "Vienna", False),
        ("", "Vienna", False),
        (" U.S", "US", True),
        (" theatre", "atre", False),
        (" São Paulo", "Sao Paulo", False),
    ],
)
def test_answers_are_compared_as_a_whole(generated: str, target: str, same: bool) -> None:
    assert same_answer(generated, target) is same


@given(
    st.text(alphabet="ab.\n!"), st.booleans(), st.lists(st.sampled_from([*STOPS, "!", "<s>"]), unique=True)
)
def test_an_answer_ends_at_the_first_stop_and_knows_it(text: str, eos: bool, stops: list[str]) -> None:
    found = postprocess_generated_text(Answer(text, eos), stops, None)
    first = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
    assert found == (text if first is None else text[:first])
    assert found.ended is (eos or first is not None)


@given(st.text(), st.booleans())
def test_an_answer_is_kept_with_its_end(text: str, ended: bool) -> None:
    kept = pickle.loads(pickle.dumps(Answer(text, ended)))
    assert (kept, kept.ended, type(kept)) == (text, ended, Answer)
    assert kept.lstrip().ended is ended
