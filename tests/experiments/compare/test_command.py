"""``harness-rect compare`` as a command, on what a stock lm_eval wrote."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from support.lm_eval_files import content, mean_task, write

from harness_rect import cli
from harness_rect.evaluation.catalogue import GROUPS, TASKS
from harness_rect.experiments.results import load, newest

ROOT = Path(__file__).resolve().parents[2]
SUITE = [name for group in GROUPS["rect_suite"].members for name in GROUPS[group].members]
HEADLINES = {name: TASKS[name].headline.name for name in SUITE} | {"rect_general": "score"}


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "harness_rect", "compare", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def rows_of(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["task"], row["metric"]): row for row in json.loads(text)["rows"]}


def test_folders_of_lm_eval_are_compared_task_by_task(evaluations: dict[str, Path]) -> None:
    done = run(evaluations["base"], evaluations["rome"], "--format", "json")
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert list(rows) == list(HEADLINES.items())
    base, rome = (load(newest(evaluations[name])[0]).file.results for name in ("base", "rome"))
    for (task, metric), row in rows.items():
        assert row["score_base"] == base[task][f"{metric},none"]
        assert row["score_other"] == rome[task][f"{metric},none"]
        assert row["test"] in {"mcnemar", "paired_bootstrap"}, row["method"]  # no sample was left unused
        assert row["low"] <= row["change"] <= row["high"]
        assert row["p"] <= row["p_holm"] <= 1
    assert rows["rect_ner", "f1"]["method"] == "paired bootstrap, n=10 in 3 sentences"
    assert rows["rect_general", "score"]["n"] == 80
    assert "base: taking" in done.stderr


def test_p_values_are_those_of_the_samples(evaluations: dict[str, Path], capsys) -> None:
    assert cli.main(["compare", *map(str, evaluations.values()), "--format", "json", "--all-metrics"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert ("rect_nli", "score") not in rows and ("rect_summarization", "rougeL") in rows
    tested = 0
    for (task, metric), row in rows.items():
        if row["test"] != "mcnemar":
            continue
        values = []
        for folder in evaluations.values():
            [path] = folder.rglob(f"samples_{task}_2*.jsonl")
            samples = [json.loads(line) for line in path.open(newline="\n")]
            values.append([sample[metric] for sample in sorted(samples, key=lambda s: s["doc_id"])])
        pairs = list(zip(*values, strict=True))
        gained, lost = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
        expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1
        assert row["p"] == pytest.approx(expected)
        tested += 1
    assert tested >= 8


def test_the_table_names_everything(evaluations: dict[str, Path]) -> None:
    done = run(evaluations["base"], evaluations["rome"], "--tasks", "rect_general")
    assert "rect-tiny, 2 edits by rome, rect 0.4" in done.stdout and "rect_zsre" not in done.stdout
    assert "corrected for 9 comparisons" in done.stdout
    [line] = [line for line in done.stdout.splitlines() if "rect_dialogue" in line]
    number = re.search(r"acc .*1\.0000.*%.* to .*(\[\d+\])", line)[1]
    assert re.search(rf"^{re.escape(number)} .*paired McNemar, n=10", done.stdout, flags=re.MULTILINE)


def test_a_model_against_itself_passes_a_gate_of_everything(evaluations: dict[str, Path], capsys) -> None:
    base = str(evaluations["base"])
    assert cli.main(["compare", base, base, "--format", "csv", "--min-retention", "100%"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == len(HEADLINES)
    assert {(float(row["change"]), float(row["p"]), row["passed"]) for row in rows} == {(0.0, 1.0, "True")}


def test_a_gate_that_fails_exits_with_1_and_prints_the_rows(evaluations: dict[str, Path]) -> None:
    base, rome = evaluations["base"], evaluations["rome"]
    done = run(rome, base, "--min-retention", "0", "--min-retention", "rect_zsre=0.5")
    assert done.returncode == 1
    assert "1 of 11 rows fell short:" in done.stderr
    assert "rect_zsre reliability" in done.stderr and "retention 0.0%, at least 50.0% asked" in done.stderr
    assert run(rome, base, "--min-retention", "rect_nli=0").returncode == 0


def test_other_limits_are_refused_in_one_line(evaluations: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(evaluations["rome"], tmp_path / "rome")
    path, _ = newest(tmp_path / "rome")
    path.write_text(path.read_text().replace('"limit": 10.0', '"limit": 20.0'))
    done = run(evaluations["base"], path)
    assert done.returncode == 2 and done.stdout == ""
    assert "limit 10.0 and 20.0" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    allowed = run(evaluations["base"], path, "--allow-differences", "--format", "json")
    assert allowed.returncode == 0
    assert json.loads(allowed.stdout)["differences"] == [
        "rect-tiny, 2 edits by rome, rect 0.4: limit 10.0 and 20.0"
    ]


@pytest.mark.parametrize(
    ("name", "start"),
    [("t.md", "**base: "), ("t.csv", "base,other,"), ("t.json", "{\n"), ("t.txt", "base: ")],
)
def test_the_output_file_has_the_format_of_its_name(
    evaluations: dict[str, Path], tmp_path: Path, capsys, name: str, start: str
) -> None:
    files = [str(path) for path in evaluations.values()]
    assert cli.main(["compare", *files, "--tasks", "rect_nli", "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_text().startswith(start)
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_markdown_has_a_row_for_each_comparison(evaluations: dict[str, Path], capsys) -> None:
    cli.main(["compare", *map(str, evaluations.values()), "--format", "markdown"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 3 * 2 + len(HEADLINES)  # a table for each protocol
    assert {line.count("|") for line in table} == {table[0].count("|")}


def test_files_of_hf_and_vllm_without_samples(tmp_path: Path, capsys) -> None:
    """Two mmlu-like tasks and their group, as evaluated by two backends."""
    paths = []
    for folder, model, right in (("hf", "hf", 0.5), ("vllm", "vllm", 0.25)):
        tasks = {name: mean_task("acc", [1, 0] * 50) | {"value": right} for name in ("mmlu_a", "mmlu_b")}
        made = content(tasks, config={"model": model, "model_args": f"pretrained=org/{model}"})
        made["groups"]["mmlu"] = made["results"]["mmlu"] = {"acc,none": right, "acc_stderr,none": 0.03}
        made["group_subtasks"] = {"mmlu": list(tasks)}
        paths.append(str(write(tmp_path / folder, made, {})))
    assert cli.main(["compare", *paths, "--format", "json", "--min-retention", "0.94"]) == 1
    rows = rows_of(capsys.readouterr().out)
    assert [task for task, _ in rows] == ["mmlu_a", "mmlu_b", "mmlu"]
    group = rows["mmlu", "acc"]
    assert (group["base"], group["other"], group["test"]) == ("org/hf", "org/vllm", "unpaired")
    assert (group["low"], group["high"]) == pytest.approx((-0.25 - 0.08316, -0.25 + 0.08316), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.json", "missing.json"], "missing.json: no such file or folder"),
        (["--min-retention", "lots", "a", "b"], "--min-retention lots: expected"),
        (["--output", ".", "a", "b"], "is a folder"),
    ],
)
def test_wrong_use_exits_with_2(capsys, monkeypatch, tmp_path: Path, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_one_results_file_is_not_enough(capsys, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"results": {"rect_nli": {"acc,none": 0.5}}, "configs": {}}')
    assert cli.main(["compare", str(tmp_path / "a.json")]) == 2
    assert "nothing to compare; name other results after it" in capsys.readouterr().err
