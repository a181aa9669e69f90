"""Write the parts of the documentation that are made from the code: python -m tools.docs_tables

Such a part stands in README.md or docs/ between ``<!-- table: NAME -->`` and ``<!-- end of table -->``. The
options that ``harness-rect COMMAND --help`` shows are written as well.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness_rect import cli, config
from harness_rect.edits.public import URLS
from harness_rect.evaluation import catalogue
from harness_rect.experiments.sweep import named
from harness_rect.hparams import Preset, presets
from harness_rect.methods import METHODS
from harness_rect.regularizers import REGULARIZERS
from tools.error_messages import advice_on, messages

ROOT = Path(__file__).parent.parent
REGION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)


def pages() -> list[Path]:
    """The files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rewritten(text: str) -> str:
    """A page with its tables as the code has them now."""
    return REGION.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def methods() -> str:
    return markdown(
        ["name", "paper", "what it changes", "needs", "batch", "cost of an edit"],
        [
            [f"`{m.name}`", m.paper, m.summary, m.needs, "yes" if m.batches else "no", m.cost]
            for m in METHODS.values()
        ],
    )


def regularizers() -> str:
    return markdown(
        ["name", "paper", "settings", "what is left of an update dW"],
        [
            [
                f"`{kind.name}`",
                kind.paper,
                ", ".join(f"`{field}`" for field in kind.model_fields),
                kind.summary,
            ]
            for name, kind in REGULARIZERS.items()
            if name != "none"
        ],
    )


def arguments() -> str:
    return markdown(
        ["argument", "meaning", "default"],
        [
            [f"`{argument.name}`", argument.help, "" if argument.default is None else f"`{argument.default}`"]
            for argument in config.declared_arguments(config.ModelArguments).values()
        ],
    )


def tasks() -> str:
    return markdown(
        ["task", "metrics, the headline first", "our file", "the paper's file"],
        [
            [
                f"`{task.name}`",
                ", ".join(metric.name for metric in task.metrics),
                task.file or "the applied edits",
                task.paper_file,
            ]
            for task in catalogue.TASKS.values()
        ],
    )


def published_presets() -> str:
    return markdown(
        ["method", "preset", "model", "values", "published in"],
        [
            [f"`{m.name}`", f"`{name}`", preset.about.partition(" on ")[2], _values(preset), preset.published]
            for m in METHODS.values()
            if m.presets in ("", m.name)
            for name, preset in presets(m).items()
            if preset.published
        ],
    )


def all_metrics() -> str:
    """What every task reports; the tasks of the GLUE suite report the same."""
    rows = {}
    for task in catalogue.TASKS.values():
        name = "rect_glue_*" if task.group == "rect_glue" else task.name
        for m in task.metrics:
            cells = (f"`{m.name}`", m.title, m.protocol, "higher" if m.higher_is_better else "lower")
            rows[name, m.name] = (f"`{name}`", *cells)
    return markdown(["task", "metric", "what it is", "protocol", "better when"], rows.values())


def metrics(group: str) -> str:
    """What the tasks of a group report."""
    of = [metric for task in catalogue.TASKS.values() if task.group == group for metric in task.metrics]
    return markdown(
        ["metric", "what it is", "protocol", "better when"],
        [
            [f"`{m.name}`", m.title, m.protocol, "higher" if m.higher_is_better else "lower"]
            for m in dict.fromkeys(of)
        ],
    )


#: Settings that are the same in all published files.
_COMMON = ("mom2_dataset", "mom2_n_samples", "mom2_dtype", "context_template_length_params", "v_loss_layer")


def _values(preset: Preset) -> str:
    values = {key: value for key, value in (preset.values | preset.training).items() if key not in _COMMON}
    if names := values.pop("inner_params", None):
        values["inner_params"] = f"{len(names)} MLP matrices, {names[0]} to {names[-1]}"
    return ", ".join(f"{key} {value}" for key, value in values.items())


def edit_sets() -> str:
    return markdown(["`edits=`", "file"], [[f"`{name}`", f"<{url}>"] for name, url in URLS.items()])


def paper_sweeps() -> str:
    found = [row for row in named.rows() if row[0].startswith("paper/")]
    return markdown(named.COLUMNS, [[f"`{name}`", *cells] for name, *cells in found])


def errors(kind: str) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    for module, texts in messages(kind).items():
        for text in texts:
            _, advice = advice_on(text, module, kind)
            plain = text.replace("|", "/").replace("`", "'").strip()
            rows.setdefault((module, advice), []).append(f"`{plain}`")
    return markdown(
        ["in", "message", "cause, and what to do"],
        [[f"`{module}`", "<br>".join(texts), advice] for (module, advice), texts in rows.items()],
    )


def commands() -> str:
    """A section for each command, from the text of its ``--help``."""
    options: dict[str, list[list[str]]] = {name: [] for name in cli.COMMANDS}
    for name, flags, settings in map(json.loads, options_for_help().splitlines()):
        value = (
            settings.get("metavar")
            or "|".join(settings.get("choices", ()))
            or settings.get("dest", "").upper()
        )
        if not flags[0].startswith("-"):
            flag = settings.get("metavar") or value or flags[0]
        elif settings.get("action") == "store_true":
            flag = ", ".join(flags)
        else:
            flag = f"{', '.join(flags)} {value}"
        needed = (
            "yes" if settings.get("required") or not (flags[0].startswith("-") or "nargs" in settings) else ""
        )
        meaning = settings.get("help", "").replace("%%", "%").replace("|", "\\|")
        options[name].append([f"`{flag}`".replace("|", "\\|"), meaning, needed])
    return "\n\n".join(
        f"## {name}\n\n`harness-rect {name}`: {purpose}.\n\n"
        + markdown(["option", "meaning", "required"], options[name])
        for name, purpose in cli.COMMANDS.items()
    )


def _numerics(part: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "results" / "numerics.json").read_text("utf-8"))[part]
    return found


def precision() -> str:
    return markdown(
        ["model", "method", "RECT", "dtype", "largest difference", "reliability", "general score"],
        [
            [
                *(f"`{row[name]}`" for name in ("model", "method")),
                "-" if row["rect"] is None else f"{row['rect']:.0%}",
                row["dtype"],
                f"{row['difference']:.2g}",
                f"{row['reliability']:.2f}",
                f"{row['general']:.3f}",
            ]
            for row in _numerics("precision")
        ],
    )


def threads() -> str:
    rows = [[f"`{row['method']}`", f"{row['difference']:.2g}"] for row in _numerics("threads")]
    return markdown(["method", "largest difference"], rows)


#: Name in the pages -> what makes the table.
TABLES: dict[str, Callable[[], str]] = {
    "arguments": arguments,
    "edit_sets": edit_sets,
    "errors": partial(errors, "errors"),
    "presets": published_presets,
    "methods": methods,
    "paper_sweeps": paper_sweeps,
    "commands": commands,
    "metrics": all_metrics,
    "precision": precision,
    "metrics_glue": partial(metrics, "rect_glue"),
    "regularizers": regularizers,
    "tasks": tasks,
    "threads": threads,
    "warnings": partial(errors, "warnings"),
}


def options_for_help() -> str:
    """The content of :data:`harness_rect.cli.HELP`: a line of JSON for each option of each command."""
    lines = []
    for name in cli.COMMANDS:
        parser = argparse.ArgumentParser(add_help=False)
        cli.module_of(name).add_options(parser)
        lines += [json.dumps([name, *_option(action)]) + "\n" for action in parser._actions]
    return "".join(lines)


def _option(action: argparse.Action) -> tuple[Sequence[str], dict[str, Any]]:
    """The arguments of ``add_argument`` that decide what the help of an option looks like."""
    settings = {name: getattr(action, name) for name in ("help", "nargs", "metavar", "choices")}
    if action.option_strings:
        settings |= {"dest": action.dest, "required": action.required or None}
    if action.nargs == 0:
        settings |= {"action": "store_true", "nargs": None}
    return action.option_strings or [action.dest], {k: v for k, v in settings.items() if v is not None}


if __name__ == "__main__":
    Path(cli.HELP).write_text(options_for_help(), encoding="utf-8")
    for page in pages():
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
