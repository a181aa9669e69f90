"""Scoring of the general tasks: a made-up answer for every rule and every slip of the scripts not copied."""

from __future__ import annotations

from typing import Any

import pytest

from harness_rect.evaluation import general


@pytest.mark.parametrize(
    ("answer", "output", "value"),
    [
        ("2 + 2 = 4\n#### 4", " 4.", 1.0),
        ("so\n#### 1,234", " $1234", 1.0),
        ("so\n#### 1,234", " 1,234", 1.0),
        ("so\n#### 1234 ", " 1,234", 1.0),
        ("so\n#### 4", " 14", 1.0),  # a substring is enough
        ("so\n#### 14", " 4", 0.0),
        ("so 5\n#### 4", " 5", 0.0),  # the rationale's numbers are not the answer
        ("so\n#### 4", "", 0.0),
    ],
)
def test_reasoning(answer: str, output: str, value: float) -> None:
    assert general.reasoning({"answer": answer}, [output]) == {"solve_rate": value, "score": value}


RIGHT = {"acc": 1.0, "valid_rate": 1.0, "score": 1.0}
WRONG = {"acc": 0.0, "valid_rate": 1.0, "score": 0.0}
UNPARSABLE = {"acc": 0.0, "valid_rate": 0.0, "score": 0.0}


@pytest.mark.parametrize(
    ("label", "output", "values"),
    [
        (0, " True", RIGHT),
        (0, " untrue", RIGHT),  # contains is enough
        (0, "FALSE", WRONG),
        (1, "false.", RIGHT),
        (1, "true", WRONG),
        (0, " True or False", UNPARSABLE),
        (1, " True or False", UNPARSABLE),
        (1, "", UNPARSABLE),
        (0, " yes", UNPARSABLE),
    ],
)
def test_nli(label: int, output: str, values: dict[str, float]) -> None:
    assert general.nli({"label": label}, [output]) == values


@pytest.mark.parametrize(
    ("label", "output", "values"),
    [
        (1, " positive", RIGHT),
        (1, "Negative", WRONG),
        (0, "NEGATIVE!", RIGHT),
        (0, " positively", WRONG),
        (1, "positive/negative", UNPARSABLE),
        (0, " neg", UNPARSABLE),
    ],
)
def test_sentiment(label: int, output: str, values: dict[str, float]) -> None:
    assert general.sentiment({"label": label}, [output]) == values


@pytest.mark.parametrize(
    ("answer", "output", "values"),
    [
        (True, " yes", RIGHT),
        (True, "yes", RIGHT),  # a tokenizer that loses the space
        (True, " Yes", RIGHT),
        (True, " no", WRONG),
        (False, " NO", RIGHT),
        (False, "no\n", RIGHT),
        (False, "yes", WRONG),
        (False, " no.", UNPARSABLE),  # exactly
        (False, " not", UNPARSABLE),
        (False, "", UNPARSABLE),
        (True, " yes no", UNPARSABLE),
    ],
)
def test_closed_domain_qa(answer: bool, output: str, values: dict[str, float]) -> None:
    assert general.closed_domain_qa({"answer": answer}, [output]) == values


@pytest.mark.parametrize(
    ("gold", "output", "values"),
    [
        ("B", " B", RIGHT),
        ("B", "(B)", RIGHT),
        ("B", " A", WRONG),
        ("B", " D", WRONG),
        ("B", " b", UNPARSABLE),
        ("B", " E", UNPARSABLE),
        ("B", "AB", RIGHT),
        ("D", "", UNPARSABLE),
    ],
)
def test_dialogue(gold: str, output: str, values: dict[str, float]) -> None:
    assert general.dialogue({"answers": gold}, [output]) == values


@pytest.mark.parametrize(
    ("answers", "output", "value"),
    [
        (["Paris"], "Paris", 1.0),
        (["paris"], "\nAnswer: It is PARIS, of course.", 1.0),
        (["The Beatles"], "beatles", 1.0),
        (["May 18 , 2018"], " on May 18, 2018.", 1.0),
        (["New York"], "York in New", 0.0),  # a contiguous run
        (["New York"], "New, the York", 1.0),  # articles and punctuation are gone first
        (["art"], "party of cartoons", 0.0),  # whole words
        (["rain"], "it rained", 0.0),
        (["Mo", "Li"], "Li", 1.0),
        (["The", "!"], "the ! a", 0.0),  # answers that normalise to nothing never match
        (["The"], "", 0.0),
        (["Röntgen"], "Wilhelm RÖNTGEN won", 1.0),
        (["a b"], "b", 1.0),
        (["an oak"], "oak", 1.0),
    ],
)
def test_open_domain_qa(answers: list[str], output: str, value: float) -> None:
    assert general.open_domain_qa({"answers": answers}, [output]) == {"em": value, "score": value}


def test_open_domain_qa_counts_an_example_once_and_scans_only_the_output() -> None:
    # The script counts "Mo" at both ends twice, carries `flag` to the next example and sees the prompt.
    doc = {"question": "who, Mo or Li?", "passage": "Mo did.", "answers": ["Mo"]}
    values = [general.open_domain_qa(doc, [output])["em"] for output in ("Mo or Mo", "x y z", "Li")]
    assert values == [1.0, 0.0, 0.0]


def test_rouge_by_hand() -> None:
    # summary: a cat sat on mats (5 words), output: cat sat mats (3 words)
    values = general.summarization({"summary": "A cat sat on mats."}, [" cat sat, MATS"])
    r1, r2, rl = 2 * 3 / (5 + 3), 2 * 1 / (4 + 2), 2 * 3 / (5 + 3)
    assert values == pytest.approx(
        {"rouge1": r1, "rouge2": r2, "rougeL": rl, "rouge": (r1 + r2 + rl) / 3, "score": (r1 + r2 + rl) / 3}
    )


def test_rouge_does_not_stem_and_takes_an_empty_output() -> None:
    assert general.rouge_scores("cats running", "cat runs")["rouge"] == 0.0
    assert general.rouge_scores("Bo greets Cy.", "") == {"rouge": 0, "rouge1": 0, "rouge2": 0, "rougeL": 0}
    assert general.rouge_scores("Bo greets Cy.", "bo greets cy")["rouge"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("output", "entities"),
    [
        (" Ada Lo, Bob; Oslo and Rome.\nMore, of it", ["Ada Lo", "Bob", "Oslo", "Rome"]),
        ("Ada, and Bob", ["Ada", "Bob"]),
        ("Anderson Sandy", ["Anderson Sandy"]),  # "and" is a word
        ("rock-and-roll", ["rock-and-roll"]),
        (" \n Ada", ["Ada"]),  # the first line that is not blank
        ("Ada\r\nBob", ["Ada"]),
        ("Ada   Lo .", ["Ada Lo"]),
        (" , ;", []),
        ("", []),
    ],
)
def test_listed_entities(output: str, entities: list[str]) -> None:
    assert general.listed_entities(output) == entities


@pytest.mark.parametrize(
    ("gold", "output", "counts"),
    [
        (["Ada Lo", "Bob"], "Ada Lo, Bob", (2, 2, 2)),
        (["Ada Lo", "Bob"], "Ada Lo", (1, 1, 2)),
        (["Ada Lo"], "Ada", (0, 1, 1)),  # the whole entity
        (["Ada"], "ada", (0, 1, 1)),  # case counts
        (["Ada"], "Ada, Ada", (1, 2, 1)),  # a multiset: saying it twice is one too many
        (["Ada", "Ada"], "Ada", (1, 1, 2)),
        (["Ada", "Ada"], "Ada, Ada", (2, 2, 2)),
        (["U.S."], "U.S.", (1, 1, 1)),  # trailing dots go on both sides
        (["Bob"], "Bob.", (1, 1, 1)),
        ([], "Bob", (0, 1, 0)),
        ([], "", (0, 0, 0)),
        (["Bob"], "", (0, 0, 1)),
    ],
)
def test_entity_counts(gold: list[str], output: str, counts: tuple[int, int, int]) -> None:
    assert general.entity_counts(gold, output) == counts


def test_ner() -> None:
    doc: dict[str, Any] = {"entity_type": "Person", "text": "Ada saw Bob", "entities": ["Ada", "Bob", "Cy"]}
    # "Adam" holds "Ada": enough for the script's recall, not for F1; the second line counts for recall only.
    assert general.ner(doc, ["Adam, Bob\nCy"]) == {
        "f1": (1, 2, 3),
        "recall_macro": ("Person", 3, 3),
        "score": (1, 2, 3),
    }
