"""``harness-rect replay``: put a kept edit run onto its base model again, without any search."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness_rect import embedded
from harness_rect.cli import path_argument
from harness_rect.cli.common import add_option, load_model
from harness_rect.cli.kept_runs import add_cache_option, cache_of
from harness_rect.config import EditConfig, ModelArguments, declared_arguments, settings
from harness_rect.errors import Failed, UserError
from harness_rect.fingerprint import model_fingerprint
from harness_rect.io.checksums import Damaged
from harness_rect.io.files import check_output
from harness_rect.io.progress import logging_only
from harness_rect.models import EditableLM
from harness_rect.regularizers import Regularizer
from harness_rect.session.base_model import base_arguments
from harness_rect.session.checkpoint import save_checkpoint
from harness_rect.session.replay import Differs, put, weights_of
from harness_rect.session.report import EditReport
from harness_rect.session.runs import KeptRun, touch
from harness_rect.session.weights import EditedWeights


def add_options(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument(
        "--output", type=path_argument, required=True, help="folder for the checkpoint and edit_report.json"
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which run is put onto which model, and how much of it."""
    parser.add_argument(
        "key", metavar="RUN", help="a kept run: the beginning of its key in the cache, or its folder"
    )
    parser.add_argument("--upto", type=int, metavar="K", help="only the first K edits (default: all)")
    parser.add_argument("--model", help="the base model (default: where the run found it)")
    parser.add_argument(
        "--model-args",
        metavar="NAME=VALUE,...",
        help="how it is loaded, as lm_eval's --model_args: revision, subfolder, tokenizer, ... in place of"
        " the run's (NAME= leaves one out), and what no run says: parallelize=True, trust_remote_code=True",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    add_cache_option(parser)
    declared = declared_arguments()
    for name in ("rect", "regularizer", *settings()):
        text = declared[name].help
        if name in ("rect", "regularizer"):
            text += "; another than the run's is for its first step alone"
        add_option(parser, name, text, None, dest=name)


@dataclass(frozen=True)
class Loaded:
    """A kept run and its base model, into which nothing was put yet.

    base: its name or folder. arguments: those of lm-eval's class that decide which model that is.
    """

    run: KeptRun
    base: str
    arguments: Mapping[str, Any]
    model: Any
    tokenizer: Any
    weights: EditedWeights
    upto: int | None
    regularizer: Regularizer | None

    def put(self) -> EditReport:
        return put(self.run, self.weights, self.upto, self.regularizer)


def load_run(arguments: argparse.Namespace) -> Loaded:
    """The run and the model that the options name.

    Raises:
        UserError: there is no such run, it is damaged, or the model is not its base model.
    """
    given = {name: getattr(arguments, name) for name in ("rect", "regularizer", *settings())}
    another = any(value is not None for value in given.values())
    chosen = EditConfig.from_args("command line", method="none", **given).regularizer if another else None
    asked = _asked(arguments.model_args)
    folder = path_argument(arguments.key)
    try:
        folder = folder if folder.is_dir() else cache_of(arguments).find(arguments.key)
        touch(folder)  # first, so that it is not removed for being old
        run = KeptRun.read(folder)
    except Damaged as problem:
        if not folder.exists():
            raise Failed(f"{arguments.key}: the kept edit run was removed meanwhile; edit anew") from None
        raise UserError(f"{arguments.key}: the kept edit run is damaged: {problem}") from None
    recorded = run.report.model if embedded.is_embedded(run.report.model) else run.base["model"]
    if not (base := arguments.model or recorded):
        raise UserError(f"{arguments.key}: does not say where its base model is; give --model")
    arguments.model, arguments.dtype = base, run.base["dtype"]
    recorded = run.base.get("arguments")
    loading = {n: value for n, value in ((recorded or {}) | asked).items() if value not in (None, "")}
    if peft := loading.get("peft"):
        raise UserError(
            f"{arguments.key}: is of a model with peft={peft}, whose checkpoint would hold the adapter alone;"
            " merge it into the model and edit that"
        )
    try:
        if recorded is None and not asked:
            model, tokenizer = load_model(arguments, trust_remote_code=False)
        else:
            model, tokenizer = _loaded(base, loading, arguments)
    except UserError as error:
        if "custom code" not in str(error):
            raise
        raise UserError(f"{error} --model-args trust_remote_code=True runs it") from None
    if model_fingerprint(model) != run.report.model_fingerprint:
        offloaded = any(weight.device.type == "meta" for weight in model.parameters())
        but = ": they are offloaded in part, and must be where they were then" if offloaded else ""
        raise UserError(f"--model {base}: its weights are not those that the run was made with{but}")
    weights = weights_of(run, EditableLM(model, tokenizer))
    return Loaded(run, base, base_arguments(loading), model, tokenizer, weights, arguments.upto, chosen)


def _asked(text: str | None) -> dict[str, Any]:
    """The arguments that ``--model-args`` gives.

    Raises:
        UserError: one has no value, or does not say how a model is loaded.
    """
    if text is None:
        return {}
    from harness_rect.compat.lm_eval import parsed_arguments  # it takes seconds, and most need none

    for part in filter(None, text.strip().split(",")):
        name, is_there, _ = part.partition("=")
        if not is_there:
            raise UserError(f"--model-args {part}: expected NAME=VALUE")
        if name in _ELSEWHERE or name in declared_arguments(ModelArguments):
            elsewhere = _ELSEWHERE.get(name, "the run says how it was edited")
            raise UserError(f"--model-args {name}: {elsewhere}")
    return parsed_arguments(text)


#: What says it in their place.
_ELSEWHERE = {
    "pretrained": "--model names the model",
    "device": "--device names it",
    "dtype": "it is the run's",
}


def _loaded(base: str, loading: Mapping[str, Any], arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model and tokenizer as ``edited_hf`` loads them."""
    from harness_rect.model_wrappers.edited_hf import EditedHF

    given = {"method": "none", "dtype": arguments.dtype, "device": arguments.device, **loading}
    with logging_only(logging.WARNING, "lm_eval"):
        lm = EditedHF(embedded.resolve_model(base), **given)
    return lm.model, lm.tokenizer


def run(arguments: argparse.Namespace) -> int:
    """Replay and write the checkpoint; 1 if other weights come out than the run had."""
    check_output(arguments.output)
    loaded = load_run(arguments)
    try:
        report = loaded.put()
    except Differs as problem:
        print(f"error: {arguments.key}: {problem}", file=sys.stderr)
        return 1
    save_checkpoint(arguments.output, loaded.model, loaded.tokenizer, report)
    print(f"{report.n_edits} edits by {report.method} put onto {loaded.base}: {arguments.output}")
    return 0
