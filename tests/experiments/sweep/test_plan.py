"""From a sweep's YAML to its trajectories and evaluations, and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness_rect.edits import fingerprint, load_edits
from harness_rect.errors import UserError
from harness_rect.experiments.sweep.plan import Plan, Shard, make_plan, read_config

ROWS = [
    {"prompt": "{} is a city in", "subject": f"Town {i}", "target_new": "Austria", "case_id": f"t{i}"}
    | ({"target_true": "France", "paraphrase_prompts": [f"Town {i} lies in", "Go to"]} if i % 2 else {})
    | ({"neighborhood_prompts": [{"prompt": "Rome is in", "ground_truth": "Italy"}]} if i > 5 else {})
    for i in range(10)
]
#: A row with consequences, and one with two edits that answer a question together.
ASKING = {
    "edit": {
        "prompt": "The name of the mother of Ann is Ida.",
        "subject_id": "Q1",
        "relation": "MOTHER",
        "target_id": "Q2",
        "original_fact": {"prompt": "The name of the mother of Ann is Eva."},
    },
    "Logical_Generalization": [
        {
            "test_queries": [
                {"prompt": "p", "answers": [{"value": "a", "aliases": ["b"]}, {"value": "c", "aliases": []}]},
                {"prompt": "q", "answers": [{"value": "d", "aliases": []}]},
            ],
            "test_condition": condition,
            "condition_queries": [{"prompt": "r", "answers": [{"value": "e", "aliases": []}]}],
        }
        for condition in ("OR", "AND")
    ],
    "attribute_snippets": ["s"],
}
CASE = {
    "case_id": 7,
    "requested_rewrite": [
        {
            "prompt": "{} lives in",
            "subject": name,
            "target_new": {"str": "Rome", "id": "Q3"},
            "relation_id": "P1",
            "question": f"Where does {name} live?",
        }
        for name in ("Ann", "Jo")
    ],
    "questions": ["Where?", "In which town?"],
    "new_answer": "Rome",
    "new_answer_alias": ["Roma"],
    "new_single_hops": [{"question": "Where does Jo live?", "answer": "Rome", "answer_alias": ["Roma"]}],
}
USUAL: dict[str, Any] = {
    "output": "out",
    "models": ["gpt2"],
    "edits": "facts.json",
    "methods": ["rome"],
    "checkpoints": [0, 2, 5],
    "tasks": ["rect_nli"],
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "facts.json").write_text(json.dumps(ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(**changes: Any) -> Plan:
    given = {key: value for key, value in (USUAL | changes).items() if value is not None}
    Path("sweep.yaml").write_text(yaml.safe_dump(given))
    return make_plan(read_config(Path("sweep.yaml")), "sweep.yaml")


def test_every_combination_is_a_trajectory_and_the_unedited_model_comes_once_for_each_model() -> None:
    made = plan(
        models=["gpt2", {"pretrained": "gpt2-xl", "dtype": "bfloat16", "name": "xl"}],
        methods=["rome", {"method": "memit", "edit_batch_size": 5, "name": "memit5"}],
        regularizers=["none", {"rect": 0.4}, {"regularizer": "random", "keep": "20%"}],
        checkpoints=[0, 10, 5, 5],
        orders=2,
        edit_seeds=[0, 3],
        measure="generated",
    )
    assert len(made.trajectories) == 2 * 2 * 3 * 2 * 2
    assert len(made.evaluations) == 2 + 2 * 48
    assert [str(e.folder) for e in made.evaluations if e.trajectory is None] == [
        "out/gpt2/unedited",
        "out/xl/unedited",
    ]
    last = made.evaluations[-1]
    assert str(last.file) == "out/xl/memit5+random0.2/order1-seed3/edits_010/results.json"
    assert last.model_args == {
        "pretrained": "gpt2-xl",
        "dtype": "bfloat16",
        "method": "memit",
        "edits": "out/edits/order1.jsonl[0:10]",
        "edit_batch_size": 5,
        "regularizer": "random",
        "keep": 0.2,
        "edit_seed": 3,
        "measure": "generated",
    }
    assert {trajectory.config.measure for trajectory in made.trajectories} == {"generated"}


@pytest.mark.parametrize("number", [1, 2, 3, 50])
def test_shards_are_disjoint_parts_of_the_whole(number: int) -> None:
    whole = plan(checkpoints=[0, 1, 3], orders=2)
    parts = [whole.part(Shard(i, number)) for i in range(1, number + 1)]
    found = [evaluation.folder for part in parts for evaluation in part.evaluations]
    assert sorted(found) == sorted(evaluation.folder for evaluation in whole.evaluations)
    assert max(len(part.units) for part in parts) - min(len(part.units) for part in parts) <= 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b", "-1/4"])
def test_a_shard_that_does_not_exist_is_refused(text: str) -> None:
    assert Shard.parse(" 2/8 ") == Shard(2, 8)
    with pytest.raises(UserError, match=f"--shard {text}: expected I/N with I from 1 to N"):
        Shard.parse(text)


def test_a_method_may_have_checkpoints_of_its_own() -> None:
    mine = {"method": "memit", "edit_batch_size": 4, "checkpoints": [8, 4], "name": "memit4"}
    made = plan(methods=["rome", mine, {"method": "r_rome", "checkpoints": 0}])
    assert [(t.label, t.checkpoints, len(t.edits)) for t in made.trajectories] == [
        ("rome", (2, 5), 5),
        ("memit4", (4, 8), 8),
    ]
    assert [e.n_edits for e in made.evaluations] == [0, 2, 5, 4, 8]
    assert "checkpoints" not in made.evaluations[-1].model_args


@pytest.mark.parametrize(
    ("entry", "label", "arguments"),
    [
        ("prune", "rome+prune", {"regularizer": "prune"}),
        ({"regularizer": "prune", "base": 1.5}, "rome+prune-base1.5", {"regularizer": "prune", "base": 1.5}),
        (
            {"regularizer": "sphere", "alpha": "0.3"},
            "rome+sphere-alpha0.3",
            {"regularizer": "sphere", "alpha": 0.3},
        ),
        ({"rect": "40%"}, "rome+rect0.4", {"rect": 0.4}),
        (
            {"rect": "40%", "rect_convention": "alphaedit"},
            "rome+rect0.4-alphaedit",
            {"rect": 0.4, "rect_convention": "alphaedit"},
        ),
        ({"rect": 0.4, "name": "mine"}, "rome+mine", {"rect": 0.4}),
        (None, "rome", {}),
        ({"regularizer": "none"}, "rome", {}),
    ],
)
def test_a_regularizer_is_an_entry_with_its_settings(
    entry: Any, label: str, arguments: dict[str, Any]
) -> None:
    (one,) = plan(regularizers=[entry], checkpoints=[2]).evaluations
    assert str(one.folder) == f"out/gpt2/{label}/order0/edits_002"
    edited = {"pretrained": "gpt2", "method": "rome", "edits": "facts.json[0:2]"}
    assert one.model_args == edited | arguments


@pytest.mark.parametrize(
    "spec",
    [
        f"facts.json{rows}"
        for rows in ("", "[2:8]", "[::2]", "[-6:]", "[::-1]", "[8:1:-2]", "[1:500:3]", "[-6:-1]", "[7]")
    ],
)
def test_the_edits_up_to_a_checkpoint_have_a_name_that_reads_them(spec: str) -> None:
    whole = load_edits(spec)
    made = plan(edits=spec, checkpoints=list(range(1, len(whole) + 1)))
    for n, evaluation in enumerate(made.evaluations, start=1):
        assert load_edits(evaluation.model_args["edits"]).edits == whole.edits[:n]


def test_orders_are_seeded_shuffles_of_the_whole_stream_and_can_be_read_back() -> None:
    made = plan(orders=3, checkpoints=[4])
    made.write_orders()
    ids = []
    for evaluation in made.evaluations:
        read = load_edits(evaluation.model_args["edits"])
        assert [e.id for e in read] == [e.id for e in evaluation.edits]
        assert [e.text for e in read] == [e.text for e in evaluation.edits]
        ids.append(tuple(e.id for e in read))
    assert len(set(ids)) == 3 and ids[0] == ("t0", "t1", "t2", "t3")
    assert ids == [tuple(e.id for e in ev.edits) for ev in plan(orders=3, checkpoints=[4]).evaluations]
    (order,) = [o for o in made.orders if o.number == 2]
    assert sorted(e.id for e in order.edits) == [f"t{i}" for i in range(10)]


@pytest.mark.parametrize("spec", ["facts.json", "odd.json", "tiny[0:40]"])
def test_another_order_says_the_same_of_each_edit(spec: str) -> None:
    odd = [
        {"prompt": "dict{} is made of", "subject": "dict{}", "target_new": " tin"},
        {"src": "Who is Jo?\u2028", "subject": "jo", "alt": "a", "pred": "b", "loc": "nq question: x"},
        {"prompt": "{} is", "subject": "Q", "target_new": "R", "attribute_prompts": ["a"], "case_id": "é"},
        {"prompt": "who is it?", "subject": "Q", "target": "R", "locality": [{"loc": "x", "loc_ans": "y"}]},
        ASKING,
        CASE,
    ]
    Path("odd.json").write_text(json.dumps(odd))
    made = plan(edits=spec, orders=2, checkpoints=[1], methods=["ft"])
    made.write_orders()
    assert fingerprint(load_edits("out/edits/order1.jsonl").edits) == fingerprint(made.orders[1].edits)


def test_a_checkpoint_may_lie_between_two_edits_of_a_row() -> None:
    Path("cases.json").write_text(json.dumps([ASKING, CASE, CASE | {"case_id": 8}]))
    made = plan(edits="cases.json[1:]", checkpoints=[0, 1, 3], orders=2)
    made.write_orders()
    unedited, one, three, *_ = made.evaluations
    assert unedited.model_args["edits"] == "cases.json[1:]"
    assert [edit.id for edit in load_edits(one.model_args["edits"])] == ["7-0"]
    assert [edit.id for edit in load_edits(three.model_args["edits"])] == ["7-0", "7-1", "8-0"]
    assert made.orders[1].name != made.orders[0].name
    (last,) = plan(edits="cases.json[-2:-1]", checkpoints=[2]).evaluations
    assert [edit.id for edit in last.edits] == ["7-0", "7-1"]


def test_rows_that_count_from_the_end_are_rows() -> None:
    Path("cases.json").write_text(json.dumps([CASE, *ROWS]))
    (one,) = plan(edits="cases.json[-2:]", checkpoints=[1]).evaluations
    assert [edit.id for edit in load_edits(one.model_args["edits"])] == ["t8"]


def test_edits_that_a_method_cannot_use_are_refused() -> None:
    Path("odd.json").write_text(json.dumps([*ROWS, ROWS[0] | {"prompt": "which city?"}]))
    with pytest.raises(UserError, match="row 10: the subject 'Town 0' is not in the prompt"):
        plan(edits="odd.json", checkpoints=[11])
    assert plan(edits="odd.json", checkpoints=[11], methods=["ft"]).evaluations
    assert plan(edits="odd.json", checkpoints=[10]).evaluations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": [1]}, "sweep.yaml: checkpoint: Extra inputs"),
        ({"tasks": None}, "sweep.yaml: tasks: Field required"),
        ({"models": []}, "sweep.yaml: models"),
        ({"model": "gpt2"}, "model and models are both given"),
        ({"models": [{"pretrained": "gpt2", "method": "rome"}]}, "models.0: method is not an argument"),
        ({"models": ["gpt2", "GPT2"]}, "two entries are called"),
        ({"methods": ["romee"]}, "no editing method 'romee': did you mean 'rome'"),
        ({"methods": ["none"]}, "methods.0: method none edits nothing"),
        ({"methods": ["rome", {"method": "rome", "hparams": "x.json"}]}, "two entries are called"),
        (
            {"methods": [{"method": "rome", "hparam": "x"}]},
            "methods.0: unknown key 'hparam': did you mean 'hparams'",
        ),
        ({"regularizers": [{"rect": 40}]}, "rect=40.*: expected a share"),
        ({"regularizers": ["rect"]}, "regularizer=rect needs keep="),
        ({"regularizers": [{"rect": 0.4, "keep": 0.4}]}, "give one or the other"),
        (
            {"regularizers": [{"regularizer": "prune", "bass": 2}]},
            "regularizers.0: unknown key 'bass': did you mean 'base'",
        ),
        ({"regularizers": [{"regularizer": "prune", "base": 1}]}, "base: Input should be greater than 1"),
        ({"regularizers": [{"regularizer": "prune", "alpha": 0.3}]}, "regularizer=prune does not use it"),
        (
            {"regularizers": [{"regularizer": "prune", "edit_seed": 1}]},
            "regularizers.0: unknown key 'edit_seed'",
        ),
        ({"regularizers": ["prune", {"regularizer": "prune", "base": 1.2}]}, "two entries are called"),
        ({"checkpoints": [1, 11]}, "checkpoints: 11 edits asked for, but edits=facts.json has 10"),
        ({"methods": [{"method": "rome", "measure": "generated"}]}, "methods.0: unknown key 'measure'"),
        ({"measure": "spoken"}, "measure: Input should be"),
        ({"checkpoints": [-1]}, "checkpoints.0"),
        ({"methods": [{"method": "rome", "checkpoints": 11}]}, "checkpoints: 11 edits asked for"),
        (
            {"methods": [{"method": "memit", "edit_batch_size": 2, "checkpoints": [3]}]},
            "checkpoints: 3 edits do not fill batches of 2",
        ),
        ({"edit_batch_size": 2}, "method=rome edits one fact at a time"),
        ({"methods": ["memit"], "edit_batch_size": 2}, "checkpoints: 5 edits do not fill batches of 2"),
        ({"limit": 2.5}, "limit: expected a whole number"),
        ({"batch_size": "many"}, "batch_size: expected a number"),
        ({"seed": [1, 2]}, "seed: expected one number, or four"),
        ({"edits": "nothing.json"}, "edits=nothing.json: there is no file"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        plan(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a list", "a: [", "", "\xff"])
def test_a_file_that_is_no_mapping_is_refused_in_one_line(text: str) -> None:
    Path("sweep.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"sweep\.yaml") as error:
        read_config(Path("sweep.yaml"))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_config(Path("missing.yaml"))
