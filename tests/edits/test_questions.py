"""What a row asks beyond its edit: consequences, multi-hop questions, locality of every set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.edit_files import Row, message, plain, read, read_one, write

from harness_rect.edits import Consequence, MultiHop, Probe, Query, load_edits
from harness_rect.edits.fields import forms
from harness_rect.edits.questions import CRITERIA, criterion_of
from harness_rect.errors import UserError


def asked(criterion: str, prompt: str, *accepted: str) -> Consequence:
    return Consequence(criterion, (Query(prompt, (accepted,)),))


# --- accepted answers ----------------------------------------------------------------------------

some_form = st.text(alphabet="ab ", max_size=3)
nested = st.recursive(some_form | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=12)


def flat(value: Any) -> list[str]:
    if isinstance(value, list):
        return [form for item in value for form in flat(item)]
    return [value] if isinstance(value, str) and value.strip() else []


@given(nested)
def test_accepted_forms_are_all_of_them_once_in_their_order(value: Any) -> None:
    found = forms(value, "x")
    assert list(found) == [form for i, form in enumerate(flat(value)) if form not in flat(value)[:i]]
    assert forms({"value": None, "aliases": value}, "x") == found
    assert forms([list(found)], "x") == found


@pytest.mark.parametrize("wrong", [3, [["a"], True], {"value": "a", "aliases": [1]}])
def test_an_accepted_form_is_a_string(wrong: Any) -> None:
    with pytest.raises(UserError, match="x: expected a string"):
        forms(wrong, "x")


# --- KnowEdit and ZsRE ---------------------------------------------------------------------------

INSERTED: Row = {
    "subject": "Ida Holm",
    "prompt": "The place of death of Ida Holm is",
    "target_new": "Lund",
    "portability": {
        "Logical_Generalization": [
            {"prompt": "Is Ida Holm alive?", "ground_truth": [["no"], ["false"], ["no"]]}
        ],
        "Reasoning": [
            {"prompt": "The country where Ida Holm died is", "ground_truth": [["Sweden", "Sverige"]]},
            {"prompt": "Unknown is", "ground_truth": []},
        ],
        "Subject_Aliasing": [],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The father of Ida Holm is", "ground_truth": [["Jo", "J."]]}]
    },
}
COUNTERFACTUAL: Row = {
    "subject": "Ida Holm",
    "prompt": "The position held by Ida Holm is",
    "target_new": "bishop",
    "ground_truth": "mayor",
    "portability": {
        "Subject_Aliasing": [{"prompt": "The position held by Ida is", "ground_truth": "bishop"}]
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The gender of Ida Holm is", "ground_truth": "female"}],
        "Forgetfulness": [{"prompt": "Ida Holm, not only bishop, is", "ground_truth": "mayor"}],
    },
}
BIOGRAPHY: Row = {
    "text": "This is a passage about ida holm. Ida Holm was a painter.",
    "labels": "She was born in Lund.",
    "concept": "ida holm",
    "locality": {
        "Relation_Specificity": [{"prompt": "ida holm field of work", "ground_truth": ["painting"]}]
    },
}
QUESTION: Row = {
    "subject": "Ornia",
    "prompt": "Which family does Ornia belong to?",
    "target_new": "Tammidae",
    "ground_truth": ["Orniidae", "Orniids"],
    "rephrase_prompt": "What family are Ornia?",
    "cond": "Orniidae >> Tammidae || Which family?",
    "locality": {"Relation Specificity": [{"prompt": "The rank of Ornia is", "ground_truth": ["genus"]}]},
    "portability": {
        "Reasoning": [{"prompt": "What do those of Ornia's family eat?", "ground_truth": "moss"}]
    },
}


def test_an_inserted_fact_of_knowedit(tmp_path: Path) -> None:
    edit = read_one(tmp_path, INSERTED)
    assert edit.consequences == (
        asked("logical_generalization", "Is Ida Holm alive?", "no", "false"),
        asked("reasoning", "The country where Ida Holm died is", "Sweden", "Sverige"),
        asked("relation_specificity", "The father of Ida Holm is", "Jo", "J."),
    )
    assert edit.neighborhood == (Probe("The father of Ida Holm is", "Jo"),)
    assert (edit.target_old, edit.multi_hop) == (None, None)


def test_a_counterfactual_of_knowedit(tmp_path: Path) -> None:
    edit = read_one(tmp_path, COUNTERFACTUAL)
    assert edit.consequences == (
        asked("subject_aliasing", "The position held by Ida is", "bishop"),
        asked("relation_specificity", "The gender of Ida Holm is", "female"),
        asked("forgetfulness", "Ida Holm, not only bishop, is", "mayor"),
    )
    assert edit.neighborhood == (
        Probe("The gender of Ida Holm is", "female"),
        Probe("Ida Holm, not only bishop, is", "mayor"),
    )


def test_a_biography_of_knowedit(tmp_path: Path) -> None:
    edit = read_one(tmp_path, BIOGRAPHY)
    assert edit.text == BIOGRAPHY["text"] and edit.prompt.startswith("This is a passage about {}. ")
    assert (edit.subject, edit.target) == ("ida holm", " She was born in Lund.")
    assert edit.consequences == (asked("relation_specificity", "ida holm field of work", "painting"),)


def test_a_question_of_knowedit(tmp_path: Path) -> None:
    edit = read_one(tmp_path, QUESTION)
    assert (edit.target_old, edit.paraphrases) == ("Orniidae", ("What family are Ornia?",))
    assert [one.criterion for one in edit.consequences] == ["reasoning", "relation_specificity"]


@pytest.mark.parametrize("missing", [None, {}, {"Reasoning": None}, {"Reasoning": [None]}])
def test_a_row_may_have_no_consequences(tmp_path: Path, missing: Any) -> None:
    assert read_one(tmp_path, plain(portability=missing, locality=missing)).consequences == ()


def test_prompts_and_answers_of_easyedit_come_in_lists(tmp_path: Path) -> None:
    groups = {
        "one_hop": {"prompt": ["P", "Q"], "ground_truth": ["a", ["b", "c"]]},
        "synonym": {"prompt": "R", "ground_truth": "d"},
    }
    edit = read_one(
        tmp_path, plain(portability=groups, locality={"nearby": {"prompt": "S", "ground_truth": "e"}})
    )
    assert edit.consequences == (
        asked("reasoning", "P", "a"),
        asked("reasoning", "Q", "b", "c"),
        asked("subject_aliasing", "R", "d"),
    )
    assert edit.neighborhood == (Probe("S", "e"),)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_are_known_by_any_spelling(criterion: str) -> None:
    for spelled in (
        criterion,
        criterion.upper(),
        criterion.title(),
        criterion.replace("_", " "),
        f" {criterion}",
    ):
        assert criterion_of(spelled.replace("_", "-") if " " in spelled else spelled, "") == criterion
    assert criterion_of("Relation_Specifity", "") == "relation_specificity"


# --- QAEdit --------------------------------------------------------------------------------------


def test_a_row_of_qaedit(tmp_path: Path) -> None:
    row = {
        "id": 1104,
        "source": "NQ",
        "prompt": "who painted the old barn?",
        "target": "Ida Holm",
        "subject": "old barn",
        "rephrase": "Which artist painted the old barn?",
        "locality": [{"loc": "who fed the cat", "loc_ans": "Jo"}, {"loc": "when is noon", "loc_ans": "12"}],
    }
    edit = read_one(tmp_path, row)
    assert (edit.prompt, edit.subject, edit.target) == ("who painted the {}?", "old barn", " Ida Holm")
    assert edit.paraphrases == ("Which artist painted the old barn?",)
    assert edit.neighborhood == (Probe("who fed the cat", "Jo"), Probe("when is noon", "12"))
    assert (edit.id, edit.consequences) == ("0", ())


# --- MQuAKE --------------------------------------------------------------------------------------


def rewrite(subject: str, new: str, **more: Any) -> Row:
    return {
        "prompt": "{} lives in",
        "relation_id": "P1",
        "target_new": {"str": new, "id": "Q2"},
        "target_true": {"str": "Bern", "id": "Q3"},
        "subject": subject,
        "question": f"Where does {subject} live?",
        **more,
    }


def case(*edits: Row | str, **changes: Any) -> Row:
    return {
        "case_id": 7,
        "requested_rewrite": list(edits),
        "questions": [
            "Where does Ann's boss live?",
            "In what town does Ann's boss live?",
            "Whither Ann's boss?",
        ],
        "answer": "Bern",
        "answer_alias": ["Berne"],
        "new_answer": "Lund",
        "new_answer_alias": ["Lunden", "Lund"],
        "new_single_hops": [
            {"question": "Who is Ann's boss?", "cloze": "Ann's boss is", "answer": "Jo", "answer_alias": []},
            {
                "question": "Where does Jo live?",
                "cloze": "Jo lives in",
                "answer": "Lund",
                "answer_alias": ["Lunden"],
            },
        ],
        **changes,
    }


MULTI_HOP = MultiHop(
    ("Where does Ann's boss live?", "In what town does Ann's boss live?", "Whither Ann's boss?"),
    ("Lund", "Lunden"),
    (Query("Who is Ann's boss?", (("Jo",),)), Query("Where does Jo live?", (("Lund", "Lunden"),))),
)


def test_a_case_of_mquake_gives_its_edits_and_the_question_they_answer(tmp_path: Path) -> None:
    one, two = read(tmp_path, case(rewrite("Ann", "Rome"), rewrite("Jo", "Lund")))
    assert [edit.id for edit in (one, two)] == ["7-0", "7-1"]
    assert [edit.text for edit in (one, two)] == ["Ann lives in", "Jo lives in"]
    assert [edit.paraphrases for edit in (one, two)] == [("Where does Ann live?",), ("Where does Jo live?",)]
    assert (one.multi_hop, two.multi_hop) == (None, MULTI_HOP)
    assert (two.target_old, two.relation, two.target_id) == ("Bern", "P1", "Q2")
    assert two.source == "one.json, row 0, requested_rewrite[1]"


def test_a_case_with_one_edit_keeps_its_id(tmp_path: Path) -> None:
    edit = read_one(tmp_path, case(rewrite("Jo", "Lund")))
    assert (edit.id, edit.source, edit.multi_hop) == ("7", "one.json, row 0", MULTI_HOP)


def test_slices_count_cases(tmp_path: Path) -> None:
    two = [rewrite("Ann", "Rome"), rewrite("Jo", "Lund")]
    path = write(tmp_path / "a.json", [case(*two, case_id=i) for i in range(3)])
    assert [edit.id for edit in load_edits(path + "[1:]")] == ["1-0", "1-1", "2-0", "2-1"]
    assert load_edits(path).rows == 3


# --- RippleEdits ---------------------------------------------------------------------------------


def query(prompt: str, *answers: Any, **more: Any) -> Row:
    return {"prompt": prompt, "answers": list(answers), "query_type": "regular", "phrase": None, **more}


def known(value: str, *aliases: str) -> Row:
    return {"value": value, "aliases": list(aliases)}


def ripple(sentence: str, relation: str = "MOTHER", old: str | None = None, **tests: Any) -> Row:
    edit: Row = {"prompt": sentence, "subject_id": "Q1", "relation": relation, "target_id": "Q2"}
    if old is not None:
        edit["original_fact"] = {"prompt": old, "subject_id": "Q1", "relation": relation, "target_id": "Q3"}
    return {"example_type": "popular", "edit": edit, **tests}


def test_a_row_of_ripple_edits(tmp_path: Path) -> None:
    asks = query("The aunts of Ann Lee are", known("Mia", "Mia L."), known("Eva"))
    before = query("The sisters of Ida are", known("Mia"), known(""), known(" ", "Eva"))
    edit = read_one(
        tmp_path,
        ripple(
            "The name of the mother of Ann Lee is Ida Holm.",
            old="The name of the mother of Ann Lee is Jo.",
            Logical_Generalization=[
                {"test_queries": [asks, asks], "test_condition": "AND", "condition_queries": [before]}
            ],
            Relation_Specifity=[{"test_queries": [asks], "test_condition": "OR", "condition_queries": []}],
            Compositionality_I=[{"test_queries": [query("Nobody is"), query("x", known(""))]}],
            Compositionality_II=[],
        ),
    )
    assert (edit.prompt, edit.subject) == ("The name of the mother of {} is", "Ann Lee")
    assert (edit.target_new, edit.target_old) == ("Ida Holm", "Jo")
    assert (edit.relation, edit.target_id) == ("MOTHER", "Q2")
    aunts = Query("The aunts of Ann Lee are", (("Mia", "Mia L."), ("Eva",)))
    sisters = Query("The sisters of Ida are", (("Mia",), ("Eva",)))
    assert edit.consequences == (
        Consequence("logical_generalization", (aunts, aunts), False, (sisters,)),
        Consequence("relation_specificity", (aunts,), True),
    )


@pytest.mark.parametrize(
    ("relation", "sentence", "prompt", "subject", "target"),
    [
        ("FOLLOWED_BY", "Act I is followed by Act II.", "{} is followed by", "Act I", "Act II"),
        ("COUNTRY", "The name of the country which Orn is associated with is Tamm.", None, "Orn", "Tamm"),
        (
            "PLACE_OF_DEATH",
            "The place of death of Ann is Lund.",
            "The place of death of {} is",
            "Ann",
            "Lund",
        ),
        ("CAST_MEMBER", "The names of the cast members of Orn are Jo.", None, "Orn", "Jo"),
        ("FIELD_OF_WORK", "The name of the field of work of A of B is C.", None, "A of B", "C"),
        ("MOTHER", "The name of the mother of Ann is Ida Jr..", None, "Ann", "Ida Jr."),
    ],
)
def test_a_sentence_is_taken_apart_by_the_wording_of_its_relation(
    tmp_path: Path, relation: str, sentence: str, prompt: str | None, subject: str, target: str
) -> None:
    edit = read_one(tmp_path, ripple(sentence, relation))
    assert (edit.subject, edit.target_new, edit.target_old) == (subject, target, None)
    assert f"{edit.text} {target}." == sentence
    assert prompt is None or edit.prompt == prompt


TWICE = "The name of the author of What is it is Who is she."


def test_a_sentence_with_several_readings_is_taken_apart_by_labels(tmp_path: Path) -> None:
    refusal = message(write(tmp_path / "a.json", [ripple(TWICE, "AUTHOR")]))
    assert "row 0: edit.prompt: several ways" in refusal and "edit.subject" in refusal
    asks = query("x", known("other"), known("Who is she", "She"), target_ids=["Q9", "Q2"])
    two_hop = query(
        "x", known("Who is she"), query_type="two_hop", target_ids=["Q9"], second_hop_target_ids=["Q2"]
    )
    row = ripple(TWICE, "AUTHOR")
    rows = [
        ripple(TWICE, "AUTHOR", Subject_Aliasing=[{"test_queries": [asks]}]),
        ripple(TWICE, "AUTHOR", Compositionality_I=[{"test_queries": [two_hop]}]),
        ripple(TWICE, "AUTHOR", old="The name of the author of What is it is Jo."),
        {**row, "edit": {**row["edit"], "subject": "What is it", "target": "Who is she"}},
    ]
    for edit in read(tmp_path, *rows):
        assert (edit.prompt, edit.subject) == ("The name of the author of {} is", "What is it")
        assert edit.target_new == "Who is she"


@pytest.mark.parametrize(
    ("relation", "sentence"),
    [
        ("UNHEARD_OF", "Ann likes moss."),
        ("MOTHER", "The father of Ann is Jo."),
        ("MOTHER", "The name of the mother of Ann is ."),
    ],
)
def test_a_sentence_in_another_wording_is_refused_without_labels(
    tmp_path: Path, relation: str, sentence: str
) -> None:
    assert "edit.prompt: no way" in message(write(tmp_path / "a.json", [ripple(sentence, relation)]))


def test_labels_replace_the_wording(tmp_path: Path) -> None:
    row = ripple("Ann likes moss.", "UNHEARD_OF", old="Ann likes ferns.")
    row["edit"] |= {"subject": "Ann", "target": "moss"}
    edit = read_one(tmp_path, row)
    assert (edit.prompt, edit.target_new, edit.target_old) == ("{} likes", "moss", "ferns")


# --- rows that are refused -----------------------------------------------------------------------

FACT = "The name of the mother of Ann Lee is Ida Holm."


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            plain(portability={"Reasonign": []} | {"Resoning": [{"prompt": "p"}]}),
            ["portability: ", "mean 'reasoning'"],
        ),
        (plain(portability="x"), ["portability: expected an object of groups"]),
        (
            plain(portability={"Reasoning": [{"question": "p"}]}),
            ["portability 'Reasoning'", "found 'question'"],
        ),
        (
            plain(portability={"Reasoning": [{"prompt": "p", "ground_truth": [3]}]}),
            ["(its answer)", "number (3)"],
        ),
        (plain(portability={"New Question": "", "New Answer": "a"}), ["portability.New Question: empty"]),
        (plain(attribute_snippets=[{"text": "t"}]), ["attribute_snippets: expected a string"]),
        (
            ripple(FACT, Logical_Generalisation=[{}]),
            ["Logical_Generalisation", "mean 'logical_generalization'"],
        ),
        (
            ripple(FACT, Forgetfulness=[{"test_queries": ["x"]}]),
            ["Forgetfulness[0].test_queries[0]: expected an object"],
        ),
        (
            ripple(FACT, Forgetfulness=[{"test_queries": [{"answers": []}]}]),
            ["test_queries[0].prompt: missing"],
        ),
        (
            ripple(FACT, Forgetfulness=[{"test_queries": [query("p", known("a"))], "test_condition": "XOR"}]),
            ["test_condition: expected OR or AND, found 'XOR'"],
        ),
        (ripple(FACT, Forgetfulness="x"), ["Forgetfulness: expected a list"]),
        ({"edit": {"prompt": FACT}}, ["edit.relation: missing"]),
        (case(), ["requested_rewrite: expected an object or a list"]),
        (case(rewrite("Ann", "Rome"), rewrite("", "Lund")), ["requested_rewrite[1].subject: empty"]),
        (
            case(rewrite("Ann", "Rome"), rewrite("Jo", "Lund", prompt="{} {}")),
            ["requested_rewrite[1].prompt"],
        ),
        (case(rewrite("Ann", "Rome"), "x"), ["requested_rewrite[1]: expected an object, found a string"]),
        (case(rewrite("Ann", "Rome"), new_answer="", new_answer_alias=[]), ["new_answer: missing"]),
        (case(rewrite("Ann", "Rome"), questions=[]), ["questions: missing"]),
        (
            plain(consequences=[{"criterion": "x", "test_queries": []}]),
            ["consequences[0].", "no criterion 'x'"],
        ),
    ],
)
def test_a_misspelled_question_is_named(tmp_path: Path, row: Any, expected: list[str]) -> None:
    text = message(write(tmp_path / "bad.json", [plain(), row]))
    for part in (f"{tmp_path / 'bad.json'}, row 1: ", *expected):
        assert part in text
