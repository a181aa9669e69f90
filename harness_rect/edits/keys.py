"""The keys of the rows that are read, of all formats, and those that are nearly one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from harness_rect.errors import closest

OLD_TARGETS = ("target_true", "ground_truth", "target_old", "pred")
PARAPHRASES = ("paraphrase_prompts", "paraphrases", "rephrase_prompts", "rephrase_prompt", "rephrase")
#: Key -> the keys of the object, or of the objects of the list, that it may hold.
Keys = dict[str, Any]


def _keys(names: str, **inner: Keys) -> Keys:
    return {name: {} for name in names.split()} | inner


_TARGET = _keys("str id")
_TARGETS = dict.fromkeys(("target_new", *OLD_TARGETS), _TARGET)
_ASKED = _keys("prompt loc ground_truth loc_ans answer target")
# Of RippleEdits' queries not all are read.
_QUERY = _keys(
    "prompt phrase question cloze answer answer_alias query_type subject_id relation relation_id target_ids"
    " second_relation second_hop_target_ids",
    answers=_keys("value aliases"),
)
_TEST = _keys("criterion test_condition", test_queries=_QUERY, condition_queries=_QUERY)
_SENTENCE = _keys("prompt relation subject subject_id target target_id")
#: Groups have any names.
_GROUPED = _ASKED | {"New Question": {}, "New Answer": {}, "*": _ASKED}
KEYS: Keys = _keys(
    "case_id prompt subject target relation_id src alt concept text labels loc loc_ans locality_prompt"
    " locality_ground_truth attribute_prompts generation_prompts attribute_snippets questions new_answer"
    " new_answer_alias",
    **{name: {} for name in PARAPHRASES},
    **_TARGETS,
    requested_rewrite=_keys("prompt subject relation_id question", **_TARGETS),
    edit=_SENTENCE | {"original_fact": _SENTENCE, "previous_fact": _SENTENCE},
    neighborhood_prompts=_ASKED,
    locality=_GROUPED,
    portability=_GROUPED,
    consequences=_TEST,
    new_single_hops=_QUERY,
)
_ALL = frozenset((*KEYS, *KEYS["requested_rewrite"], *KEYS["edit"], *_QUERY, *_TEST, *_TARGET, *_GROUPED))
#: How like each other two names must be, from 0 to 1.
_LIKE = 0.8


def misspelled(row: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(path of a key that no format has, path of the key that it nearly is and that is not there)."""
    lists_of_tests = {"*": _TEST} if isinstance(row.get("edit"), dict) else {}  # RippleEdits
    return set(_misspelled(row, KEYS | lists_of_tests, ""))


def _misspelled(values: Mapping[str, Any], keys: Keys, path: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        near = None if name in keys else _near(str(name), frozenset(keys))
        if near is not None and near not in values:
            yield f"{path}{name}", f"{path}{near}"
        inner = keys[name] if name in keys else keys.get("*")
        for one in value if isinstance(value, list) else [value]:
            if inner and isinstance(one, dict):
                yield from _misspelled(one, inner, f"{path}{name}.")


@cache
def _near(name: str, keys: frozenset[str]) -> str | None:
    begun = (key for key in sorted(keys) if len(name) > 5 and key.startswith(f"{name.lower()}_"))
    return closest(name.lower(), sorted(keys), _LIKE) or next(begun, None)


def hint(values: Mapping[str, Any], missing: str) -> str:
    """The end of a message: which of the keys may be the misspelled one that is missing; empty if none."""
    near = closest(missing, [str(name) for name in values if name not in _ALL], _LIKE)
    return f"; found {near!r}: did you mean {missing!r}?" if near else ""
