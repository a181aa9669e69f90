"""The messages of user errors and the warnings, found in the source, for docs/errors.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent

#: Of ``errors`` and ``warnings``: what to say of which messages.
ADVICE: dict[str, dict[str, str]] = yaml.safe_load(
    Path(__file__).with_name("error_advice.yaml").read_text(encoding="utf-8")
)


def advice_on(message: str, module: str, kind: str) -> tuple[str, str]:
    """Its key and text.

    Args:
        module: without ``harness_rect.``. kind: errors or warnings.

    Raises:
        KeyError: there is none.
    """
    of, parts = ADVICE[kind], module.split(".")
    for name in (".".join(parts[:n]) for n in range(len(parts), 0, -1)):
        split = ((key, *key.partition(": ")[::2]) for key in of)
        if fitting := [key for key, where, text in split if where == name and text in message]:
            key = max(fitting, key=len)
            return key, of[key]
    raise KeyError(f"tools/error_advice.yaml: nothing on {message!r} of {module}")


def messages(kind: str) -> dict[str, list[str]]:
    """Module -> its errors, or warnings, in the order of the source, with names for what is filled in."""
    find = {"errors": _errors, "warnings": _warnings}[kind]
    found: dict[str, list[str]] = {}
    for folder in (ROOT / "harness_rect", ROOT / "model_wrappers"):
        for path in sorted(folder.rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("harness_rect.")
            texts = dict.fromkeys(find(ast.parse(path.read_text(encoding="utf-8"))))
            if texts and module != "errors":
                found[module.removesuffix(".__init__")] = list(texts)
    return dict(sorted(found.items()))


def _warnings(tree: ast.AST) -> Iterator[str]:
    constants = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        name, given = ast.unparse(call.func), call.args
        if name.endswith("_once") and ast.unparse(given[0]) == "logging.WARNING":
            yield _text(given[1])
        elif name in ("log.warning", "logger.warning"):
            form = given[0] if isinstance(given[0], ast.Constant) else constants[ast.unparse(given[0])]
            values = [one for arg in given[1:] for one in _elements(arg)]
            pieces = re.split(r"%[a-z.0-9]*[srdge]", _text(form))
            yield "".join(map("".join, zip_longest(pieces, map(_text, values), fillvalue="")))


def _elements(node: ast.expr) -> list[ast.expr]:
    inner = node.value if isinstance(node, ast.Starred) else None
    return inner.elts if isinstance(inner, ast.Tuple) else [node]


def _errors(tree: ast.AST) -> Iterator[str]:
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


#: Functions whose result has the name of what they are given; methods whose result has that of their object.
_OF_ARGUMENT = {
    "join",
    "str",
    "repr",
    "shorten",
    "sorted",
    "list",
    "dumps",
    "map",
    "Path",
    "one_line",
    "getattr",
}
_OF_OBJECT = {"split", "splitlines", "partition", "removeprefix", "strip", "absolute", "get", "items", "keys"}
_NUMBERS = {"len", "max", "min", "sum", "int", "round", "prod"}


def _text(node: ast.expr, filled_in: bool = False) -> str:
    """A text with names, in brackets, for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, filled_in=True)
    if isinstance(node, ast.IfExp):
        return _text(node.body, filled_in)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and _has_text(node.left):
        return _text(node.left, filled_in)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and (not filled_in or _has_text(node)):
        return _text(node.left, filled_in) + _text(node.right, filled_in)
    return f"<{_name(node)}>"


def _has_text(node: ast.expr) -> bool:
    return any(
        isinstance(one, ast.JoinedStr) or (isinstance(one, ast.Constant) and isinstance(one.value, str))
        for one in ast.walk(node)
    )


def _name(node: ast.expr) -> str:
    """A readable name of what an expression gives."""
    if isinstance(node, ast.Name):
        return node.id.strip("_")
    if isinstance(node, ast.Attribute):
        return "type" if node.attr == "__name__" else node.attr.strip("_")
    if isinstance(node, ast.Subscript | ast.Starred | ast.FormattedValue):
        return _name(node.value)
    if isinstance(node, ast.GeneratorExp | ast.ListComp):
        return _name(node.generators[0].iter)
    if isinstance(node, ast.BoolOp):
        return _name(node.values[0])
    if isinstance(node, ast.BinOp):
        return _name(node.left) if isinstance(node.op, ast.Div) else "number"
    if isinstance(node, ast.Call):
        name = _name(node.func)
        if name in _OF_ARGUMENT and node.args:
            return _name(node.args[-1 if name == "map" else 0])
        if name in _OF_OBJECT and isinstance(node.func, ast.Attribute):
            return _name(node.func.value)
        return "number" if name in _NUMBERS else name
    return "text"
