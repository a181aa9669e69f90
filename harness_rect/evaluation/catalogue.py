"""Every task of this package, once: names, titles, metrics, files and groups.

``compare``, ``report``, the tables of the documentation and the reader of task data take what they need to
know of a task from here, and a test compares it with the YAML files. Adding a task means

* ``tasks/NAME.yaml``, and the task's line in the YAML of its group;
* the functions that this YAML names: rows (:mod:`.data`), scoring (:mod:`.general`, or a class as in
  :mod:`.editing`), and an aggregation (:mod:`.aggregations`) for a metric that is not a mean of documents;
* one entry of ``TASKS`` below.

This file needs the standard library only, so that reading it costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from harness_rect.evaluation.aggregations import (
    EDIT_SCORE,
    ENTITY_F1,
    MACRO_RECALL,
    MEAN,
    MEAN_OF_CRITERIA,
    MEAN_OF_TOKENS,
    PERPLEXITY,
    WEIGHTED_F1,
    Aggregation,
)

#: How a metric gets at the model's answer: each token of the expected answer is predicted after those before
#: it; or the probabilities of given texts are read; or the model generates.
Protocol = Literal["teacher-forced", "probability", "generated"]


@dataclass(frozen=True)
class Metric:
    """What a task reports.

    Attributes:
        name: as in the YAML and in results files.
        title: what it is, in words.
        aggregation: how the documents' values become the metric.
        higher_is_better: the direction of an improvement.
        share: whether it lies in [0, 1].
        protocol: how it gets at the model's answer; metrics of different protocols are not comparable.
        retained: whether other / base says what is left of it. Not of a metric that is 0 in the unedited
            model or can be negative: a distance from that model, a difference.
    """

    name: str
    title: str
    aggregation: Aggregation = MEAN
    higher_is_better: bool = True
    share: bool = True
    protocol: Protocol = "generated"
    retained: bool = True


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as in ``--tasks``.
        title: its name in tables and figures.
        metrics: the headline first, in the YAML's order.
        kind: "general" measures an ability of the model, "editing" the applied edits.
        group: the group that lists it.
        file: the file that it reads in a ``data`` folder; empty where it reads the edits.
        paper_file: the file, or folder, of the paper's own data that it reads instead, if there is one.
        unit: what the documents with the same ``text`` are together, where they are not independent.
        repeats_headline: whether the headline is also reported as ``score``, of which the group has the mean.
    """

    name: str
    title: str
    metrics: tuple[Metric, ...]
    kind: Literal["general", "editing"] = "general"
    group: str = field(kw_only=True)
    file: str = ""
    paper_file: str = ""
    unit: str = "documents"
    repeats_headline: bool = True

    @property
    def headline(self) -> Metric:
        return self.metrics[0]

    def metric(self, name: str) -> Metric | None:
        """The metric of this name; ``score`` is the headline. None for any other name."""
        if name == SCORE and self.repeats_headline:
            return self.headline
        return next((metric for metric in self.metrics if metric.name == name), None)


#: What the editing session measures of each edit and the edit report has, whatever the tasks; and how.
EDITING_METRICS = ("reliability", "generalization", "locality")
EDITING_PROTOCOL: Protocol = "teacher-forced"
#: All that it measures, by protocol: the generated ones with ``measure=generated``.
EDITING_MEASURES: dict[Protocol, tuple[str, ...]] = {
    EDITING_PROTOCOL: EDITING_METRICS,
    "generated": tuple(f"{metric}_gen" for metric in EDITING_METRICS),
}
#: The second name of the headline, so that tasks with different headlines have a mean.
SCORE = "score"
#: ``<metric>_rows`` counts the edits that have a metric, where some lack what it needs.
ROWS = "_rows"

_ACCURACY = (Metric("acc", "accuracy"), Metric("valid_rate", "share of answers that can be parsed"))


_CLASSES = (Metric("f1_weighted", "F1 of the classes, weighted by their rows", WEIGHTED_F1), *_ACCURACY)


def _glue(name: str, title: str) -> Task:
    return Task(f"rect_glue_{name}", title, _CLASSES, group="rect_glue", file=f"glue_{name}.jsonl")


def _editing(
    name: str, title: str, protocol: Protocol, *metrics: Metric, group: str = "rect_editing"
) -> Task:
    metrics = tuple(replace(metric, protocol=protocol) for metric in metrics)
    return Task(name, title, metrics, kind="editing", group=group, repeats_headline=False)


def _criteria(protocol: Protocol, ending: str = "") -> tuple[Metric, ...]:
    """What rect_portability reports under one protocol."""
    titles = {
        "portability": "mean of the next three",
        "subject_aliasing": "prompts with another name of the subject",
        "reasoning": "prompts that need one more step",
        "logical_generalization": "prompts of facts that follow by a relation's logic",
        "relation_specificity": "prompts of other relations of the subject",
        "forgetfulness": "prompts of other objects of the relation",
    }
    return tuple(Metric(name + ending, title, protocol=protocol) for name, title in titles.items())


def _of_text(name: str, title: str, aggregation: Aggregation) -> Metric:
    return Metric(name, title, aggregation, higher_is_better=False, share=False, protocol="probability")


def _paper(
    name: str, title: str, metrics: tuple[Metric, ...], file: str, paper_file: str, unit: str = "documents"
) -> Task:
    """One of the eight general tasks of Gu et al. 2024."""
    return Task(name, title, metrics, group="rect_general", file=file, paper_file=paper_file, unit=unit)


_TASKS = (
    _paper(
        "rect_reasoning",
        "Reasoning",
        (Metric("solve_rate", "share of problems whose number is in the answer"),),
        "gsm8k.jsonl",
        "test-reasoning.jsonl",
    ),
    _paper("rect_nli", "NLI", _ACCURACY, "rte.jsonl", "test-NLI.tsv"),
    _paper(
        "rect_open_domain_qa",
        "Open-domain QA",
        (Metric("em", "share of answers that contain the expected one"),),
        "nq_open.jsonl",
        "test-OpenDomainQA.jsonl",
    ),
    _paper(
        "rect_closed_domain_qa", "Closed-domain QA", _ACCURACY, "boolq.jsonl", "test-ClosedDomainQA.jsonl"
    ),
    _paper("rect_dialogue", "Dialogue", _ACCURACY, "mutual.jsonl", "test-dialogue"),
    _paper(
        "rect_summarization",
        "Summarization",
        (
            Metric("rouge", "mean of the three ROUGE F-measures"),
            Metric("rouge1", "ROUGE-1 F-measure"),
            Metric("rouge2", "ROUGE-2 F-measure"),
            Metric("rougeL", "ROUGE-L F-measure"),
        ),
        "samsum.jsonl",
        "test-summarization.json",
    ),
    _paper(
        "rect_ner",
        "NER",
        (
            Metric("f1", "micro F1 of entities", ENTITY_F1),
            Metric("recall_macro", "recall of entities in the text, mean over types", MACRO_RECALL),
        ),
        "conll2003.jsonl",
        "test-NER.txt",
        "sentences",
    ),
    _paper("rect_sentiment", "Sentiment", _ACCURACY, "sst2.jsonl", "test-SentimentAnalysis.tsv"),
    _editing(
        "rect_zsre",
        "zsRE",
        "teacher-forced",
        Metric("reliability", "share of target tokens predicted at the edit prompt"),
        Metric("generalization", "the same at rephrased prompts"),
        Metric("neighborhood_acc", "share of reference tokens predicted at locality prompts"),
    ),
    _editing(
        "rect_counterfact",
        "CounterFact",
        "probability",
        Metric("es", "efficacy: the new target is likelier than the old one"),
        Metric("ps", "the same at paraphrases"),
        Metric("ns", "neighborhood: the reference is likelier than the new target"),
        Metric("edit_score", "harmonic mean of es, ps and ns", EDIT_SCORE),
        Metric("em", "difference of the probabilities that es compares", share=False, retained=False),
        Metric("pm", "the same at paraphrases", share=False, retained=False),
        Metric("nm", "difference of the probabilities that ns compares", share=False, retained=False),
    ),
    _editing(
        "rect_autoregressive",
        "Autoregressive",
        "generated",
        Metric("reliability", "share of answers at the edit prompt that are the new target"),
        Metric("generalization", "the same at rephrased prompts"),
        Metric("locality", "share of answers at locality prompts that are the unedited model's"),
        Metric("stopped", "share of answers that end by themselves"),
        Metric("judge_reliability", "share of answers at the edit prompt that a judge finds correct"),
        Metric("judge_generalization", "the same at rephrased prompts"),
        group="rect_beyond",
    ),
    Task(
        "rect_portability",
        "Portability",
        (*_criteria("teacher-forced"), *_criteria("generated", "_gen")),
        kind="editing",
        group="rect_beyond",
        repeats_headline=False,
    ),
    _editing(
        "rect_ripple",
        "Ripple effects",
        "generated",
        Metric("ripple", "mean of the six criteria", MEAN_OF_CRITERIA),
        Metric("logical_generalization", "tests of facts that follow by a relation's logic"),
        Metric("compositionality_i", "tests of relations of the new target"),
        Metric("compositionality_ii", "tests of relations that lead to the subject"),
        Metric("subject_aliasing", "tests with another name of the subject"),
        Metric("relation_specificity", "tests of other relations of the subject"),
        Metric("forgetfulness", "tests of other objects of a relation that has several"),
        group="rect_beyond",
    ),
    _editing(
        "rect_multihop",
        "Multi-hop",
        "generated",
        Metric("multihop_acc", "share of multi-hop questions that one wording answers"),
        Metric("hop_acc", "share of the single questions that are answered"),
        group="rect_beyond",
    ),
    _editing(
        "rect_fluency",
        "Fluency",
        "generated",
        Metric("ngram_entropy", "entropy of two and three words in bits", share=False),
        Metric("consistency", "similarity with texts about the new target"),
        group="rect_beyond",
    ),
    Task(
        "rect_drift",
        "Drift",
        (
            replace(
                _of_text("kl", "KL divergence from the unedited model, nats a token", MEAN_OF_TOKENS),
                retained=False,
            ),
            _of_text("perplexity", "perplexity of the edited model", PERPLEXITY),
            replace(
                _of_text("argmax_changed", "share of places with another likeliest token", MEAN_OF_TOKENS),
                share=True,
                retained=False,
            ),
            _of_text("perplexity_unedited", "perplexity of the unedited model", PERPLEXITY),
        ),
        group="rect_beyond",
        file="drift.txt",
        repeats_headline=False,
    ),
    _glue("sst", "GLUE SST-2"),
    _glue("mrpc", "GLUE MRPC"),
    _glue("cola", "GLUE CoLA"),
    _glue("rte", "GLUE RTE"),
    _glue("nli", "GLUE NLI"),
    _glue("mmlu", "GLUE MMLU"),
)

#: Name -> task, in the order of tables and figures.
TASKS = {task.name: task for task in _TASKS}


@dataclass(frozen=True)
class Group:
    """Tasks that are asked for together. mean_title: of the mean of their ``score``, where there is one."""

    name: str
    members: tuple[str, ...]
    mean_title: str = ""

    @property
    def mean(self) -> Metric | None:
        """The mean as a metric: of shares that are better when higher, and of one protocol."""
        if not self.mean_title:
            return None
        [protocol] = {TASKS[task].headline.protocol for task in self.members}
        return Metric(SCORE, self.mean_title, protocol=protocol)


def _members(group: str) -> tuple[str, ...]:
    return tuple(task.name for task in _TASKS if task.group == group)


GENERAL = Group("rect_general", _members("rect_general"), "Mean of the eight")
#: Name -> group; members are tasks or groups.
GROUPS = {
    group.name: group
    for group in (
        GENERAL,
        Group("rect_editing", _members("rect_editing")),
        Group("rect_suite", ("rect_general", "rect_editing")),
        Group("rect_glue", _members("rect_glue"), "Mean of the GLUE suite"),
        Group("rect_beyond", (*_members("rect_beyond"), "rect_glue")),
        Group("rect_full", ("rect_suite", "rect_beyond")),
    )
}


def is_editing(task: str) -> bool:
    """Whether a task, of any package, measures the applied edits."""
    return task in TASKS and TASKS[task].kind == "editing"


def is_ability(task: str) -> bool:
    """Whether a task, of any package, is about an ability of the model, with one score for it.

    Of the others, those about the edits or the distance from the unedited model, every metric counts.
    """
    return task not in TASKS or TASKS[task].repeats_headline


def is_repetition(task: str, metric: str) -> bool:
    """Whether a metric of a task repeats another one (``score``) or counts its rows (``<metric>_rows``)."""
    known = TASKS.get(task)
    if known is None:
        return False
    counted = metric.endswith(ROWS) and known.metric(metric.removesuffix(ROWS)) is not None
    return counted or (metric == SCORE and known.repeats_headline)


def title(name: str) -> str:
    """The title of a task, or of the mean of a group; of one that is not ours, its name."""
    found = mean(name)
    return found.title if found else TASKS[name].title if name in TASKS else name


def mean(group: str) -> Metric | None:
    """The mean of a group, if it is ours and has one."""
    return GROUPS[group].mean if group in GROUPS else None


def headline(name: str) -> Metric | None:
    """The headline of a task, or the mean of a group; None if it is not ours."""
    return TASKS[name].headline if name in TASKS else mean(name)


def entry(name: str, metric: str) -> Metric | None:
    """The entry of a metric of a task, or of the mean of a group; None if it is not ours."""
    if name in TASKS:
        return TASKS[name].metric(metric)
    return mean(name) if metric == SCORE else None


def protocol(name: str, metric: str) -> Protocol | None:
    """How a metric of a task or group gets at the model's answer; None if it is not ours."""
    found = entry(name, metric)
    return found.protocol if found else None


def is_retained(name: str, metric: str) -> bool:
    """See :class:`Metric`; true of metrics that are not ours."""
    found = entry(name, metric)
    return found is None or found.retained


def aggregation(task: str, metric: str) -> Aggregation:
    """How a metric combines documents; a mean, for tasks and metrics that are not ours."""
    found = entry(task, metric)
    return found.aggregation if found else MEAN
