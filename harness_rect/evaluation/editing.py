"""The two editing tasks: ``rect_zsre`` (accuracies of target tokens) and ``rect_counterfact`` (comparisons).

Both take edits of every format. The old target is ``pred`` or ``target_true``; the neighborhood is ``loc``
with ``loc_ans``, or ``neighborhood_prompts`` with ``target_true``. An edit without what a metric needs is
left out of that metric's mean and counted; a metric that no edit can have is absent.

Requests carry token ids, because lm-eval's text requests are answered for a continuation as a whole, and move
white space between context and continuation (Llama's tokenizers give a number a token for the space alone).
rect_zsre makes one request for each target token; edited_hf answers those of a target from one forward pass.
Any lm-eval model that scores token ids (Hugging Face, vLLM, SGLang) can be evaluated; its tokenizer is loaded
from the ``pretrained`` or ``tokenizer`` argument.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Iterable, Sequence
from math import exp
from typing import Any, ClassVar

import datasets
import transformers

from harness_rect import embedded
from harness_rect.compat.lm_eval import SCORE_IDS, IdRequest, Instance, request_fields
from harness_rect.edits import Edit, load_edits
from harness_rect.errors import UserError, one_line_errors
from harness_rect.evaluation.task import RectTask
from harness_rect.measure import with_space
from harness_rect.models.lm import TextEncoder
from harness_rect.models.load import load_errors

log = logging.getLogger(__name__)

Pair = tuple[list[int], list[int]]


def edits_for_tasks(**metadata: Any) -> dict[str, datasets.Dataset]:
    """The applied edits as lm-eval documents (``custom_dataset`` of both tasks).

    Args:
        **metadata: model_args merged with ``--metadata``; ``edits`` is read here.

    Raises:
        UserError: without ``edits``, or where they cannot be read.
    """
    with one_line_errors():
        spec = embedded.of_tasks(metadata).get("edits")
        if spec is None:
            raise UserError(
                "rect_zsre and rect_counterfact need edits: give edits=FILE[start:stop] in --model_args, or"
                " in --metadata for a model that is not edited_hf"
            )
        return _splits(load_edits(str(spec)))


def _splits(edits: Iterable[Edit]) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list([_document(edit) for edit in edits])}


def _document(edit: Edit) -> dict[str, Any]:
    return {
        "id": edit.id,
        "subject": edit.subject,
        "prompt": edit.text,
        "target_new": edit.target_new,
        "target_old": edit.target_old,
        "paraphrases": list(edit.paraphrases),
        "neighborhood": [
            {"prompt": p.prompt, "answer": p.answer} for p in edit.neighborhood if p.answer is not None
        ],
    }


def load_tokenizer(metadata: dict[str, Any]) -> TextEncoder:
    """The tokenizer of the model under evaluation, as lm-eval's Hugging Face class loads it.

    Raises:
        UserError: if the metadata name none, or it cannot be loaded.
    """
    metadata = embedded.of_tasks(metadata)
    name = metadata.get("tokenizer") or embedded.resolve_model(metadata.get("pretrained"))
    if not isinstance(name, str):
        raise UserError(
            "rect_zsre and rect_counterfact need the tokenizer's name; give tokenizer=NAME in metadata"
        )
    add_bos = metadata.get("add_bos_token")
    options = {} if add_bos is None else {"add_bos_token": add_bos}
    if metadata.get("subfolder"):
        options["subfolder"] = metadata["subfolder"]
    with load_errors(f"tokenizer {name}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name,
            revision=str(metadata.get("revision", "main")),
            trust_remote_code=bool(metadata.get("trust_remote_code", False)),
            use_fast=metadata.get("use_fast_tokenizer", True),
            **options,
        )
    return TextEncoder(tokenizer, add_bos)


class EditingTask(RectTask):
    """What both tasks share: documents are edits, and several continuations are scored for each.

    A metric is the mean over the documents that have it. Where only some do, ``<metric>_rows`` is their
    number, and there is no standard error.
    """

    #: metric -> the document fields it needs, for metrics that a document may lack
    needs: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        with one_line_errors():
            self._encoder = load_tokenizer(self.config.metadata or {})
        #: metrics that some of the evaluated documents have and some lack
        self._partial: set[str] = set()
        self._continuations: dict[tuple[str, str], Pair] = {}

    def score_edits(self, edits: Iterable[Edit]) -> None:
        """Use these edits as documents from the next ``build_all_requests`` on."""
        self.dataset = _splits(edits)
        self.task_docs = self.eval_docs

    def _count_rows(self, limit: int | None, samples: list[int] | None) -> None:
        """Find the metrics that only some documents of all processes have, and warn of them."""
        documents = [doc for _, doc in self.doc_iterator(rank=0, world_size=1, limit=limit, samples=samples)]
        self._partial.clear()
        for metric, required in self.needs.items():
            have = sum(all(doc[name] for name in required) for doc in documents)
            if have < len(documents):
                log.warning(
                    "%s: %s: %d of %d edits lack %s and are left out of its mean",
                    self.config.task,
                    metric,
                    len(documents) - have,
                    len(documents),
                    " or ".join(required),
                )
                if have:
                    self._partial.add(metric)

    def continuation(self, prompt: str, target: str) -> Pair:
        if (prompt, target) not in self._continuations:
            with one_line_errors():
                ids = self._encoder.continuation(prompt, with_space(target))
            self._continuations[prompt, target] = ids
        return self._continuations[prompt, target]

    @abc.abstractmethod
    def questions(self, doc: dict[str, Any]) -> list[tuple[str, str, Pair]]:
        """(prompt, target, ids) of each continuation that is scored for one edit."""

    @abc.abstractmethod
    def scores(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        """metric -> value of one edit, from the answers in the order asked."""

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **kwargs: Any) -> list[Instance]:
        fields = request_fields(self, kwargs)
        return [
            # lm-eval sorts answers by idx
            IdRequest(request_type=SCORE_IDS, doc=doc, arguments=(prompt, target, *ids), idx=index, **fields)
            for index, (prompt, target, ids) in enumerate(self.questions(doc))
        ]

    def build_all_requests(self, **kwargs: Any) -> None:
        self._count_rows(kwargs.get("limit"), kwargs.get("samples"))
        super().build_all_requests(**kwargs)

    def process_results(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        scores = self.scores(doc, results)
        # None, not absent: lm-eval gathers from every process the metrics that the first process has.
        partial: dict[str, Any] = dict.fromkeys(self._partial)
        return partial | scores | {f"{metric}_rows": float(metric in scores) for metric in self._partial}

    def aggregation(self) -> dict[str, Any]:
        functions = super().aggregation()
        partial = {metric: _of_those_present(functions[metric]) for metric in self._partial}
        return functions | partial | {f"{metric}_rows": sum for metric in self._partial}

    def higher_is_better(self) -> dict[str, bool]:
        return super().higher_is_better() | {f"{metric}_rows": True for metric in self._partial}


def _of_those_present(function: Callable[[list[Any]], float]) -> Callable[[list[Any]], float]:
    return lambda values: function([value for value in values if value is not None])


class ZsreTask(EditingTask):
    """Shares of target tokens that are the argmax under teacher forcing (ROME's and EasyEdit's zsRE).

    reliability at the edit prompt, generalization at the rephrased prompts (mean over prompts),
    neighborhood_acc of the reference answer at the locality prompts (mean over prompts).
    """

    needs: ClassVar = {"generalization": ("paraphrases",), "neighborhood_acc": ("neighborhood",)}

    def _groups(self, doc: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
        return {
            "reliability": [(doc["prompt"], doc["target_new"])],
            "generalization": [(text, doc["target_new"]) for text in doc["paraphrases"]],
            "neighborhood_acc": [(probe["prompt"], probe["answer"]) for probe in doc["neighborhood"]],
        }

    def questions(self, doc: dict[str, Any]) -> list[tuple[str, str, Pair]]:
        found = []
        for pairs in self._groups(doc).values():
            for prompt, target in pairs:
                context, ids = self.continuation(prompt, target)
                found += [(prompt, target, (context + ids[:i], [token])) for i, token in enumerate(ids)]
        return found

    def scores(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        correct = iter(results)
        scores = {}
        for metric, pairs in self._groups(doc).items():
            shares = []
            for prompt, target in pairs:
                n = len(self.continuation(prompt, target)[1])
                shares.append(sum(next(correct)[1] for _ in range(n)) / n)
            if shares:
                scores[metric] = sum(shares) / len(shares)
        return scores


class CounterfactTask(EditingTask):
    """Comparisons of the new and the old target (Meng et al. 2022, section 3.4).

    P is exp of minus the mean token NLL of the whole target. es, ps: share of edit / paraphrase prompts with
    P(new) > P(old); ns: share of neighborhood prompts with P(reference) > P(new); em, pm, nm: the mean
    differences of those probabilities; edit_score: harmonic mean of the means of es, ps and ns.
    """

    needs: ClassVar = {
        "es": ("target_old",),
        "ps": ("target_old", "paraphrases"),
        "ns": ("neighborhood",),
        "em": ("target_old",),
        "pm": ("target_old", "paraphrases"),
        "nm": ("neighborhood",),
        "edit_score": ("target_old", "paraphrases", "neighborhood"),
    }

    def _groups(self, doc: dict[str, Any]) -> dict[str, list[tuple[str, str, str]]]:
        """metric letter -> (prompt, target that should win, other target)."""
        new, old = doc["target_new"], doc["target_old"]
        return {
            "e": [(doc["prompt"], new, old)] if old else [],
            "p": [(text, new, old) for text in doc["paraphrases"]] if old else [],
            "n": [(probe["prompt"], probe["answer"], new) for probe in doc["neighborhood"]],
        }

    def questions(self, doc: dict[str, Any]) -> list[tuple[str, str, Pair]]:
        asked = [
            (prompt, target)
            for comparisons in self._groups(doc).values()
            for prompt, *targets in comparisons
            for target in targets
        ]
        # lm-eval fails on a document without requests; where nothing is compared, this answer is not read.
        asked = asked or [(doc["prompt"], doc["target_new"])]
        return [(prompt, target, self.continuation(prompt, target)) for prompt, target in asked]

    def scores(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        log_likelihoods = iter(results)

        def probability(prompt: str, target: str) -> float:
            return exp(next(log_likelihoods)[0] / len(self.continuation(prompt, target)[1]))

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
