"""YAML files of users: safe, of limited size, and with single values as YAML's core types.

A file is refused where it is larger or deeper than anything meant, or where its aliases would make more of it
than :data:`NODES` values: a few hundred bytes can stand for billions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from harness_rect.errors import UserError
from harness_rect.io.rows import read_text

#: Limits of a file: characters, levels of lists and mappings, values with every alias written out.
CHARACTERS, LEVELS, NODES = 2**20, 50, 100_000
_TYPES = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")


class _Loader(yaml.SafeLoader):
    """Without the types that hyper-parameters and sweeps have no use for; dates stay texts."""

    level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.level += 1
        if self.level > LEVELS:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {LEVELS} levels deep", problem_mark=self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if tag not in _TYPES:
            raise yaml.MarkedYAMLError(
                problem=f"the type {node.tag} is not used here", problem_mark=node.start_mark
            )
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, IndexError, OverflowError):  # !!int abc
            raise yaml.MarkedYAMLError(problem=f"not a valid {tag}", problem_mark=node.start_mark) from None


_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: str(node.value))


def read_yaml(path: Path, name: str = "") -> Any:
    """The value in a YAML file.

    Args:
        name: of the file, in messages; by default its path.

    Raises:
        UserError: it cannot be read, is not valid, or exceeds a limit; one line that names file and line.
    """
    return parse_yaml(read_text(path, name or str(path)), name or str(path))


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text; see :func:`read_yaml`."""
    if len(text) > CHARACTERS:
        raise UserError(f"{name}: larger than {CHARACTERS} characters; is it the right file?")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _values(node, {}) > NODES:
                raise UserError(f"{name}: its aliases stand for more than {NODES} values")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "malformed"
        raise UserError(f"{name}{where}: not valid YAML: {problem}") from None


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, aliases written out; beyond the limit for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = NODES + 1  # until it is counted
        children: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]
