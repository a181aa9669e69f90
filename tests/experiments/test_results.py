"""Reading results files: lm-eval's of several ages and models, and what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.lm_eval_files import DATE, content, mean_task, with_group, write

from harness_rect.errors import UserError
from harness_rect.experiments.results import Key, Score, describe, find, labels, load, newest


@pytest.fixture
def tasks() -> dict:
    return {"rect_nli": mean_task("acc", [1, 0, 1, 1]), "rect_ner": mean_task("f1", [1, 1])}


def test_scores_and_standard_errors_are_told_from_everything_else(tmp_path: Path, tasks) -> None:
    tasks["rect_ner"]["stderr"] = None
    results = load(write(tmp_path, content(tasks), tasks))
    assert list(results.tasks) == ["rect_nli", "rect_ner"]
    assert results.scores("rect_nli") == {Key("acc", "none"): pytest.approx(Score(0.75, 0.25))}
    assert results.scores("rect_ner") == {Key("f1", "none"): Score(1.0, None)}


def test_what_predict_only_writes_is_no_score(tmp_path: Path) -> None:
    made = content({name: mean_task("bypass", [999, 999]) | {"stderr": 0.0} for name in ("rect_nli", "piqa")})
    with pytest.raises(UserError, match="holds no scores"):
        load(write(tmp_path, made, {}))


def test_the_headline_is_what_the_task_defines_first_and_its_copy_is_not_listed(
    tmp_path: Path, tasks
) -> None:
    made = content(tasks)
    made["results"]["rect_nli"] = {"score,none": 0.75, "valid_rate,none": 1.0, "acc,none": 0.75}
    results = load(write(tmp_path, made, tasks))
    assert results.metrics("rect_nli") == [Key("acc", "none"), Key("valid_rate", "none")]
    no_copy = content({"other": mean_task("acc", [1, 0]) | {"more": {"score,none": 0.1}}})
    assert Key("score", "none") in load(write(tmp_path, no_copy, {})).metrics("other")


def test_groups_are_told_from_tasks_and_reach_through_other_groups(tmp_path: Path, tasks) -> None:
    made = with_group(content(tasks), "rect_general", ["rect_nli", "rect_ner"], 0.9)
    made["group_subtasks"]["rect_suite"] = ["rect_general"]
    results = load(write(tmp_path, made, tasks))
    assert list(results.tasks) == ["rect_nli", "rect_ner"] and list(results.groups) == ["rect_general"]
    assert results.leaves("rect_suite") == ["rect_nli", "rect_ner"]
    within_itself = with_group(content(tasks), "all", ["all", "rect_nli"], 0.9)
    assert load(write(tmp_path, within_itself, tasks)).leaves("all") == ["rect_nli"]


def test_names_of_lm_eval_05_are_read_as_those_of_04(tmp_path: Path, tasks) -> None:
    made = with_group(content(tasks), "rect_general", ["rect_nli", "rect_ner"], 0.9)
    earlier = load(write(tmp_path / "04", made, tasks))
    text = json.dumps(made)
    for name in tasks:
        text = text.replace(f'"{name}"', f'"rect_general::{name}"')
    renamed = {f"rect_general::{name}": task for name, task in tasks.items()}
    found = load(write(tmp_path / "05", json.loads(text), renamed))
    assert (found.tasks, found.groups) == (earlier.tasks, earlier.groups)
    assert found.leaves("rect_general") == ["rect_nli", "rect_ner"]
    assert found.metrics("rect_nli") == earlier.metrics("rect_nli")
    assert found.effective_rows("rect_nli") == 4
    assert [s.values for s in found.samples("rect_nli")["none"]] == [
        s.values for s in earlier.samples("rect_nli")["none"]
    ]


def test_a_task_in_two_groups_keeps_the_names_that_lm_eval_05_gives_it(tmp_path: Path) -> None:
    made = {
        "one::a": mean_task("acc", [1, 0]),
        "two::a": mean_task("acc", [1, 1]),
        "two::b": mean_task("acc", [0, 1]),
    }
    results = load(write(tmp_path, content(made), made))
    assert list(results.tasks) == ["one::a", "two::a", "b"]
    assert [len(results.samples(name)["none"]) for name in results.tasks] == [2, 2, 2]


@pytest.mark.parametrize("wrong", [5, 10**400, "text", [1], {"a": 1}])
def test_entries_of_other_types_are_left_out(tmp_path: Path, tasks, wrong) -> None:
    made = content(tasks, config={"model": wrong, "model_args": [wrong], "edit": [wrong]})
    made["configs"]["rect_nli"] |= {"metric_list": wrong, "metadata": wrong}
    made["n-samples"]["rect_nli"]["effective"] = [wrong]
    made["results"]["rect_nli"]["acc_stderr,none"] = wrong
    row = {"doc_id": 0, "metrics": wrong, "arguments": wrong, "doc": wrong, "doc_hash": wrong, "acc": 1}
    results = load(write(tmp_path, made | {"samples": {"rect_nli": [row]}}, {}))
    assert results.headline("rect_nli") == Key("acc", "none")
    assert (results.edit, results.effective_rows("rect_nli"), results.model_args) == (None, None, {})
    assert isinstance(describe(results), str)
    [sample] = results.samples("rect_nli")["none"]
    assert sample.text is None and sample.prompt is None


def test_model_arguments_may_be_text_as_older_files_have_them(tmp_path: Path, tasks) -> None:
    made = content(tasks, config={"model": "vllm", "model_args": "pretrained=org/m,dtype=auto"})
    results = load(write(tmp_path, made, tasks))
    assert (results.model_name, results.model_class, results.edit) == ("org/m", "vllm", None)


def test_samples_lie_beside_the_file_or_in_it(tmp_path: Path, tasks) -> None:
    beside = load(write(tmp_path / "a", content(tasks), tasks)).samples("rect_nli")
    rows = [json.loads(line) for line in (tmp_path / f"a/samples_rect_nli_{DATE}.jsonl").open(newline="\n")]
    inside = load(write(tmp_path / "b", content(tasks, samples={"rect_nli": rows}), {})).samples("rect_nli")
    assert inside == beside and [s.values["acc"] for s in beside["none"]] == [1, 0, 1, 1]
    assert load(write(tmp_path / "c", content(tasks), {})).samples("rect_nli") is None
    slash = content({"a/b": mean_task("acc", [1, 0])})
    assert load(write(tmp_path / "d", slash, {})).samples("a/b") is None


def test_samples_of_several_filters_are_kept_apart(tmp_path: Path) -> None:
    tasks = {"gsm8k": mean_task("exact_match", [1, 0], filter="strict-match")}
    path = write(tmp_path, content(tasks), tasks)
    samples = tmp_path / f"samples_gsm8k_{DATE}.jsonl"
    samples.write_text(samples.read_text() + samples.read_text().replace("strict-match", "flexible"))
    assert {name: len(rows) for name, rows in load(path).samples("gsm8k").items()} == {
        "strict-match": 2,
        "flexible": 2,
    }


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:-20], r"samples_rect_nli_.*jsonl, line 4: malformed JSON"),
        (lambda text: text + text, r"jsonl, row 4 \(line 5\): doc_id 0 of rect_nli occurs twice"),
        (lambda text: text.replace("doc_id", "id"), r"jsonl, row 0 \(line 1\): no doc_id"),
        (lambda text: "3\n" + text, r"jsonl, row 0 \(line 1\): expected a JSON object"),
    ],
)
def test_spoilt_samples_are_refused_by_line(tmp_path: Path, tasks, spoil, message) -> None:
    path = write(tmp_path, content(tasks), tasks)
    samples = tmp_path / f"samples_rect_nli_{DATE}.jsonl"
    samples.write_text(spoil(samples.read_text()))
    with pytest.raises(UserError, match=message):
        load(path).samples("rect_nli")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "malformed JSON"),
        ("[]", "not a results file of lm-eval"),
        ('{"method": "rome"}', "not a results file of lm-eval: results: Field required"),
        ('{"results": {"a": 1}}', "not a results file of lm-eval: results.a"),
        ('{"results": {"a": {"alias": "a"}}}', "holds no scores"),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load(path)


def test_a_folder_stands_for_its_newest_file(tmp_path: Path, tasks) -> None:
    folder = tmp_path / "runs" / "model"
    first = write(folder, content(tasks), {})
    later = folder / "results_2026-03-01T00-00-00.000001.json"
    later.write_text(first.read_text())
    (folder / "edit_report.json").write_text("{}")
    assert newest(tmp_path / "runs") == (later, 2)
    assert find(tmp_path / "runs") == [first, later]
    (folder / "results.json").write_text(first.read_text())
    with pytest.raises(UserError, match=r"holds 3 results files, and the name of results.json has no date"):
        newest(tmp_path / "runs")


@pytest.mark.posix
def test_folders_that_are_links_are_read_once(tmp_path: Path, tasks) -> None:
    kept = write(tmp_path / "elsewhere" / "a", content(tasks), {})
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(kept.parent)
    (kept.parent / "circle").symlink_to(tmp_path / "runs")
    assert find(tmp_path / "runs") == [tmp_path / "runs" / "link" / kept.name]


@pytest.mark.parametrize(
    ("name", "message"), [("absent", "no such"), ("empty", "no results"), (".", "several folders")]
)
def test_a_folder_without_results_or_with_several_is_refused(tmp_path, tasks, name, message) -> None:
    write(tmp_path / "a", content(tasks), {})
    write(tmp_path / "b", content(tasks), {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        newest(tmp_path / name)


def test_labels_say_what_was_edited_and_tell_equals_apart(tmp_path: Path, tasks) -> None:
    edit = {"method": "rome", "n_edits": 20, "regularizer": "rect", "keep": 0.4}
    edited = load(write(tmp_path / "e", content(tasks, config={"edit": edit}), {}))
    plain = load(write(tmp_path / "p", content(tasks), {}))
    assert describe(edited) == "gpt2-xl, 20 edits by rome, rect 0.4"
    assert labels([plain, edited]) == ["gpt2-xl", describe(edited)]
    again = load(write(tmp_path / "f", content(tasks, config={"edit": edit}), {}))
    assert len(set(labels([edited, again]))) == 2
    said = {"pretrained": "unknown", "peft": {"method": "memit", "n_edits": 5}, "model_fingerprint": "a"}
    args = {"pretrained": "gpt2-xl", "peft": "P", "dtype": "float16"}
    config = {"model_args": args, "provenance": said}
    adapter = load(write(tmp_path / "a", content(tasks, config=config), {}))
    assert describe(adapter) == "gpt2-xl (float16, peft=P), loaded with 5 edits by memit"
    both = load(write(tmp_path / "b", content(tasks, config=config | {"edit": edit}), {}))
    assert describe(both) == f"{describe(adapter)}, 20 edits by rome, rect 0.4"


def test_what_was_asked_and_said_is_read_for_every_kind_of_request(tmp_path: Path, tasks) -> None:
    generated = {"arguments": {"gen_args_0": {"arg_0": "2+2=", "arg_1": {"until": []}}}, "target": "4"}
    choice = {
        "arguments": {f"gen_args_{i}": {"arg_0": "Q", "arg_1": f" {c}"} for i, c in enumerate("ABC")},
        "target": "2",
    }
    older = {"arguments": [["Q", " A"], ["Q", " B"]], "target": 0}
    rows = [
        generated | {"filtered_resps": [" 5"]},
        choice | {"filtered_resps": [["-2.5", "False"], ["-0.5", "True"], ["-9.0", "False"]]},
        older | {"filtered_resps": [[-1.0, True], [-3.0, False]]},
        {"filtered_resps": [["odd"], None]},
        *(choice | {"target": text, "filtered_resps": []} for text in ("\u00b2", "9" * 5000)),
    ]
    rows = [row | {"doc_id": i, "filter": "none", "metrics": ["acc"], "acc": 1} for i, row in enumerate(rows)]
    results = load(write(tmp_path, content(tasks, samples={"rect_nli": rows}), {}))
    *found, power, large = [(s.prompt, s.target, s.answer) for s in results.samples("rect_nli")["none"]]
    assert (power[1], large[1]) == ("\u00b2", "9" * 5000)
    assert found == [("2+2=", "4", " 5"), ("Q", " C", " B"), ("Q", " A", " A"), (None, None, None)]
