"""What is fuzzed, area by area: each makes one hostile input and runs what a user would run on it.

Everything runs in this process, through the boundary of the commands (``harness_rect.errors``). Models are
loaded once, and what is accepted stops before it edits.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from fuzz import hostile
from fuzz.oracles import SLICES, check_edits, check_moment, with_scores_checked
from support.lm_eval_files import DATE
from support.report_files import edit as edit_report
from support.report_files import writer

from harness_rect import cli, embedded, errors
from harness_rect.edits import fingerprint, load_edits
from harness_rect.evaluation.editing.documents import documents
from harness_rect.experiments import analysis
from harness_rect.moments.layout import read_moment
from harness_rect.moments.text import texts_of

Run = Callable[[], int]
Area = Callable[[random.Random, Path], Run]
#: Of rect-tiny.
D_MLP = 16
ROWS = [json.loads(line) for line in embedded.EDITS.read_text(encoding="utf-8").splitlines()[:3]]
HPARAMS = {
    "layers": [2],
    "v_num_grad_steps": 2,
    "v_lr": 0.3,
    "v_weight_decay": 0.5,
    "kl_factor": 0.1,
    "clamp_norm_factor": 4,
    "context_templates": ["{}"],
    "mom2_adjustment": False,
    "mom2_n_samples": 100,
    "alg_name": "ROME",
}
SWEEP = {
    "title": "t",
    "model": "rect-tiny",
    "edits": "tiny[0:3]",
    "methods": ["rome"],
    "regularizers": [None, {"rect": 0.4}],
    "checkpoints": [0, 1, 3],
    "tasks": ["rect_sentiment"],
    "orders": 1,
    "edit_seeds": [0],
    "batch_size": 4,
    "limit": 2,
    "edit_batch_size": 1,
    "seed": [0, 1, 2, 3],
    "device": "cpu",
}


class Accepted(SystemExit):
    """Raised where the work would begin."""

    code = 0


def _accept(*arguments: Any, **more: Any) -> Any:
    raise Accepted(0)


def command(*arguments: object) -> Run:
    return lambda: cli.main([str(one) for one in arguments])


def through_boundary(do: Callable[[], object]) -> Run:
    """As a command runs it."""

    def run() -> int:
        try:
            do()
        except Exception as error:
            return errors.tell(error)
        return 0

    return run


# --------------------------------------------------------------------------------------------- results files


def _results(rng: random.Random, folder: Path, samples: bool = True) -> list[Path]:
    add = writer(folder / "in")
    tasks = ("rect_nli", "rect_sentiment")
    more: dict[str, Any] = {"before_each_edit": {"reliability": 0.1}, "edits": [_record(i) for i in range(3)]}
    steps = [{"edits": ["0"], "weights": {"h.3.weight": {"update_norm": 1.0, "kept": 0.4}}, "seconds": 1.0}]
    paths = [
        add(7, tasks=tasks, samples=samples),
        add(5, edit_report(3, (0.9, 0.5), steps=steps, **more), tasks=tasks, samples=samples),
        add(6, edit_report(3, (0.8, 0.6), regularizer="rect", keep=0.4), tasks=tasks, samples=samples),
    ]
    for path in rng.sample(paths, rng.choice((1, 1, 2))):
        made = json.loads(path.read_text())
        if rng.random() < 0.3:
            made["group_subtasks"] = rng.choice((_doubling(26), {"g": ["g", "h"], "h": ["g"]}, _chain(3000)))
        times = rng.choice((0, 1, 1, 2, 6))
        data = hostile.as_json(hostile.mutated(rng, made, times))
        hostile.put(rng, path, hostile.damaged(rng, data) if rng.random() < 0.15 else data)
    for path in sorted((folder / "in").rglob("samples_*.jsonl")):
        if rng.random() < 0.3:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
            lines = [hostile.as_json(row).replace(b"\n", b" ") for row in hostile.mutated(rng, rows, 2)]
            data = b"\n".join(lines)
            hostile.put(rng, path, hostile.damaged(rng, data) if rng.random() < 0.2 else data)
    return paths


def _record(index: int) -> dict[str, Any]:
    metrics = {"reliability": 1.0, "generalization": 0.5, "locality": 0.5}
    return {"id": str(index), "before": metrics, "after": metrics, "end": metrics, "search": {"loss": 0.1}}


def _doubling(levels: int) -> dict[str, list[str]]:
    inner = {f"g{i}": [f"g{i + 1}"] * 2 for i in range(levels)}
    return inner | {f"g{levels}": ["rect_nli", "rect_sentiment"]}


def _chain(length: int) -> dict[str, list[str]]:
    return {f"g{i}": [f"g{i + 1}", "rect_nli"] for i in range(length)}


def report(rng: random.Random, folder: Path) -> Run:
    _results(rng, folder)
    more = ["--figures", folder / "out" / "figures"] if rng.random() < 0.1 else []
    run = command("report", folder / "in", "-o", folder / "out" / "r.html", *more)

    return run if rng.random() < 0.05 else undrawn(run)


def undrawn(run: Run) -> Run:
    """Figures are made and not drawn, which takes most of the time."""

    def without() -> int:
        with mock.patch("harness_rect.experiments.report.drawing._save", _empty_picture):
            return run()

    return without


def _empty_picture(figure: Any, target: Any, form: str) -> None:
    if isinstance(target, Path):
        target.touch()
    else:
        target.write("<svg></svg>")


def compare(rng: random.Random, folder: Path) -> Run:
    base, *others = _results(rng, folder)
    options = [rng.choice(("--all-metrics", "--allow-differences", "--tasks=rect_nli")) for _ in range(2)]
    form = rng.choice(("table", "markdown", "csv", "json"))
    run = command("compare", base.parent, *(o.parent for o in others), *options, "--format", form)
    return partial(with_scores_checked, run) if form == "json" else run


def analysing(rng: random.Random, folder: Path) -> Run:
    _results(rng, folder, samples=False)
    functions = (
        *(analysis.runs, analysis.scores, analysis.edit_metrics, analysis.edits),
        *(analysis.update_statistics, analysis.weight_distances),
    )
    return through_boundary(lambda: [function(folder / "in") for function in functions])


# ------------------------------------------------------------------------------------- edits, texts, moments


def edits(rng: random.Random, folder: Path) -> Run:
    rows = ROWS if rng.random() < 0.5 else [rng.choice(PUBLISHED) for _ in range(2)]
    made = hostile.mutated(rng, rows, rng.choice((1, 2, 5)))
    data = hostile.as_json(made)
    if rng.random() < 0.3 and isinstance(made, list):
        data = b"\n".join(hostile.as_json(row).replace(b"\n", b" ") for row in made)
    data = hostile.damaged(rng, data) if rng.random() < 0.25 else data
    path = hostile.put(rng, folder / "in" / rng.choice(("e.json", "e.jsonl", "e.JSON")), data)
    selection = rng.choice((*SLICES, "", "[99:]", "[x]", "[0:1:0]"))
    spec = f"{path}{selection}"
    if rng.random() < 0.1:
        spec = rng.choice((f"~nosuchuser/{path.name}", "n" * 3000 + ".json", f"{path}/x.json", "\x00.json"))

    def read() -> None:
        stream = load_edits(spec)
        fingerprint(stream.edits)
        documents(stream.edits)
        check_edits(stream.edits, path, selection)

    return through_boundary(read)


PUBLISHED: list[Any] = [
    {
        "src": "Who leads Ulm?",
        "subject": "Ulm",
        "alt": "Ann",
        "pred": "Bo",
        "rephrase": "Ulm?",
        "loc": "nq: x",
        "loc_ans": "y",
    },
    {
        "case_id": 1,
        "requested_rewrite": {
            "prompt": "{} is in",
            "subject": "Ulm",
            "target_new": {"str": "Rome", "id": "Q1"},
            "target_true": {"str": "Bonn"},
            "relation_id": "P1",
        },
        "paraphrase_prompts": ["Ulm lies in"],
        "neighborhood_prompts": ["Bonn is in"],
        "attribute_prompts": ["x"],
        "generation_prompts": ["y"],
    },
    {
        "prompt": "The mayor of Ulm is",
        "subject": "Ulm",
        "target_new": "Ann",
        "portability": {"Reasoning": [{"prompt": "p", "ground_truth": [["a"]]}]},
        "locality": {"Relation_Specificity": [{"prompt": "p", "ground_truth": "g"}]},
    },
    {
        "requested_rewrite": [
            {"prompt": "{} of", "subject": "Ulm", "target_new": {"str": "a"}, "question": "q"}
        ],
        "questions": ["q1"],
        "new_answer": "a",
        "new_answer_alias": ["b"],
        "new_single_hops": [{"question": "q", "answer": "a", "answer_alias": []}],
    },
    {
        "edit": {
            "prompt": "The name of the currency in Ulm is mark.",
            "relation": "CURRENCY",
            "target_id": "Q1",
        },
        "Logical_Generalization": [
            {
                "test_queries": [{"prompt": "p", "answers": [{"value": "v", "aliases": []}]}],
                "test_condition": "OR",
            }
        ],
    },
]


def texts(rng: random.Random, folder: Path) -> Run:
    if rng.random() < 0.5:
        data = b"A city.\n\nIt rained.\n" * 3
        name = "t.txt"
    else:
        rows = hostile.mutated(rng, [{"text": "A city."}, {"text": "It rained."}], 2)
        data = b"\n".join(hostile.as_json(row).replace(b"\n", b" ") for row in rows)
        name = "t.jsonl"
    path = hostile.put(rng, folder / "in" / name, hostile.damaged(rng, data) if rng.random() < 0.5 else data)
    return through_boundary(lambda: list(texts_of(str(path))))


def moments(rng: random.Random, folder: Path) -> Run:
    path = folder / "in" / "m.npz"
    path.parent.mkdir(parents=True)
    total: Any = np.eye(D_MLP, dtype=np.float32) * 3
    count: Any = np.asarray(7)
    how = rng.randrange(12)
    if how <= 5:
        total = (
            total[:, :3],
            total.astype(rng.choice((">f4", "i4", ">f8", "c8", "?", "U3", "f2"))),
            np.full_like(total, rng.choice((np.inf, np.nan, -1, 0, 1e38))),
            np.asarray(3.0),
            np.asarray([], dtype=np.float32),
            np.array([[{}]], dtype=object),
        )[how]
    elif how <= 7:
        count = np.asarray(rng.choice((0, -1, np.nan, np.inf, 10**18, 1.5, [1, 2], "x", b"x", None)))
    names = ["mom2.mom2", "mom2.count"] if how != 8 else rng.choice((["mom2.mom2"], ["mom2.count", "x"], []))
    np.savez(path, **dict(zip(names, (total, count), strict=False)))
    data = path.read_bytes()
    if how == 9:  # a header that claims more than there is
        shape = rng.choice(("(10**18,)", "(1000000000, 1000000000)", "(16, 16)", "(-1, 16)", "x" * 9999))
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        body = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mom2.mom2.npy", body)
            archive.writestr("mom2.count.npy", body)
        data = path.read_bytes()
    elif how == 10:  # little that becomes much
        with zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))) as archive:
            archive.writestr("mom2.mom2.npy", b"\x93NUMPY\x01\x00" + bytes(50_000_000))
        data = path.read_bytes()
    elif how == 11:  # flags and methods of the archive
        changed = bytearray(data)
        for place in (6, 8, data.rfind(b"PK\x01\x02") + 8, data.rfind(b"PK\x01\x02") + 10):
            changed[place] = rng.choice((0, 1, 8, 9, 12, 14, 93, 99))
        data = bytes(changed)
    path.unlink()
    hostile.put(rng, path, hostile.damaged(rng, data) if rng.random() < 0.3 else data)
    return through_boundary(lambda: check_moment(read_moment(path, D_MLP), path))


# ------------------------------------------------------------------------------ YAML, options, model_args


@cache
def tiny() -> tuple[Any, Any]:
    import transformers

    name = embedded.resolve_model("rect-tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(name).eval()
    return model, transformers.AutoTokenizer.from_pretrained(name)


@contextlib.contextmanager
def _without_work() -> Iterator[None]:
    with (
        mock.patch("harness_rect.cli.edit.load_model", lambda arguments: tiny()),
        mock.patch("harness_rect.session.stream.EditSession.run", _accept),
        mock.patch("harness_rect.moments.provider.MomentProvider.compute_into", _accept),
        mock.patch("harness_rect.training.mend.MendTrainer.run", _accept),
        mock.patch("harness_rect.experiments.sweep.runner.show_dry_run", lambda *arguments: None),
        mock.patch("lm_eval.models.huggingface.HFLM.__init__", _accept),
    ):
        yield


def stopping(run: Run) -> Run:
    def stopped() -> int:
        with _without_work():
            return run()

    return stopped


def hparams(rng: random.Random, folder: Path) -> Run:
    name = rng.choice(("h.yaml", "h.yaml", "h.yml", "h.json"))
    method = rng.choice(("rome", "rome", "r_rome", "mend"))
    if name == "h.json":
        data = hostile.as_json(hostile.mutated(rng, HPARAMS, rng.choice((1, 2))))
    else:
        data = hostile.yaml_text(rng, HPARAMS)
    path = hostile.put(rng, folder / "in" / name, hostile.damaged(rng, data) if rng.random() < 0.15 else data)
    if method == "mend" and rng.random() < 0.5:
        path = hostile.put(rng, folder / "in" / "mend" / "mend.yaml", data).parent
    options = {"model": "rect-tiny", "method": method, "edits": facts(folder), "hparams": path}
    return stopping(command("edit", *as_options(options | {"output": folder / "out" / "o"})))


def sweep(rng: random.Random, folder: Path) -> Run:
    whole = SWEEP | {"output": str(folder / "out" / "s")}
    if rng.random() < 0.4:
        data = hostile.as_json(hostile.mutated(rng, whole, rng.choice((1, 2, 4))))
    else:
        data = hostile.yaml_text(rng, whole)
    data = hostile.damaged(rng, data) if rng.random() < 0.1 else data
    path = hostile.put(rng, folder / "in" / "s.yaml", data)
    inside = ["--output", folder / "out" / "s"]
    return stopping(command("sweep", path, "--dry-run", *inside))


def facts(folder: Path) -> Path:
    """A file of three good rows: the embedded one has a thousand, which take longer than all else."""
    path = folder / "in" / "facts.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(ROWS))
    return path


def as_options(given: dict[str, Any]) -> list[str]:
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


VALUES = (
    *(
        "",
        " ",
        "0",
        "-1",
        "0.4%%",
        "40",
        "1e400",
        "nan",
        "99999999999999999999",
        "9" * 5000,
        "true",
        "None",
        "x",
    ),
    *(
        "~",
        "~nosuchuser/x",
        "~root",
        "/dev/full",
        "/dev/zero",
        "/proc/self/mem",
        "/",
        ".",
        "..",
        "a/b/c",
        "[/x]",
    ),
    *(
        "0-99999999999",
        "1,2,3",
        "3-1",
        "--",
        "=",
        "float7",
        "int8",
        "cuda",
        "cuda:99",
        "meta",
        "mps",
        "auto",
        "n" * 5000,
    ),
    *(
        "tiny[0:2]",
        "tiny[5]",
        "tiny[::0]",
        "tiny[",
        "zsre",
        "none",
        "off",
        "\ud800",
        "\x00",
        "a\nb",
        "rect",
        "memit",
        "é",
    ),
)


def options(rng: random.Random, folder: Path) -> Run:
    (folder / "in").mkdir()
    (folder / "in" / "t.txt").write_text("A city.\n")
    (folder / "in" / "dangling").symlink_to(folder / "in" / "nowhere")
    (folder / "in" / "file").write_text("x")
    name = rng.choice(("edit", "edit", "stats", "train-mend"))
    out = folder / "out" / rng.choice(("o", "[/x]", "[bold]", "e\u0301"))
    given: dict[str, Any] = {"model": "rect-tiny", "device": "cpu", "dtype": "float32", "output": out}
    given |= {
        "edit": {
            "method": "rome",
            "edits": facts(folder),
            "hparams": "rect-tiny",
            "edit_cache": "off",
            "seed": 0,
        }
        | {
            "regularizer": "rect",
            "keep": 0.4,
            "edit_batch_size": 1,
            "stats": embedded.stats_folder("rect-tiny"),
        },
        "stats": {"layers": "1", "text": folder / "in" / "t.txt", "tokens": 40},
        "train-mend": {"train": facts(folder), "layers": "1", "steps": 1, "rank": 2, "lr": 0.1, "seed": 0},
    }[name]
    for _ in range(rng.choice((1, 1, 2))):
        places = [folder / "in" / "dangling", folder / "in" / "file", folder / "in" / "file" / "x"]
        key = rng.choice(list(given))
        given[key] = rng.choice((*VALUES, *places)) if key not in ("output",) else rng.choice(places)
    return stopping(command(name, *as_options(given)))


MODEL_ARGS: dict[str, Any] = {
    "pretrained": "rect-tiny",
    "method": "rome",
    "rect": 0.4,
    "edit_batch_size": 1,
    "edit_seed": 0,
    "hparams": "rect-tiny",
    "stats": str(embedded.stats_folder("rect-tiny")),
    "edit_cache": "off",
    "data": "tiny",
    "dtype": "float32",
    "device": "cpu",
    "batch_size": 1,
    "max_batch_size": 4,
    "attn_implementation": "eager",
    "revision": "main",
    "subfolder": "",
    "tokenizer": "rect-tiny",
    "trust_remote_code": False,
    "measure": "teacher_forced",
    "max_length": 64,
    "prefix_token_id": 1,
    "truncation": False,
    "add_bos_token": False,
}


def model_args(rng: random.Random, folder: Path) -> Run:
    """As lm-eval passes them on: texts, and what it reads as numbers, booleans and None."""
    from lm_eval.utils import handle_arg_string

    from harness_rect.model_wrappers.edited_hf import EditedHF

    usual = MODEL_ARGS | {"edits": str(facts(folder))}
    given = dict(rng.sample(sorted(usual.items()), rng.randrange(2, 8)))
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice((*usual, "save_edited", "metod", "keep", "regularizer", "judge", "editz"))
        given[key] = handle_arg_string(rng.choice(VALUES))
    if "save_edited" in given:
        given["save_edited"] = (
            folder / "out" / str(given["save_edited"]).replace("/", "_") if given["save_edited"] else ""
        )

    def make() -> int:
        with mock.patch.object(sys, "argv", ["lm_eval"]), mock.patch.object(sys, "excepthook"):
            EditedHF(**given)
        return 0

    return stopping(make)


AREAS: dict[str, Area] = {
    "report": report,
    "compare": compare,
    "analysis": analysing,
    "edit files": edits,
    "texts": texts,
    "second moments": moments,
    "hyper-parameters": hparams,
    "sweep files": sweep,
    "options": options,
    "model_args": model_args,
}
torch.set_num_threads(1)
assert DATE
