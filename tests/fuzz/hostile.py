"""Hostile values and files, from a seeded generator: JSON, YAML and bytes that nobody should have written."""

from __future__ import annotations

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

#: Written as they stand: JSON that Python's writer does not make.
_RAW = ("1e400", "-1e400", "NaN", "Infinity", "9" * 5000, "-" + "9" * 400, "1e-400", "0." + "3" * 3000)
_WORDS = (
    *(
        "",
        " ",
        "x",
        "0.5",
        "nan",
        "<script>alert(1)</script>",
        "[/x]",
        "[bold",
        "{}",
        "{} {}",
        "\ud800",
        "\x00",
    ),
    *(
        "e\u0301",
        "\u00e9",
        "\u2028",
        "\x1b[31m",
        "../../../x",
        "/etc/passwd",
        "~nosuchuser/x",
        "%s%n",
        "{{7*7}}",
    ),
    *(
        "none",
        "rome",
        "rect",
        "tiny",
        "2026-13-45",
        "k" * 300,
        "w" * 20_000,
        "$x$",
        "a\nb",
        "\u202e",
        "-1",
        "1e999",
    ),
)
_NUMBERS = (0, -1, 1, 2, 0.5, -0.5, 1e308, -1e308, 1e-320, 10**20, 2**31, 2**63, -(2**63), 10**300, 7.5)


def value(rng: random.Random, level: int = 0) -> Any:
    """Any JSON value; texts that begin with ``@raw`` stand for :data:`_RAW`."""
    kind = rng.randrange(9 if level < 3 else 6)
    if kind <= 1:
        return rng.choice(_WORDS)
    if kind <= 3:
        return rng.choice(_NUMBERS)
    if kind == 4:
        return rng.choice((None, True, False))
    if kind == 5:
        return f"@raw{rng.randrange(len(_RAW))}"
    if kind == 6:
        return [value(rng, level + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {rng.choice(_WORDS): value(rng, level + 1) for _ in range(rng.randrange(4))}
    found: Any = rng.choice(_NUMBERS)
    for _ in range(rng.choice((5, 60, 150, 800))):
        found = [found] if rng.random() < 0.5 else {"a": found}
    return found


def mutated(rng: random.Random, whole: Any, times: int = 1) -> Any:
    """A copy of a JSON value in which parts are replaced, removed, repeated, renamed or added."""
    whole = copy.deepcopy(whole)
    for _ in range(times):
        holder = whole
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = rng.choice(keys)
            inner = holder[key]
            if isinstance(inner, dict | list) and inner and rng.random() < 0.85:
                holder = inner
                continue
            _change(rng, holder, key)
            break
    return whole


def _change(rng: random.Random, holder: Any, key: Any) -> None:
    how = rng.randrange(6)
    if how <= 2:
        holder[key] = value(rng)
    elif how == 3:
        del holder[key]
    elif isinstance(holder, list):
        holder.extend([holder[key]] * rng.choice((1, 40)))
    elif how == 4:
        holder[rng.choice((f"{key}x", str(key).upper(), *_WORDS))] = holder.pop(key)
    else:
        holder[rng.choice(_WORDS)] = value(rng)


def as_json(whole: Any) -> bytes:
    """JSON with the raw texts in place; a key may not be raw."""
    text = json.dumps(whole)
    for index, raw in enumerate(_RAW):
        text = text.replace(f'"@raw{index}"', raw)
    return text.encode()


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut, flipped, in another encoding, or something else altogether."""
    how = rng.randrange(9)
    place = rng.randrange(len(data) + 1)
    if how == 0:
        return data[:place]
    if how == 1:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 5, 50))):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if how == 2:
        return data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    if how == 3:
        return (
            data[:place] + rng.choice((b"\x00", b"\xff", b"\xed\xa0\x80", b"\r", b'"', b"[")) + data[place:]
        )
    if how == 4:
        return rng.choice((b"[", b'{"a":', b"- ", b"\t", b"&a [*a,", b"<!DOCTYPE")) * rng.choice(
            (1, 3000, 100_000)
        )
    if how == 5:
        return rng.choice(
            (b"", b"\n", b"null", b"0", b'"x"', b"[]", b"{}", b"[[]]", b"true", b"\xef\xbb\xbf")
        )
    if how == 6:
        return b"[" * 100_000 + b"]" * 100_000
    if how == 7:
        return rng.randbytes(rng.choice((1, 100, 5000)))
    return data + data[place:]


def put(rng: random.Random, path: Path, data: bytes) -> Path:
    """Write a file, or rarely something else: a folder, a pipe, a link, a file nobody may read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.unlink()
    how = rng.randrange(60)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.symlink_to(path)
    elif how == 2:
        path.symlink_to(path.parent / "nowhere")
    elif how == 3:
        path.mkdir()
    else:
        path.write_bytes(data)
        if how == 4:
            path.chmod(0)
    return path


YAML = (
    "!!set {1, 2}",
    "!!timestamp x",
    "!!int abc",
    "!!float x",
    "!!bool maybe",
    "!!python/object/apply:os.system ['true']",
    "!!binary x",
    "!!omap [a: 1]",
    "&a [*a]",
    "*nothing",
    "9" * 5000,
    "2026-13-45",
    "2026-01-02",
    "{? [1]: 2}",
    "{[1, 2]: 3}",
    "<<: 5",
    "{<<: [1]}",
    "0x",
    "0b",
    "1:99:99",
    ".inf",
    ".nan",
    "true",
    "[true]",
    "~",
    "''",
    '"\\ud800"',
    "[" * 3000,
    "{a: " * 3000,
    "- " * 3000,
    "100000000000000000000",
    "1000000000",
    "-1",
    "[[1]]",
    "[/x]",
    "1e400",
)


def yaml_text(rng: random.Random, whole: dict[str, Any]) -> bytes:
    """A mapping as YAML, with a hostile value at one of its keys, or a bomb of aliases."""
    how = rng.randrange(12)
    if how == 0:
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, rng.choice((5, 9, 26)))]
        text = "\n".join(lines)
        return f"{json_lines(whole)}\n{text}\nlayers: *a{len(lines) - 1}\n".encode()
    if how == 1:
        lines = ["m0: &m0 {k: 1}"]
        lines += [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 9)]
        return "\n".join([*lines, json_lines(whole)]).encode()
    key = rng.choice([*whole, "unknown", "layers", "limit"])
    rest = {name: given for name, given in whole.items() if name != key}
    return f"{json_lines(rest)}\n{key}: {rng.choice(YAML)}\n".encode("utf-8", "surrogatepass")


def json_lines(whole: dict[str, Any]) -> str:
    return "\n".join(f"{json.dumps(name)}: {json.dumps(given)}" for name, given in whole.items())
