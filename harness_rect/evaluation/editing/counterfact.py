"""``rect_counterfact``: comparisons of probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any, ClassVar

from harness_rect.evaluation.editing.task import COMPARED, NEIGHBORHOOD, EditingTask, Question


class CounterfactTask(EditingTask):
    """Comparisons of the new and the old target (Meng et al. 2022, section 3.4).

    P is exp of minus the mean token NLL of the whole target. es, ps: share of edit / paraphrase prompts with
    P(new) > P(old); ns: share of neighborhood prompts with P(reference) > P(new); em, pm, nm: the mean
    differences of those probabilities; edit_score: harmonic mean of the means of es, ps and ns.
    """

    fields: ClassVar = COMPARED
    needs: ClassVar = {
        "es": ("target_old",),
        "ps": ("target_old", "paraphrases"),
        "ns": (NEIGHBORHOOD,),
        "em": ("target_old",),
        "pm": ("target_old", "paraphrases"),
        "nm": (NEIGHBORHOOD,),
        "edit_score": ("target_old", "paraphrases", NEIGHBORHOOD),
    }

    def _groups(self, doc: dict[str, Any]) -> dict[str, list[tuple[str, str, str]]]:
        """metric letter -> (prompt, target that should win, other target)."""
        new, old = doc["target_new"], doc["target_old"]
        return {
            "e": [(doc["prompt"], new, old)] if old else [],
            "p": [(text, new, old) for text in doc["paraphrases"]] if old else [],
            "n": [(probe["prompt"], probe["answer"], new) for probe in doc["neighborhood"]],
        }

    def questions(self, doc: dict[str, Any]) -> list[Question]:
        return [
            self.continuation(prompt, target)
            for comparisons in self._groups(doc).values()
            for prompt, *targets in comparisons
            for target in targets
        ]

    def scores(self, doc: dict[str, Any], answers: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        log_likelihoods = iter(answers)

        def probability(prompt: str, target: str) -> float:
            return exp(next(log_likelihoods)[0] / len(self.continuation(prompt, target).ids))

        scores: dict[str, Any] = {}
        for letter, comparisons in self._groups(doc).items():
            differences = [
                probability(prompt, first) - probability(prompt, second)
                for prompt, first, second in comparisons
            ]
            if differences:
                scores[f"{letter}s"] = sum(d > 0 for d in differences) / len(differences)
                scores[f"{letter}m"] = sum(differences) / len(differences)
        if {"es", "ps", "ns"} <= scores.keys():
            scores["edit_score"] = (scores["es"], scores["ps"], scores["ns"])
        return scores
