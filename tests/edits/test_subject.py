"""The subject of an edit in its prompt: exactly, loosely, or not there."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.edit_files import edit_of

from harness_rect.edits.subject import mark_subject
from harness_rect.errors import UserError


@pytest.mark.parametrize(
    ("prompt", "subject", "marked", "stands", "loose"),
    [
        ("Who is {}?", "Ann", "Who is {}?", "Ann", False),
        ("Ann, is {} here?", "Ann", "Ann, is {} here?", "Ann", False),  # a marker wins over the text
        ("Is Ann Ann?", "Ann", "Is {} Ann?", "Ann", False),
        ("What is dict{}?", "dict{}", "What is {}?", "dict{}", False),
        ("Who is {Ann}?", "Ann", "Who is {{}}?", "Ann", False),
        ("Who is Ann?", " Ann ", "Who is {}?", "Ann", True),
        ("Tell us of US", "US ", "Tell us of {}", "US", True),  # stripped comes before folded
        ("Where is caf\u00e9 Ann?", "cafe\u0301", "Where is {} Ann?", "caf\u00e9", True),
        ("Where is cafe\u0301 Ann?", "caf\u00e9", "Where is {} Ann?", "cafe\u0301", True),
        ("Where is cafe\u0301?", "CAFE\u0301", "Where is {}?", "cafe\u0301", True),
        ("cafe\u0301 or cafe", "cafe", "cafe\u0301 or {}", "cafe", False),  # not half of a character
        ("Cafe\u0301 or Cafe", "cafe", "Cafe\u0301 or {}", "Cafe", True),
        ("On \u1112\u1161\u11ab Street", "\ud55c street", "On {}", "\u1112\u1161\u11ab Street", True),
        ("n\u00e9 or N\u00c9", "NE\u0301", "n\u00e9 or {}", "N\u00c9", True),
        ("X\u0301 or X", "x", "X\u0301 or {}", "X", True),  # a pair with no single-character form
        ("Go to STRASSE 5", "Stra\u00dfe", "Go to {} 5", "STRASSE", True),
        ("Where is New\u00a0 York?", "New York", "Where is {}?", "New\u00a0 York", True),
        ("Who starts an art school?", "Art", "Who starts an {} school?", "art", True),  # no part of a word
        ("\u6771\u4eac iphone\u7684", "iPhone", "\u6771\u4eac {}\u7684", "iphone", True),
        (
            "Who sang \u2018Rock\u2019n Roll\u2019?",
            "rock'n roll",
            "Who sang \u2018{}\u2019?",
            "Rock\u2019n Roll",
            True,
        ),
        ("Who is in the band Beatles?", "The Beatles", "Who is in the band {}?", "Beatles", True),
        (
            "Who sells squidgers or a squidger?",
            '"A Squidger."',
            "Who sells squidgers or a {}?",
            "squidger",
            True,
        ),
        ("Where does Miss Piggy live?", "Miss Piggy's", "Where does {} live?", "Miss Piggy", True),
        ("Where does James live?", "James'", "Where does {} live?", "James", True),
    ],
)
def test_marking(prompt: str, subject: str, marked: str, stands: str, loose: bool) -> None:
    assert mark_subject(prompt, subject) == (marked, stands, loose)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Who?", "Ann"),
        ("{ }", "Ann"),
        ("Who starts?", "tra"),
        ("Who wrote the start?", "Art"),
        ("Who is a dancer?", "'A'"),  # an article alone is no subject
        ("Who is the dancer?", "Th!"),
        ("Who has 15 cats?", "5!"),
        ("Who is C?", "C++"),  # punctuation that tells names apart
        ("Who is Annie?", "An Ann"),
        ("Where is Jose\u0301?", "Jose"),
        ("On \u1112\u1161\u11ab Street", "\u1112\u1161"),
        ("Where did World War II begin?", "Second World War"),
    ],
)
def test_a_subject_that_is_not_there_is_not_made_up(prompt: str, subject: str) -> None:
    assert mark_subject(prompt, subject) == (prompt, subject, False)


def test_several_markers_are_refused() -> None:
    for prompt in ("{} and Ann {}", "Ann {} {}", "dict{} {}"):
        with pytest.raises(UserError, match=r"expected one \{\}, at the subject, found"):
            mark_subject(prompt, "dict{}" if "dict" in prompt else "Ann")


some_text = st.text(alphabet=st.sampled_from("aAbé\u0301ß{} İ\u1112\u1161n"), max_size=12)
whole_letters = st.text(alphabet=st.sampled_from("aAbéß{} İn"), max_size=12)


@given(before=whole_letters, subject=whole_letters.filter(str.strip), after=whole_letters)
@example(before="{", subject="a", after="}")
@example(before="", subject="{}", after="")
@example(before="{", subject="}", after="")
def test_the_span_holds_the_subject(before: str, subject: str, after: str) -> None:
    prompt = before + subject + after
    try:
        marked, stands, loose = mark_subject(prompt, subject)
    except UserError:
        assert "{}" in prompt  # nothing else may be refused when the subject is there
        return
    edit = edit_of(marked, stands)
    start, end = edit.subject_span
    assert edit.prompt.count("{}") == 1
    assert edit.text[start:end] == stands == subject
    assert not loose
    if "{}" not in prompt or "{}" in subject:
        assert edit.text == prompt
        assert start == prompt.index(subject)


@given(
    before=some_text,
    subject=some_text.filter(str.strip),
    after=some_text,
    form=st.sampled_from(["NFC", "NFD"]),
)
def test_loose_matches_point_into_the_prompt(before: str, subject: str, after: str, form: Any) -> None:
    prompt = before + subject + after
    if "{}" in prompt:
        return
    marked, stands, loose = mark_subject(prompt, f" {unicodedata.normalize(form, subject).swapcase()} ")
    edit = edit_of(marked, stands)
    assert edit.text == prompt
    if edit.has_subject:
        assert edit.text[slice(*edit.subject_span)] == stands
        assert stands
    else:
        assert not loose


words = st.lists(st.text(alphabet="bcdé", min_size=2, max_size=4), min_size=1, max_size=3)


@given(
    before=words,
    subject=words,
    after=words,
    article=st.sampled_from(["", "the ", "A ", "An "]),
    ending=st.sampled_from(["", "'s", "\u2019s", ".", "?"]),
    quotes=st.sampled_from(["", '"', "'"]),
    space=st.sampled_from([" ", "  ", "\u00a0"]),
    upper=st.booleans(),
)
def test_words_are_found_whatever_is_written_around_them(
    before: list[str],
    subject: list[str],
    after: list[str],
    article: str,
    ending: str,
    quotes: str,
    space: str,
    upper: bool,
) -> None:
    text = " ".join([*before, *subject, *after])
    name = quotes + article + space.join(subject) + ending + quotes
    marked, stands, loose = mark_subject(text, name.upper() if upper else name)
    assert marked.count("{}") == 1
    assert stands == " ".join(subject)
    assert loose == ((name.upper() if upper else name) not in text)
    assert edit_of(marked, stands).text == text
    # Nothing before the first place where these words stand is taken.
    assert len(marked.partition("{}")[0]) == f" {text} ".index(f" {stands} ") or not loose
