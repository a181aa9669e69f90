"""``rect_multihop``: questions that several edits answer together (MQuAKE, arXiv 2305.14795)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from harness_rect.answers import same_answer
from harness_rect.errors import one_line_errors
from harness_rect.evaluation.data import data_choice, file_in, folder_of
from harness_rect.evaluation.editing.task import EditingTask, Generation, Question
from harness_rect.io.rows import read_text

#: The file with the answered questions before each question: in a ``data`` folder, else ours.
SHOTS = "multihop_shots.txt"


class MultihopTask(EditingTask):
    """Greedy answers to multi-hop questions and to the single questions of which they are composed.

    multihop_acc: one of the wordings of the question is answered as it should be after the edits, or by an
    alias of that answer. hop_acc: the share of the single questions that are. Answers are compared as a whole
    after normalisation. Each question follows answered ones, one a line.
    """

    fields: ClassVar = ["id", "subject", "prompt", "target_new", "multi_hop"]
    needs: ClassVar = {
        "multihop_acc": ("a multi-hop question",),
        "hop_acc": ("the hops of a multi-hop question",),
    }

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        with one_line_errors():
            given = file_in(folder_of(data_choice(self.config.metadata or {})), SHOTS)
            self._shots = read_text(given or Path(__file__).with_name(SHOTS)).strip()

    def _after_shots(self, question: str) -> Generation:
        return Generation(f"{self._shots}\nQ: {question} A:")

    def questions(self, doc: dict[str, Any]) -> list[Question]:
        asked = doc["multi_hop"]
        if asked is None:
            return []
        single = [hop["prompt"] for hop in asked["hops"]]
        return [self._after_shots(question) for question in [*asked["questions"], *single]]

    def scores(self, doc: dict[str, Any], answers: Sequence[Any]) -> dict[str, Any]:
        asked = doc["multi_hop"]
        if asked is None:
            return {}
        said, hops = answers[: len(asked["questions"])], answers[len(asked["questions"]) :]
        right = any(same_answer(answer, form) for answer in said for form in asked["answers"])
        scores = {"multihop_acc": float(right)}
        if hops:
            scores["hop_acc"] = sum(map(_right, hops, asked["hops"])) / len(hops)
        return scores


def _right(said: str, hop: dict[str, Any]) -> bool:
    return any(same_answer(said, form) for forms in hop["answers"] for form in forms)
