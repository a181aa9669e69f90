"""``--model edited_vllm``: with a stand-in for vLLM, and in vLLM itself (``make test-vllm``)."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from support.lm_eval_files import without_groups
from transformers import AutoModelForCausalLM, AutoTokenizer

import harness_rect._autoload  # noqa: F401  registers the model classes
from harness_rect import cli, embedded
from harness_rect.edits import load_edits
from harness_rect.errors import UserError
from harness_rect.session.runs import EditCache

TASKS = Path(__file__).resolve().parent.parent / "tasks"
INSTALLED = importlib.util.find_spec("vllm") is not None
IN_VLLM = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed: make test-vllm")
ENGINE = {"gpu_memory_utilization": 0.3, "enforce_eager": True}
OURS = [f"harness_rect.{name}" for name in ("compat.lm_eval_vllm", "model_wrappers.edited_vllm")]


def evaluate(model: str, given: dict[str, Any], tasks: list[str], **more: Any) -> dict[str, Any]:
    metadata = given | more.pop("metadata", {})
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    results = lm_eval.simple_evaluate(
        model=model, model_args=given, tasks=tasks, task_manager=manager, bootstrap_iters=0, **more
    )
    assert results is not None
    return without_groups(results)


def scores(results: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (task, metric): value
        for task, found in results["results"].items()
        for metric, value in found.items()
        if isinstance(value, float)
    }


def answers(results: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(task, request, answer) of all requests, in one order for all model classes."""
    for task, documents in sorted(results["samples"].items()):
        for sample in sorted(documents, key=lambda sample: sample["doc_id"]):
            for request, (answer,) in zip(sample["arguments"], sample["resps"], strict=True):
                yield task, request, answer


# ------------------------------------------------------------------------------------------ without vLLM


def test_without_vllm_one_line_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "argv", ["lm_eval"])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(OURS[-1])
    assert stopped.value.code == 2
    line = "error: edited_vllm needs vLLM, which is not installed: pip install 'harness-rect[vllm]'\n"
    assert capsys.readouterr().err == line


class StandIn(TemplateLM):
    """lm-eval's vLLM class as far as ours uses it, with answers by transformers."""

    made: dict[str, Any]

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        batch_size: str | int = "auto",
        add_bos_token: bool | None = None,
        trust_remote_code: bool = False,
        prefix_token_id: int | None = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        StandIn.made = {"dtype": dtype, "tensor_parallel_size": tensor_parallel_size, **kwargs}
        self.batch_size = batch_size
        self.max_length, self.max_gen_toks = max_length or 256, 64
        self.folder = Path(pretrained)
        self.model = HFLM(pretrained=pretrained, dtype=dtype, device="cpu", batch_size=8)

    eot_token_id = property(lambda self: self.model.eot_token_id)
    tok_encode = _loglikelihood_tokens = loglikelihood_rolling = lambda self, *args, **given: None

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return self.model.generate_until(requests, disable_tqdm=True)


@pytest.fixture
def edited_vllm(monkeypatch) -> Iterator[Any]:
    """The model class, on the stand-in."""
    modules = {name: ModuleType(name) for name in ("vllm", "lm_eval.models.vllm_causallms")}
    engine = make_dataclass("EngineArgs", ["gpu_memory_utilization", "model"])
    vars(modules["vllm"]).update(LLM=object, EngineArgs=engine, __spec__=object())
    vars(modules["lm_eval.models.vllm_causallms"])["VLLM"] = StandIn
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    model = importlib.import_module(OURS[-1]).EditedVLLM
    monkeypatch.setitem(model_registry._objs, "edited_vllm", model)
    yield model
    for name in OURS:
        sys.modules.pop(name, None)


def test_arguments_and_report_are_those_of_edited_hf_and_the_rest_goes_to_vllm(edited_vllm, tmp_path) -> None:
    edits = {"edits": "tiny[0:2]", "edit_cache": str(tmp_path)}
    tasks = ["rect_autoregressive"]
    ours = evaluate("edited_hf", edits, tasks, batch_size=8, device="cpu")
    given = edits | {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.3}
    theirs = evaluate("edited_vllm", given, tasks, batch_size=8, device="cpu")
    assert StandIn.made == {
        "dtype": "float32",
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.3,
    }
    for report in (ours["config"]["edit"], theirs["config"]["edit"]):
        del report["from_cache"], report["seconds"]
    assert theirs["config"]["edit"] == ours["config"]["edit"]
    assert theirs["config"]["model_num_parameters"] == ours["config"]["model_num_parameters"]
    assert scores(theirs) == scores(ours)  # locality, for which the unedited model is needed, among them
    assert list(answers(theirs)) == list(answers(ours))


def test_the_checkpoint_is_there_as_long_as_the_model(edited_vllm) -> None:
    edited = edited_vllm(edits="tiny[0:1]", edit_cache="off", device="cpu")
    report = json.loads((edited.folder / "edit_report.json").read_text())
    assert report["run"] == edited.get_model_info()["edit"]["run"] and edited.run_key.endswith(report["run"])
    folder = edited.folder
    del edited
    assert not folder.exists()


@pytest.mark.parametrize(
    ("given", "processes", "message"),
    [
        ({"tensor_paralel_size": 2}, "1", "'tensor_paralel_size': did you mean 'tensor_parallel_size'?"),
        ({"model": "gpt2"}, "1", "no argument 'model'"),
        ({"peft": "adapter"}, "1", "merge the adapter"),
        ({"softmax_dtype": "float32"}, "1", "softmax_dtype: .* vLLM answers here"),
        ({}, "2", "vLLM starts its own processes"),
        ({"edits": "tiny[0:x]"}, "1", "tiny"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_model_is_loaded(
    edited_vllm, monkeypatch, given: dict[str, Any], processes: str, message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(HFLM, "__init__", lambda *args, **given: pytest.fail("a model is loaded"))
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        edited_vllm(**given)


@pytest.mark.parametrize("model_class", ["stand-in", pytest.param("vLLM", marks=IN_VLLM)])
def test_what_it_would_fail_on_while_it_answers_is_said_in_one_line(request, model_class: str) -> None:
    if model_class == "vLLM":
        made, more = importlib.import_module(OURS[-1]).EditedVLLM, ENGINE
    else:
        made, more = request.getfixturevalue("edited_vllm"), {}
    model = made(edits="tiny[0:1]", edit_cache="off", device="cpu", max_length=16, **more)

    def asked(**given: Any) -> list[Instance]:
        return [Instance("generate_until", {}, ("Mira lives in", given), 0)]

    with pytest.raises(UserError, match="max_gen_toks=16: the model reads 16 tokens at most"):
        model.generate_until(asked(max_gen_toks=16))
    with pytest.raises(UserError, match="do_sample needs a temperature"):
        model.generate_until(asked(max_gen_toks=4, do_sample=True, temperature=0.0))
    with pytest.raises(UserError, match="max_length=16: an answer of the tasks has 15 tokens"):
        model._loglikelihood_tokens([(("", ""), [1], [2] * 15)])
    model._loglikelihood_tokens([(("", ""), [1], [2] * 14)])


# ---------------------------------------------------------------------------------------------- in vLLM


@IN_VLLM
def test_scores_of_three_ways_agree_within_rounding(tmp_path) -> None:
    tasks = ["rect_suite", "rect_autoregressive", "rect_ripple", "rect_drift"]
    # vLLM has to generate a token after what it scores, so a text as long as the model reads is cut.
    how: dict[str, Any] = {"limit": 10, "metadata": {"max_length": 255}}
    edits = {"pretrained": "rect-tiny", "edit_cache": str(tmp_path / "runs")}
    folder = str(tmp_path / "edited")
    hf = evaluate("edited_hf", edits | {"save_edited": folder}, tasks, batch_size=16, **how)
    vllm = evaluate("edited_vllm", edits | ENGINE, tasks, batch_size="auto", device="cpu", **how)
    how["metadata"] |= {"edits": "tiny[0:20]", "data": "tiny"}
    given = {"pretrained": folder, "dtype": "float32", **ENGINE}
    checkpoint = evaluate("vllm", given, tasks, batch_size="auto", **how)

    for results in (hf, vllm):
        del results["config"]["edit"]["from_cache"], results["config"]["edit"]["seconds"]
    assert vllm["config"]["edit"] == hf["config"]["edit"]
    assert scores(vllm) == pytest.approx(scores(hf), rel=1e-3, abs=1e-3)
    assert scores(vllm).keys() - scores(checkpoint).keys() == {
        ("rect_autoregressive", "locality,none"),
        *(("rect_drift", f"{metric},none") for metric in ("kl", "argmax_changed", "perplexity_unedited")),
    }
    scored = 0
    for (task, asked, mine), (*_, other), (*_, stock) in zip(
        answers(hf), answers(vllm), answers(checkpoint), strict=True
    ):
        if isinstance(mine, tuple) and len(mine) == 2 and isinstance(mine[0], float):
            assert other[0] == pytest.approx(mine[0], abs=1e-3) and other[1] == mine[1], (task, asked)
            scored += 1
        else:
            assert other == mine, (task, asked)
            assert getattr(other, "ended", None) == getattr(mine, "ended", None), (task, asked)
        assert stock in (None, other), (task, asked)
    assert scored > 200


@IN_VLLM
def test_vllm_and_peft_answer_from_an_exported_adapter_as_the_edited_model(tmp_path) -> None:
    from peft import PeftModel
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    # vLLM takes adapters for Llama's architecture, and not for GPT-2's.
    base, edited, adapter = embedded.resolve_model("rect-tiny-llama"), tmp_path / "edited", tmp_path / "lora"
    options = ["--model", "rect-tiny-llama", "--method", "rome", "--edits", "tiny[0:4]", "--device", "cpu"]
    assert cli.main(["edit", *options, "--edit-cache", str(tmp_path / "runs"), "--output", str(edited)]) == 0
    (run,) = EditCache(tmp_path / "runs").entries()
    options = ["--format", "peft", "--output", str(adapter), "--device", "cpu"]
    assert cli.main(["export", str(run.path), *options]) == 0

    tokenizer = AutoTokenizer.from_pretrained(base)
    whole = AutoModelForCausalLM.from_pretrained(edited).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    engine = LLM(base, dtype="float32", enable_lora=True, max_lora_rank=8, **ENGINE)
    asked = SamplingParams(temperature=0, max_tokens=8, logprobs=5)
    prompts = [tokenizer(edit.text).input_ids for edit in load_edits("tiny[0:8]")]
    given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    plain = engine.generate(given, asked, use_tqdm=False)
    found = engine.generate(given, asked, use_tqdm=False, lora_request=LoRARequest("edited", 1, str(adapter)))
    assert [one.outputs[0].token_ids for one in plain] != [one.outputs[0].token_ids for one in found]
    for prompt, (answer,) in zip(prompts, (one.outputs for one in found), strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            expected, theirs = (model(ids).logits[0, -1].log_softmax(-1) for model in (whole, adapted))
            continued = whole.generate(ids, do_sample=False, max_new_tokens=8)[0, len(prompt) :].tolist()
        torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=0)
        assert list(answer.token_ids) == continued
        for token, logprob in answer.logprobs[0].items():
            assert logprob.logprob == pytest.approx(float(expected[token]), abs=1e-3)
