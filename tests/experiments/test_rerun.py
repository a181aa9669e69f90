"""``harness-rect rerun``: what it takes from a file, repeats and compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness_rect import cli
from harness_rect.errors import UserError
from harness_rect.experiments import rerun, results

SCORED = {"rect_zsre": {"reliability,none": 0.3}}


def written(path: Path, config: dict[str, Any], **more: Any) -> results.Results:
    path.write_text(json.dumps({"results": SCORED, "config": {"model": "edited_hf"} | config} | more))
    return results.load(path)


def test_a_repetition_has_the_same_bits_and_another_score_is_shown(tmp_path, capsys, monkeypatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    edits = {"method": "rome", "n_edits": 1, "computed_on": {"device": "cpu", "threads": 2}}
    arguments = {"method": "rome", "edits": "tiny[0:1]", "rect": 0.4}
    shown = {"batch_size": 4, "device": "cpu", "edit": edits, "model_args": arguments}
    written(tmp_path / "results.json", shown)
    assert cli.main(["rerun", str(tmp_path / "results.json"), "--output", str(tmp_path / "again")]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rect_zsre", "reliability", "0.3", "1.0"] in lines
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert threads == [2, torch.get_num_threads()]
    assert all(check["passed"] for check in again["config"]["self_checks"].values())

    assert cli.main(["rerun", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.startswith("equal: ")

    weights = again["config"]["edit"]["weights"]
    next(iter(weights.values()))["sha256"] = 64 * "0"
    again["config"]["edit"]["versions"]["torch"] = "1.0"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text(json.dumps(again))
    then, now = (results.load(tmp_path / name / "results.json") for name in ("other", "again"))
    (different,), equal = rerun.compared(then, now)
    assert different.what == f"{next(iter(weights))} sha256" and equal > 15
    assert [row.what for row in rerun.circumstances(then, now)] == ["torch"]


def test_what_could_do_harm_is_not_taken_from_a_file(tmp_path: Path) -> None:
    arguments = {
        **{"trust_remote_code": "True", "save_edited": "/etc/x", "edit_cache": "/etc", "judge": "http://x"},
        **{"attn_implementation": "a/kernel", "code_revision": "x", "pretrained": "gpt2", "dtype": "float32"},
        **{"quantization_config": {"a": 1}, "chat_template_args": {"enable_thinking": True}},
    }
    given = {
        "model_args": arguments,
        "gen_kwargs": {"do_sample": True, "custom_generate": "a/b", "trust_remote_code": True},
        "edit": {"method": "rome", "n_edits": 1, "computed_on": {"threads": 10**9}},
    }
    then = written(
        tmp_path / "results.json",
        given,
        configs={"rect_zsre": {"metadata": {"edits": "tiny", "judge": "http://x", "version": 1}}},
    )
    found = rerun.read(then)
    assert found.given == {
        **{"pretrained": "gpt2", "dtype": "float32", "chat_template_args": {"enable_thinking": True}},
        "edit_cache": "off",
    }
    assert found.settings["gen_kwargs"] == {"do_sample": True}
    assert found.metadata == {"edits": "tiny"} and found.threads is None
    said = "\n".join(found.not_repeated)
    for name in ("judge", "attn_implementation", "code_revision", "custom_generate", "threads", "--trust-"):
        assert name in said
    assert rerun.read(then, trust_remote_code=True).given["trust_remote_code"] is True


def test_what_the_tasks_were_given_instead_of_the_model_is_repeated(tmp_path: Path) -> None:
    arguments = {"edits": "tiny[0:2]", "data": "tiny", "max_length": 64}
    of_tasks = arguments | {"edits": "tiny[5:8]", "max_length": "64"}
    configs = {"rect_zsre": {"metadata": of_tasks | {"version": 1}}}
    then = written(tmp_path / "results.json", {"model_args": arguments}, configs=configs)
    assert rerun.read(then).metadata == {"edits": "tiny[5:8]"}


def test_it_computes_where_the_results_say_they_were_computed(tmp_path: Path) -> None:
    """lm-eval writes cuda:0 where no device was given, there or not."""
    for given, on, device in (("cuda:0", "cpu", "cpu"), ("cpu", "cpu", "cpu"), (None, "cpu", "cpu")):
        computed = {"computed_on": {"device": on, "threads": 1}}
        found = rerun.read(written(tmp_path / "results.json", {"device": given} | computed))
        assert found.settings["device"] == device and not any("device" in line for line in found.not_repeated)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": "vllm"}, "model: Input should be 'hf', 'edited_hf' or 'edited_vllm'"),
        ({"limit": -1}, "limit: Input should be greater"),
        ({"limit": 0}, "limit: Input should be greater than 0"),
        ({"batch_size": "auto:999999999999"}, "batch_size=auto:999999999999: expected a number"),
        ({"gen_kwargs": {"max_gen_toks": "x"}}, r"results\.json: gen_kwargs: max_gen_toks: Input should be"),
        ({"gen_kwargs": {"temperature": "a"}}, "gen_kwargs: temperature: Input should be a valid number"),
        ({"model_args": {"max_length": "abc"}}, r"results\.json: model_args: max_length: Input should be"),
        ({"numpy_seed": "x"}, "numpy_seed: Input should be a valid integer"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(tmp_path: Path, config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rerun.read(written(tmp_path / "results.json", config))


def test_a_task_is_a_name_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "rect_evil.yaml").write_text("task: !function os.abort")
    (tmp_path / "results.json").write_text(
        json.dumps(
            {"results": {f"rect_/../{tmp_path}/rect_evil.yaml": {"acc,none": 1.0}}, "config": {"model": "hf"}}
        )
    )
    with pytest.raises(UserError, match=r"rect_evil\.yaml: lm-eval has no such task here"):
        rerun.run(rerun.read(results.load(tmp_path / "results.json")), log_samples=False)
