"""What a sweep does: from a YAML file to trajectories and evaluations.

A *trajectory* is one model edited by one method with one regularizer along one order of the edits. It edits
once and is evaluated at its checkpoints (numbers of edits). The unedited model is evaluated once for all.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from harness_rect import embedded
from harness_rect.config import EditConfig, Measured, ModelArguments, declared_arguments, settings
from harness_rect.edits import Consequence, Edit, EditStream, Query, load_edits
from harness_rect.edits.readers import split_spec
from harness_rect.errors import UserError, did_you_mean
from harness_rect.experiments.sweep.networks import TrainMend, networks_folder
from harness_rect.io.files import expanded, written_whole
from harness_rect.io.rows import read_text
from harness_rect.io.yaml_files import read_yaml
from harness_rect.methods import METHODS, check_edits
from harness_rect.validation import refuse_boolean, validated

#: lm-eval's own seeds of random, numpy, torch and few-shot sampling.
SEEDS = (0, 1234, 1234, 1234)
#: Arguments of a run that are keys of the sweep and not of an entry.
_OF_THE_SWEEP = frozenset(
    (
        *("edits", "edit_seed", "measure", "edit_cache", "data", "save_edited"),
        *("apply_chat_template", "system_instruction"),
    )
)


def _a_list(value: Any) -> Any:
    return value if isinstance(value, list) or value is None else [value]


T = TypeVar("T")
#: A list that is not empty; a single value stands for a list of one.
OneOrMore = Annotated[list[T], Field(min_length=1), BeforeValidator(_a_list)]
Count = Annotated[int, Field(ge=0, lt=2**31), BeforeValidator(refuse_boolean)]
#: More evaluations, or trajectories, than this are a slip of the hand.
MOST = 100_000


class _Entry(BaseModel):
    """A mapping of arguments, with a name for folders and tables; the arguments are validated later.

    The value of the main key can stand for the whole entry; an empty value means ``none``.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    main_key: ClassVar[str]

    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping) else {cls.main_key: "none" if value is None else value}

    @property
    def arguments(self) -> dict[str, Any]:
        """The given arguments, without the name."""
        given = self.model_dump(exclude={"name"})
        return {key: value for key, value in given.items() if value is not None}


class ModelEntry(_Entry):
    """A model, and any further arguments of lm-eval's ``hf`` (dtype, device, revision, ...)."""

    main_key = "pretrained"

    pretrained: str = Field(min_length=1)

    @model_validator(mode="after")
    def _arguments(self) -> ModelEntry:
        ours = {*declared_arguments(ModelArguments), "batch_size", "max_batch_size"}
        for key, value in (self.model_extra or {}).items():
            if key in ours:
                raise ValueError(f"{key} is not an argument of one model; docs/sweep.md has its place")
            if not isinstance(value, str | int | float | bool):
                raise ValueError(f"{key}: expected a single value, got {value!r}")
        return self

    @property
    def label(self) -> str:
        path = Path(self.pretrained)
        return _file_name(self.name or (path.name if path.is_dir() else self.pretrained))


class MethodEntry(_Entry):
    """A method, and the arguments that go with it: ``hparams``, ``stats``, ``edit_batch_size``.

    checkpoints: those of this method, where they are not the sweep's.
    """

    main_key = "method"

    method: str
    checkpoints: OneOrMore[Count] | None = None

    @model_validator(mode="after")
    def _arguments(self) -> MethodEntry:
        if self.method == "none":
            raise ValueError("method none edits nothing: for the unedited model put 0 into checkpoints")
        _check_keys(self, EditConfig.model_fields.keys() - _OF_THE_SWEEP - {"regularizer"})
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        return {key: value for key, value in super().arguments.items() if key != "checkpoints"}

    @property
    def label(self) -> str:
        return self.name or self.method


class RegularizerEntry(_Entry):
    """A regularizer with its settings, or ``rect``; without either, none."""

    main_key = "regularizer"

    @model_validator(mode="after")
    def _arguments(self) -> RegularizerEntry:
        _check_keys(self, {"regularizer", "rect", *settings()})
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """What goes into model_args: nothing for no regularizer."""
        return {key: value for key, value in super().arguments.items() if value != "none"}


def _check_keys(entry: _Entry, known: Collection[str]) -> None:
    for key in entry.model_extra or {}:
        if key not in known:
            raise ValueError(f"unknown key {key!r}: {did_you_mean(key, sorted({*known, 'name'}))}")


class SweepConfig(BaseModel):
    """The YAML file of a sweep. Keys and defaults: docs/sweep.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = ""
    output: Annotated[str, Field(min_length=1), AfterValidator(expanded)]
    models: OneOrMore[ModelEntry]
    edits: str
    data: str | None = None
    methods: OneOrMore[MethodEntry]
    regularizers: OneOrMore[RegularizerEntry] = [RegularizerEntry()]
    checkpoints: OneOrMore[Count]
    tasks: OneOrMore[str]
    train_mend: TrainMend | None = None
    edit_batch_size: int = Field(default=1, ge=1, lt=2**31)
    orders: int = Field(default=1, ge=1)
    edit_seeds: OneOrMore[Count] = [0]
    measure: Measured = "teacher_forced"
    limit: float | None = Field(default=None, gt=0, lt=2**31)
    apply_chat_template: bool | str = False
    system_instruction: str | None = None
    batch_size: int | str = 1
    device: str | None = None
    seed: OneOrMore[Annotated[int, Field(ge=0, lt=2**32)]] = list(SEEDS)
    log_samples: bool = False

    @model_validator(mode="before")
    @classmethod
    def _singular(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.keys() >= {"model", "models"}:
            raise ValueError("model and models are both given; give one")
        return {"models" if key == "model" else key: value for key, value in values.items()}

    @field_validator("seed")
    @classmethod
    def _four(cls, seed: list[int]) -> list[int]:
        if len(seed) not in (1, 4):
            raise ValueError("expected one number, or four: random, numpy, torch, few-shot")
        return seed * (4 // len(seed))

    @field_validator("limit")
    @classmethod
    def _whole(cls, limit: float | None) -> float | None:
        if limit is not None and limit >= 1 and limit != int(limit):
            raise ValueError("expected a whole number of documents, or a share below 1")
        return int(limit) if limit is not None and limit >= 1 else limit

    @field_validator("batch_size")
    @classmethod
    def _batch(cls, size: int | str) -> int | str:
        if not (1 <= size < 2**31 if isinstance(size, int) else re.fullmatch(r"auto(:\d{1,9})?", size)):
            raise ValueError("expected a number from 1 to 2147483647, or auto")
        return size

    def checkpoints_of(self, method: MethodEntry) -> tuple[int, ...]:
        """The numbers of edits at which a method's trajectories are evaluated, in order; without 0."""
        given = self.checkpoints if method.checkpoints is None else method.checkpoints
        return tuple(sorted({n for n in given if n > 0}))

    def networks(self, model: ModelEntry) -> Path | None:
        """Where this sweep keeps the networks of MEND that it trains for a model; None if it trains none."""
        if self.train_mend is None or model.pretrained == embedded.NAME:  # which has networks
            return None
        asked = any(m.method == "mend" and "hparams" not in m.arguments for m in self.methods)
        return networks_folder(Path(self.output), model.label) if asked else None

    @property
    def prompts(self) -> dict[str, Any]:
        """How prompts are put to the model, in editing and evaluation: options of lm-eval."""
        return {
            "apply_chat_template": self.apply_chat_template,
            "system_instruction": self.system_instruction,
        }

    def model_args(self, model: ModelEntry, edit: dict[str, Any] | None = None) -> dict[str, Any]:
        """``--model_args`` of one evaluation; of the unedited model where ``edit`` is not given."""
        edit = {"method": "none", "edits": self.edits} if edit is None else edit
        return model.arguments | edit | ({} if self.data is None else {"data": self.data})


@dataclass(frozen=True)
class Order:
    """One order of the edits.

    name, selection: the file, or another value of ``edits=``, and its rows in this order.
    """

    number: int
    name: str
    selection: range
    edits: tuple[Edit, ...]
    written: bool  # whether the sweep writes the file, with one edit a row

    def spec(self, n: int) -> str:
        """The first ``n`` edits as a value of ``edits=``."""
        first = self.selection[:n]
        step = f":{first.step}" if first.step != 1 else ""
        stop = "" if first.stop < 0 else first.stop
        return f"{self.name}[{first.start}:{stop}{step}]"


@dataclass(frozen=True)
class Trajectory:
    """model x method x regularizer x order x seed, edited up to its last checkpoint."""

    model: ModelEntry
    label: str
    order: Order
    config: EditConfig
    checkpoints: tuple[int, ...]
    folder: Path
    edit_arguments: dict[str, Any]  # of model_args, except method and edits

    @property
    def edits(self) -> tuple[Edit, ...]:
        return self.order.edits[: self.checkpoints[-1]]


@dataclass(frozen=True)
class Evaluation:
    """One results file. ``trajectory`` is None for the unedited model."""

    model: ModelEntry
    trajectory: Trajectory | None
    n_edits: int
    folder: Path
    model_args: dict[str, Any]  # of a single run with `lm_eval --model edited_hf`
    edits: tuple[Edit, ...]  # what the editing tasks evaluate

    @property
    def file(self) -> Path:
        return self.folder / "results.json"


@dataclass(frozen=True)
class Shard:
    """One of ``number`` parts of a sweep, counted from 1."""

    index: int
    number: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``2/8``.

        Raises:
            UserError: it is something else.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        shard = cls(*map(int, found.groups())) if found else cls(0, 0)
        if not 1 <= shard.index <= shard.number:
            raise UserError(f"--shard {text}: expected I/N with I from 1 to N, such as 1/4")
        return shard

    def __str__(self) -> str:
        return f"{self.index}/{self.number}"


@dataclass(frozen=True)
class Plan:
    """unedited: the models that are evaluated without edits."""

    config: SweepConfig
    output: Path
    stream: EditStream
    orders: tuple[Order, ...]
    trajectories: tuple[Trajectory, ...]
    unedited: tuple[ModelEntry, ...]

    @cached_property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """All evaluations in the order in which they run."""
        return tuple(itertools.chain.from_iterable(map(self.of_model, self.config.models)))

    @cached_property
    def units(self) -> list[ModelEntry | Trajectory]:
        """What can run apart, in order: a model that is evaluated unedited, or a trajectory."""
        found: list[ModelEntry | Trajectory] = []
        for model in self.config.models:
            found += [one for one in self.unedited if one is model]
            found += [one for one in self.trajectories if one.model is model]
        return found

    def part(self, shard: Shard) -> Plan:
        """The plan of a shard: every ``number``-th unit, which spreads methods of different cost."""
        units = self.units[shard.index - 1 :: shard.number]
        return replace(
            self,
            trajectories=tuple(one for one in units if isinstance(one, Trajectory)),
            unedited=tuple(one for one in units if isinstance(one, ModelEntry)),
        )

    def of_model(self, model: ModelEntry) -> list[Evaluation]:
        found = []
        if any(one is model for one in self.unedited):
            folder, arguments = self.output / model.label / "unedited", self.config.model_args(model)
            found.append(Evaluation(model, None, 0, folder, arguments, self.stream.edits))
        for trajectory in self.trajectories:
            if trajectory.model is model:
                found += [self._evaluation(trajectory, n) for n in trajectory.checkpoints]
        return found

    def _evaluation(self, trajectory: Trajectory, n: int) -> Evaluation:
        edit = {"method": trajectory.config.method, "edits": trajectory.order.spec(n)}
        arguments = self.config.model_args(trajectory.model, edit | trajectory.edit_arguments)
        folder = trajectory.folder / f"edits_{n:03d}"
        return Evaluation(trajectory.model, trajectory, n, folder, arguments, trajectory.edits[:n])

    def write_orders(self) -> None:
        """Write the orders that are no slice of a file, which a single run of lm_eval can use too.

        Raises:
            UserError: such a file exists with other edits.
        """
        for order in self.orders:
            if not order.written:
                continue
            path, text = Path(order.name), "".join(map(_row, order.edits))
            if not path.exists():
                with written_whole(path) as temporary:
                    temporary.write_text(text, encoding="utf-8")
            elif read_text(path) != text:
                raise UserError(
                    f"{path}: has other edits than {self.config.edits}; give another output folder"
                )


def read_config(path: Path) -> SweepConfig:
    """The validated sweep in a YAML file.

    Raises:
        UserError: one line naming file and key.
    """
    return validated(SweepConfig, read_values(path), str(path))


def read_values(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping with output, models, edits, ...; see docs/sweep.md")
    return {str(key): value for key, value in values.items()}


def make_plan(config: SweepConfig, where: str) -> Plan:
    """Trajectories and evaluations, with all checks that need no model; reads the edits.

    Args:
        where: the configuration file, for messages.

    Raises:
        UserError: edits cannot be read, a checkpoint cannot be reached, or two entries would share a folder.
    """
    parts: tuple[Sequence[Any], ...] = (config.models, config.methods, config.regularizers, config.edit_seeds)
    if (count := config.orders * math.prod(len(part) for part in parts)) > MOST:
        raise UserError(
            f"{where}: models x methods x regularizers x orders x edit_seeds are {count}, more than {MOST}"
        )
    stream = load_edits(config.edits)
    output = Path(config.output)
    last = max((n for method in config.methods for n in config.checkpoints_of(method)), default=0)
    if last > len(stream):
        raise UserError(
            f"{where}: checkpoints: {last} edits asked for, but edits={config.edits} has {len(stream)}"
        )
    orders = tuple(_order(k, config, stream, output) for k in range(config.orders))
    combinations = itertools.product(
        config.models, config.methods, config.regularizers, orders, config.edit_seeds
    )
    trajectories = tuple(_trajectory(config, where, *one) for one in combinations)
    plan = Plan(
        config,
        output,
        stream,
        orders,
        trajectories=tuple(t for t in trajectories if t.checkpoints),
        unedited=tuple(config.models) if 0 in config.checkpoints else (),
    )
    _check_folders([m.label for m in config.models], f"{where}: models")
    folders = [str(t.folder) for t in plan.trajectories]
    _check_folders(folders, f"{where}: methods, regularizers or edit_seeds")
    return plan


def _trajectory(
    config: SweepConfig,
    where: str,
    model: ModelEntry,
    method: MethodEntry,
    regularizer: RegularizerEntry,
    order: Order,
    seed: int,
) -> Trajectory:
    checkpoints = config.checkpoints_of(method)
    given = {"edit_batch_size": config.edit_batch_size} | method.arguments | regularizer.arguments
    given_once = {"edit_seed": seed, "measure": config.measure}
    given |= given_once
    if method.method == "mend" and (networks := config.networks(model)):
        given.setdefault("hparams", str(networks))
    last = checkpoints[-1] if checkpoints else len(order.edits)
    checked = EditConfig.from_args(
        f"{where}: {method.label}", edits=order.spec(last), **config.prompts, **given
    )
    check_edits(METHODS[checked.method], order.edits[:last])
    size = checked.edit_batch_size
    for n in checkpoints:
        if n % size and n != len(order.edits):
            raise UserError(
                f"{where}: checkpoints: {n} edits do not fill batches of {size} ({method.label}): expected a"
                f" multiple of {size}, or the whole stream"
            )
    values = checked.regularizer.model_dump()
    values["rect"] = values.get("keep")
    given |= {key: values[key] for key in given.keys() & values.keys()}  # 40% and 0.4 are the same run
    defaults = {key: EditConfig.model_fields[key].default for key in ("edit_batch_size", *given_once)}
    arguments = {key: value for key, value in given.items() if key != "method" and value != defaults.get(key)}
    label = "+".join(filter(None, (method.label, regularizer.name or _regularizer_label(checked))))
    folder = Path(config.output) / model.label / _file_name(label)
    folder /= f"order{order.number}" + (f"-seed{seed}" if seed else "")
    return Trajectory(model, label, order, checked, checkpoints, folder, arguments)


def _regularizer_label(config: EditConfig) -> str:
    """rect0.4, rect0.4-alphaedit, sphere-alpha0.3: the share kept and settings other than the defaults."""
    regularizer = config.regularizer
    if regularizer.name == "none":
        return ""
    settings = regularizer.model_dump(exclude_defaults=True)
    texts = {name: f"{value:g}" if isinstance(value, float) else value for name, value in settings.items()}
    first = regularizer.name + texts.pop("keep", "")
    convention = texts.pop("rect_convention", "")
    return "-".join(filter(None, (first, convention, *(f"{name}{text}" for name, text in texts.items()))))


def _check_folders(names: Sequence[str], where: str) -> None:
    """Refuse two entries with the same folder; case is ignored, as on some file systems."""
    seen: set[str] = set()
    for name in names:
        if name.casefold() in seen:
            raise UserError(f"{where}: two entries are called {Path(name)}; give one of them another name:")
        seen.add(name.casefold())


def _order(number: int, config: SweepConfig, stream: EditStream, output: Path) -> Order:
    if number == 0 and stream.rows == len(stream):
        return Order(0, *_rows(config.edits, len(stream)), stream.edits, written=False)
    edits = list(stream.edits)
    if number > 0:
        random.Random(number).shuffle(edits)
    path = output / "edits" / f"order{number}.jsonl"
    return Order(number, str(path), range(len(edits)), tuple(edits), written=True)


def _rows(spec: str, length: int) -> tuple[str, range]:
    """The name in an edits spec, and the row numbers that its slice selects.

    ``length`` is the number of selected rows. A slice that counts from the end needs the number of all rows,
    for which the file is read once more.
    """
    name, rows = split_spec(spec)
    rows = rows or slice(None)
    start, step = rows.start or 0, rows.step or 1
    if step > 0 and start >= 0:
        return name, range(start, start + length * step, step)
    return name, range(load_edits(name).rows)[rows]


def _row(edit: Edit) -> str:
    """An edit as a line of JSON, from which :func:`load_edits` reads the same edit."""
    row = {
        "case_id": edit.id,
        "prompt": edit.prompt,
        "subject": edit.subject,
        "target_new": {"str": edit.target_new, "id": edit.target_id} if edit.target_id else edit.target_new,
        "target_true": edit.target_old,
        "relation_id": edit.relation,
        "paraphrase_prompts": list(edit.paraphrases),
        "neighborhood_prompts": [{"prompt": p.prompt, "ground_truth": p.answer} for p in edit.neighborhood],
        "attribute_prompts": list(edit.attribute_prompts),
        "generation_prompts": list(edit.generation_prompts),
        "attribute_snippets": list(edit.reference_texts),
        "consequences": [_consequence(one) for one in edit.consequences],
    }
    if edit.multi_hop is not None:
        answer, *aliases = edit.multi_hop.answers
        row |= {
            "questions": list(edit.multi_hop.questions),
            "new_answer": answer,
            "new_answer_alias": aliases,
        }
        row["new_single_hops"] = list(map(_query, edit.multi_hop.hops))
    # ASCII escapes also cover lone surrogates, which UTF-8 cannot.
    return json.dumps({key: value for key, value in row.items() if value not in (None, "", [])}) + "\n"


def _consequence(consequence: Consequence) -> dict[str, Any]:
    return {
        "criterion": consequence.criterion,
        "test_queries": list(map(_query, consequence.queries)),
        "test_condition": "OR" if consequence.any_query else "AND",
        "condition_queries": list(map(_query, consequence.conditions)),
    }


def _query(query: Query) -> dict[str, Any]:
    return {"prompt": query.prompt, "answers": [list(forms) for forms in query.answers]}


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+=%-]+", "__", text).strip(".") or "_"
