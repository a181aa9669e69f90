"""The ``harness-rect`` command.

Exit status 0: done; 1: a run failed; 2: what was asked is wrong (one line on stderr).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from harness_rect import __version__
from harness_rect.errors import UserError

if TYPE_CHECKING:
    from harness_rect.session.report import EditReport


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own); returns the exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "transformers", "datasets", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return arguments.run(arguments) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what was saved last", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="harness-rect", description="Edit language models; measure the harm.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    edit = commands.add_parser("edit", help="edit a model and write it as a Hugging Face checkpoint")
    _add_model(edit)
    edit.add_argument(
        "--method",
        required=True,
        help="rome, r_rome, memit, emmet, alphaedit, kn, mend, ft, ft_l, locft_bf or ultraedit",
    )
    edit.add_argument(
        "--edits",
        required=True,
        help="tiny, zsre, counterfact or a .json/.jsonl file, with [start:stop:step]",
    )
    edit.add_argument("--edit-batch-size", type=int, default=1, help="facts an edit (default 1)")
    edit.add_argument("--hparams", help="preset name, or a published JSON/YAML file")
    edit.add_argument("--stats", help="folder of second moments")
    edit.add_argument("--regularizer", help="rect, random, pca, prune, sphere or none (default)")
    edit.add_argument("--keep", help="share of the update kept: 0.4 or 40%%")
    edit.add_argument("--rect-convention", help="paper (default) or alphaedit")
    edit.add_argument("--edit-cache", help="folder for finished runs, or off (default: the user's cache)")
    edit.add_argument("--seed", type=int, default=0, help="for everything random in editing (default 0)")
    edit.add_argument(
        "--output", type=Path, required=True, help="folder for the checkpoint and edit_report.json"
    )
    edit.set_defaults(run=_edit)

    sweep = commands.add_parser("sweep", help="run a whole experiment, resumable (see docs/sweep.md)")
    sweep.add_argument("config", type=Path, metavar="CONFIG.yaml", help="what to edit and evaluate")
    sweep.add_argument("--dry-run", action="store_true", help="print the plan and its cost, and stop")
    sweep.set_defaults(run=_sweep)

    stats = commands.add_parser("stats", help="compute second moments from text, in the public npz layout")
    _add_model(stats)
    stats.add_argument("--layers", required=True, help="block numbers: 5 or 13-17 or 3,5,8")
    stats.add_argument(
        "--text", required=True, help="a text file, a .jsonl with a text field, wikipedia or wikitext"
    )
    stats.add_argument("--tokens", type=int, default=None, help="tokens to read (default 50000)")
    stats.add_argument("--float64", action="store_true", help="keep the sums in float64")
    stats.add_argument("--output", type=Path, required=True, help="folder for one npz file a layer")
    stats.set_defaults(run=_stats)

    comparison = commands.add_parser("compare", help="evaluations side by side, with intervals and p-values")
    comparison.add_argument("base", metavar="BASE", help="a results file of lm-eval, or a folder with one")
    comparison.add_argument("others", metavar="OTHER", nargs="+", help="what to compare with it, likewise")
    comparison.add_argument("--tasks", help="only these tasks and groups, comma-separated (default: all)")
    comparison.add_argument(
        "--all-metrics", action="store_true", help="every metric, not the headline of each task"
    )
    comparison.add_argument(
        "--min-retention",
        action="append",
        default=[],
        metavar="[TASK[/METRIC]=]SHARE",
        help="exit with 1 if less is left: 0.94 of each headline, rect_nli=0.9 of one; may be repeated",
    )
    comparison.add_argument(
        "--allow-differences", action="store_true", help="compare what differs in version, data, seeds, ..."
    )
    comparison.add_argument(
        "--format", choices=("table", "markdown", "csv", "json"), help="default: as --output ends, else table"
    )
    comparison.add_argument("--output", type=Path, help="write to this file instead of printing")
    comparison.set_defaults(run=_compare)

    mend = commands.add_parser("train-mend", help="train the networks that method mend edits with")
    _add_model(mend)
    mend.add_argument(
        "--train",
        required=True,
        help="rows to learn from: zsre (its training rows) or a file, with [start:stop]",
    )
    mend.add_argument("--val", help="held-out rows (default: the last tenth of --train, at most 500)")
    mend.add_argument("--output", type=Path, required=True, help="folder for mend.safetensors and mend.yaml")
    mend.add_argument(
        "--layers", help="blocks whose MLP matrices are edited: 45-47 (default: the last three)"
    )
    for name, kind, meaning in (
        ("rank", int, "rank of the networks' layers (default 32)"),
        ("steps", int, "steps at most (default 1000)"),
        ("batch-size", int, "facts a step, each an edit of its own (default 16)"),
        ("lr", float, "learning rate of the networks (default 0.001)"),
        ("edit-lr", float, "every weight's scalar starts at minus this (default 0.001)"),
        ("c-edit", float, "weight of the edit loss at paraphrases (default 1)"),
        ("c-loc", float, "weight of the divergence at locality prompts (default 1)"),
        ("patience", int, "validations without improvement, of 40, that end it early (default 10)"),
        ("seed", int, "for the networks' start and the order of facts (default 0)"),
    ):
        mend.add_argument(f"--{name}", type=kind, help=meaning)
    mend.set_defaults(run=_train_mend)

    report = commands.add_parser("report", help="one self-contained HTML page from a folder of results")
    report.add_argument("results", metavar="DIR", type=Path, help="a folder with lm-eval's results files")
    report.add_argument(
        "-o", "--output", type=Path, required=True, help="the page to write, e.g. report.html"
    )
    report.add_argument("--figures", metavar="DIR", type=Path, help="also write each figure as SVG and PNG")
    report.set_defaults(run=_report)

    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="hub name or folder of a causal language model, or rect-tiny"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16 or auto (as stored, the default)"
    )


def _edit(arguments: argparse.Namespace) -> None:
    from harness_rect.config import EditConfig
    from harness_rect.edits import load_edits
    from harness_rect.moments.provider import layout_name
    from harness_rect.session.checkpoint import check_output, save_checkpoint
    from harness_rect.session.runs import EditCache
    from harness_rect.session.stream import EditSession, check_edits

    config = EditConfig.from_args(
        "command line",
        method=arguments.method,
        edits=arguments.edits,
        edit_batch_size=arguments.edit_batch_size,
        regularizer=arguments.regularizer,
        keep=arguments.keep,
        rect_convention=arguments.rect_convention,
        hparams=arguments.hparams,
        stats=arguments.stats,
        edit_cache=arguments.edit_cache,
        edit_seed=arguments.seed,
    )
    if config.method == "none":
        raise UserError("--method none edits nothing; choose a method")
    check_output(arguments.output)
    stream = load_edits(arguments.edits)
    check_edits(config, stream)
    model, tokenizer = _load(arguments)
    session = EditSession(model, tokenizer, config, stream, layout_name(arguments.model))
    session.run(EditCache.from_spec(config.edit_cache))
    save_checkpoint(arguments.output, model, tokenizer, session.report)
    _print_summary(session.report, arguments.output)


def _print_summary(report: EditReport, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.n_edits} edits by {report.method}")
    for heading in ("metric", "before", "right after each", "at the end"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    moments = [report.before_each_edit, report.right_after_each_edit, report.at_the_end]
    for metric in sorted({name for scores in moments for name in scores}):
        values = [scores.get(metric) for scores in moments]
        cells = ["-" if value is None else f"{value:.3g}" for value in values]
        if metric == "locality":
            cells[0] = "-"
        table.add_row(metric, *cells)
    console = Console()
    console.print(table)
    console.print(f"checkpoint and edit_report.json: {output}", soft_wrap=True)


def _sweep(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    os.environ.setdefault("TQDM_DISABLE", "1")  # one bar of lm-eval's for each task of each evaluation
    from harness_rect.experiments.sweep.runner import run_sweep

    run_sweep(arguments.config, arguments.dry_run, started)


def _stats(arguments: argparse.Namespace) -> None:
    import torch
    import transformers

    from harness_rect.fingerprint import model_fingerprint
    from harness_rect.models import EditableLM
    from harness_rect.moments import MomentProvider
    from harness_rect.moments.collect import DEFAULT_TOKENS, texts_of
    from harness_rect.processes import Processes
    from harness_rect.session.checkpoint import check_parent

    cuda = torch.cuda.is_available() and (arguments.device or "cuda").startswith("cuda")
    processes = Processes.launched(cuda)
    if not processes.is_main:
        logging.disable(logging.WARNING)
        transformers.utils.logging.disable_progress_bar()
    with processes.agreed():
        layers = parse_layers(arguments.layers)
        tokens = DEFAULT_TOKENS if arguments.tokens is None else arguments.tokens
        if tokens < 1:
            raise UserError(f"--tokens {tokens}: expected a positive number")
        check_parent(arguments.output / "file")
        texts_of(arguments.text)  # refuses what is no text source before the model is loaded
        arguments.device = processes.own_device(arguments.device)
        model, tokenizer = _load(arguments)
        lm = EditableLM(model, tokenizer)
        lm.check_layers(layers)
        dtype = "float64" if arguments.float64 else "float32"
        provider = MomentProvider(
            lm, None, "", model_fingerprint(model), dataset=arguments.text, dtype=dtype, tokens=tokens
        )
    names = {layer: lm.architecture.down_projections[layer] for layer in layers}
    paths = {layer: arguments.output / f"{name}_{dtype}_mom2_{tokens}.npz" for layer, name in names.items()}
    count = provider.compute_into(paths, processes)
    processes.leave()
    if processes.is_main:
        print(f"second moments of {count} tokens:")
        for path in paths.values():
            print(f"  {path}")


def _compare(arguments: argparse.Namespace) -> int:
    from harness_rect.experiments.compare.command import run

    return run(arguments)


def _train_mend(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from harness_rect.edits import load_edits
    from harness_rect.models import EditableLM
    from harness_rect.moments.provider import layout_name
    from harness_rect.session.checkpoint import check_parent
    from harness_rect.training.mend import (
        MendTrainer,
        MendTraining,
        check_output,
        default_layers,
        hold_out,
        training_rows,
    )
    from harness_rect.validation import validated

    names = ("rank", "steps", "batch_size", "lr", "edit_lr", "c_edit", "c_loc", "patience", "seed")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    layers = parse_layers(arguments.layers) if arguments.layers is not None else [0]
    settings = validated(MendTraining, given | {"layers": layers}, "command line")  # before any work
    check_output(arguments.output)
    check_parent(arguments.output / "file")
    train = load_edits(training_rows(arguments.train)).edits
    if arguments.val is None:
        train, held_out = hold_out(train)
    else:
        held_out = load_edits(training_rows(arguments.val)).edits
    model, tokenizer = _load(arguments)
    lm = EditableLM(model, tokenizer)
    if arguments.layers is None:
        settings = settings.model_copy(update={"layers": default_layers(lm.architecture.n_layers)})
    described = MendTrainer(lm, train, held_out, settings, layout_name(arguments.model)).run(arguments.output)
    scores = ", ".join(f"{name} {value:.3g}" for name, value in described.validation.items())
    console = Console()
    console.print(
        f"best of {described.training['last_step']} steps on held-out rows: {scores}", soft_wrap=True
    )
    console.print(f"edit with: --method mend --hparams {arguments.output}", soft_wrap=True)


def _report(arguments: argparse.Namespace) -> None:
    from harness_rect.experiments.report.command import run

    run(arguments)


def parse_layers(text: str) -> list[int]:
    """Block numbers from "5", "3,5,8" or "13-17", sorted and without repetition.

    Raises:
        UserError: for anything else.
    """
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--layers {text}: expected numbers such as 5, 3,5,8 or 13-17")
        layers |= set(range(int(first), int(last or first) + 1))
    if not layers:
        raise UserError(f"--layers {text}: an empty range")
    return sorted(layers)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model and tokenizer of ``--model``, checked to be editable before any weight is read."""
    import torch
    import transformers

    from harness_rect import embedded
    from harness_rect.models.architecture import refuse_config
    from harness_rect.models.load import load_errors

    name = embedded.resolve_model(arguments.model)
    if arguments.dtype not in {"auto", "float32", "bfloat16", "float16", "float64"}:
        raise UserError(f"--dtype {arguments.dtype}: expected float32, bfloat16, float16 or auto")
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {arguments.device}: cannot be used here: {reason}") from None
    with load_errors(f"--model {arguments.model}"):
        refuse_config(transformers.AutoConfig.from_pretrained(name))
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    model.to(device)  # type: ignore[arg-type]  # the stub of a wrapped method
    return model.eval(), tokenizer
