"""``harness-rect export``: a kept edit run as a checkpoint, a LoRA adapter or a checkpoint of differences."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness_rect import embedded
from harness_rect.cli import path_argument
from harness_rect.cli.replay import add_run_options, load_run
from harness_rect.experiments.cost import cost
from harness_rect.experiments.hub import check_hub, model_card, rank_in_words, upload
from harness_rect.io.files import check_output, expanded, folder_written_whole
from harness_rect.session.base_model import BaseArguments
from harness_rect.session.checkpoint import save_checkpoint
from harness_rect.session.export import save_adapter, save_delta
from harness_rect.session.replay import Differs

FORMATS = ("full", "peft", "delta")


def add_options(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default="full",
        help="full: an edited checkpoint (default); peft: a LoRA adapter, where all updates are of low rank;"
        " delta: a checkpoint of edited minus base",
    )
    parser.add_argument("--output", type=path_argument, required=True, help="folder to write to")
    parser.add_argument("--push-to-hub", metavar="NAME", help="also upload the folder, with a model card")
    parser.add_argument(
        "--results",
        nargs=2,
        metavar="RESULTS",
        help="results of lm-eval of the base model and of this run, whose comparison goes into the card",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the folder and upload it; 1 if other weights come out than the run had."""
    output, name = arguments.output, arguments.push_to_hub
    check_output(output)
    api = check_hub(name) if name else None
    loaded = load_run(arguments)
    base, rank = expanded(loaded.base), None
    try:
        report = loaded.put()
        # Before anything is written, since it may be refused.
        measured = cost(arguments.results, report, base) if arguments.results else None
        with folder_written_whole(output) as folder:  # with the card, or not at all
            if arguments.format == "full":
                save_checkpoint(folder, loaded.model, loaded.tokenizer, report)
            elif arguments.format == "delta":
                marked = report.model_copy(update=_delta_of(base, loaded.arguments))
                inexact = save_delta(folder, loaded.model, loaded.tokenizer, loaded.weights, marked)
                print(f"base + delta differs from the edited weights in {inexact:.3%} of edited elements")
            else:
                place = _absolute(embedded.resolve_model(base))  # PEFT knows no embedded models
                if Path(place).is_dir():  # PEFT has no place for a subfolder
                    place = str(Path(place, loaded.arguments.get("subfolder", "")))
                revision = loaded.arguments.get("revision")
                rank = save_adapter(
                    folder, loaded.run, loaded.weights, place, report, loaded.regularizer, revision
                )
                print(rank_in_words(rank))
            card = model_card(
                report, loaded.run.edits, base, arguments.format, measured, rank, loaded.arguments
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
    except Differs as problem:
        print(f"error: {arguments.key}: {problem}", file=sys.stderr)
        return 1
    print(f"{arguments.format} export of {report.n_edits} edits by {report.method}: {output}")
    if api is not None:
        print(f"uploaded: {upload(api, name, output)}")
    return 0


def _delta_of(base: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an edit report that say of which model a checkpoint of differences is."""
    if not given:
        return {"delta_of": _absolute(base)}
    places = {name: _absolute(given[name]) for name in ("tokenizer", "delta") if name in given}
    return {"delta_of": _absolute(base), "delta_of_arguments": BaseArguments(**{**given, **places})}


def _absolute(model: str) -> str:
    """A folder in full; any other name of a model as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model
