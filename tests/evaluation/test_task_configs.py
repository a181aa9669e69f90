"""The YAML files: exact prompts, settings, groups, and the general tasks run through lm-eval."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from support.lm_eval_files import without_groups

from harness_rect.evaluation.aggregations import MEAN
from harness_rect.evaluation.catalogue import GROUPS, TASKS

FOLDER = Path(__file__).parents[2] / "tasks"

# The longest answer of each task, in tokens.
MAX_GEN_TOKS = {
    "rect_reasoning": 5,
    "rect_nli": 1,
    "rect_open_domain_qa": 20,
    "rect_closed_domain_qa": 1,
    "rect_dialogue": 1,
    "rect_summarization": 25,
    "rect_ner": 10,
    "rect_sentiment": 1,
    "rect_glue_sst": 5,
    "rect_glue_mrpc": 5,
    "rect_glue_cola": 5,
    "rect_glue_rte": 5,
    "rect_glue_nli": 3,
    "rect_glue_mmlu": 5,
}


def _after_shots(*rows: dict[str, Any], classes: int = 2, label: str = "label") -> list[dict[str, Any]]:
    """Rows of the GLUE suite behind ten others, which are not used; the classes take turns."""
    return [*({**rows[0], label: i % classes} for i in range(10)), *rows]


ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k.jsonl": [
        {"question": "Ana has {{2}} nuts \nand 2 more. How many?", "answer": "2 + 2 = 4\n#### 4"},
        {"question": "How far?", "answer": "1,000 + 2\n#### 1,002"},
    ],
    "rte.jsonl": [
        {"sentence1": "The mill closed.", "sentence2": "A mill closed.", "label": 0},
        {"sentence1": "Cats sleep. ", "sentence2": " Cats bark.", "label": 1},
        {"sentence1": "x", "sentence2": "y", "label": 1},
        {"sentence1": "x", "sentence2": "y", "label": -1},
    ],
    "nq_open.jsonl": [
        {"question": "who built it", "answer": ["Mo Li"], "output": ["\n\nMo Li built <it>."]},
        {"question": "where is it?", "answer": ["Here", "Oslo"], "output": ["It is here."]},
    ],
    "boolq.jsonl": [
        {"question": "is tin a metal", "passage": "Tin is a metal.", "answer": True},
        {"question": "is it gold", "passage": "It is tin.", "answer": False},
    ],
    "mutual.jsonl": [
        {
            "article": "m : it 's late .",
            "options": ["f : go .", "f : no .", " f", "f : ok ."],
            "answers": "B",
        },
        {"article": "f : hi .", "options": ["a .", "b .", "c .", "d ."], "answers": "D"},
    ],
    "samsum.jsonl": [
        {"dialogue": "Bo: hi\r\nCy: hi ünd bye\r\n", "summary": "Bo greets Cy."},
        {"dialogue": "Di: bye", "summary": "[1, 2]"},
    ],
    "conll2003.jsonl": [
        {
            "tokens": ["Ada", "Lo", "met", "Bob", ",", "in", "Oslo", "."],
            "ner_tags": ["B-PER", "I-PER", "O", "B-PER", "O", "O", "B-LOC", "O"],
        }
    ],
    "sst2.jsonl": [{"sentence": "warm and funny . ", "label": 1}, {"sentence": "dull", "label": 0}],
    "glue_sst.jsonl": _after_shots(
        {"sentence": "dull {{x}}", "label": 0}, {"sentence": "warm and funny . ", "label": 1}
    ),
    "glue_mrpc.jsonl": _after_shots(
        {"sentence1": "It rained .", "sentence2": "Snow fell .", "label": 0},
        {"sentence1": "He came .", "sentence2": "There he came .", "label": 1},
    ),
    "glue_cola.jsonl": _after_shots(
        {"sentence": "The came cat.", "label": 0}, {"sentence": "The cat came.", "label": 1}
    ),
    "glue_rte.jsonl": _after_shots(
        {"sentence1": "The old mill closed.", "sentence2": "A mill closed.", "label": 0},
        {"sentence1": "Cats sleep.", "sentence2": "Cats bark.", "label": 1},
    ),
    "glue_nli.jsonl": _after_shots(
        {"sentence1": "The old mill closed.", "sentence2": "A mill closed.", "label": 0},
        {"sentence1": "Cats sleep.", "sentence2": "Cats bark.", "label": 1},
    ),
    "glue_mmlu.jsonl": _after_shots(
        {"question": "What is tin?", "choices": ["gas", "wood", "a metal", "oil"], "answer": 2},
        {"question": "Two and\ntwo?", "choices": ["1", "2", "3", "4"], "answer": 3},
        classes=4,
        label="answer",
    ),
}

# Written by hand, not by a template: this is what the paper's models were shown.
PROMPTS: dict[str, list[str]] = {
    "rect_reasoning": [
        "Q: Ana has {{2}} nuts \nand 2 more. How many? A:Let's think step by step. 2 + 2 = 4\n "
        "Therefore, the answer (arabic numerals) is:",
        "Q: How far? A:Let's think step by step. 1,000 + 2\n Therefore, the answer (arabic numerals) is:",
    ],
    "rect_nli": [
        "The mill closed. entails the A mill closed.. True or False? answer:",
        "Cats sleep.  entails the  Cats bark.. True or False? answer:",
        "x entails the y. True or False? answer:",
    ],
    "rect_open_domain_qa": [
        "Refer to the passage below and answer the following question. "
        "Passage: \n\nMo Li built <it>. Question: who built it",
        "Refer to the passage below and answer the following question. "
        "Passage: It is here. Question: where is it?",
    ],
    "rect_closed_domain_qa": [
        "Please answer the given question based on the passage. The answer should be exact 'yes' or 'no'. "
        "passage: Tin is a metal. question: is tin a metal. answer:",
        "Please answer the given question based on the passage. The answer should be exact 'yes' or 'no'. "
        "passage: It is tin. question: is it gold. answer:",
    ],
    "rect_dialogue": [
        "Q: m : it 's late . Which choice is correct? "
        "Answer Chioces: (A)f : go .(B)f : no .(C) f(D)f : ok . A: Among A through D, the answer is",
        "Q: f : hi . Which choice is correct? "
        "Answer Chioces: (A)a .(B)b .(C)c .(D)d . A: Among A through D, the answer is",
    ],
    "rect_summarization": ["Bo: hi\r\nCy: hi ünd bye\r\n\nTL;DR:", "Di: bye\nTL;DR:"],
    "rect_ner": [
        f"Please identify {kind} Entity from the given text. Text: Ada Lo met Bob, in Oslo. Entity:"
        for kind in ("Person", "Location", "Organization", "Miscellaneous")
    ],
    "rect_sentiment": [
        "For each snippet of text,label the sentiment of the text as positive or negative."
        "The answer should be exact 'positive' or 'negative'. text: warm and funny .  answer:",
        "For each snippet of text,label the sentiment of the text as positive or negative."
        "The answer should be exact 'positive' or 'negative'. text: dull answer:",
    ],
    "rect_glue_sst": ["Review : dull {{x}}\nSentiment :", "Review : warm and funny . \nSentiment :"],
    "rect_glue_mrpc": [
        "Are the sentences paraphrases of each other.\n"
        "Sentence 1: It rained .\nSentence 2: Snow fell .\nAnswer:",
        "Are the sentences paraphrases of each other.\n"
        "Sentence 1: He came .\nSentence 2: There he came .\nAnswer:",
    ],
    "rect_glue_cola": [
        "Is this sentence linguistically acceptable?\nSentence: The came cat.\nAnswer: ",
        "Is this sentence linguistically acceptable?\nSentence: The cat came.\nAnswer: ",
    ],
    "rect_glue_rte": [
        "The old mill closed.\nquestion: A mill closed. True or False?\nanswer:",
        "Cats sleep.\nquestion: Cats bark. True or False?\nanswer:",
    ],
    "rect_glue_nli": [
        "The old mill closed. entails the A mill closed. True or False? Answer:",
        "Cats sleep. entails the Cats bark. True or False? Answer:",
    ],
    "rect_glue_mmlu": [
        "Question: What is tin?\n(A) gas\n(B) wood\n(C) a metal\n(D) oil\nAnswer:",
        "Question: Two and\ntwo?\n(A) 1\n(B) 2\n(C) 3\n(D) 4\nAnswer:",
    ],
}

TARGETS: dict[str, list[Any]] = {
    "rect_reasoning": ["4", "1002"],
    "rect_nli": ["True", "False", "False"],
    "rect_open_domain_qa": [["Mo Li"], ["Here", "Oslo"]],
    "rect_closed_domain_qa": ["yes", "no"],
    "rect_dialogue": ["B", "D"],
    "rect_summarization": ["Bo greets Cy.", "[1, 2]"],
    "rect_ner": ["Ada Lo, Bob", "Oslo", "", ""],
    "rect_sentiment": ["positive", "negative"],
    "rect_glue_sst": ["negative", "positive"],
    "rect_glue_mrpc": ["No", "Yes"],
    "rect_glue_cola": ["No", "Yes"],
    "rect_glue_rte": ["True", "False"],
    "rect_glue_nli": ["True", "False"],
    "rect_glue_mmlu": ["C", "D"],
}

# What the fake model says, and what that is worth.
ANSWERS: dict[str, list[str]] = {
    "rect_reasoning": [" 4", " 7"],
    "rect_nli": [" True", " True", " perhaps"],
    "rect_open_domain_qa": ["by Mo Li, I think", "nowhere"],
    "rect_closed_domain_qa": [" Yes", "no"],
    "rect_dialogue": [" B", "?"],
    "rect_summarization": ["Bo greets Cy", "words"],
    "rect_ner": [" Ada Lo and Cy", " Oslo", "", "Zed"],
    "rect_sentiment": [" positive", " positive"],
    "rect_glue_sst": [" Negative\nReview", " so warm"],
    "rect_glue_mrpc": [" No, they know", " Yes"],
    "rect_glue_cola": ["Yes", "Yes"],
    "rect_glue_rte": [" True", " True"],
    "rect_glue_nli": [" (True)", " False"],
    "rect_glue_mmlu": [" (C) a metal", " A dog"],
}
EXPECTED: dict[str, dict[str, float]] = {
    "rect_reasoning": {"solve_rate": 1 / 2},
    "rect_nli": {"acc": 1 / 3, "valid_rate": 2 / 3},
    "rect_open_domain_qa": {"em": 1 / 2},
    "rect_closed_domain_qa": {"acc": 1.0, "valid_rate": 1.0},
    "rect_dialogue": {"acc": 1 / 2, "valid_rate": 1 / 2},
    "rect_summarization": {"rouge": 1 / 2, "rouge1": 1 / 2, "rouge2": 1 / 2, "rougeL": 1 / 2},
    # 2 matched of 4 predicted and 3 gold; recall: persons 1 of 2, locations 1 of 1
    "rect_ner": {"f1": 2 * 2 / (4 + 3), "recall_macro": (1 / 2 + 1) / 2},
    "rect_sentiment": {"acc": 1 / 2, "valid_rate": 1.0},
    # One class right (F1 1), of the other no answer was read (F1 0).
    "rect_glue_sst": {"f1_weighted": 1 / 2, "acc": 1 / 2, "valid_rate": 1 / 2},
    "rect_glue_mrpc": {"f1_weighted": 1.0, "acc": 1.0, "valid_rate": 1.0},
    # One answer for both: F1 2/3 for its class, 0 for the other.
    "rect_glue_cola": {"f1_weighted": 1 / 3, "acc": 1 / 2, "valid_rate": 1.0},
    "rect_glue_rte": {"f1_weighted": 1 / 3, "acc": 1 / 2, "valid_rate": 1.0},
    "rect_glue_nli": {"f1_weighted": 1.0, "acc": 1.0, "valid_rate": 1.0},
    "rect_glue_mmlu": {"f1_weighted": 1 / 2, "acc": 1 / 2, "valid_rate": 1 / 2},
}


class Scripted(LM):
    """Says what ANSWERS holds for each document."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [ANSWERS[request.task_name][request.doc_id] for request in requests]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows")
    for name, rows in ROWS.items():
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _manager(folder: Path) -> TaskManager:
    metadata = {"data": str(folder), "pretrained": "any", "method": "rome"}
    return TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)


@pytest.fixture(scope="module")
def outcome(folder: Path) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model=Scripted(),
        tasks=["rect_general", "rect_glue"],
        task_manager=_manager(folder),
        bootstrap_iters=10,
    )
    assert found is not None
    return without_groups(found)


@pytest.mark.parametrize("task", MAX_GEN_TOKS)
def test_prompts_to_the_letter(outcome: dict[str, Any], task: str) -> None:
    samples = sorted(outcome["samples"][task], key=lambda sample: sample["doc_id"])
    assert [sample["arguments"][0][0] for sample in samples] == PROMPTS[task]
    targets = [sample["target"] for sample in samples]
    assert [str(t) if isinstance(t, int) else t for t in targets] == TARGETS[
        task
    ]  # 0.5 logs digits as numbers
    settings = {"do_sample": False, "until": [], "max_gen_toks": MAX_GEN_TOKS[task]}
    assert all(sample["arguments"][0][1] == settings for sample in samples)


@pytest.mark.parametrize("task", MAX_GEN_TOKS)
def test_results(outcome: dict[str, Any], task: str) -> None:
    results = outcome["results"][task]
    found = {key.split(",")[0]: value for key, value in results.items() if key.endswith(",none")}
    values = {name: value for name, value in found.items() if not name.endswith("_stderr")}
    metrics = [metric.name for metric in TASKS[task].metrics]
    assert values == pytest.approx({**EXPECTED[task], "score": EXPECTED[task][metrics[0]]})
    assert list(EXPECTED[task]) == metrics
    for name in values:
        metric = TASKS[task].metric(name)
        assert metric is not None
        assert (found[f"{name}_stderr"] == "N/A") == (metric.aggregation is not MEAN)
    assert set(outcome["higher_is_better"][task].values()) == {True}
    assert outcome["versions"][task] == 1.0
    assert outcome["n-shot"][task] == 0


@pytest.mark.parametrize(("group", "size"), [("rect_general", 8), ("rect_glue", 6)])
def test_a_group_has_the_plain_mean_of_scores(outcome: dict[str, Any], group: str, size: int) -> None:
    tasks = [task for task in MAX_GEN_TOKS if TASKS[task].group == group]
    scores = [EXPECTED[task][TASKS[task].headline.name] for task in tasks]
    assert outcome["groups"][group]["score,none"] == pytest.approx(sum(scores) / size)
    members = outcome["group_subtasks"][group]
    assert [name.rpartition("::")[2] for name in members] == tasks


def test_dummy_model_and_quiet_configs(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        results = lm_eval.simple_evaluate(
            model="dummy", tasks=list(MAX_GEN_TOKS), task_manager=_manager(folder), bootstrap_iters=0
        )["results"]
    assert {task: results[task]["score,none"] for task in MAX_GEN_TOKS} == dict.fromkeys(MAX_GEN_TOKS, 0.0)
    texts = [record.getMessage() for record in caplog.records]
    assert "rect_nli: 1 of 4 rows skipped" in " ".join(texts)
    # lm-eval announces --metadata to every task with a custom data set; nothing else may be odd.
    about_tasks = [text for text in texts if "rect_" in text and "Custom kwargs can be passed" not in text]
    assert len(about_tasks) == 1, about_tasks


# ------------------------------------------------------------------------------------- the files alone


class _Loader(yaml.SafeLoader):
    """Reads ``!function x.y`` as that text."""


_Loader.add_constructor("!function", lambda loader, node: f"!function {node.value}")


def _config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), Loader=_Loader)
    return config


@pytest.mark.parametrize("name", TASKS)
def test_a_task_file_agrees_with_the_catalogue(name: str) -> None:
    config, task = _config(name), TASKS[name]
    assert config["task"] == name
    expected = [(m.name, m.aggregation.function, m.higher_is_better) for m in task.metrics]
    if task.repeats_headline:
        expected.append(("score", *expected[0][1:]))
    assert [tuple(entry.values()) for entry in config["metric_list"]] == expected
    assert all(
        list(entry) == ["metric", "aggregation", "higher_is_better"] for entry in config["metric_list"]
    )
    generates = any(metric.protocol == "generated" for metric in task.metrics)
    assert config["output_type"] == ("generate_until" if generates else "loglikelihood")
    assert bool(task.file) == (task.kind == "general")
    assert config["num_fewshot"] == 0
    assert config["test_split"] == "test"
    assert config["metadata"] == {"version": 1.0}


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_file_agrees_with_the_catalogue(name: str) -> None:
    config, group = _config(name), GROUPS[name]
    assert config["group"] == name
    assert tuple(config["task"]) == group.members
    mean = [{"metric": "score", "aggregation": "mean", "weight_by_size": False}]
    assert config.get("aggregate_metric_list") == (mean if group.mean_title else None)
    if group.mean_title:
        assert all(TASKS[task].repeats_headline for task in group.members)
    assert config["metadata"] == {"version": 1.0}


def test_every_file_is_in_the_catalogue() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*TASKS, *GROUPS}
    for task in TASKS.values():
        assert task.name in GROUPS[task.group].members


def test_reading_the_catalogue_imports_no_library() -> None:
    code = f"import sys; sys.path = {sys.path}; import harness_rect.evaluation.catalogue; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"numpy", "torch", "lm_eval", "transformers", "datasets", "yaml"}
