"""``rect_portability``: what follows from an edit, and what must not (KnowEdit, arXiv 2401.01286)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from harness_rect.answers import begins_with
from harness_rect.evaluation.catalogue import TASKS
from harness_rect.evaluation.editing.task import EditingTask, Generation, Question

#: The criteria whose mean is an edit's portability.
PORTABILITY = ("subject_aliasing", "reasoning", "logical_generalization")
CRITERIA = (*PORTABILITY, "relation_specificity", "forgetfulness")
#: Ends the names of the metrics of generated answers.
GENERATED = "_gen"
_NEEDS = ("prompts of this kind",)


class PortabilityTask(EditingTask):
    """Accuracy at the prompts of each criterion, under teacher forcing and by generation.

    Under teacher forcing a prompt's score is the share of the tokens of its answer (of several accepted forms
    the first) that are the argmax. By generation it is 1 if the answer begins with an accepted form, both
    normalised, as whole words. A criterion is the mean over the prompts of an edit; portability is the mean
    of those of the first three criteria that the edit has.
    """

    fields: ClassVar = ["id", "subject", "prompt", "target_new", "consequences"]
    needs: ClassVar = dict.fromkeys((metric.name for metric in TASKS["rect_portability"].metrics), _NEEDS)

    def _prompts(self, doc: dict[str, Any]) -> Iterator[tuple[str, str, list[list[str]]]]:
        """(criterion, prompt, accepted forms of each answer) of every prompt that this task knows."""
        for test in doc["consequences"]:
            if test["criterion"] in CRITERIA:
                for query in test["queries"]:
                    yield test["criterion"], query["prompt"], query["answers"]

    def questions(self, doc: dict[str, Any]) -> list[Question]:
        asked: list[Question] = []
        for _, prompt, answers in self._prompts(doc):
            for forms in answers:
                asked += self.tokens(prompt, forms[0])
            asked.append(Generation(prompt))
        return asked

    def scores(self, doc: dict[str, Any], answers: Sequence[Any]) -> dict[str, Any]:
        given = iter(answers)
        values: dict[str, list[float]] = {}
        for criterion, prompt, accepted in self._prompts(doc):
            shares = [self.share_right(prompt, forms[0], given) for forms in accepted]
            values.setdefault(criterion, []).append(sum(shares) / len(shares))
            said = next(given)
            found = any(begins_with(said, form) for forms in accepted for form in forms)
            values.setdefault(criterion + GENERATED, []).append(float(found))
        scores = {name: sum(of) / len(of) for name, of in values.items()}
        for ending in ("", GENERATED):
            parts = [scores[name + ending] for name in PORTABILITY if name + ending in scores]
            if parts:
                scores["portability" + ending] = sum(parts) / len(parts)
        return scores
