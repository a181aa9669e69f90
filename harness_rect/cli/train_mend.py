"""``harness-rect train-mend``: train the networks that MEND edits with."""

from __future__ import annotations

import argparse
import logging

from harness_rect.cli import path_argument
from harness_rect.cli.common import (
    add_chat_options,
    add_model_options,
    add_option,
    load_model,
    parse_layers,
    template_arguments,
)
from harness_rect.edits import load_edits
from harness_rect.io.progress import console
from harness_rect.models import EditableLM
from harness_rect.models.prompt_format import PromptFormat
from harness_rect.moments.layout import layout_name
from harness_rect.training.mend import (
    MendTrainer,
    MendTraining,
    check_folder,
    hold_out,
    training_rows,
    usual_settings,
)
from harness_rect.validation import validated

log = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument(
        "--train",
        required=True,
        help="training rows: zsre (ZsRE's training rows) or a file, with [start:stop]",
    )
    parser.add_argument("--val", help="held-out rows (default: the last tenth of --train, at most 500)")
    parser.add_argument(
        "--output", type=path_argument, required=True, help="folder for mend.safetensors and mend.yaml"
    )
    parser.add_argument(
        "--layers", help="blocks whose MLP matrices are edited: 45-47 (default: the last three)"
    )
    for name, field in MendTraining.model_fields.items():
        if name != "layers":
            add_option(parser, name, field.description or "", field.default, type=field.annotation)
    add_chat_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train, and write the networks' best state."""
    names = MendTraining.model_fields.keys() - {"layers"}
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    layers = parse_layers(arguments.layers) if arguments.layers is not None else [0]
    validated(MendTraining, given | {"layers": layers}, "command line")  # before any work
    check_folder(arguments.output)
    train = load_edits(training_rows(arguments.train)).edits
    if arguments.val is None:
        train, held_out = hold_out(train)
    else:
        held_out = load_edits(training_rows(arguments.val)).edits
    model, tokenizer = load_model(arguments)
    chosen, instruction = arguments.apply_chat_template or False, arguments.system_instruction
    format = PromptFormat.of(tokenizer, chosen, instruction, template_arguments(arguments))
    lm = EditableLM(model, tokenizer, format=format)
    given |= {} if arguments.layers is None else {"layers": layers}
    settings = validated(MendTraining, usual_settings(lm) | given, "command line")
    described = MendTrainer(lm, train, held_out, settings, layout_name(arguments.model)).run(arguments.output)
    scores = ", ".join(f"{name} {value:.3g}" for name, value in described.validation.items())
    console().print(
        f"best of {described.training['last_step']} steps on held-out rows: {scores}", soft_wrap=True
    )
    console().print(f"edit with: --method mend --hparams {arguments.output}", soft_wrap=True)
