"""``rect_autoregressive``: what the model says when it really generates (arXiv 2502.11177)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from harness_rect.answers import same_answer
from harness_rect.errors import UserError, did_you_mean, one_line_errors
from harness_rect.evaluation.editing.task import EditingTask, Generation, Question
from harness_rect.evaluation.judge import Judge, read_grade

#: ``prompt_context`` in the metadata -> what the prompt is put into.
CONTEXTS = {"bare": "{}", "qa": "Please answer the question:\n\nQ: {}\nA:"}
#: Begins the names of the metrics that a judge decides.
JUDGED = "judge_"


class AutoregressiveTask(EditingTask):
    """Greedy answers, compared as a whole after normalisation.

    reliability: the answer at the edit prompt is the new target. generalization: the same at rephrased
    prompts. locality: the answer at a locality prompt is the unedited model's, character for character. Each
    is 0 or 1 for a prompt, and the mean over the prompts of an edit. stopped: share of the edited model's
    answers that end by themselves, not at the limit of tokens. judge_reliability, judge_generalization: as
    the first two, by the grade of a judge, where ``judge`` in the metadata names one.
    """

    fields: ClassVar = ["id", "subject", "prompt", "target_new", "paraphrases", "locality_prompts"]
    needs: ClassVar = {
        "generalization": ("paraphrases",),
        "locality": ("locality_prompts",),
        "judge_reliability": ("a grade",),
        "judge_generalization": ("paraphrases", "a grade"),
    }
    of_unedited: ClassVar = ("locality",)

    def __init__(self, config: dict[str, Any]) -> None:
        metadata = config.get("metadata") or {}
        if not metadata.get("judge"):
            listed = [one for one in config["metric_list"] if not one["metric"].startswith(JUDGED)]
            config = config | {"metric_list": listed}
        super().__init__(config)
        context = metadata.get("prompt_context") or "bare"
        with one_line_errors():
            self._judge = Judge.of(metadata)
            if context not in CONTEXTS:
                raise UserError(f"prompt_context={context}: {did_you_mean(str(context), CONTEXTS)}")
        self._before, self._after = CONTEXTS[context].split("{}")
        #: id of an edit -> the judge's replies about its first answers
        self._replies: dict[str, list[str | None]] = {}

    def _in_context(self, prompt: str) -> str:
        return f"{self._before}{prompt}{self._after}"

    def questions(self, doc: dict[str, Any]) -> list[Question]:
        return [
            *(Generation(self._in_context(text)) for text in (doc["prompt"], *doc["paraphrases"])),
            *(Generation(self._in_context(text), of="both") for text in doc["locality_prompts"]),
        ]

    def scores(self, doc: dict[str, Any], answers: Sequence[Any]) -> dict[str, Any]:
        first = 1 + len(doc["paraphrases"])
        generated, compared = list(answers[:first]), answers[first:]
        right = [float(same_answer(answer, doc["target_new"])) for answer in generated]
        values = {"reliability": right[:1], "generalization": right[1:]}
        if None not in compared:
            values["locality"] = [float(edited == unedited) for edited, unedited in compared]
            generated += [edited for edited, _ in compared]
        values["stopped"] = [float(self.ended(answer)) for answer in generated]
        if self._judge is not None:
            asked = (doc["prompt"], *doc["paraphrases"])
            replies = [
                self._judge.reply_or_none(prompt, doc["target_new"], answer)
                for prompt, answer in zip(asked, answers, strict=False)
            ]
            self._replies[doc["id"]] = replies
            grades = [None if reply is None else read_grade(reply) for reply in replies]
            for name, given in (("reliability", grades[:1]), ("generalization", grades[1:])):
                values[JUDGED + name] = [float(grade) for grade in given if grade is not None]
        return {metric: sum(of) / len(of) for metric, of in values.items() if of}

    def apply_filters(self) -> None:
        """Also write the judge's replies into the samples, behind the answers that they are about."""
        super().apply_filters()
        for request in self._instances:
            replies = self._replies.get(request.doc["id"], [])
            if request.idx < len(replies) and replies[request.idx] is not None:
                request.resps.append(f"judge: {replies[request.idx]}")
