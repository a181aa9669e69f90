"""``harness-rect rerun``: repeat the evaluation of a results file, and compare."""

from __future__ import annotations

import argparse
import logging
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from harness_rect.cli import path_argument
from harness_rect.errors import one_line
from harness_rect.experiments import rerun, results
from harness_rect.io.files import check_output

log = logging.getLogger("harness_rect.rerun")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        metavar="RESULTS",
        help="a results file of lm_eval --model edited_hf, edited_vllm or hf, or a folder with one",
    )
    parser.add_argument("--output", type=path_argument, metavar="DIR", help="folder for the new results")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the model's own code from the hub, if the file asks for it",
    )


def run(arguments: argparse.Namespace) -> int:
    """Repeat and compare; 1 if a score, a measurement of the edits or a weight differs, else 0."""
    if arguments.output is not None:
        check_output(arguments.output)
    then = results.load(results.newest(arguments.results)[0])
    this = rerun.read(then, arguments.trust_remote_code)
    with ExitStack() as stack:
        folder = arguments.output or Path(stack.enter_context(TemporaryDirectory(prefix="harness-rect-")))
        finished = rerun.run(this, log_samples=arguments.output is not None)
        finished.write(folder, rerun_of=str(then.path))
        now = results.load(folder / "results.json")
    for line in this.not_repeated:
        log.warning("not repeated: %s", one_line(line))
    different, equal = rerun.compared(then, now)
    if not different:
        print(f"equal: {equal} scores, measurements of the edits and weights are the same to the last bit")
    else:
        print(f"{len(different)} of {len(different) + equal} differ:\n{rerun.table(different)}")
    if changed := rerun.circumstances(then, now):
        print(f"made with:\n{rerun.table(changed)}")
    elif different:
        but = ", but for what is not repeated" if this.not_repeated else ""
        print(f"inputs, code, versions, threads and machine are the same, as far as the files say them{but}")
    return 1 if different else 0
