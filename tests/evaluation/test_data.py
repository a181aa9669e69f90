"""Rows of the paper's tasks: both folder layouts, the hub's columns, what is skipped and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from harness_rect.errors import UserError
from harness_rect.evaluation import data

SOURCES = tuple(source for source in data.SOURCES.values() if source.paper_file)
REASONING, NLI, OPEN_DOMAIN_QA, CLOSED_DOMAIN_QA, DIALOGUE, SUMMARIZATION, NER, SENTIMENT = SOURCES

# One made-up pair of rows a task: as our JSONL has them, and as the documents they become.
OURS: dict[str, list[dict[str, Any]]] = {
    "gsm8k.jsonl": [
        {"question": "Ana has 1,000 nuts\r\nand finds 2. ", "answer": "1000 + 2 = 1002 nüts\n#### 1,002"},
        {"question": "Two and two?", "answer": "It is 4.\n#### 4"},
    ],
    "rte.jsonl": [
        {"sentence1": 'The "old mill closed.', "sentence2": "A mill closed.", "label": 0},
        {"sentence1": "Röd cats sleep. ", "sentence2": "Cats bark.", "label": 1},
    ],
    "nq_open.jsonl": [
        {"question": "who built it", "answer": ["Mo", "Mo Li"], "output": ["\n\nMo Li built it.", "unused"]},
        {"question": "where is it", "answer": ["Here"], "output": ["It is here."]},
    ],
    "boolq.jsonl": [
        {"question": "is tin a metal", "passage": "Tin — a metal.", "answer": True},
        {"question": "is it gold", "passage": "It is tin.", "answer": False},
    ],
    "mutual.jsonl": [
        {"article": "m : it 's late .", "options": ["go .", "f : no .", "eh .", "ok ."], "answers": "B"},
        {"article": "f : hej \u2028 du", "options": ["a .", "b .", "c .", "d ."], "answers": "D"},
    ],
    "samsum.jsonl": [
        {"id": "7", "dialogue": "Bo: hi\r\nCy: 🙂 hi\r\n", "summary": "Bo greets Cy."},
        {"id": "8", "dialogue": "Di: bye", "summary": "Di leaves."},
    ],
    "conll2003.jsonl": [
        {
            "tokens": ["Ada", "Lo", "met", "Bob", ",", "in", "Oslo", "."],
            "ner_tags": ["B-PER", "I-PER", "O", "B-PER", "O", "O", "B-LOC", "O"],
        },
        {"tokens": ["Rain", "fell"], "ner_tags": ["O", "O"]},
    ],
    "sst2.jsonl": [
        {"sentence": "warm and funny . ", "label": 1},
        {"sentence": 'a "dull film', "label": 0},
    ],
}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text.encode("utf-8"))
    return path


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    folder = tmp_path / "ours"
    folder.mkdir()
    for name, rows in OURS.items():
        write_jsonl(folder / name, rows)
    return folder


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    """The same rows in the layout of the paper's data folder."""
    folder = tmp_path / "paper"
    (folder / "test-dialogue").mkdir(parents=True)
    write_jsonl(folder / "test-reasoning.jsonl", OURS["gsm8k.jsonl"])
    write_jsonl(folder / "test-OpenDomainQA.jsonl", OURS["nq_open.jsonl"])
    write_jsonl(folder / "test-ClosedDomainQA.jsonl", OURS["boolq.jsonl"])
    (folder / "test-summarization.json").write_text(json.dumps(OURS["samsum.jsonl"], indent=1))

    lines = ["index\tsentence1\tsentence2\tlabel"]
    for index, row in enumerate(OURS["rte.jsonl"]):
        label = ["entailment", "not_entailment"][row["label"]]
        lines.append(f"{index}\t{row['sentence1']}\t{row['sentence2']}\t{label}")
    (folder / "test-NLI.tsv").write_bytes(("\n".join(lines) + "\n").encode())

    lines = ["whatever\tthe header says"]
    lines += [f"{row['sentence']}\t{row['label']}" for row in OURS["sst2.jsonl"]]
    (folder / "test-SentimentAnalysis.tsv").write_bytes("\r\n".join(lines).encode())

    # One file as a Python literal, one as JSON; the numbers sort as numbers (2 before 10).
    python_row, json_row = OURS["mutual.jsonl"]
    (folder / "test-dialogue" / "dev_2.txt").write_text(repr(python_row), encoding="utf-8")
    (folder / "test-dialogue" / "dev_10.txt").write_text(json.dumps(json_row), encoding="utf-8")
    (folder / "test-dialogue" / "notes.txt").write_text("not a dialogue")

    lines = ["-DOCSTART- -X- -X- O", ""]
    for row in OURS["conll2003.jsonl"]:
        words = zip(row["tokens"], row["ner_tags"], strict=True)
        lines += [*(f"{token} NNP B-NP {tag}" for token, tag in words), ""]
    (folder / "test-NER.txt").write_text("\n".join(lines[:-1]))  # no blank line behind the last sentence
    return folder


def test_canonical_documents(ours: Path) -> None:
    docs = {source.task: data.documents(source, str(ours)) for source in SOURCES}
    for source in (REASONING, NLI, CLOSED_DOMAIN_QA, DIALOGUE, SENTIMENT):  # columns as they are
        assert docs[source.task] == OURS[source.file]
    passage = "\n\nMo Li built it."
    first = {"question": "who built it", "answers": ["Mo", "Mo Li"], "passage": passage}
    assert docs["rect_open_domain_qa"][0] == first
    summary = {"dialogue": "Bo: hi\r\nCy: 🙂 hi\r\n", "summary": "Bo greets Cy."}
    assert docs["rect_summarization"][0] == summary
    entities = {"Person": ["Ada Lo", "Bob"], "Location": ["Oslo"], "Organization": [], "Miscellaneous": []}
    assert docs["rect_ner"][:4] == [
        {"text": "Ada Lo met Bob, in Oslo.", "entity_type": name, "entities": found}
        for name, found in entities.items()
    ]
    assert len(docs["rect_ner"]) == 8


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.task)
def test_paper_folder_gives_the_same_documents(ours: Path, paper: Path, source: data.Source) -> None:
    assert data.documents(source, str(paper)) == data.documents(source, str(ours))


def test_layouts_mix_and_jsonl_wins(paper: Path) -> None:
    write_jsonl(paper / "rte.jsonl", [{"sentence1": "x", "sentence2": "y", "label": 1}])
    assert len(data.documents(NLI, str(paper))) == 1
    assert len(data.documents(SENTIMENT, str(paper))) == 2


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.task)
def test_entry_points_return_a_test_split(ours: Path, source: data.Source) -> None:
    function = getattr(data, source.task.removeprefix("rect_"))
    splits = function(data=str(ours), pretrained="gpt2", version=1.0, edits="zsre", nobody_knows=object())
    assert list(splits) == ["test"]
    assert splits["test"].to_list() == data.documents(source, str(ours))


@pytest.mark.parametrize(
    ("metadata", "chosen"),
    [
        ({}, "hub"),
        ({"pretrained": "rect-tiny"}, "tiny"),
        ({"pretrained": "gpt2"}, "hub"),
        ({"pretrained": "gpt2", "data": "tiny"}, "tiny"),
        ({"pretrained": "rect-tiny", "data": "hub"}, "hub"),
        ({"data": "some/folder"}, "some/folder"),
        ({"pretrained": "gpt2", "data": None}, "hub"),
    ],
)
def test_data_choice(metadata: dict[str, Any], chosen: str) -> None:
    assert data.data_choice(metadata) == chosen


# ------------------------------------------------------------------------------------------------- BIO


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O B-PER I-PER O", [("PER", 1, 3)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),  # adjacent: the paper's parser loses the second
        ("B-PER B-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
        ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),  # I- of another type starts one
        ("O I-ORG I-ORG", [("ORG", 1, 3)]),  # I- after O starts one
        ("I-ORG B-ORG I-ORG", [("ORG", 0, 1), ("ORG", 1, 3)]),
        ("B-PER O I-PER", [("PER", 0, 1), ("PER", 2, 3)]),
        ("O B-MISC", [("MISC", 1, 2)]),  # one that ends the sentence
        ("O O", []),
    ],
)
def test_entity_spans(tags: str, spans: list[tuple[str, int, int]]) -> None:
    assert data.entity_spans(tags.split()) == spans


def test_integer_tags_mean_the_usual_classes(tmp_path: Path) -> None:
    tokens = list("abcdefghi")
    integers = write_jsonl(tmp_path / "conll2003.jsonl", [{"tokens": tokens, "ner_tags": list(range(9))}])
    entities = {doc["entity_type"]: doc["entities"] for doc in data.documents(NER, str(integers.parent))}
    names = ("Person", "Organization", "Location", "Miscellaneous")
    assert entities == dict(zip(names, (["b c"], ["d e"], ["f g"], ["h i"]), strict=True))


def test_detokenize() -> None:
    assert data.detokenize(["U.S.", ",", "Inc", ".", "(", "x", ")", "!"]) == "U.S., Inc. ( x ) !"
    assert data.detokenize([",", "then"]) == ", then"


# -------------------------------------------------------------------------------------- rows that go


def _skipped(caplog: pytest.LogCaptureFixture) -> str:
    assert len(caplog.records) == 1, "one warning a task"
    message = caplog.records[0].getMessage()
    assert "\n" not in message
    return message


def test_unusable_rows_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = {"sentence1": "a", "sentence2": "b", "label": 1}
    bad = [{**good, "label": -1}, {**good, "sentence2": "  "}, {"sentence1": "a", "label": 0}]
    bad += [{**good, "label": True}, {**good, "sentence1": 5}, {**good, "label": None}]
    write_jsonl(tmp_path / "rte.jsonl", [good, *bad, good])
    with caplog.at_level(logging.WARNING):
        assert data.documents(NLI, str(tmp_path)) == [good, good]
    assert _skipped(caplog) == (
        "rect_nli: 6 of 8 rows skipped: "
        "row 1 (line 2): label: -1 is not 0 (entailment) or 1 (not_entailment); "
        "row 2 (line 3): sentence2: empty; row 3 (line 4): sentence2: missing; "
        "row 4 (line 5): label: True is not 0 (entailment) or 1 (not_entailment); "
        "row 5 (line 6): sentence1: expected a string, found a number (5); and 1 more"
    )


@pytest.mark.parametrize(
    ("source", "row", "reason"),
    [
        (REASONING, {"question": "q", "answer": "no number"}, "no number after '#### '"),
        (REASONING, {"question": "q", "answer": "so #### ,"}, "no number after '#### '"),
        (
            OPEN_DOMAIN_QA,
            {"question": "q", "answer": [], "passage": "p"},
            "answer: expected a list of strings",
        ),
        (
            OPEN_DOMAIN_QA,
            {"question": "q", "answer": ["a"], "output": []},
            "output: expected a list of strings",
        ),
        (OPEN_DOMAIN_QA, {"question": "\ud83d", "answer": ["a"], "text": "p"}, "half of a surrogate pair"),
        (CLOSED_DOMAIN_QA, {"question": "q", "passage": "p", "answer": "maybe"}, "'maybe' is not true"),
        (DIALOGUE, {"article": "a", "options": list("wxyz"), "answers": "E"}, "'E' is not A, B, C or D"),
        (DIALOGUE, {"article": "a", "options": list("wxy"), "answers": "A"}, "expected a list of 4 strings"),
        (SUMMARIZATION, {"dialogue": "", "summary": "s"}, "dialogue: empty"),
        (NER, {"tokens": ["a"], "ner_tags": ["B-DATE"]}, "ner_tags: 'B-DATE' is not"),
        (NER, {"tokens": ["a"], "ner_tags": [9]}, "ner_tags: 9 is not"),
        (NER, {"tokens": ["a", "b"], "ner_tags": [0]}, "1 tags for 2 tokens"),
        (SENTIMENT, {"sentence": "s", "label": 2}, "label: 2 is not"),
    ],
)
def test_every_kind_of_unusable_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: data.Source, row: dict[str, Any], reason: str
) -> None:
    good = OURS[source.file]
    (tmp_path / source.file).write_text("".join(json.dumps(r) + "\n" for r in [good[0], row, good[1]]))
    with caplog.at_level(logging.WARNING):
        docs = data.documents(source, str(tmp_path))
    assert len(docs) == (8 if source is NER else 2)
    message = _skipped(caplog)
    assert message.startswith(f"{source.task}: 1 of 3 rows skipped: row 1 (line 2): ") and reason in message


def test_table_row_with_a_stray_tab_is_skipped(paper: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (paper / "test-NLI.tsv").open("a") as file:
        file.write("9\tone\ttwo\tthree\tentailment\n")
    assert len(data.documents(NLI, str(paper))) == 2
    assert "1 of 3 rows skipped: row 2 (line 4)" in _skipped(caplog)


def test_lone_carriage_return_stays_inside_its_cell(tmp_path: Path) -> None:
    (tmp_path / "test-SentimentAnalysis.tsv").write_bytes(b"text\tlabel\nodd\rbut fine\t1\n")
    assert data.documents(SENTIMENT, str(tmp_path)) == [{"sentence": "odd\rbut fine", "label": 1}]


def test_other_names_for_a_column(tmp_path: Path) -> None:
    rows = [{"question": "q", "answers": ["a"], "text": "t", "passage": "p"}]
    write_jsonl(tmp_path / "nq_open.jsonl", [*rows, {"question": "q", "answer": "a", "passage": "p"}])
    assert [doc["passage"] for doc in data.documents(OPEN_DOMAIN_QA, str(tmp_path))] == ["t", "p"]
    write_jsonl(tmp_path / "boolq.jsonl", [{"question": "q", "passage": "p", "label": 1}])
    assert data.documents(CLOSED_DOMAIN_QA, str(tmp_path))[0]["answer"] is True


# ---------------------------------------------------------------------------------- files that do not


def _error(source: data.Source, where: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        data.documents(source, str(where))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    message = _error(NLI, tmp_path)
    assert message.startswith(f"rect_nli: expected rte.jsonl or the paper's test-NLI.tsv in {tmp_path};")
    message = _error(SENTIMENT, tmp_path / "nowhere")
    assert "is not a folder; expected hub, tiny or a folder with sst2.jsonl" in message


def test_missing_column_names_what_was_found(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rte.jsonl", [{"premise": "a", "sentence2": "b", "label": 1}] * 2)
    assert _error(NLI, tmp_path) == (
        f"rect_nli: {tmp_path / 'rte.jsonl'} has no column sentence1 in its first 2 rows; "
        "expected sentence1, sentence2, label; found label, premise, sentence2"
    )
    write_jsonl(tmp_path / "nq_open.jsonl", [{"question": "q", "answer": ["a"]}])
    assert "has no column text or passage or output in" in _error(OPEN_DOMAIN_QA, tmp_path)


@pytest.mark.parametrize(
    ("source", "file", "content", "said"),
    [
        (NLI, "rte.jsonl", '{"sentence1": "a"}\n\n{"sentence1": \n', "rte.jsonl, line 3: malformed JSON"),
        (NLI, "rte.jsonl", '{"sentence1": "a"}\n3\n', "row 1 (line 2): expected a JSON object"),
        (NLI, "rte.jsonl", "\n\n", "rte.jsonl is empty; expected rows with sentence1, sentence2, label"),
        (NLI, "rte.jsonl", '{"sentence1": "a", "sentence2": "b", "label": 7}', "none of the 1 rows of"),
        (SUMMARIZATION, "test-summarization.json", '[{"id": 1},\n{]', "line 2: malformed JSON"),
        (SUMMARIZATION, "test-summarization.json", '{"id": 1}', "no column dialogue"),
        (SUMMARIZATION, "test-summarization.json", "[3]", "row 0: expected a JSON object, found a number"),
        (DIALOGUE, "test-dialogue/dev_1.txt", "__import__('os')", "dev_1.txt: not a JSON object"),
        (DIALOGUE, "test-dialogue/other.txt", "{}", "test-dialogue is empty"),
        (NLI, "test-NLI.tsv", "index\tsentence1\tsentence2\tlabel\n", "test-NLI.tsv is empty"),
        (NLI, "test-NLI.tsv", "i\tpremise\tsentence2\tlabel\n1\ta\tb\tx", "no column sentence1"),
        (NER, "test-NER.txt", "-DOCSTART- -X- -X- O\n\n", "test-NER.txt is empty"),
        (NER, "test-NER.txt", "word\nother\n", "(row 0 (line 1): ner_tags: '' is not"),
    ],
)
def test_broken_files(tmp_path: Path, source: data.Source, file: str, content: str, said: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    message = _error(source, tmp_path)
    assert said in message and str(tmp_path) in message


# ------------------------------------------------------------------------------------------------- hub


def test_hub_rows_and_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(*place: str, split: str) -> Dataset:
        asked.append((*place, split))
        return Dataset.from_list([{"sentence1": "a", "sentence2": "b", "label": 0, "idx": 0}])

    monkeypatch.setattr(data, "load_dataset", fake)
    assert data.nli(pretrained="gpt2")["test"].to_list() == [{"sentence1": "a", "sentence2": "b", "label": 0}]
    assert asked == [("nyu-mll/glue", "rte", "train")]
    assert _error(REASONING, "hub") == (
        "rect_reasoning: openai/gsm8k (main, test) has no column question in its first 1 rows; "
        "expected question, answer; found idx, label, sentence1, sentence2"
    )


def test_hub_splits_are_the_paper_s() -> None:
    assert {source.task: source.hub for source in SOURCES} == {
        "rect_reasoning": ("openai/gsm8k", "main", "test"),
        "rect_nli": ("nyu-mll/glue", "rte", "train"),
        "rect_open_domain_qa": ("florin-hf/nq_open_gold", None, "test"),
        "rect_closed_domain_qa": ("google/boolq", None, "validation"),
        "rect_dialogue": ("EleutherAI/mutual", "mutual", "validation"),
        "rect_summarization": ("knkarthick/samsum", None, "validation"),
        "rect_ner": ("lhoestq/conll2003", None, "test"),
        "rect_sentiment": ("nyu-mll/glue", "sst2", "validation"),
    }


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach it\nat all"), "cannot be reached for openai/gsm8k"),
        (ValueError('Unknown split "test"'), "did not give openai/gsm8k (main, test)"),
        (FileNotFoundError("no such dataset"), "did not give openai/gsm8k (main, test)"),
    ],
)
def test_hub_failures(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def fail(*_: Any, **__: Any) -> Dataset:
        raise error

    monkeypatch.setattr(data, "load_dataset", fail)
    message = _error(REASONING, "hub")
    assert f"the Hugging Face hub {said}" in message
    assert "data=FOLDER works offline and reads FOLDER/gsm8k.jsonl" in message


def test_the_lm_eval_command_prints_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness_rect.errors.inside_lm_eval_command", lambda: True)
    with pytest.raises(SystemExit) as caught:
        data.sentiment(data=str(tmp_path))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: rect_sentiment: expected sst2.jsonl or")
