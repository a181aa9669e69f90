"""The messages of user errors, found in the source, for docs/errors.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: Module, or a package it is in -> the cause of its messages, and what to do; the longest name counts.
ADVICE = {
    "api": "An argument of a Python function: correct the one that is named.",
    "cli": "An option of a command: correct the one that is named; `harness-rect COMMAND --help` has all.",
    "compat": "The evaluation cannot be run by lm-eval as it is: see the message.",
    "config": "An argument of editing: correct it; [reference/arguments.md](reference/arguments.md) has all.",
    "edits": "`edits=`, or a row of its file: correct the row that is named; the formats are in"
    " [edit_files.md](edit_files.md).",
    "embedded": "The embedded model: see the message.",
    "evaluation": "Rows of a task, or what a task needs of the model's arguments: see the message.",
    "experiments.analysis": "A results file: see `results`.",
    "experiments.compare": "The two evaluations cannot be compared as asked: evaluate both alike, or choose"
    " tasks with `--tasks`.",
    "experiments.cost": "`--results`: give results of the base model and of the run that is exported.",
    "experiments.hub": "`--push-to-hub`: log in, correct the name, or push the finished folder yourself.",
    "experiments.masks": "Arguments of `masks`: see the message.",
    "experiments.report": "Nothing to show, or an unknown reference: give a folder with results of lm-eval.",
    "experiments.rerun": "`harness-rect rerun`: the evaluation of the file cannot be repeated here; see"
    " [determinism.md](determinism.md).",
    "experiments.results": "A results file is damaged, or not lm-eval's: evaluate again, or leave it out.",
    "experiments.sweep": "The file of a sweep, or its output folder: correct the key that is named;"
    " [sweep.md](sweep.md) has all.",
    "generated": "Answers cannot be generated: see the message.",
    "hparams": "`hparams=`, or a key of its file: correct it; [methods.md](methods.md) and"
    " [presets.md](presets.md) have all.",
    "io": "A file or folder that is read or written: check its name, permissions, encoding and content.",
    "measure": "An edit cannot be measured with this model: leave its row out.",
    "methods": "The method cannot make these edits in this model, or a hyper-parameter is wrong; see"
    " [methods.md](methods.md).",
    "model_wrappers": "`--model_args`: correct the argument that is named;"
    " [reference/arguments.md](reference/arguments.md) has all.",
    "models": "The model cannot be loaded or edited, or a prompt does not fit it; see"
    " [adding_a_model_family.md](adding_a_model_family.md).",
    "moments": "Second moments, or the text they are computed from: give others with `stats=`, or make some"
    " with `harness-rect stats`.",
    "precision": "The device has no double precision: see the message.",
    "processes": "One of several processes failed, or they cannot work together: see the message.",
    "registry": "A name that is not registered, or packages whose names clash: correct it, or remove one.",
    "regularizers": "A setting of the regularizer: correct it; [methods.md](methods.md) has a table of them.",
    "session": "The run, its cache or its output folder: see the message.",
    "training": "`harness-rect train-mend`: change the option that is named, or the rows.",
    "validation": "A value of another type than expected: correct the key that is named.",
}


def advice(module: str) -> str:
    """Of a module, without ``harness_rect.``.

    Raises:
        KeyError: it has none.
    """
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    found = next((name for name in names if name in ADVICE), None)
    if found is None:
        raise KeyError(f"tools/error_messages.py: no advice for the errors of {module}")
    return ADVICE[found]


def messages() -> dict[str, list[str]]:
    """Module -> its messages in the order of the source, with names for what is filled in."""
    found: dict[str, list[str]] = {}
    for folder in (ROOT / "harness_rect", ROOT / "model_wrappers"):
        for path in sorted(folder.rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("harness_rect.")
            texts = dict.fromkeys(_messages(ast.parse(path.read_text(encoding="utf-8"))))
            if texts and module != "errors":
                found[module.removesuffix(".__init__")] = list(texts)
    return dict(sorted(found.items()))


def _messages(tree: ast.AST) -> Iterator[str]:
    validators = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any("validator" in ast.unparse(one) for one in node.decorator_list)
    ]
    inside = {id(node) for function in validators for node in ast.walk(function)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        called = call.func.body if isinstance(call.func, ast.IfExp) else call.func
        name = ast.unparse(called).rpartition(".")[2]
        ours = name in ("UserError", "Failed", "error") or (name == "ValueError" and id(call) in inside)
        texts = [_text(argument) for argument in call.args]
        if ours and " " in texts[-1].replace("<", "").strip():
            yield ": ".join(texts)


def _text(node: ast.expr) -> str:
    """A text with names, in brackets, for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.FormattedValue):
        return _text(node.value)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.IfExp):
        return _text(node.body)
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return f"<{node.attr if isinstance(node, ast.Attribute) else getattr(node, 'id', 'text')}>"
