"""What the lm_eval command says after its tables: what is known of the scores before and after the edits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from harness_rect.experiments import summary as module
from harness_rect.experiments.summary import KNOWN, OF_EDITS, summary
from harness_rect.io.progress import console

COMMITTED = Path(__file__).parents[2] / "results" / "rect-tiny" / "rect-tiny"


def results(folder: str, **changes: Any) -> dict[str, Any]:
    """Committed results as ``simple_evaluate`` returns them; changes are of their config."""
    found = json.loads((COMMITTED / folder / "results.json").read_text("utf-8"))
    found["config"] |= changes
    return found


def known(method: str) -> dict[str, Any]:
    """What the package knows of rect-tiny on all rows."""
    lines = map(json.loads, KNOWN.read_text("utf-8").splitlines())
    configs = ((one, one["config"]) for one in lines)
    (found,) = (
        one
        for one, config in configs
        if config["model_args"] == {"pretrained": "rect-tiny", "method": method, "data": "tiny"}
        and config["limit"] is None
    )
    return found


RECT = results("rome+rect0.4/order0/edits_020")
# These were made before later fields of edits and hyper-parameters.
for name in (*OF_EDITS, "hparams"):
    RECT["config"]["edit"][name] = known("rome")["config"]["edit"].get(name)


def printed(parts: list[Table | str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    for part in parts:
        console(width=80).print(part, soft_wrap=isinstance(part, str))
    return capsys.readouterr().out.splitlines()


def row(lines: list[str], name: str) -> list[str]:
    (found,) = (line.strip() for line in lines if line.strip().startswith(name))
    return found.removeprefix(name).split()


def test_the_default_run_is_held_against_what_the_package_knows(capsys) -> None:
    lines = printed(summary(RECT, None, []), capsys)
    assert lines[0].rstrip() == "harness-rect: the general tasks after 20 edits"
    assert row(lines, "Mean of the eight") == ["0.975", "0.362", "0.449", "46%", "+0.088"]
    assert row(lines, "Reliability of the edits*") == ["-", "0.700", "0.750"]
    assert "unedited: measured when this package was made" in lines and max(map(len, lines)) <= 80
    assert lines[-1].endswith("harness-rect demo")


def test_what_is_known_are_the_committed_scores() -> None:
    for folder, method in (("unedited", "none"), ("rome/order0/edits_020", "rome")):
        committed = results(folder)["results"]
        for task, scores in known(method)["results"].items():
            assert scores["score,none"] == pytest.approx(committed[task]["score,none"], abs=0.03), task


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({}, ["unedited", "ROME"]),
        ({"limit": 50}, []),
        ({"model_dtype": "torch.bfloat16"}, []),
        ({"gen_kwargs": {"do_sample": True, "temperature": 3.0}}, []),
        ({"model_args": {"pretrained": "another", "edits": "tiny[0:20]", "rect": 0.4}}, []),
    ],
)
def test_only_evaluations_of_the_same_model_and_rows_are_held_against_it(change, columns, capsys) -> None:
    found = copy.deepcopy(RECT)
    found["config"] |= change
    heading = row(printed(summary(found, None, []), capsys), "score")
    assert heading == [*columns, "ROME", "+", "rect", "0.4", *["left", "saved"][: len(columns)]]


@pytest.mark.parametrize(
    ("changes", "command", "made"),
    [
        # Another slice, another method, fewer rows: the demo has none of them.
        ({"args": {"edits": "tiny[0:5]"}, "edits_sha256": "x"}, [], ["method=rome,edits=tiny[0:5]"]),
        ({"args": {"method": "memit", "rect": 0.4}, "method": "memit"}, [], ["method=memit"]),
        ({"limit": 50}, ["--limit", "50"], ["method=none", "method=rome"]),
    ],
)
def test_each_run_that_is_missing_is_named_and_the_demo_only_for_its_own(changes, command, made) -> None:
    found = copy.deepcopy(RECT)
    config = found["config"]
    config |= {"model_args": changes.get("args", {}), "limit": changes.get("limit")}
    config["edit"] |= {name: changes[name] for name in changes.keys() & config["edit"].keys()}
    config["edit"]["edits_spec"] = changes.get("args", {}).get("edits", "tiny[0:20]")
    line, *commands = summary(found, None, [*command, "--tasks", "rect_suite"])[-1 - len(made) :]
    assert " ".join(line.split()).endswith(
        f"; {'these commands make' if len(made) > 1 else 'this makes'} them; then this run again,"
        " with --output_path results/edited, prints them all (its edits are kept):"
    )
    for one, arguments in zip(commands, made, strict=True):
        assert {*one.split("--model_args ")[1].split()[0].strip("'").split(",")} == {*arguments.split(",")}
        assert one.startswith(" ".join(["lm_eval", *command, "--tasks rect_suite --model_args "]))


def test_earlier_results_in_the_output_folder_are_used_and_what_is_missing_is_named(tmp_path, capsys) -> None:
    args = {"pretrained": "gpt2", "method": "rome", "edits": "facts.json"}
    now = results("rome+rect0.4/order0/edits_020", model_args=args | {"rect": 0.4})
    command = ["--model", "edited_hf", "--model_args", "pretrained=gpt2,rect=0.4", "--tasks", "rect_suite"]
    lines = printed(summary(now, None, command), capsys)
    assert max(map(len, lines[:-2])) <= 80
    said = "the scores before the edits and without the regularizer are not known"
    assert said in " ".join(lines[:-2])
    common = "lm_eval --model edited_hf --tasks rect_suite --model_args pretrained=gpt2,"
    assert lines[-2] == common + "edits=facts.json,method=none --output_path results/unedited"
    assert lines[-1] == common + "method=rome,edits=facts.json --output_path results/rome"

    before = results("unedited", model_args={"pretrained": "gpt2", "method": "none"})
    for folder in ("before", "after"):  # beside each other, as the tutorial has them
        (tmp_path / folder / "gpt2").mkdir(parents=True)
    (tmp_path / "before" / "gpt2" / "results_1.json").write_text(json.dumps(before))
    (tmp_path / "after" / "gpt2" / "results_2.json").write_text("{")
    (tmp_path / "after" / "gpt2" / "results_3.json").write_text(json.dumps(now))  # this run itself
    output = str(tmp_path / "after")
    lines = printed(summary(now, output, [*command, "--output_path", output]), capsys)
    assert row(lines, "Mean of the eight") == ["0.975", "0.449", "46%"]
    # Elsewhere: `compare before after` takes the newest file of a folder.
    asked = f"--model_args pretrained=gpt2,method=rome,edits=facts.json --output_path {output}-rome"
    assert lines[-1] == f"lm_eval --model edited_hf --tasks rect_suite {asked}"


@pytest.mark.parametrize(
    ("change", "used"),
    [
        ({}, True),
        ({"provenance": {"model_fingerprint": "unknown"}}, True),
        ({"provenance": {"model_fingerprint": "overwritten"}}, False),
        ({"gen_kwargs": {"temperature": 3.0}}, False),
    ],
)
def test_an_earlier_result_of_other_weights_or_sampling_is_not_used(tmp_path, change, used) -> None:
    now = results("rome/order0/edits_020", model_args={"pretrained": "/x/P", "edits": "tiny[0:20]"})
    before = results("unedited", model_args={"pretrained": "/x/P", "method": "none"}, **change)
    before["sweep"] = {}
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "results_1.json").write_text(json.dumps(before))
    said = summary(now, str(tmp_path / "after.json"), [])
    assert any("results_1.json" in str(part) for part in said) == used


def test_nothing_is_said_of_an_unedited_model_or_outside_the_command(monkeypatch) -> None:
    assert summary(results("unedited"), None, []) == []
    monkeypatch.setattr(module.atexit, "register", lambda *given: pytest.fail("it would print"))
    module.after_evaluation(RECT, None)
