"""Results files of lm-eval, of any model class: the JSON file and the samples beside it.

The format is lm-eval's own, so results of ``--model hf``, vLLM or an API are read alike; ``edited_hf`` adds
its edit report as ``config.edit``. Samples (``--log_samples``) are read when they are needed:
``samples_TASK_DATE.jsonl`` beside ``results_DATE.json``, or the ``samples`` in a result of
``simple_evaluate`` that was written as a whole.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness_rect import embedded
from harness_rect.errors import UserError
from harness_rect.evaluation.catalogue import TASKS, entry, is_repetition
from harness_rect.io.checksums import check_if_listed
from harness_rect.io.files import expanded
from harness_rect.io.rows import json_lines, parse_json, read_text
from harness_rect.session.report import EditReport
from harness_rect.session.self_checks import failed

#: Bytes of a results file; samples are in files of their own, which are read line by line.
LARGEST = 256 << 20
#: Entries of a task's results that are numbers but not metrics.
#: "bypass" is what ``--predict_only`` writes in place of a score: 999.
_NO_METRICS = {"sample_len", "sample_count", "bypass"}
#: Arguments of a model class that make another model of the same name; the dtype does so, too.
_OF_MODEL = (
    *("revision", "subfolder", "gguf_file", "peft", "delta", "tokenizer", "add_bos_token"),
    *("load_in_4bit", "load_in_8bit"),
)
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?$")


class Key(NamedTuple):
    """A metric as lm-eval names it: the metric and the filter its answers went through."""

    metric: str
    filter: str


class Score(NamedTuple):
    """A reported value with its standard error, None where lm-eval gives none."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Sample:
    """One document of one task under one filter.

    values: metric -> this document's value: a number, or what the metric's aggregation takes.
    text: the document's ``text`` field, where it has one (the sentence of an NER document).
    prompt, target, answer: the prompt, the expected answer and the model's answer as text; of several
        continuations the likeliest. None where the file does not have it.
    """

    doc_id: int
    doc_hash: str | None
    prompt_hash: str | None
    values: Mapping[str, Any]
    text: str | None
    prompt: str | None = None
    target: str | None = None
    answer: str | None = None


_BY_TASK = (
    *("results", "groups", "group_subtasks", "configs", "versions"),
    *("n_shot", "n_samples", "higher_is_better", "samples"),
)


class _File(BaseModel):
    """The parts of a results file that are read; all but ``results`` may be missing in older ones."""

    model_config = ConfigDict(extra="ignore")

    results: dict[str, dict[str, Any]]
    groups: dict[str, Any] = {}
    group_subtasks: dict[str, list[str]] = {}
    configs: dict[str, dict[str, Any]] = {}
    versions: dict[str, Any] = {}
    n_shot: dict[str, Any] = Field(default={}, alias="n-shot")
    n_samples: dict[str, dict[str, Any]] = Field(default={}, alias="n-samples")
    higher_is_better: dict[str, dict[str, Any]] = {}
    config: dict[str, Any] = {}
    samples: dict[str, list[dict[str, Any]]] = {}
    date: float | str | None = None
    model_name: str | None = None
    model_source: str | None = None
    lm_eval_version: str | None = None
    chat_template_sha: str | None = None
    system_instruction_sha: str | None = None
    # Of any type: most readers do not need them.
    chat_template: Any = None
    system_instruction: Any = None
    fewshot_as_multiturn: Any = None
    transformers_version: Any = None
    pretty_env_info: Any = None
    sweep: Any = None

    def written_names(self) -> dict[str, str]:
        """Name of each task and group -> its name in the file.

        lm-eval 0.5 writes ``group::task``. The group is left out where one task alone has the name.
        """
        found = list(dict.fromkeys([*self.results, *self.configs]))
        short = {name: name.rpartition("::")[2] for name in found}
        count = Counter(short.values())
        return {short[name] if count[short[name]] == 1 else name: name for name in found}

    def renamed(self, names: Mapping[str, str]) -> _File:
        """The same with other names of tasks and groups: name here -> new name."""
        changed: dict[str, Any] = {
            field: {names.get(name, name): entry for name, entry in getattr(self, field).items()}
            for field in _BY_TASK
        }
        for group, members in changed["group_subtasks"].items():
            changed["group_subtasks"][group] = [names.get(name, name) for name in members]
        return self.model_copy(update=changed)


class Results:
    """One results file.

    Attributes:
        path: where it was read from.
        file: its validated content, with tasks named as lm-eval 0.4 does.
    """

    def __init__(self, path: Path, file: _File) -> None:
        self.path = path
        self._written = file.written_names()
        self.file = file.renamed({written: name for name, written in self._written.items()})
        self._samples: dict[str, dict[str, list[Sample]] | None] = {}

    # -- the run ----------------------------------------------------------------------------------

    @cached_property
    def model_args(self) -> dict[str, Any]:
        """Arguments of the model; a string, as older versions of lm-eval wrote it, is parsed."""
        given = self.file.config.get("model_args")
        if isinstance(given, str):
            pairs = (part.partition("=") for part in given.split(",") if part)
            return {name.strip(): value for name, _, value in pairs}
        return given if isinstance(given, dict) else {}

    @cached_property
    def edit(self) -> EditReport | None:
        """What ``edited_hf`` and ``edited_vllm`` report of their edits; None for any other model.

        Raises:
            UserError: a field cannot be read; the message names the file and the field.
        """
        found = self.file.config.get("edit")
        if not isinstance(found, dict) or not found:
            return None
        return EditReport.read(found, f"{self.path}: config.edit")

    @property
    def failed_checks(self) -> list[str]:
        """A line for each check that the evaluation made of itself and that failed."""
        return failed(self.file.config.get("self_checks"))

    @property
    def model_class(self) -> str | None:
        """hf, vllm, edited_hf, ...: lm-eval's ``--model``."""
        return _text(self.file.config.get("model")) or self.file.model_source

    @property
    def model_name(self) -> str:
        """The evaluated model: ``pretrained`` or its default, else what lm-eval calls it."""
        given = self._completed(self.model_args)
        named = given["pretrained"] or given.get("model") or self.file.model_name
        return str(named or self.model_class or self.path.stem)

    @cached_property
    def variant(self) -> dict[str, str]:
        """The arguments that make it another model of the same name, as text and without the defaults."""
        given = {name: str(self.model_args.get(name)) for name in _OF_MODEL}
        not_given = {"": "", "None": "", "main": "revision", "False": "load_in_"}
        return {
            name: value
            for name, value in given.items()
            if value not in not_given or not name.startswith(not_given[value])
        }

    @property
    def full_name(self) -> str:
        """The model's name, and the arguments that make it another model."""
        given = [str(self.model_args["dtype"])] if self.model_args.get("dtype") else []
        given += [f"{name}={value}" for name, value in self.variant.items()]
        return f"{self.model_name} ({', '.join(given)})" if given else self.model_name

    @property
    def loaded(self) -> str | None:
        """``loaded with 2 edits by rome``, where the files that it was loaded from say so."""
        given = self.file.config.get("provenance")
        said = given.values() if isinstance(given, dict) else ()
        found = [
            f"{one['n_edits']} edits by {one['method']}"
            for one in said
            if isinstance(one, dict) and one.get("method") and one.get("n_edits")
        ]
        return f"loaded with {' and '.join(found)}" if found else None

    @cached_property
    def fingerprint(self) -> str | None:
        """Digest of the weights before any edits of this run; None where the file does not have it.

        Raises:
            UserError: as :attr:`edit`.
        """
        made_of = self._made_of.get("edited")
        places = self.file.config.get("provenance"), made_of
        said = [place.get("model_fingerprint") for place in places if isinstance(place, dict)]
        known = [self.edit.model_fingerprint if self.edit else None, *said]
        return next((one for one in known if isinstance(one, str) and one not in ("", "unknown")), None)

    @property
    def _made_of(self) -> Mapping[str, Any]:
        """What a sweep writes of everything that determines its results."""
        found = self.file.sweep.get("made_of") if isinstance(self.file.sweep, dict) else None
        return found if isinstance(found, dict) else {}

    def requests_digest(self, task: str) -> str | None:
        """Digest of a task's documents and requests, which sweeps write; None where the file has none."""
        of = self._made_of.get("tasks")
        entry = of.get(task) if isinstance(of, dict) else None
        return _text(entry.get("requests_sha256")) if isinstance(entry, dict) else None

    def metadata(self, task: str) -> dict[str, Any]:
        """The metadata that the task was given, model arguments and ``--metadata``, with their defaults."""
        own = self.file.configs.get(task, {}).get("metadata")
        return self._completed(self.model_args | (own if isinstance(own, dict) else {}))

    def _completed(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        ours = self.model_class in ("edited_hf", "edited_vllm")
        default_model = ours and not self.model_args.get("pretrained")
        return embedded.completed(arguments, default_model)

    def effective_rows(self, task: str) -> int | None:
        """The number of documents that were evaluated, where the file has it."""
        found = self.file.n_samples.get(task, {}).get("effective")
        return found if isinstance(found, int) else None

    # -- scores -----------------------------------------------------------------------------------

    @cached_property
    def tasks(self) -> dict[str, dict[Key, Score]]:
        """Scores of every task that is not a group, in the file's order."""
        return {name: scores for name, scores in self._scored.items() if name not in self._members}

    @cached_property
    def groups(self) -> dict[str, dict[Key, Score]]:
        """Scores of every group that has its own."""
        return {name: scores for name, scores in self._scored.items() if name in self._members}

    @cached_property
    def _scored(self) -> dict[str, dict[Key, Score]]:
        found = {name: _scores(entries) for name, entries in self.file.results.items()}
        return {name: scores for name, scores in found.items() if scores}

    @cached_property
    def _members(self) -> dict[str, list[str]]:
        members = {name: list(of) for name, of in self.file.group_subtasks.items() if of}
        return {name: [] for name in self.file.groups} | members

    def leaves(self, name: str) -> list[str]:
        """The tasks of a group, through groups within it; a task is its own only leaf."""
        found: dict[str, None] = {}
        waiting, seen = [name], {name}
        while waiting:
            name = waiting.pop()
            if name not in self._members:
                found[name] = None
            new = [member for member in self._members.get(name, ()) if member not in seen]
            seen.update(new)
            waiting += reversed(new)
        return list(found)

    @property
    def roots(self) -> list[str]:
        """The tasks and groups that are in no other group: what the evaluation was asked for."""
        inside = {member for members in self._members.values() for member in members}
        names = dict.fromkeys([*self._members, *self.file.results])
        return [name for name in names if name not in inside]

    @property
    def names(self) -> set[str]:
        """Tasks and groups, with scores of their own or without."""
        return set(self._scored) | set(self._members)

    def scores(self, name: str) -> dict[Key, Score]:
        """Scores of a task or group."""
        return self._scored[name]

    def headline(self, name: str) -> Key:
        """The first metric that the task defines, under the first filter that the file has it for."""
        keys = list(self._scored[name])
        listed = _list(self.file.configs.get(name, {}).get("metric_list"))
        defined = [entry.get("metric") for entry in listed if isinstance(entry, dict)]
        if not defined and name in TASKS:
            defined = [metric.name for metric in TASKS[name].metrics]
        return next((key for metric in defined for key in keys if key.metric == metric), keys[0])

    def metrics(self, name: str) -> list[Key]:
        """The headline and all other metrics but repetitions, see :func:`.catalogue.is_repetition`."""
        headline = self.headline(name)
        others = (key for key in self._scored[name] if key != headline)
        return [headline, *(key for key in others if not is_repetition(name, key.metric))]

    def higher_is_better(self, name: str, metric: str) -> bool:
        """The catalogue's direction, else the file's; a metric without one is better when higher."""
        if (known := entry(name, metric)) is not None:
            return known.higher_is_better
        return self.file.higher_is_better.get(name, {}).get(metric) is not False

    # -- samples ----------------------------------------------------------------------------------

    def samples(self, task: str) -> dict[str, list[Sample]] | None:
        """filter -> documents sorted by ``doc_id``; None if samples were not logged.

        Raises:
            UserError: if the samples file cannot be read; the message names the line.
        """
        if task not in self._samples:
            self._samples[task] = self._read_samples(task)
        return self._samples[task]

    def _read_samples(self, task: str) -> dict[str, list[Sample]] | None:
        if inside := self.file.samples.get(task):
            return _by_filter(((f"{self.path}: samples of {task}", row) for row in inside), task)
        date = _DATE.search(self.path.stem)
        written = self._written.get(task, task)
        path = self.path.parent / f"samples_{written}{'_' + date.group() if date else ''}.jsonl"
        if not path.is_file():
            return None
        check_if_listed(path)
        rows = json_lines(path, hint="was the evaluation interrupted?")
        return _by_filter(((row.where, row.object()) for row in rows), task)


def _scores(entries: Mapping[str, Any]) -> dict[Key, Score]:
    """The metrics among a task's entries: ``acc,none`` with ``acc_stderr,none`` beside it."""
    found = {}
    for name, value in entries.items():
        metric, _, filtered = name.partition(",")
        score = _number(value)
        if metric.endswith("_stderr") or metric in _NO_METRICS or score is None:
            continue
        stderr = _number(entries.get(f"{metric}_stderr,{filtered}" if filtered else f"{metric}_stderr"))
        known = stderr is not None and math.isfinite(stderr)
        found[Key(metric, filtered or "none")] = Score(score, stderr if known else None)
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _by_filter(rows: Iterable[tuple[str, Mapping[str, Any]]], task: str) -> dict[str, list[Sample]]:
    found: dict[str, dict[int, Sample]] = {}
    for where, row in rows:
        doc_id, filtered = row.get("doc_id"), str(row.get("filter", "none"))
        if not isinstance(doc_id, int):
            raise UserError(f"{where}: no doc_id; expected a sample as lm-eval's --log_samples writes it")
        doc = row.get("doc")
        metrics = _list(row.get("metrics")) or [key for key in row if key not in _SAMPLE_FIELDS]
        sample = Sample(
            doc_id,
            _text(row.get("doc_hash")),
            _text(row.get("prompt_hash")),
            {metric: row.get(metric) for metric in metrics if isinstance(metric, str)},
            _text(doc.get("text")) if isinstance(doc, dict) else None,
            *_question_and_answers(row),
        )
        if found.setdefault(filtered, {}).setdefault(doc_id, sample) is not sample:
            raise UserError(f"{where}: doc_id {doc_id} of {task} occurs twice; remove one")
    return {name: [samples[i] for i in sorted(samples)] for name, samples in found.items()}


def _question_and_answers(row: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
    """(prompt, target, answer) of a sample, for every type of request and version of lm-eval."""
    given = row.get("arguments")
    if isinstance(given, dict):  # {"gen_args_0": {"arg_0": prompt, "arg_1": continuation or settings}, ...}
        given = [list(one.values()) for one in given.values() if isinstance(one, dict)]
    requests = [one for one in _list(given) if isinstance(one, list) and one and isinstance(one[0], str)]
    prompt = requests[0][0] if requests else None
    continuations = [one[1] if len(one) > 1 and isinstance(one[1], str) else None for one in requests]
    answers = row.get("filtered_resps") or row.get("resps") or [None]
    while isinstance(answers, list) and len(answers) == 1:
        answers = answers[0]
    if isinstance(answers, list) and len(answers) == len(continuations):  # (log-likelihood, greedy) of each
        try:
            likelihoods = [float(one[0]) for one in answers]
            answers = continuations[max(range(len(answers)), key=likelihoods.__getitem__)]
        except (TypeError, ValueError, IndexError):
            answers = None
    target = row.get("target")
    if isinstance(target, str) and target.isdecimal() and len(target) < 10 and len(continuations) > 1:
        target = int(target)
    if isinstance(target, int) and 0 <= target < len(continuations) > 1:
        target = continuations[target]
    return prompt, None if target is None else str(target), _text(answers)


_SAMPLE_FIELDS = {
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"),
    *("doc_hash", "prompt_hash", "target_hash"),
}


# ---------------------------------------------------------------------------------------------- finding


def find(source: Path | str) -> list[Path]:
    """The file itself, or all results files below a folder, sorted by folder and date.

    Their names are ``results*.json``, or end in a date, as those that ``--output_path NAME.json`` writes.

    Raises:
        UserError: if there is none.
    """
    path = Path(expanded(str(source)))
    if path.is_file():
        return [path]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        raise UserError(f"{path}: is a pipe or a device; expected a results file or a folder with some")
    if found := sorted(filter(has_their_name, _files_below(path)), key=lambda p: (p.parent, _date(p))):
        return found
    raise UserError(f"{path}: no results*.json in this folder; expected what lm_eval --output_path writes")


def _files_below(folder: Path) -> Iterator[Path]:
    """All .json files below a folder, through links too, each folder once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names if name.endswith(".json"))


def has_their_name(path: Path) -> bool:
    return path.stem.startswith("results") or _DATE.search(path.stem) is not None


def _date(path: Path) -> str:
    return match.group() if (match := _DATE.search(path.stem)) else path.stem


def newest(source: Path | str) -> tuple[Path, int]:
    """The file itself, or the newest results file of a folder by the date in its name; and their number.

    Raises:
        UserError: if there is none, if several folders below this one have some, or if of several one has no
            date in its name.
    """
    found = find(source)
    if len(folders := sorted({str(path.parent) for path in found})) > 1:
        raise UserError(f"{source}: holds results in several folders ({', '.join(folders)}); name one")
    if undated := [path.name for path in found if len(found) > 1 and not _DATE.search(path.stem)]:
        raise UserError(
            f"{source}: holds {len(found)} results files, and the name of {undated[0]} has no date; name one"
        )
    return found[-1], len(found)


def load(path: Path | str) -> Results:
    """Read a results file.

    Raises:
        UserError: if it cannot be read or is not a results file of lm-eval.
    """
    path = Path(path)
    check_if_listed(path)
    return of(parse_json(read_text(path, largest=LARGEST), str(path), parse_int=_integer), path)


def of(content: Any, path: Path) -> Results:
    """The results that a file holds, or ``simple_evaluate`` returns; raises as :func:`load`.

    Args:
        path: of the file, for messages and the samples beside it.
    """
    try:
        file = _File.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: not a results file of lm-eval: {place}: {first['msg']}") from None
    results = Results(path, file)
    if not results.tasks:
        raise UserError(f"{path}: holds no scores")
    return results


def _integer(text: str) -> float:
    """An integer; infinity where it is larger than any float, so that arithmetic with it cannot fail."""
    return int(text) if len(text) < 300 else float(text)


def same_name(one: Results, other: Results) -> bool:
    """Whether both are of a model of one name, given in the same way: its edits, or weights, may differ."""
    dtypes = {str(found) for a in (one, other) if (found := a.file.config.get("model_dtype"))}
    return one.model_name == other.model_name and one.variant == other.variant and len(dtypes) < 2


def labels(results: Sequence[Results]) -> list[str]:
    """A short name for each, all different: model and edits where that tells them apart, else the file."""
    short = [describe(one) for one in results]
    return [
        text if short.count(text) == 1 else f"{text} [{one.path}]"
        for text, one in zip(short, results, strict=True)
    ]


def describe(results: Results) -> str:
    """``gpt2-xl, 20 edits by rome, rect 0.4``; only the model where nothing was edited."""
    edit = results.edit
    parts = [results.full_name, *([results.loaded] if results.loaded else [])]
    if edit is None or not edit.n_edits:
        return ", ".join(parts)
    parts.append(f"{edit.n_edits} edits by {edit.method}")
    if edit.regularizer != "none":
        parts.append(f"{edit.regularizer} {edit.keep or ''}".strip())
    return ", ".join(parts)
