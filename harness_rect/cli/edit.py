"""``harness-rect edit``: edit a model and write it as a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from harness_rect import config
from harness_rect.cli import path_argument
from harness_rect.cli.common import (
    add_chat_options,
    add_model_options,
    add_option,
    load_model,
    template_arguments,
)
from harness_rect.edits import load_edits
from harness_rect.errors import UserError
from harness_rect.io.files import check_output
from harness_rect.io.progress import console
from harness_rect.methods import METHODS, check_edits
from harness_rect.moments.layout import layout_name
from harness_rect.session.checkpoint import save_checkpoint
from harness_rect.session.report import EditReport
from harness_rect.session.runs import EditCache
from harness_rect.session.stream import EditSession


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    for name, argument in config.declared_arguments().items():
        if name in {"apply_chat_template", "system_instruction"}:
            continue
        required = name in {"method", "edits"}
        default = None if required else argument.default
        option = "seed" if name == "edit_seed" else name
        add_option(parser, option, argument.help, default, type=argument.type, required=required, dest=name)
    add_chat_options(parser)
    parser.add_argument(
        "--output", type=path_argument, required=True, help="folder for the checkpoint and edit_report.json"
    )


def run(arguments: argparse.Namespace) -> None:
    """Edit, write the checkpoint and print how the edits did."""
    described = described_by(arguments)
    if described.method == "none":
        raise UserError("--method none edits nothing; choose a method")
    check_output(arguments.output)
    stream = load_edits(arguments.edits)
    check_edits(METHODS[described.method], stream)
    cache = EditCache.to_write(described.edit_cache)
    model, tokenizer = load_model(arguments)
    name, template = layout_name(arguments.model), template_arguments(arguments)
    session = EditSession(model, tokenizer, described, stream, name, chat_template_args=template)
    session.run(cache)
    save_checkpoint(arguments.output, model, tokenizer, session.report)
    _print_summary(session.report, arguments.output)


def described_by(arguments: argparse.Namespace) -> config.EditConfig:
    """The editing run that the options describe."""
    given = {name: getattr(arguments, name) for name in config.declared_arguments()}
    return config.EditConfig.from_args("command line", **given)


def _print_summary(report: EditReport, output: Path) -> None:
    table = Table(title=f"{report.n_edits} edits by {report.method}")
    table.add_column("metric")
    for heading in ("before", "right after each", "at the end"):
        table.add_column(heading, justify="right")
    times = [report.before_each_edit, report.right_after_each_edit, report.at_the_end]
    for metric in sorted({name for scores in times for name in scores}):
        values = [scores.get(metric) for scores in times]
        if metric == "locality":  # before an edit it is 1 by definition
            values[0] = None
        table.add_row(metric, *("-" if value is None else f"{value:.3g}" for value in values))
    console().print(table)
    console().print(f"checkpoint and edit_report.json: {output}", soft_wrap=True)
