"""``rect_ripple``: ripple effects of an edit, by generation (RippleEdits, arXiv 2307.12976)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from harness_rect.answers import mentions
from harness_rect.evaluation.catalogue import TASKS
from harness_rect.evaluation.editing.task import EditingTask, Generation, Question

#: The headline is their mean.
CRITERIA = tuple(metric.name for metric in TASKS["rect_ripple"].metrics[1:])


class RippleTask(EditingTask):
    """The share of tests that pass, for each criterion, over the edits that the model states after editing.

    A query is right if the generated text mentions an accepted form of each of its answers (normalised, whole
    words; the prompt is not searched). A test passes if all of its queries, or one of them, are right, as the
    test says. A test with conditions counts only if the unedited model answers all of them; where the model
    class does not know the unedited model, an edit has no criterion with such tests. An edit counts only if
    the model, asked its prompt, mentions the new target. ripple is the mean of the criteria.
    """

    fields: ClassVar = ["id", "subject", "prompt", "target_new", "consequences"]
    needs: ClassVar = dict.fromkeys(("ripple", *CRITERIA), ("a test that counts",))
    of_unedited: ClassVar = ("tests with conditions",)

    def questions(self, doc: dict[str, Any]) -> list[Question]:
        asked: list[Question] = [Generation(doc["prompt"])]
        for test in doc["consequences"]:
            asked += [Generation(query["prompt"]) for query in test["queries"]]
            asked += [Generation(query["prompt"], of="unedited") for query in test["conditions"]]
        return asked

    def scores(self, doc: dict[str, Any], answers: Sequence[Any]) -> dict[str, Any]:
        given = iter(answers)
        if not mentions(next(given), doc["target_new"]):
            return {}
        passed: dict[str, list[bool]] = {}
        unknown = set()
        for test in doc["consequences"]:
            right = [_right(next(given), query) for query in test["queries"]]
            conditions = [(next(given), query) for query in test["conditions"]]
            if any(said is None for said, _ in conditions):
                unknown.add(test["criterion"])
            elif all(_right(said, query) for said, query in conditions):
                outcome = any(right) if test["any_query"] else all(right)
                passed.setdefault(test["criterion"], []).append(outcome)
        shares = {
            name: sum(passed[name]) / len(passed[name])
            for name in CRITERIA
            if name in passed and name not in unknown
        }
        return shares | ({"ripple": [shares.get(name) for name in CRITERIA]} if shares else {})


def _right(said: str, query: dict[str, Any]) -> bool:
    return all(any(mentions(said, form) for form in forms) for forms in query["answers"])
