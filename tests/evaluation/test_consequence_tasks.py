"""Portability, ripple effects, multi-hop questions and fluency: scores of hand-written answers."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.table_lm import TableLM, evaluate, metrics

from harness_rect import embedded
from harness_rect.answers import begins_with, mentions, normalise
from harness_rect.errors import UserError
from harness_rect.evaluation.aggregations import mean_of_criteria
from harness_rect.evaluation.editing.consistency import FREQUENCIES, SNIPPETS, VOCABULARY, References
from harness_rect.evaluation.editing.fluency import FluencyTask, ngram_entropy
from harness_rect.evaluation.editing.multihop import SHOTS, MultihopTask
from harness_rect.evaluation.editing.portability import PortabilityTask
from harness_rect.evaluation.editing.ripple import CRITERIA, RippleTask
from harness_rect.evaluation.editing.task import Continuation, EditingTask, Generation
from harness_rect.models.prompt_format import PromptFormat

TASKS = Path(__file__).parents[2] / "tasks"
KINDS: dict[str, type[EditingTask]] = {
    "rect_portability": PortabilityTask,
    "rect_ripple": RippleTask,
    "rect_multihop": MultihopTask,
    "rect_fluency": FluencyTask,
}

Doc = dict[str, Any]


def query(prompt: str, *answers: list[str]) -> Doc:
    return {"prompt": prompt, "answers": list(answers)}


def consequence(
    criterion: str, *queries: Doc, any_query: bool = False, conditions: tuple[Doc, ...] = ()
) -> Doc:
    return {
        "criterion": criterion,
        "queries": list(queries),
        "any_query": any_query,
        "conditions": list(conditions),
    }


def make_task(name: str, tmp_path: Path, **metadata: Any) -> Any:
    """The task of a YAML file, as lm-eval makes it, on one edit of the embedded model."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    config = yaml.load((TASKS / f"{name}.yaml").read_text(), Loader)
    edits = tmp_path / "edits.json"
    edits.write_text('[{"prompt": "{} is in", "subject": "Ada", "target_new": "Rome"}]')
    given = {"pretrained": embedded.NAME, "edits": str(edits), "data": str(tmp_path), **metadata}
    from harness_rect.evaluation.editing.documents import edits_for_tasks

    for metric in config["metric_list"]:
        if str(metric["aggregation"]).startswith("harness_rect."):
            metric["aggregation"] = mean_of_criteria
    config |= {"custom_dataset": edits_for_tasks, "metadata": config["metadata"] | given}
    config.pop("class")
    return KINDS[name](config)


def answered(task: Any, doc: Doc, said: dict[str, Any], unedited: dict[str, Any] | None = None) -> Doc:
    """The scores of a document, where the model says ``said[prompt]`` and predicts the tokens of ``right``.

    unedited: prompt -> what the unedited model says; without it the model class does not know it.
    """
    answers: list[Any] = []
    for asked in task.questions(doc):
        if isinstance(asked, Continuation):
            answers.append((-1.0, (asked.prompt, len(asked.context)) in said.get("right", ())))
        elif asked.of == "unedited":
            answers.append(None if unedited is None else unedited[asked.prompt])
        else:
            answers.append(said[asked.prompt])
    found: Doc = task.scores(doc, answers)
    return found


DOC = {"id": "0", "subject": "Ada", "prompt": "Ada is in", "target_new": "Rome"}


# ------------------------------------------------------------------------------------------ portability


def test_portability_is_the_mean_of_the_criteria_that_an_edit_has(tmp_path: Path) -> None:
    task = make_task("rect_portability", tmp_path)
    doc = DOC | {
        "consequences": [
            consequence("reasoning", query("Ada's country is", ["Italy", "the Italian Republic"])),
            consequence("reasoning", query("Ada's river is the", ["Tiber"])),
            consequence("subject_aliasing", query("Countess Lovelace is in", ["Rome"])),
            consequence("forgetfulness", query("Ada was in", ["London"])),
            consequence("compositionality_i", query("never asked", ["x"])),
        ]
    }
    said = {
        "Ada's country is": " The Italian republic, of course",  # an alias, as whole words, at the beginning
        "Ada's river is the": " river Tiber",
        "Countess Lovelace is in": " Romeville",
        "Ada was in": " London",
    }
    italy = task.tokens("Ada's country is", "Italy")
    tiber = task.tokens("Ada's river is the", "Tiber")
    right = {(asked.prompt, len(asked.context)) for asked in [*italy, *tiber[:1]]}
    scores = answered(task, doc, said | {"right": right})
    assert scores == pytest.approx(
        {
            "reasoning": (1 + 1 / len(tiber)) / 2,
            "subject_aliasing": 0.0,
            "portability": (1 + 1 / len(tiber)) / 4,
            "forgetfulness": 0.0,
            "reasoning_gen": 0.5,
            "subject_aliasing_gen": 0.0,
            "portability_gen": 0.25,
            "forgetfulness_gen": 1.0,
        }
    )
    assert answered(task, DOC | {"consequences": []}, {}) == {}


# ----------------------------------------------------------------------------------------------- ripple


def ripple_doc(*tests: Doc) -> Doc:
    return DOC | {"consequences": list(tests)}


def test_a_test_passes_by_all_or_any_of_its_queries(tmp_path: Path) -> None:
    task = make_task("rect_ripple", tmp_path)
    one, two = query("q1", ["Anna", "Ann"], ["Bob"]), query("q2", ["Carl"])
    said = {"Ada is in": " Rome", "q1": " Ann and Bob", "q2": " Carla"}
    for any_query, expected in ((False, 0.0), (True, 1.0)):
        doc = ripple_doc(consequence("compositionality_i", one, two, any_query=any_query))
        scores = answered(task, doc, said)
        assert scores["compositionality_i"] == expected
        assert scores["ripple"] == [None, expected, None, None, None, None]
    assert answered(task, ripple_doc(consequence("forgetfulness", one)), said | {"q1": " Ann"}) == {
        "forgetfulness": 0.0,
        "ripple": [None] * 5 + [0.0],
    }


def test_tests_whose_conditions_the_unedited_model_fails_do_not_count(tmp_path: Path) -> None:
    task = make_task("rect_ripple", tmp_path)
    known = consequence("reasoning", query("q1", ["Ann"]), conditions=(query("c1", ["x"]),))
    known["criterion"] = "subject_aliasing"
    unknown = known | {
        "conditions": [query("c1", ["x"]), query("c2", ["y"])],
        "queries": [query("q2", ["B"])],
    }
    doc = ripple_doc(known, unknown, consequence("forgetfulness", query("q2", ["B"])))
    said = {"Ada is in": " Rome", "q1": " Ann", "q2": " no"}
    assert answered(task, doc, said, {"c1": " x!", "c2": " z"}) == {
        "subject_aliasing": 1.0,
        "forgetfulness": 0.0,
        "ripple": [None, None, None, 1.0, None, 0.0],
    }
    assert answered(task, doc, said, {"c1": " x!", "c2": " y"})["subject_aliasing"] == 0.5
    # A model class that does not know the unedited model has only what needs no condition.
    assert answered(task, doc, said) == {"forgetfulness": 0.0, "ripple": [None] * 5 + [0.0]}


def test_a_warning_says_what_needs_the_unedited_model(tmp_path: Path, caplog) -> None:
    conditional = {
        "criterion": "forgetfulness",
        "test_queries": [{"prompt": "q", "answers": ["A"]}],
        "condition_queries": [{"prompt": "c", "answers": ["B"]}],
    }
    row = {"prompt": "{} is in", "subject": "Ada", "target_new": "Rome", "consequences": [conditional]}
    (tmp_path / "edits.json").write_text(json.dumps([row]))
    results = evaluate(TableLM({"Ada is in": " Rome", "q": " A"}), "rect_ripple", tmp_path / "edits.json")
    assert metrics(results, "rect_ripple") == {}
    assert "rect_ripple: tests with conditions need the unedited model" in caplog.text


def test_an_edit_that_the_model_does_not_state_does_not_count(tmp_path: Path) -> None:
    task = make_task("rect_ripple", tmp_path)
    doc = ripple_doc(consequence("forgetfulness", query("q", ["A"])))
    assert answered(task, doc, {"Ada is in": " Romeo", "q": " A"}) == {}


@given(st.lists(st.lists(st.none() | st.floats(0, 1), min_size=6, max_size=6), min_size=1))
def test_ripple_is_the_mean_over_criteria_of_their_means_over_edits(values: list[list[float | None]]) -> None:
    columns = [[v for v in column if v is not None] for column in zip(*values, strict=True)]
    means = [sum(column) / len(column) for column in columns if column]
    assert mean_of_criteria(values) == pytest.approx(sum(means) / len(means) if means else 0.0)
    assert len(CRITERIA) == 6


# ------------------------------------------------------------------------------------------- multi-hop


def test_one_right_wording_answers_a_multi_hop_question(tmp_path: Path) -> None:
    (tmp_path / SHOTS).write_text("Q: One? A: 1\nQ: Two? A: 2\n")
    task = make_task("rect_multihop", tmp_path)
    hops = [query("Where is Ada?", ["Rome"]), query("Where is Rome?", ["Italy", "the Republic of Italy"])]
    multi_hop = {"questions": ["Ada's land?", "Land of Ada?"], "answers": ["Italy", "IT"], "hops": hops}
    before = "Q: One? A: 1\nQ: Two? A: 2\nQ: {} A:"
    said = {
        before.format("Ada's land?"): " France",
        before.format("Land of Ada?"): " it.",
        before.format("Where is Ada?"): " Rome, Italy",
        before.format("Where is Rome?"): " Republic of Italy",
    }
    doc = DOC | {"multi_hop": multi_hop}
    assert answered(task, doc, said) == {"multihop_acc": 1.0, "hop_acc": 0.5}
    said[before.format("Land of Ada?")] = " Italy and France"
    assert answered(task, doc, said)["multihop_acc"] == 0.0
    assert answered(task, doc | {"multi_hop": multi_hop | {"hops": []}}, said) == {"multihop_acc": 0.0}
    assert answered(task, DOC | {"multi_hop": None}, {}) == {}


def test_sixteen_questions_come_first_where_the_data_have_none(tmp_path: Path) -> None:
    task = make_task("rect_multihop", tmp_path)
    multi_hop = {"questions": ["Who?"], "answers": ["x"], "hops": []}
    (asked,) = task.questions(DOC | {"multi_hop": multi_hop})
    lines = asked.prompt.splitlines()
    assert len(lines) == 17
    assert lines[-1] == "Q: Who? A:"
    assert all(line.startswith("Q: ") and "? A: " in line for line in lines[:-1])


# --------------------------------------------------------------------------------------------- fluency


def entropy_by_definition(words: list[str], n: int) -> float:
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    shares = [count / sum(counts.values()) for count in counts.values()]
    return sum(share * math.log2(1 / share) for share in shares)


@given(st.lists(st.sampled_from(["a", "b", "c", "."]), max_size=40))
def test_ngram_entropy_weighs_two_and_three_words(words: list[str]) -> None:
    expected = (2 * entropy_by_definition(words, 2) + 4 * entropy_by_definition(words, 3)) / 3 / 2
    assert ngram_entropy(" ".join(words)) == pytest.approx(expected, abs=1e-9)


def write_references(folder: Path, words: dict[str, int], idf: list[float]) -> None:
    samples = [{"text": "Rome is old"}, {"text": "in Rome it is hot"}]
    snippets = [{"relation_id": "P1", "target_id": "Q1", "samples": samples}]
    (folder / SNIPPETS).write_text(json.dumps(snippets))
    (folder / VOCABULARY).write_text(json.dumps(words))
    np.save(folder / FREQUENCIES, np.array(idf))


def test_consistency_is_the_cosine_of_weighted_word_counts(tmp_path: Path) -> None:
    write_references(tmp_path, {"rome": 0, "old": 1, "paris": 2}, [2.0, 1.0, 3.0])
    task = make_task("rect_fluency", tmp_path)
    doc = DOC | {"generation_prompts": ["Ada in", "Old Ada"], "reference_texts": []}
    doc |= {"relation": "P1", "target_id": "Q1"}
    scores = answered(task, doc, {"Ada in": " Rome", "Old Ada": " saw Paris"})
    ours, theirs = np.array([2.0, 1.0, 3.0]), np.array([4.0, 1.0, 0.0])
    cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
    assert scores["consistency"] == pytest.approx(cosine)
    texts = [ngram_entropy("Ada in Rome"), ngram_entropy("Old Ada saw Paris")]
    assert scores["ngram_entropy"] == pytest.approx(sum(texts) / 2)
    own = answered(task, doc | {"reference_texts": ["old"]}, {"Ada in": " Rome", "Old Ada": " x"})
    assert own["consistency"] == pytest.approx(1 / np.linalg.norm([2.0, 1.0]))
    assert "consistency" not in answered(task, doc | {"target_id": "Q2"}, {"Ada in": "", "Old Ada": ""})
    assert answered(task, doc | {"generation_prompts": []}, {}) == {}


def test_in_a_chat_prompt_and_answer_are_two_words(tmp_path: Path) -> None:
    task = make_task("rect_fluency", tmp_path)
    task.encoder.format = PromptFormat(lambda messages, add_generation_prompt: messages[0]["content"])
    doc = DOC | {"generation_prompts": ["Ada in"], "reference_texts": [], "relation": "", "target_id": ""}
    assert answered(task, doc, {"Ada in": "Rome is"})["ngram_entropy"] == ngram_entropy("Ada in Rome is")


def test_only_the_first_hundred_tokens_of_a_text_count(tmp_path: Path) -> None:
    task = make_task("rect_fluency", tmp_path)
    doc = DOC | {"generation_prompts": ["Ada"], "reference_texts": [], "relation": "", "target_id": ""}
    short, long = (answered(task, doc, {"Ada": " old" * n}) for n in (400, 800))
    assert short == long
    assert task.questions(doc) == [Generation("Ada", sampled=True)]


@pytest.mark.parametrize(
    ("words", "idf"),
    [({"rome": 0}, [1.0, 2.0]), ({"rome": 1}, [1.0]), ({"rome": 0}, [math.nan]), (["rome"], [1.0])],
)
def test_word_frequencies_that_do_not_fit_are_refused(tmp_path: Path, words: Any, idf: list[float]) -> None:
    write_references(tmp_path, words, idf)
    with pytest.raises(UserError, match=r"idf.npy.*one finite number"):
        References.find({"data": str(tmp_path), "pretrained": "x"})


def test_snippets_of_another_form_are_refused(tmp_path: Path) -> None:
    (tmp_path / SNIPPETS).write_text('[{"relation_id": "P1"}]')
    with pytest.raises(UserError, match=r"attribute_snippets.json: expected a list of objects"):
        References.find({"data": str(tmp_path), "pretrained": "x"})


# ----------------------------------------------------------------------------------------------- words

TEXT = st.text(st.sampled_from("ab AN.the'"), max_size=12)


@given(TEXT, TEXT, TEXT)
def test_a_phrase_is_found_where_its_words_stand(before: str, phrase: str, after: str) -> None:
    found = bool(normalise(phrase))
    assert mentions(f"{before} {phrase} {after}", phrase) is found
    assert begins_with(f"{phrase} {after}", phrase) is found
    if begins_with(before, phrase):
        assert mentions(before, phrase)
    assert not mentions("", phrase)


def test_a_phrase_is_not_found_inside_a_word() -> None:
    assert mentions("He went to New York.", "the new york")
    assert not mentions("Romeo", "Rome")
    assert not begins_with("Not Rome", "no")
