"""``rect_zsre``: accuracies of target tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from harness_rect.evaluation.editing.task import COMPARED, NEIGHBORHOOD, EditingTask, Question


class ZsreTask(EditingTask):
    """Shares of target tokens that are the argmax under teacher forcing (ROME's and EasyEdit's zsRE).

    reliability at the edit prompt, generalization at the rephrased prompts (mean over prompts),
    neighborhood_acc of the reference answer at the locality prompts (mean over prompts).
    """

    fields: ClassVar = COMPARED
    needs: ClassVar = {"generalization": ("paraphrases",), "neighborhood_acc": (NEIGHBORHOOD,)}

    def _groups(self, doc: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
        return {
            "reliability": [(doc["prompt"], doc["target_new"])],
            "generalization": [(text, doc["target_new"]) for text in doc["paraphrases"]],
            "neighborhood_acc": [(probe["prompt"], probe["answer"]) for probe in doc["neighborhood"]],
        }

    def questions(self, doc: dict[str, Any]) -> list[Question]:
        return [
            token
            for pairs in self._groups(doc).values()
            for prompt, target in pairs
            for token in self.tokens(prompt, target)
        ]

    def scores(self, doc: dict[str, Any], answers: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        given = iter(answers)
        scores = {}
        for metric, pairs in self._groups(doc).items():
            shares = [self.share_right(prompt, target, given) for prompt, target in pairs]
            if shares:
                scores[metric] = sum(shares) / len(shares)
        return scores
