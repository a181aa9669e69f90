"""Scoring of the general tasks: a made-up answer for every rule and every slip of the scripts not copied."""

from __future__ import annotations

from typing import Any

import pytest

from harness_rect.evaluation import general

RIGHT = {"acc": 1.0, "valid_rate": 1.0, "score": 1.0}
WRONG = {"acc": 0.0, "valid_rate": 1.0, "score": 0.0}
UNPARSABLE = {"acc": 0.0, "valid_rate": 0.0, "score": 0.0}
SOLVED, UNSOLVED = ({"solve_rate": value, "score": value} for value in (1.0, 0.0))
FOUND, MISSED = ({"em": value, "score": value} for value in (1.0, 0.0))


@pytest.mark.parametrize(
    ("task", "doc", "output", "values"),
    [
        ("reasoning", {"answer": "2 + 2 = 4\n#### 4"}, " 4.", SOLVED),
        ("reasoning", {"answer": "so\n#### 1,234"}, " $1234", SOLVED),
        ("reasoning", {"answer": "so\n#### 1,234"}, " 1,234", SOLVED),
        ("reasoning", {"answer": "so\n#### 1234 "}, " 1,234", SOLVED),
        ("reasoning", {"answer": "so\n#### 4"}, " 14", SOLVED),  # a substring is enough
        ("reasoning", {"answer": "so\n#### 14"}, " 4", UNSOLVED),
        ("reasoning", {"answer": "so 5\n#### 4"}, " 5", UNSOLVED),  # a number of the rationale
        ("reasoning", {"answer": "so\n#### 4"}, "", UNSOLVED),
        ("nli", {"label": 0}, " True", RIGHT),
        ("nli", {"label": 0}, " untrue", RIGHT),  # contains is enough
        ("nli", {"label": 0}, "FALSE", WRONG),
        ("nli", {"label": 1}, "false.", RIGHT),
        ("nli", {"label": 1}, "true", WRONG),
        ("nli", {"label": 0}, " True or False", UNPARSABLE),
        ("nli", {"label": 1}, " True or False", UNPARSABLE),
        ("nli", {"label": 1}, "", UNPARSABLE),
        ("nli", {"label": 0}, " yes", UNPARSABLE),
        ("sentiment", {"label": 1}, " positive", RIGHT),
        ("sentiment", {"label": 1}, "Negative", WRONG),
        ("sentiment", {"label": 0}, "NEGATIVE!", RIGHT),
        ("sentiment", {"label": 0}, " positively", WRONG),
        ("sentiment", {"label": 1}, "positive/negative", UNPARSABLE),
        ("sentiment", {"label": 0}, " neg", UNPARSABLE),
        ("closed_domain_qa", {"answer": True}, " yes", RIGHT),
        ("closed_domain_qa", {"answer": True}, "yes", RIGHT),  # a tokenizer that loses the space
        ("closed_domain_qa", {"answer": True}, " Yes", RIGHT),
        ("closed_domain_qa", {"answer": True}, " no", WRONG),
        ("closed_domain_qa", {"answer": False}, " NO", RIGHT),
        ("closed_domain_qa", {"answer": False}, "no\n", RIGHT),
        ("closed_domain_qa", {"answer": False}, "yes", WRONG),
        ("closed_domain_qa", {"answer": False}, " no.", UNPARSABLE),  # exactly
        ("closed_domain_qa", {"answer": False}, " not", UNPARSABLE),
        ("closed_domain_qa", {"answer": False}, "", UNPARSABLE),
        ("closed_domain_qa", {"answer": True}, " yes no", UNPARSABLE),
        ("dialogue", {"answers": "B"}, " B", RIGHT),
        ("dialogue", {"answers": "B"}, "(B)", RIGHT),
        ("dialogue", {"answers": "B"}, " A", WRONG),
        ("dialogue", {"answers": "B"}, " D", WRONG),
        ("dialogue", {"answers": "B"}, " b", UNPARSABLE),
        ("dialogue", {"answers": "B"}, " E", UNPARSABLE),
        ("dialogue", {"answers": "B"}, "AB", RIGHT),
        ("dialogue", {"answers": "D"}, "", UNPARSABLE),
        ("open_domain_qa", {"answers": ["Paris"]}, "Paris", FOUND),
        ("open_domain_qa", {"answers": ["paris"]}, "\nAnswer: It is PARIS, of course.", FOUND),
        ("open_domain_qa", {"answers": ["The Beatles"]}, "beatles", FOUND),
        ("open_domain_qa", {"answers": ["May 18 , 2018"]}, " on May 18, 2018.", FOUND),
        ("open_domain_qa", {"answers": ["New York"]}, "York in New", MISSED),  # a contiguous run
        ("open_domain_qa", {"answers": ["New York"]}, "New, the York", FOUND),  # no articles, no punctuation
        ("open_domain_qa", {"answers": ["art"]}, "party of cartoons", MISSED),  # whole words
        ("open_domain_qa", {"answers": ["rain"]}, "it rained", MISSED),
        ("open_domain_qa", {"answers": ["Mo", "Li"]}, "Li", FOUND),
        ("open_domain_qa", {"answers": ["The", "!"]}, "the ! a", MISSED),  # both normalise to nothing
        ("open_domain_qa", {"answers": ["The"]}, "", MISSED),
        ("open_domain_qa", {"answers": ["Röntgen"]}, "Wilhelm RÖNTGEN won", FOUND),
        ("open_domain_qa", {"answers": ["a b"]}, "b", FOUND),
        ("open_domain_qa", {"answers": ["an oak"]}, "oak", FOUND),
    ],
)
def test_one_answer(task: str, doc: dict[str, Any], output: str, values: dict[str, float]) -> None:
    assert getattr(general, task)(doc, [output]) == values


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
