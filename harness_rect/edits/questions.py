"""What a row asks beyond its edit: paraphrases, neighborhood, consequences, multi-hop questions.

All is read from every row by the names that any of the published sets gives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness_rect.edits.edit import Consequence, MultiHop, Probe, Query
from harness_rect.edits.fields import Fields, answer, forms, listed, paired, texts
from harness_rect.edits.keys import PARAPHRASES, hint
from harness_rect.errors import UserError, did_you_mean
from harness_rect.io.rows import kind

_PROMPTS = ("prompt", "loc")
_ANSWERS = ("ground_truth", "loc_ans", "answer", "target")
CRITERIA = (
    *("subject_aliasing", "reasoning", "logical_generalization", "compositionality_i", "compositionality_ii"),
    *("relation_specificity", "forgetfulness"),
)
#: Other names of criteria: a misspelling in RippleEdits' description, and EasyEdit's groups.
_OTHER_NAMES = {
    "relation_specifity": "relation_specificity",
    "one_hop": "reasoning",
    "synonym": "subject_aliasing",
}


def paraphrases_of(row: Fields) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.texts(*PARAPHRASES)))


def neighborhood_of(row: Fields, old: str | None) -> Iterator[Probe]:
    """All locality prompts of a row.

    Args:
        old: the fact's old target, which CounterFact's neighborhood prompts share.
    """
    get = row.values.get
    yield from _probes(get("loc"), get("loc_ans"), f"{row.where}loc")
    name = f"{row.where}neighborhood_prompts"
    for item in listed(get("neighborhood_prompts")):
        if isinstance(item, dict):
            yield from _probes(*_question(item, name), name)
        else:
            yield from (Probe(text, old) for text in texts(item, name))
    yield from _probes(get("locality_prompt"), get("locality_ground_truth"), f"{row.where}locality_prompt")
    for _, name, item in _grouped(row, "locality"):
        yield from _probes(*_question(item, name), name)


def consequences_of(row: Fields) -> Iterator[Consequence]:
    """KnowEdit's ``portability`` and ``locality``, ZsRE's question, and tests as RippleEdits has them."""
    portability = row.values.get("portability")
    if isinstance(portability, dict) and "New Question" in portability:
        asked = row.object("portability")
        yield from _one_query("reasoning", asked.text("New Question"), asked.forms("New Answer"))
    else:
        for group, name, item in _grouped(row, "portability"):
            yield from _asked(criterion_of(group, f"{row.where}portability: "), name, item)
    for group, name, item in _grouped(row, "locality"):
        if criterion := _known(group):
            yield from _asked(criterion, name, item)
    if isinstance(row.values.get("edit"), dict):
        yield from _ripple_edits(row)
    for test in row.objects("consequences"):
        yield from _test(criterion_of(test.text("criterion"), test.where), test)


def multi_hop_of(row: Fields) -> MultiHop | None:
    """MQuAKE's question that the edits of a row answer together."""
    if "new_answer" not in row.values and not isinstance(row.values.get("requested_rewrite"), list):
        return None
    questions, answers = tuple(row.texts("questions")), row.forms("new_answer", "new_answer_alias")
    for name, found in (("questions", questions), ("new_answer", answers)):
        if not found:
            problem = "missing; expected the multi-hop question of the row's edits"
            raise row.error(name, problem + hint(row.values, name))
    hops = tuple(query for hop in row.objects("new_single_hops") if (query := _query(hop)))
    return MultiHop(questions, answers, hops)


def criterion_of(name: str, where: str) -> str:
    """A criterion by any of its spellings.

    Raises:
        UserError: beginning with ``where``, if there is none of this name.
    """
    if found := _known(name):
        return found
    raise UserError(f"{where}no criterion {name!r}: {did_you_mean(name.lower(), CRITERIA)}")


def _known(name: str) -> str | None:
    name = "_".join(name.lower().replace("-", " ").replace("_", " ").split())
    name = _OTHER_NAMES.get(name, name)
    return name if name in CRITERIA else None


def _grouped(row: Fields, field: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(group, name for messages, object) of an object of groups, or of a list without groups (QAEdit)."""
    groups = row.values.get(field)
    if isinstance(groups, list):
        groups = {"": groups}
    elif not isinstance(groups, dict | None):
        raise row.error(field, f"expected an object of groups or a list of objects, found {kind(groups)}")
    for group, items in (groups or {}).items():
        name = f"{row.where}{field} {group!r}" if group else f"{row.where}{field}"
        for item in listed(items):
            if not isinstance(item, dict | None):
                raise UserError(f"{name}: expected prompt and ground_truth, found {kind(item)}")
            yield group, name, item or {}


def _question(item: dict[str, Any], name: str) -> tuple[Any, Any]:
    """Prompt and answer, by any of their names."""
    found = [next((item[key] for key in of if key in item), None) for of in (_PROMPTS, _ANSWERS)]
    if item and not any(key in item for key in _PROMPTS):
        keys = f"{', '.join(map(repr, item))}{hint(item, 'prompt')}"
        raise UserError(f"{name}: expected prompt and ground_truth, found {keys}")
    return found[0], found[1]


def _probes(prompts: Any, answers: Any, name: str) -> Iterator[Probe]:
    """Of several accepted answers the first counts."""
    for prompt, given in paired(prompts, answers, name):
        yield Probe(prompt, answer(given, f"{name} (its answer)"))


def _asked(criterion: str, name: str, item: dict[str, Any]) -> Iterator[Consequence]:
    for prompt, given in paired(*_question(item, name), name):
        yield from _one_query(criterion, prompt, forms(given, f"{name} (its answer)"))


def _one_query(criterion: str, prompt: str, accepted: tuple[str, ...]) -> Iterator[Consequence]:
    """A question without an answer tests nothing."""
    if accepted:
        yield Consequence(criterion, (Query(prompt, (accepted,)),))


def _ripple_edits(row: Fields) -> Iterator[Consequence]:
    """The six lists of tests in a row of RippleEdits."""
    for name, value in row.values.items():
        tests = isinstance(value, list) and any(isinstance(test, dict) for test in value)
        if tests or _known(name):
            criterion = criterion_of(name, row.where)
            for test in row.objects(name):
                yield from _test(criterion, test)


def _test(criterion: str, test: Fields) -> Iterator[Consequence]:
    condition = test.values.get("test_condition", "OR")
    if condition not in ("OR", "AND"):
        raise test.error("test_condition", f"expected OR or AND, found {condition!r}")
    asked, before = (
        tuple(query for one in test.objects(name) if (query := _query(one)))
        for name in ("test_queries", "condition_queries")
    )
    if asked:
        yield Consequence(criterion, asked, condition == "OR", before)


def _query(query: Fields) -> Query | None:
    """A question and the forms of each thing that its answer names; None if it names nothing."""
    prompt = next(query.texts("prompt", "phrase", "question"), None)
    if prompt is None:
        raise query.error("prompt", f"missing; expected a non-empty string{hint(query.values, 'prompt')}")
    if "answers" in query.values:
        items = listed(query.values["answers"])
        found = tuple(each for item in items if (each := forms(item, f"{query.where}answers")))
    else:
        found = tuple(filter(None, [query.forms("answer", "answer_alias")]))
    return Query(prompt, found) if found else None
