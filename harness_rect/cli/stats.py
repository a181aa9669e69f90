"""``harness-rect stats``: second moments of a text, for ``stats=``."""

from __future__ import annotations

import argparse
import logging

import torch
import transformers

from harness_rect.cli import path_argument
from harness_rect.cli.common import add_model_options, load_model, parse_layers
from harness_rect.errors import UserError
from harness_rect.fingerprint import model_fingerprint
from harness_rect.io.files import check_folder, expanded
from harness_rect.models import EditableLM
from harness_rect.moments import MomentProvider
from harness_rect.moments.text import DEFAULT_TOKENS, texts_of
from harness_rect.processes import Processes


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--layers", required=True, help="block numbers: 5 or 13-17 or 3,5,8")
    parser.add_argument(
        "--text", required=True, help="a text file, a .jsonl with a text field, wikipedia or wikitext"
    )
    parser.add_argument(
        "--tokens", type=int, default=DEFAULT_TOKENS, help=f"tokens to read (default {DEFAULT_TOKENS})"
    )
    parser.add_argument("--float64", action="store_true", help="keep the sums in float64")
    parser.add_argument(
        "--output", type=path_argument, required=True, help="folder for one npz file per layer"
    )


def run(arguments: argparse.Namespace) -> None:
    """Compute second moments, shared between the processes of a launcher, and write them."""
    cuda = torch.cuda.is_available() and (arguments.device or "cuda").startswith("cuda")
    processes = Processes.launched(cuda)
    if not processes.is_main:
        logging.disable(logging.WARNING)
        transformers.utils.logging.disable_progress_bar()
    with processes.failing_together():
        layers = parse_layers(arguments.layers)
        if (tokens := arguments.tokens) < 1:
            raise UserError(f"--tokens {tokens}: expected a positive number")
        check_folder(arguments.output)
        arguments.text = expanded(arguments.text)
        texts_of(arguments.text)  # refuses what is no text source before the model is loaded
        arguments.device = processes.own_device(arguments.device)
        model, tokenizer = load_model(arguments)
        lm = EditableLM(model, tokenizer)
        lm.check_layers(layers)
        dtype = "float64" if arguments.float64 else "float32"
        provider = MomentProvider(
            lm, None, "", model_fingerprint(model), dataset=arguments.text, dtype=dtype, tokens=tokens
        )
    paths = provider.paths_in(arguments.output, layers)
    computed = provider.compute_into(paths, processes)
    processes.leave()
    if processes.is_main:
        print(f"second moments of {computed[layers[0]].count} tokens:")
        for path in paths.values():
            print(f"  {path}")
