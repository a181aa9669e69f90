"""YAML of users is read within limits, and nothing in it makes anything but plain values."""

from __future__ import annotations

import pytest

from harness_rect.errors import UserError
from harness_rect.io.yaml_files import parse_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
MERGED = "m0: &m0 {k: 1}\n" + "".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "more than 100000 values"),
        (MERGED, "more than 100000 values"),
        ("a: &a [*a]", "more than 100000 values"),
        ("a: 1\nb: !!set {1, 2}", "line 2: not valid YAML: the type tag:yaml.org,2002:set is not used here"),
        ("a: !!python/name:os.system", "is not used here"),
        ("a: !!int abc", "line 1: not valid YAML: not a valid int"),
        ("a: " + "9" * 5000, "not a valid int"),
        ("[" * 3000, "nested more than 50 levels deep"),
        ("{a: " * 3000, "nested more than 50 levels deep"),
        ("x" * 2**21, "larger than 1048576 characters"),
        ("a: [", "line 1: not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
    ids=range(12),
)
def test_what_cannot_be_meant_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError, match=r"^f\.yaml") as raised:
        parse_yaml(text, "f.yaml")
    assert says in str(raised.value)


def test_plain_values_and_a_few_aliases_are_read() -> None:
    text = "a: &a {x: 1}\nb: {<<: *a, y: 2.5}\nc: [true, null, text, 2026-01-02]\nd: *a\n"
    expected = {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2.5},
        "c": [True, None, "text", "2026-01-02"],
        "d": {"x": 1},
    }
    assert parse_yaml(text, "f.yaml") == expected
