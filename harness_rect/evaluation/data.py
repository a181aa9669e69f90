"""Rows for the eight general tasks of Gu et al. 2024, wherever they come from, in one shape for each task.

lm-eval calls one of the eight functions at the end of this file (``custom_dataset:`` in the task YAML) with
all it knows as metadata: the model arguments, ``--metadata``, the YAML's own. Only two keys are read:

* ``data``: ``hub`` (the Hugging Face hub), ``tiny`` (the rows inside this package) or a folder. A folder
  holds our JSONL files, the paper's own data files, or both; where a task finds both, it reads the JSONL.
* ``pretrained``: without ``data``, the tasks read ``tiny`` for ``rect-tiny`` or no model, else ``hub``.

Every source goes the same way: a reader yields ``(where, row)``, an adaptor turns a row into documents. A row
that cannot be used is skipped and counted in one warning; a file that cannot be used is a ``UserError``.

Canonical documents:

    rect_reasoning        question, answer (with ``#### number`` at its end)
    rect_nli              sentence1, sentence2, label (0 entailment, 1 not_entailment)
    rect_open_domain_qa   question, answers (list), passage
    rect_closed_domain_qa question, passage, answer (bool)
    rect_dialogue         article, options (four), answers (a letter)
    rect_summarization    dialogue, summary
    rect_ner              text, entity_type (as the prompt names it), entities (list): four a sentence
    rect_sentiment        sentence, label (0 negative, 1 positive)

Texts are passed on as they are: never stripped, ``\\r\\n`` and non-ASCII intact.
"""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from harness_rect import embedded
from harness_rect.errors import UserError, one_line_errors
from harness_rect.evaluation.catalogue import TASKS

log = logging.getLogger(__name__)

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row]]
Document = dict[str, Any]

# The entity types of CoNLL-2003 with their names in the prompt, in the order the paper's script asks.
ENTITY_TYPES = {"PER": "Person", "LOC": "Location", "ORG": "Organization", "MISC": "Miscellaneous"}
# What the integers mean where a file or a hub dataset stores `ner_tags` as class indices.
CONLL_TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")

_HEAD = 20  # a column absent from this many first rows is absent from the file
_REASONS_SHOWN = 5


class _UnusableRow(Exception):
    """One row cannot become a document; the message says why and goes into the warning."""


# ---------------------------------------------------------------------------------------------- readers


def _read_text(path: Path) -> str:
    try:
        # newline="" keeps \r\n; utf-8-sig drops the byte-order mark some editors write.
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a readable text file") from None


def _read_jsonl(path: Path) -> Rows:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                "expected one JSON object a line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number}: found a {type(row).__name__}; expected one JSON object a line"
            )
        yield f"row {number}", row


def _read_json_list(path: Path) -> Rows:
    try:
        rows = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}); "
            "expected a list of objects"
        ) from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: found a {type(rows).__name__}; expected a list of objects")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: found a {type(row).__name__}; expected an object")
        yield f"row {number}", row


def _read_tsv(path: Path, header: Sequence[str] | None = None) -> Rows:
    """Rows of a tab-separated file, keyed by its first line, or by ``header`` in place of the first line.

    Split by hand: the paper's files know no quoting (a sentence may hold a lone double quote), and csv would
    also break a row at a carriage return and refuse a long field.
    """
    lines = _read_text(path).split("\n")
    names = list(header) if header else lines[0].rstrip("\r").split("\t")
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = line.removesuffix("\r").split("\t")
        # With too few or too many cells nobody knows which text is which: a row without any field.
        yield f"line {number}", dict(zip(names, cells, strict=True)) if len(cells) == len(names) else {}


def _read_sentiment_tsv(path: Path) -> Rows:
    # The paper's script skips the header whatever it says and reads the columns by position.
    return _read_tsv(path, header=("sentence", "label"))


def _read_dialogue_folder(path: Path) -> Rows:
    numbered = []
    for file in path.glob("dev_*.txt"):
        match = re.fullmatch(r"dev_(\d+)\.txt", file.name)
        if match:
            numbered.append((int(match[1]), file))
    for _, file in sorted(numbered):
        text = _read_text(file).strip()
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            try:
                row = ast.literal_eval(text)  # the paper's files are Python literals with single quotes
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                row = None
        if not isinstance(row, dict):
            raise UserError(
                f"{file}: not a JSON object or Python dictionary; expected keys article, options, answers"
            )
        yield file.name, row


def _read_conll(path: Path) -> Rows:
    """Sentences of a CoNLL column file: the first column is the word, the last its tag."""
    tokens: list[str] = []
    tags: list[str] = []
    sentences = 0
    for line in [*_read_text(path).split("\n"), ""]:  # a last sentence may lack its blank line
        cells = re.split(r"[ \t]+", line.strip(" \t\r"))  # not str.split(): a word may be a no-break space
        if cells[0] == "-DOCSTART-":
            continue
        if cells[0]:
            tokens.append(cells[0])
            tags.append(cells[-1] if len(cells) > 1 else "")
        elif tokens:
            sentences += 1
            yield f"sentence {sentences}", {"tokens": tokens, "ner_tags": tags}
            tokens, tags = [], []


# --------------------------------------------------------------------------------------------- adaptors


def _first(row: Row, *names: str) -> Any:
    """The value of the first of ``names`` that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise _UnusableRow(f"no {' or '.join(names)}")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _UnusableRow(f"{name} is a {type(value).__name__}, expected text")
    if not value.strip():
        raise _UnusableRow(f"{name} is empty")
    try:
        value.encode("utf-8")  # JSON may smuggle in half a surrogate pair, which no tokenizer accepts
    except UnicodeEncodeError:
        raise _UnusableRow(f"{name} holds half a surrogate pair") from None
    return value


def _class(row: Row, name: str, classes: Mapping[int | str, int], expected: str) -> int:
    value = _first(row, name)
    # A bool is an int to Python: `true` would pass for class 1.
    if isinstance(value, bool) or not isinstance(value, int | str) or value not in classes:
        raise _UnusableRow(f"{name} {value!r} is not {expected}")
    return classes[value]


def _reasoning_row(row: Row) -> list[Document]:
    answer = _text(_first(row, "answer"), "answer")
    number = answer.split("#### ")[1:2]
    if not number or not number[0].replace(",", "").strip():
        raise _UnusableRow("answer has no number after '#### '")
    return [{"question": _text(_first(row, "question"), "question"), "answer": answer}]


_NLI_LABELS: Mapping[int | str, int] = {0: 0, 1: 1, "0": 0, "1": 1, "entailment": 0, "not_entailment": 1}


def _nli_row(row: Row) -> list[Document]:
    return [
        {
            "sentence1": _text(_first(row, "sentence1"), "sentence1"),
            "sentence2": _text(_first(row, "sentence2"), "sentence2"),
            "label": _class(row, "label", _NLI_LABELS, "0 (entailment) or 1 (not_entailment)"),
        }
    ]


def _open_domain_row(row: Row) -> list[Document]:
    answers = _first(row, "answers", "answer")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers:
        raise _UnusableRow("answer is neither text nor a list of texts")
    passage = _first(row, "text", "passage", "output")
    if isinstance(passage, list):
        if not passage:
            raise _UnusableRow("output is an empty list")
        passage = passage[0]
    return [
        {
            "question": _text(_first(row, "question"), "question"),
            "answers": [_text(answer, "answer") for answer in answers],
            "passage": _text(passage, "passage"),
        }
    ]


def _closed_domain_row(row: Row) -> list[Document]:
    answer = _first(row, "answer", "label")
    if answer not in (True, False):  # 0 and 1 equal them
        raise _UnusableRow(f"answer {answer!r} is not true or false")
    return [
        {
            "question": _text(_first(row, "question"), "question"),
            "passage": _text(_first(row, "passage"), "passage"),
            "answer": bool(answer),
        }
    ]


def _dialogue_row(row: Row) -> list[Document]:
    letter = _first(row, "answers")
    if letter not in ("A", "B", "C", "D"):
        raise _UnusableRow(f"answers {letter!r} is not A, B, C or D")
    options = _first(row, "options")
    if not isinstance(options, list) or len(options) != 4:
        raise _UnusableRow("options is not a list of four")
    return [
        {
            "article": _text(_first(row, "article"), "article"),
            "options": [_text(option, "an option") for option in options],
            "answers": letter,
        }
    ]


def _summarization_row(row: Row) -> list[Document]:
    return [
        {
            "dialogue": _text(_first(row, "dialogue"), "dialogue"),
            "summary": _text(_first(row, "summary"), "summary"),
        }
    ]


_SENTIMENT_LABELS: Mapping[int | str, int] = {0: 0, 1: 1, "0": 0, "1": 1}


def _sentiment_row(row: Row) -> list[Document]:
    return [
        {
            "sentence": _text(_first(row, "sentence"), "sentence"),
            "label": _class(row, "label", _SENTIMENT_LABELS, "0 (negative) or 1 (positive)"),
        }
    ]


def _ner_row(row: Row) -> list[Document]:
    tokens = _first(row, "tokens")
    if not isinstance(tokens, list) or not tokens:
        raise _UnusableRow("tokens is not a list of words")
    for token in tokens:
        _text(token, "a token")
    tags = _first(row, "ner_tags")
    if not isinstance(tags, list) or len(tags) != len(tokens):
        raise _UnusableRow("ner_tags is not a list as long as tokens")
    spans = entity_spans([_tag(tag) for tag in tags])
    return [
        {
            "text": detokenize(tokens),
            "entity_type": name,
            "entities": [detokenize(tokens[start:end]) for kind, start, end in spans if kind == code],
        }
        for code, name in ENTITY_TYPES.items()
    ]


def _tag(tag: Any) -> str:
    if isinstance(tag, int) and not isinstance(tag, bool) and 0 <= tag < len(CONLL_TAGS):
        return CONLL_TAGS[tag]
    if tag in CONLL_TAGS:
        return str(tag)
    raise _UnusableRow(f"tag {tag!r} is not O, B-TYPE or I-TYPE of {', '.join(ENTITY_TYPES)}")


def entity_spans(tags: Iterable[str]) -> list[tuple[str, int, int]]:
    """Entities of a BIO-tagged sentence as ``(type, start, end)``, in order.

    ``B-`` always starts an entity, also right behind another; so does ``I-`` after ``O`` or another type (the
    IOB1 form). The paper's script runs each span to the next ``O`` and drops what directly follows an entity.
    """
    spans: list[tuple[str, int, int]] = []
    for position, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if prefix == "O":
            continue
        if prefix == "I" and spans and spans[-1][0] == kind and spans[-1][2] == position:
            spans[-1] = (kind, spans[-1][1], position + 1)
        else:
            spans.append((kind, position, position + 1))
    return spans


def detokenize(tokens: Iterable[str]) -> str:
    """Tokens joined by spaces, with none before ``,`` and ``.`` (the paper's NER prompt)."""
    text = ""
    for token in tokens:
        text += token if not text or token in (",", ".") else f" {token}"
    return text


# ---------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Source:
    """Where one task finds its rows and how a row becomes documents."""

    task: str
    read_paper: Callable[[Path], Rows]
    hub: tuple[str, str | None, str]  # dataset, configuration, split
    columns: tuple[tuple[str, ...], ...]  # each needed column, with the names it goes by
    adapt: Callable[[Row], list[Document]]

    @property
    def file(self) -> str:
        """Our JSON Lines file in a ``data`` folder."""
        return TASKS[self.task].file

    @property
    def paper_file(self) -> str:
        """The file in the paper's own data folder; a folder itself, for the dialogues."""
        return TASKS[self.task].paper_file

    def wanted(self) -> str:
        """The needed columns in words, for error messages."""
        return ", ".join("/".join(names) for names in self.columns)


REASONING = Source(
    "rect_reasoning",
    _read_jsonl,
    ("openai/gsm8k", "main", "test"),
    (("question",), ("answer",)),
    _reasoning_row,
)
NLI = Source(
    "rect_nli",
    _read_tsv,
    ("nyu-mll/glue", "rte", "train"),  # the paper evaluates on RTE's training rows
    (("sentence1",), ("sentence2",), ("label",)),
    _nli_row,
)
OPEN_DOMAIN_QA = Source(
    "rect_open_domain_qa",
    _read_jsonl,
    # Gold passages in place of the paper's model-written ones. Its test split is the part of NQ-open's
    # development set (which the paper uses) that has a gold passage.
    ("florin-hf/nq_open_gold", None, "test"),
    (("question",), ("answers", "answer"), ("text", "passage", "output")),
    _open_domain_row,
)
CLOSED_DOMAIN_QA = Source(
    "rect_closed_domain_qa",
    _read_jsonl,
    ("google/boolq", None, "validation"),
    (("question",), ("passage",), ("answer", "label")),
    _closed_domain_row,
)
DIALOGUE = Source(
    "rect_dialogue",
    _read_dialogue_folder,
    ("EleutherAI/mutual", "mutual", "validation"),
    (("article",), ("options",), ("answers",)),
    _dialogue_row,
)
SUMMARIZATION = Source(
    "rect_summarization",
    _read_json_list,
    ("knkarthick/samsum", None, "validation"),  # the paper's 818 rows are the validation split
    (("dialogue",), ("summary",)),
    _summarization_row,
)
NER = Source(
    "rect_ner",
    _read_conll,
    ("lhoestq/conll2003", None, "test"),
    (("tokens",), ("ner_tags",)),
    _ner_row,
)
SENTIMENT = Source(
    "rect_sentiment",
    _read_sentiment_tsv,
    ("nyu-mll/glue", "sst2", "validation"),
    (("sentence",), ("label",)),
    _sentiment_row,
)
SOURCES = (REASONING, NLI, OPEN_DOMAIN_QA, CLOSED_DOMAIN_QA, DIALOGUE, SUMMARIZATION, NER, SENTIMENT)


def data_choice(metadata: Mapping[str, Any]) -> str:
    """``hub``, ``tiny`` or a folder, from lm-eval's metadata; see the top of this file for the default."""
    return str(embedded.of_tasks(metadata).get("data") or "hub")


def _open_hub(source: Source) -> tuple[str, Rows]:
    path, name, split = source.hub
    origin = f"{path} ({name + ', ' if name else ''}{split})"
    try:
        dataset = load_dataset(path, name, split=split)
    except Exception as error:  # network, cache, renamed dataset or split: many libraries, many types
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        said = (
            "the Hugging Face hub cannot be reached for"
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            else "the Hugging Face hub did not give"
        )
        raise UserError(
            f"{source.task}: {said} {origin} [{why}]; "
            f"data=FOLDER works offline and reads FOLDER/{source.file}"
        ) from None
    return origin, ((f"row {number}", row) for number, row in enumerate(dataset, start=1))


def _open_folder(source: Source, folder: Path) -> tuple[str, Rows]:
    if not folder.is_dir():
        raise UserError(
            f"{source.task}: data={folder} is not a folder; expected hub, tiny or a folder with {source.file}"
        )
    ours, paper = folder / source.file, folder / source.paper_file
    if ours.exists():
        return str(ours), _read_jsonl(ours)
    if paper.exists():
        return str(paper), source.read_paper(paper)
    raise UserError(
        f"{source.task}: {folder} holds neither {source.file} nor the paper's {source.paper_file}; "
        f"put one there, with {source.wanted()}"
    )


def documents(source: Source, data: str) -> list[Document]:
    """All documents of one task.

    Reads the rows ``data`` names and returns them in the task's canonical form. Rows that cannot be used are
    skipped and counted in one warning. Raises ``UserError`` for a source that cannot be reached or read, is
    empty, lacks a column, or has no usable row. The files are those of Gu et al. 2024 (evaluation scripts).
    """
    if data == "tiny":
        origin, stream = _open_folder(source, embedded.DATA)
    elif data == "hub":
        origin, stream = _open_hub(source)
    else:
        origin, stream = _open_folder(source, Path(data).expanduser())

    rows = list(stream)
    if not rows:
        raise UserError(f"{source.task}: {origin} is empty; expected rows with {source.wanted()}")
    head = [row for _, row in rows[:_HEAD]]
    for names in source.columns:
        if not any(name in row for row in head for name in names):
            found = ", ".join(sorted({str(key) for row in head for key in row})) or "no complete row"
            raise UserError(
                f"{source.task}: {origin} has no column {' or '.join(names)} in its first {len(head)} rows; "
                f"expected {source.wanted()}; found {found}"
            )

    docs: list[Document] = []
    skipped: list[str] = []
    for where, row in rows:
        try:
            docs += source.adapt(row)
        except _UnusableRow as reason:
            skipped.append(f"{where}: {reason}")
    if not docs:
        raise UserError(
            f"{source.task}: none of the {len(rows)} rows of {origin} can be used ({skipped[0]}); "
            f"expected {source.wanted()}"
        )
    if skipped:
        more = len(skipped) - _REASONS_SHOWN
        log.warning(
            "%s: %d of %d rows skipped: %s%s",
            source.task,
            len(skipped),
            len(rows),
            "; ".join(skipped[:_REASONS_SHOWN]),
            f"; and {more} more" if more > 0 else "",
        )
    return docs


def _splits(source: Source, metadata: Mapping[str, Any]) -> dict[str, Dataset]:
    with one_line_errors():
        return {"test": Dataset.from_list(documents(source, data_choice(metadata)))}


# ------------------------------------------------------------------- what the task YAMLs call, one a task
# Each returns {"test": Dataset} of the canonical documents at the top of this file and ignores metadata it
# does not know. Each raises UserError as `documents` does (one line and status 2 under the lm_eval command).


def reasoning(**metadata: Any) -> dict[str, Dataset]:
    """GSM8K test."""
    return _splits(REASONING, metadata)


def nli(**metadata: Any) -> dict[str, Dataset]:
    """RTE, the GLUE train rows."""
    return _splits(NLI, metadata)


def open_domain_qa(**metadata: Any) -> dict[str, Dataset]:
    """NQ-open dev, each question with one passage."""
    return _splits(OPEN_DOMAIN_QA, metadata)


def closed_domain_qa(**metadata: Any) -> dict[str, Dataset]:
    """BoolQ dev."""
    return _splits(CLOSED_DOMAIN_QA, metadata)


def dialogue(**metadata: Any) -> dict[str, Dataset]:
    """MuTual dev."""
    return _splits(DIALOGUE, metadata)


def summarization(**metadata: Any) -> dict[str, Dataset]:
    """SAMSum validation."""
    return _splits(SUMMARIZATION, metadata)


def ner(**metadata: Any) -> dict[str, Dataset]:
    """CoNLL-2003 test, four documents a sentence."""
    return _splits(NER, metadata)


def sentiment(**metadata: Any) -> dict[str, Dataset]:
    """SST-2 dev."""
    return _splits(SENTIMENT, metadata)
