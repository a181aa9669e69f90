"""Rows for the general tasks, wherever they come from, in one shape for each task.

lm-eval calls one of the functions at the end of this file (``custom_dataset:`` in the task YAML) with
all it knows as metadata: the model arguments, ``--metadata``, the YAML's own. Only two keys are read:

* ``data``: ``hub`` (the Hugging Face hub), ``tiny`` (the rows inside this package) or a folder. A folder
  holds our JSONL files, the paper's own data files, or both; where a task finds both, it reads the JSONL.
* ``pretrained``: without ``data``, the tasks read ``tiny`` for ``rect-tiny`` or no model, else ``hub``.

A reader yields the rows of a source, and the columns of the task turn a row into a document:

    rect_reasoning        question, answer (with ``#### number`` at its end)
    rect_nli              sentence1, sentence2, label (0 entailment, 1 not_entailment)
    rect_open_domain_qa   question, answers (list), passage
    rect_closed_domain_qa question, passage, answer (bool)
    rect_dialogue         article, options (four), answers (a letter)
    rect_summarization    dialogue, summary
    rect_ner              text, entity_type (as the prompt names it), entities (list): four per sentence
    rect_sentiment        sentence, label (0 negative, 1 positive)
    rect_glue_sst         sentence, label (0 negative, 1 positive)
    rect_glue_mrpc        sentence1, sentence2, label (0 no paraphrase, 1 paraphrase)
    rect_glue_cola        sentence, label (0 unacceptable, 1 acceptable)
    rect_glue_rte, _nli   sentence1, sentence2, label (0 entailment, 1 not_entailment)
    rect_glue_mmlu        question, choices (four), answer (0 to 3)

Texts stay as they are: never stripped, ``\\r\\n`` and non-ASCII characters intact.
"""

from __future__ import annotations

import ast
import json
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from harness_rect import embedded
from harness_rect.errors import UserError, one_line_errors
from harness_rect.evaluation.catalogue import TASKS
from harness_rect.io.files import expanded
from harness_rect.io.rows import Row, as_text, json_rows, read_lines, read_text, tsv_rows

log = logging.getLogger(__name__)

Document = dict[str, Any]

# The entity types of CoNLL-2003 with their names in the prompt, in the order the paper's script asks.
ENTITY_TYPES = {"PER": "Person", "LOC": "Location", "ORG": "Organization", "MISC": "Miscellaneous"}
# What the integers mean where a file or a hub dataset stores `ner_tags` as class indices.
CONLL_TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")

_HEAD = 20  # a column absent from this many first rows is absent from the file
_REASONS_SHOWN = 5


# -------------------------------------------------------------------------- the paper's own file formats


def _dialogue_rows(folder: Path) -> Iterator[Row]:
    """One row from each ``dev_NUMBER.txt``, a JSON object or a Python dictionary, by number."""
    files = [path for path in folder.glob("dev_*.txt") if re.fullmatch(r"dev_\d+", path.stem)]
    for path in sorted(files, key=lambda path: int(path.stem.removeprefix("dev_"))):
        text = read_text(path).strip()
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                value = None
        if not isinstance(value, dict):
            raise UserError(
                f"{path}: not a JSON object or Python dictionary; expected keys article, options, answers"
            )
        yield Row(value, str(path), 0)


def _conll_rows(path: Path) -> Iterator[Row]:
    """Sentences of a CoNLL column file: the first column is the word, the last its tag."""
    tokens: list[str] = []
    tags: list[str] = []
    index = start = 0
    for number, line in chain(read_lines(path), [(0, "")]):  # a last sentence may lack its blank line
        cells = re.split(r"[ \t]+", line.strip(" \t\r\n"))  # not str.split(): a word may be a no-break space
        if cells[0] == "-DOCSTART-":
            continue
        if cells[0]:
            start = start if tokens else number
            tokens.append(cells[0])
            tags.append(cells[-1] if len(cells) > 1 else "")
        elif tokens:
            yield Row({"tokens": tokens, "ner_tags": tags}, str(path), index, start)
            tokens, tags, index = [], [], index + 1


# ------------------------------------------------------------------- from a column's value to a document's
# Each takes a value and its column's name, and raises UserError where the row cannot be used.


def required_text(value: Any, name: str) -> str:
    if not as_text(value, name).strip():
        raise UserError(f"{name}: empty")
    return value


def _texts(value: Any, name: str, length: int | None = None) -> list[str]:
    if not isinstance(value, list) or not value or length not in (None, len(value)):
        raise UserError(f"{name}: expected a list of {'' if length is None else f'{length} '}strings")
    return [required_text(item, name) for item in value]


def _answers(value: Any, name: str) -> list[str]:
    return _texts([value] if isinstance(value, str) else value, name)


def _first_text(value: Any, name: str) -> str:
    return _texts(value, name)[0] if isinstance(value, list) else required_text(value, name)


def _solution(value: Any, name: str) -> str:
    number = required_text(value, name).split("#### ")[1:2]
    if not number or not number[0].replace(",", "").strip():
        raise UserError(f"{name}: no number after '#### '")
    return value


def one_of(choices: Mapping[Any, Any], expected: str) -> Callable[[Any, str], Any]:
    def read(value: Any, name: str) -> Any:
        # A bool is an int to Python: `true` would pass for class 1.
        if isinstance(value, bool) or not isinstance(value, int | str) or value not in choices:
            raise UserError(f"{name}: {value!r} is not {expected}")
        return choices[value]

    return read


BINARY: dict[Any, int] = {0: 0, 1: 1, "0": 0, "1": 1}
_nli_label = one_of(BINARY | {"entailment": 0, "not_entailment": 1}, "0 (entailment) or 1 (not_entailment)")
_sentiment_label = one_of(BINARY, "0 (negative) or 1 (positive)")
_CHOICES: dict[Any, int] = {key: i for i, letter in enumerate("ABCD") for key in (i, str(i), letter)}


def _boolean(value: Any, name: str) -> bool:
    if value not in (True, False):  # 0 and 1 equal them
        raise UserError(f"{name}: {value!r} is not true or false")
    return bool(value)


_tag = one_of(
    {**dict(enumerate(CONLL_TAGS)), **{tag: tag for tag in CONLL_TAGS}},
    f"O, B-TYPE or I-TYPE of {', '.join(ENTITY_TYPES)}",
)


def _tags(value: Any, name: str) -> list[str]:
    if not isinstance(value, list):
        raise UserError(f"{name}: expected a list of tags")
    return [_tag(tag, name) for tag in value]


def _by_entity_type(sentence: Document) -> list[Document]:
    """The four documents of a sentence with ``tokens`` and ``ner_tags``."""
    tokens, tags = sentence["tokens"], sentence["ner_tags"]
    if len(tags) != len(tokens):
        raise UserError(f"ner_tags: {len(tags)} tags for {len(tokens)} tokens")
    spans = entity_spans(tags)
    return [
        {
            "text": detokenize(tokens),
            "entity_type": name,
            "entities": [detokenize(tokens[start:end]) for kind, start, end in spans if kind == code],
        }
        for code, name in ENTITY_TYPES.items()
    ]


def entity_spans(tags: Iterable[str]) -> list[tuple[str, int, int]]:
    """Entities of a BIO-tagged sentence as ``(type, start, end)``, in order.

    ``B-`` always starts an entity, also directly after another; so does ``I-`` after ``O`` or another type
    (the IOB1 form). The paper's script extends each span to the next ``O`` and drops an entity that directly
    follows another.
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


# ------------------------------------------------------------------------------------- rows of the GLUE suite

#: Rows kept for shots, and rows used after them.
_SHOTS, _USED = 10, 100
_SEED = 37


def _glue_rows(documents: list[Document], column: str = "label") -> list[Document]:
    """A hundred documents in which the classes take turns, after ten that are kept for shots.

    Classes are in the order in which they first occur. If one has more documents than another, those of each
    are shuffled first, with one generator for all of them, and the surplus is left out: so the published
    script selects rows. If not, documents stay in the order of the file.
    """
    classes: dict[Any, list[Document]] = {}
    for document in documents:
        classes.setdefault(document[column], []).append(document)
    if len({len(of) for of in classes.values()}) > 1:
        rng = random.Random(_SEED)
        for of in classes.values():
            rng.shuffle(of)
    in_turn = list(chain.from_iterable(zip(*classes.values(), strict=False)))
    if len(in_turn) <= _SHOTS:
        raise UserError(
            f"{len(documents)} usable rows make {len(in_turn)} with the classes ({column}) balanced, of which"
            f" {_SHOTS} are kept for shots; give more rows of each class"
        )
    return in_turn[_SHOTS : _SHOTS + _USED]


# ---------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Column:
    """What a document takes from a row: the value of the first of ``names`` that the row has, as read."""

    read: Callable[[Any, str], Any]
    names: tuple[str, ...]

    def value(self, row: Mapping[str, Any]) -> Any:
        name = next((name for name in self.names if row.get(name) is not None), None)
        if name is None:
            raise UserError(f"{' or '.join(self.names)}: missing")
        return self.read(row[name], name)


@dataclass(frozen=True)
class Source:
    """Where one task finds its rows and how a row becomes documents.

    task: its name in the catalogue, which also names its files. hub: dataset, configuration, split. columns:
    of a document. read_paper: rows of the paper's own file. split: a document into those of the task.
    select: all documents to those that are used.
    """

    task: str
    hub: tuple[str, str | None, str]
    columns: Mapping[str, Column]
    read_paper: Callable[[Path], Iterable[Row]] = json_rows
    split: Callable[[Document], list[Document]] = lambda document: [document]
    select: Callable[[list[Document]], list[Document]] = lambda documents: documents

    @property
    def file(self) -> str:
        return TASKS[self.task].file

    @property
    def paper_file(self) -> str:
        return TASKS[self.task].paper_file

    @property
    def wanted(self) -> str:
        """The needed columns in words, for error messages."""
        return ", ".join("/".join(column.names) for column in self.columns.values())

    def documents(self, row: Mapping[str, Any]) -> list[Document]:
        """What a row becomes.

        Raises:
            UserError: naming the column that cannot be used.
        """
        return self.split({name: column.value(row) for name, column in self.columns.items()})


def columns(**given: Callable[[Any, str], Any] | Column) -> dict[str, Column]:
    """Columns by the name they have in the document; in a row they have the same unless it is a Column."""
    return {n: column if isinstance(column, Column) else Column(column, (n,)) for n, column in given.items()}


_SOURCES = (
    Source(
        "rect_reasoning", ("openai/gsm8k", "main", "test"), columns(question=required_text, answer=_solution)
    ),
    Source(
        "rect_nli",
        ("nyu-mll/glue", "rte", "train"),  # the paper evaluates on RTE's training rows
        columns(sentence1=required_text, sentence2=required_text, label=_nli_label),
        read_paper=tsv_rows,
    ),
    Source(
        "rect_open_domain_qa",
        # Gold passages in place of the paper's model-written ones. Its test split is the part of NQ-open's
        # development set (which the paper uses) that has a gold passage.
        ("florin-hf/nq_open_gold", None, "test"),
        columns(
            question=required_text,
            answers=Column(_answers, ("answers", "answer")),
            passage=Column(_first_text, ("text", "passage", "output")),
        ),
    ),
    Source(
        "rect_closed_domain_qa",
        ("google/boolq", None, "validation"),
        columns(
            question=required_text,
            passage=required_text,
            answer=Column(_boolean, ("answer", "label")),
        ),
    ),
    Source(
        "rect_dialogue",
        ("EleutherAI/mutual", "mutual", "validation"),
        columns(
            article=required_text,
            options=partial(_texts, length=4),
            answers=one_of({letter: letter for letter in "ABCD"}, "A, B, C or D"),
        ),
        read_paper=_dialogue_rows,
    ),
    Source(
        "rect_summarization",
        ("knkarthick/samsum", None, "validation"),  # the paper's 818 rows are the validation split
        columns(dialogue=required_text, summary=required_text),
    ),
    Source(
        "rect_ner",
        ("lhoestq/conll2003", None, "test"),
        columns(tokens=_texts, ner_tags=_tags),
        read_paper=_conll_rows,
        split=_by_entity_type,
    ),
    Source(
        "rect_sentiment",
        ("nyu-mll/glue", "sst2", "validation"),
        columns(sentence=required_text, label=_sentiment_label),
        # The paper's script skips the header whatever it says and reads the columns by position.
        read_paper=partial(tsv_rows, header=("sentence", "label")),
    ),
    Source(
        "rect_glue_sst",
        ("nyu-mll/glue", "sst2", "validation"),
        columns(sentence=required_text, label=_sentiment_label),
        select=_glue_rows,
    ),
    Source(
        "rect_glue_mrpc",
        ("nyu-mll/glue", "mrpc", "validation"),
        columns(
            sentence1=required_text,
            sentence2=required_text,
            label=one_of(BINARY, "0 (no paraphrase) or 1 (paraphrase)"),
        ),
        select=_glue_rows,
    ),
    Source(
        "rect_glue_cola",
        ("nyu-mll/glue", "cola", "validation"),
        columns(sentence=required_text, label=one_of(BINARY, "0 (unacceptable) or 1 (acceptable)")),
        select=_glue_rows,
    ),
    Source(
        "rect_glue_rte",
        ("nyu-mll/glue", "rte", "validation"),
        columns(sentence1=required_text, sentence2=required_text, label=_nli_label),
        select=_glue_rows,
    ),
    Source(
        "rect_glue_nli",
        ("nyu-mll/glue", "rte", "train"),  # the rows of rect_nli, which the suite took over
        columns(sentence1=required_text, sentence2=required_text, label=_nli_label),
        select=_glue_rows,
    ),
    Source(
        "rect_glue_mmlu",
        ("cais/mmlu", "all", "validation"),
        columns(
            question=required_text,
            choices=partial(_texts, length=4),
            answer=one_of(_CHOICES, "0 to 3 or A to D"),
        ),
        select=partial(_glue_rows, column="answer"),
    ),
)

#: Task -> where its rows come from, in the order of the catalogue.
SOURCES = {source.task: source for source in _SOURCES}


def data_choice(metadata: Mapping[str, Any]) -> str:
    """``hub``, ``tiny`` or a folder, from lm-eval's metadata; see the top of this file for the default."""
    return str(embedded.of_tasks(metadata).get("data") or "hub")


def folder_of(data: str) -> Path | None:
    """The folder that a choice of data names; None for the hub."""
    if data == "hub":
        return None
    return embedded.DATA if data == "tiny" else Path(expanded(data))


def file_in(folder: Path | None, name: str) -> Path | None:
    """The file of this name in a folder of data; None where it has none, and for the hub."""
    return folder / name if folder is not None and (folder / name).is_file() else None


def _open_hub(source: Source) -> tuple[str, Iterable[Row]]:
    path, name, split = source.hub
    origin = f"{path} ({name + ', ' if name else ''}{split})"
    try:
        dataset = load_dataset(path, name, split=split)
    except Exception as error:  # network, cache, renamed dataset or split: many libraries, many types
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        unreachable = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        problem = "cannot be reached for" if unreachable else "did not give"
        raise UserError(
            f"{source.task}: the Hugging Face hub {problem} {origin} [{why}]; "
            f"data=FOLDER works offline and reads FOLDER/{source.file}"
        ) from None
    return origin, (Row(row, origin, index) for index, row in enumerate(dataset))


def _open_folder(source: Source, folder: Path) -> tuple[str, Iterable[Row]]:
    if not folder.is_dir():
        raise UserError(
            f"{source.task}: data={folder} is not a folder; expected hub, tiny or a folder with {source.file}"
        )
    ours, paper = folder / source.file, folder / source.paper_file
    if ours.exists():
        return str(ours), json_rows(ours)
    if source.paper_file and paper.exists():
        return str(paper), source.read_paper(paper)
    or_paper = f" or the paper's {source.paper_file}" if source.paper_file else ""
    raise UserError(
        f"{source.task}: expected {source.file}{or_paper} in {folder}; put it there, with {source.wanted}"
    )


def documents(source: Source, data: str) -> list[Document]:
    """All documents of one task, from the rows that ``data`` names.

    Rows that cannot be used are skipped and counted in one warning.

    Raises:
        UserError: the source cannot be reached or read, is empty, lacks a column, or has too few usable rows.
    """
    folder = folder_of(data)
    origin, stream = _open_hub(source) if folder is None else _open_folder(source, folder)
    rows = list(stream)
    if not rows:
        raise UserError(f"{source.task}: {origin} is empty; expected rows with {source.wanted}")
    head = [row.object() for row in rows[:_HEAD]]
    for column in source.columns.values():
        if not any(name in row for row in head for name in column.names):
            found = ", ".join(sorted({str(key) for row in head for key in row})) or "no complete row"
            raise UserError(
                f"{source.task}: {origin} has no column {' or '.join(column.names)} in its first {len(head)}"
                f" rows; expected {source.wanted}; found {found}"
            )
    docs: list[Document] = []
    skipped: list[str] = []
    for row in rows:
        value = row.object()  # anything else is a malformed file, not a row to skip
        try:
            docs += source.documents(value)
        except UserError as error:
            skipped.append(f"{row.where.removeprefix(f'{origin}, ')}: {error}")
    if not docs:
        raise UserError(
            f"{source.task}: none of the {len(rows)} rows of {origin} can be used ({skipped[0]}); "
            f"expected {source.wanted}"
        )
    if skipped:
        more = len(skipped) - _REASONS_SHOWN
        shown = "; ".join(skipped[:_REASONS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        log.warning("%s: %d of %d rows skipped: %s", source.task, len(skipped), len(rows), shown)
    try:
        return source.select(docs)
    except UserError as error:
        raise UserError(f"{source.task}: {origin}: {error}") from None


# ---------------------------------------------------------------------------------- what the task YAMLs call


def loader(task: str) -> Callable[..., dict[str, Dataset]]:
    def load(**metadata: Any) -> dict[str, Dataset]:
        """The task's documents; errors under the lm_eval command are one line and exit status 2."""
        with one_line_errors():
            return {"test": Dataset.from_list(documents(SOURCES[task], data_choice(metadata)))}

    return load


reasoning = loader("rect_reasoning")
nli = loader("rect_nli")
open_domain_qa = loader("rect_open_domain_qa")
closed_domain_qa = loader("rect_closed_domain_qa")
dialogue = loader("rect_dialogue")
summarization = loader("rect_summarization")
ner = loader("rect_ner")
sentiment = loader("rect_sentiment")
glue_sst = loader("rect_glue_sst")
glue_mrpc = loader("rect_glue_mrpc")
glue_cola = loader("rect_glue_cola")
glue_rte = loader("rect_glue_rte")
glue_nli = loader("rect_glue_nli")
glue_mmlu = loader("rect_glue_mmlu")
