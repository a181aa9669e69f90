"""What the editing tasks share.

They take edits of every format. A metric is the mean over the edits that have it: where only some do,
``<metric>_rows`` is their number; a metric that none has is absent.

:class:`Continuation` is scored by its token ids, because lm-eval's text requests are answered for a
continuation as a whole, and move white space between context and continuation (Llama's tokenizers give a
number a token for the space alone). Any lm-eval model that scores token ids (Hugging Face, vLLM, SGLang) can
be evaluated; its tokenizer is loaded from the ``pretrained`` or ``tokenizer`` argument.

:class:`Generation` is answered by any model class; what the unedited model says only by those that know it
(``edited_hf``, ``edited_vllm``). Under others the metrics that need it are absent.
"""

from __future__ import annotations

import abc
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import datasets

from harness_rect.answers import Answer
from harness_rect.compat.lm_eval import (
    GENERATE,
    GENERATE_BOTH,
    GENERATE_SEEDED,
    GENERATE_UNEDITED,
    SCORE_IDS,
    IdRequest,
    Instance,
    request_fields,
)
from harness_rect.edits import Edit
from harness_rect.errors import one_line_errors
from harness_rect.evaluation.editing.documents import documents
from harness_rect.evaluation.task import RectTask, load_tokenizer
from harness_rect.measure import with_space
from harness_rect.models.prompt_format import PromptFormat
from harness_rect.processes import of_all_processes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continuation:
    """The log-likelihood (nats) of ``ids`` after ``context``, and whether each token is the argmax.

    prompt, target: the texts that the ids were made from, for the samples.
    """

    prompt: str
    target: str
    context: list[int]
    ids: list[int]


@dataclass(frozen=True)
class Generation:
    """What the model says after ``prompt``, by the task's ``generation_kwargs``.

    The answer is a text; with ``of="both"`` a pair (edited model's, unedited model's) from the same batches.
    With "unedited" and "both" it is None where the model class does not know the unedited model.

    sampled: whether the task's ``generation_kwargs`` sample. Samples of edited_hf and edited_vllm depend on
    the prompt alone; those of other model classes on lm-eval's seed and on all that was sampled before.
    """

    prompt: str
    of: Literal["edited", "unedited", "both"] = "edited"
    sampled: bool = False


Question = Continuation | Generation

#: What a metric of neighborhood prompts needs; prompts alone are not among the fields of a document.
NEIGHBORHOOD = "a neighborhood prompt with its answer"
#: The fields that rect_zsre and rect_counterfact have always had. ``compare`` pairs by them.
COMPARED = ["id", "subject", "prompt", "target_new", "target_old", "paraphrases", "neighborhood"]

_METHODS = {"edited": GENERATE, "both": GENERATE_BOTH, "unedited": GENERATE_UNEDITED}


class EditingTask(RectTask):
    """A task whose documents are the applied edits, with any number of questions about each.

    Attributes:
        fields: what a document has, of :func:`~harness_rect.evaluation.editing.documents.documents`.
        needs: metric -> the fields without which an edit does not have it; for the warning.
        of_unedited: metrics, or other things, that need what the unedited model says; for the warning.
    """

    fields: ClassVar[list[str]]
    needs: ClassVar[dict[str, tuple[str, ...]]] = {}
    of_unedited: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        with one_line_errors():
            self.encoder = load_tokenizer(self.config.metadata or {})
        #: metrics that some of the evaluated documents have and some lack
        self._partial: list[str] = []  # in an order that does not depend on the process
        #: id of an edit -> its scores
        self._scores: dict[str, dict[str, Any]] = {}
        self._processes = 1
        self._types: dict[str, Question] = {}
        self._continuations: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    # -- what a task defines --------------------------------------------------------------------------

    @abc.abstractmethod
    def questions(self, doc: dict[str, Any]) -> Sequence[Question]:
        """What is asked about one edit; nothing, where it lacks what all metrics need."""

    @abc.abstractmethod
    def scores(self, doc: dict[str, Any], answers: Sequence[Any]) -> dict[str, Any]:
        """metric -> value of one edit, from the answers in the order asked; without the metrics it lacks."""

    # -- for its use ----------------------------------------------------------------------------------

    def continuation(self, prompt: str, target: str) -> Continuation:
        """The whole target after a prompt, with a space between them."""
        if (prompt, target) not in self._continuations:
            with one_line_errors():
                ids = self.encoder.continuation(prompt, with_space(target))
            self._continuations[prompt, target] = ids
        return Continuation(prompt, target, *self._continuations[prompt, target])

    def tokens(self, prompt: str, target: str) -> list[Continuation]:
        """Each token of the target after the prompt and the tokens before it."""
        whole = self.continuation(prompt, target)
        return [
            Continuation(prompt, target, whole.context + whole.ids[:i], [token])
            for i, token in enumerate(whole.ids)
        ]

    def share_right(self, prompt: str, target: str, answers: Iterator[tuple[float, bool]]) -> float:
        """The share of the target's tokens that are the argmax, from the next answers: to :meth:`tokens`."""
        n = len(self.continuation(prompt, target).ids)
        return sum(next(answers)[1] for _ in range(n)) / n

    def ended(self, answer: str) -> bool:
        """Whether a generated answer ended by itself, not at the limit of tokens.

        edited_hf and edited_vllm say it. The answers of other model classes are texts: those with fewer
        tokens than the limit count as ended.
        """
        if isinstance(answer, Answer):
            return answer.ended
        return len(self.encoder.tokens(answer)) - len(self.encoder.tokens("")) < self.max_new_tokens

    @property
    def max_new_tokens(self) -> int:
        return int(self.config.generation_kwargs["max_gen_toks"])

    # -- documents and requests -----------------------------------------------------------------------

    def download(self, *args: Any, **kwargs: Any) -> None:
        super().download(*args, **kwargs)
        self._use(self.dataset["test"])

    def score_edits(self, edits: Iterable[Edit]) -> None:
        """Use these edits as documents from the next ``build_all_requests`` on."""
        self._use(documents(edits))
        self.task_docs = self.eval_docs

    def _use(self, rows: datasets.Dataset) -> None:
        self.dataset: dict[str, datasets.Dataset] = {"test": rows.select_columns(self.fields)}

    def build_all_requests(self, **kwargs: Any) -> None:
        self._put_prompts(**kwargs)
        self._processes, self._types = kwargs["world_size"], {}
        if self._processes > 1:
            # lm-eval waits for all processes after each type of request: each process asks each type.
            every = self.doc_iterator(
                rank=0, world_size=1, limit=kwargs.get("limit"), samples=kwargs.get("samples")
            )
            self._types = {_type(asked): asked for _, doc in every for asked in self._asked(doc)}
        super().build_all_requests(**kwargs)
        self._instances.sort(key=lambda request: request.request_type)

    def _put_prompts(
        self,
        apply_chat_template: bool = False,
        chat_template: Callable[..., str] | None = None,
        system_instruction: str | None = None,
        **rest: Any,
    ) -> None:
        """Have prompts read in the chat, and after the instruction, of this evaluation."""
        chat = chat_template if apply_chat_template else None
        format = PromptFormat(chat, system_instruction or None)
        if format != self.encoder.format:
            self.encoder.format = format
            self._continuations.clear()

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **kwargs: Any) -> list[Instance]:
        fields = request_fields(self, kwargs)
        questions = self._asked(doc)
        present = {_type(asked) for asked in questions}
        questions += [asked for kind, asked in self._types.items() if kind not in present]
        # lm-eval sorts answers by idx
        return [self._request(asked, doc=doc, idx=i, **fields) for i, asked in enumerate(questions)]

    def _asked(self, doc: dict[str, Any]) -> list[Question]:
        # lm-eval fails on a document without requests; the answer to this one is not read.
        return list(self.questions(doc)) or [self.continuation(doc["prompt"], doc["target_new"])]

    def _request(self, asked: Question, **fields: Any) -> Instance:
        if isinstance(asked, Continuation):
            return IdRequest(
                request_type=SCORE_IDS,
                arguments=(asked.prompt, asked.target, asked.context, asked.ids),
                **fields,
            )
        with one_line_errors():
            prompt = self.encoder.format.text(asked.prompt)
        return Instance(
            request_type=_type(asked),
            arguments=(prompt, deepcopy(self.config.generation_kwargs)),
            **fields,
        )

    # -- scores ---------------------------------------------------------------------------------------

    def apply_filters(self) -> None:
        """Once all answers are there, score the edits; count those that have a metric, in all processes."""
        super().apply_filters()
        if not self.scored:
            return
        by_document: dict[int, list[Instance]] = {}
        for request in sorted(self._instances, key=lambda request: request.idx):
            by_document.setdefault(request.doc_id, []).append(request)
        self._scores = {}
        for requests in by_document.values():
            doc = requests[0].doc
            answers = [request.resps[0] for request in requests[: len(self.questions(doc))]]
            self._scores[doc["id"]] = self.scores(doc, answers)
        mine = Counter(metric for scores in self._scores.values() for metric in scores)
        counts: Counter[str] = sum(of_all_processes(mine, self._processes), Counter())
        total = sum(of_all_processes(len(self._scores), self._processes))
        self._partial = sorted(metric for metric, have in counts.items() if have < total)
        self._warn(counts, total)

    def _warn(self, counts: Counter[str], total: int) -> None:
        names = [one["metric"] for one in self.config.metric_list]
        unanswered = {r.request_type for r in self._instances if r.resps[0] is None}
        if unanswered:
            log.warning(
                "%s: %s need the unedited model, which this model class does not have, and are left out",
                self.config.task,
                ", ".join(self.of_unedited),
            )
        alike: dict[tuple[int, tuple[str, ...]], list[str]] = {}
        for metric in names:
            if counts[metric] < total and not (unanswered and metric in self.of_unedited):
                lacked = total - counts[metric], self.needs.get(metric, (metric,))
                alike.setdefault(lacked, []).append(metric)
        for (lacking, needed), metrics in alike.items():
            log.warning(
                "%s: %s: %d of %d edits lack %s and are left out",
                self.config.task,
                ", ".join(metrics),
                lacking,
                total,
                " or ".join(needed),
            )

    def process_results(self, doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
        scores = self._scores[doc["id"]]
        # None, not absent: lm-eval gathers from every process the metrics that the first process has.
        partial: dict[str, Any] = dict.fromkeys(self._partial)
        return partial | scores | {f"{metric}_rows": float(metric in scores) for metric in self._partial}

    def aggregation(self) -> dict[str, Any]:
        functions = super().aggregation()
        partial = {metric: _of_those_present(functions[metric]) for metric in self._partial}
        return functions | partial | {f"{metric}_rows": sum for metric in self._partial}

    def higher_is_better(self) -> dict[str, bool]:
        return super().higher_is_better() | {f"{metric}_rows": True for metric in self._partial}


def _type(asked: Question) -> str:
    if isinstance(asked, Continuation):
        return SCORE_IDS
    return GENERATE_SEEDED if asked.sampled else _METHODS[asked.of]


def _of_those_present(function: Callable[[list[Any]], float]) -> Callable[[list[Any]], float]:
    return lambda values: function([value for value in values if value is not None])
