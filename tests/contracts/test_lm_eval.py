"""What ``compat/`` relies on in lm-eval, on 0.4.13 and 0.5 alike.

A failure here names what an upgrade breaks.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval import evaluator
from lm_eval.api import metrics
from lm_eval.api import task as lm_eval_task
from lm_eval.api.model import CacheHook, CachingLM, TemplateLM
from lm_eval.api.registry import get_aggregation
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.dummy import DummyLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from sqlitedict import SqliteDict
from torch.utils import collect_env

from harness_rect.compat import lm_eval as compat
from harness_rect.compat.lm_eval import KeptTasks, YamlTask, build_arguments, evaluate
from harness_rect.compat.lm_eval_command import call_after_saving
from harness_rect.compat.lm_eval_model import SharedPassLM, share_rows
from harness_rect.compat.prompt_options import PromptOptions, options_of_evaluation
from harness_rect.errors import Failed
from harness_rect.models.prompt_format import ChatTemplate

TASK = """
task: {name}
class: !function harness_rect.compat.lm_eval.YamlTask
custom_dataset: !function rows.rows
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
num_fewshot: 0
process_results: !function rows.score
metric_list:
  - metric: acc
    aggregation: mean
  - metric: f1
    aggregation: !function rows.largest
"""
ROWS = """
def rows(**metadata):
    import datasets
    return {"test": datasets.Dataset.from_list([{"q": f"Q{i}", "a": f"A{i}"} for i in range(4)])}
def score(doc, results):
    return {"acc": float(doc["q"] != "Q3"), "f1": int(doc["q"][1:])}
def largest(values):
    return max(values)
"""


@pytest.fixture
def manager(tmp_path: Path) -> KeptTasks:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.py").write_text(ROWS)
    for name in ("one", "two"):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name))
    return KeptTasks(include_path=str(tmp_path / "tasks"), include_defaults=False, metadata={})


def calls_of(owner: Any, name: str, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Keyword arguments of each call of ``owner.name``."""
    seen: list[dict[str, Any]] = []
    original = getattr(owner, name)

    def watched(*args: Any, **given: Any) -> Any:
        seen.append(given)
        return original(*args, **given)

    patch.setattr(owner, name, watched)
    return seen


def run(manager: KeptTasks, **given: Any) -> compat.Finished:
    settings = {"tasks": ["one"], "task_manager": manager, "log_samples": True, "limit": 4} | given
    return evaluate(DummyLM(), "a name", **settings)


def test_an_evaluation_is_written_by_the_trackers_two_methods_under_the_name_given(
    manager: KeptTasks, tmp_path: Path
) -> None:
    finished = run(manager)
    finished.write(tmp_path / "out", sweep={"n": 1})
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"results.json", "samples_one.jsonl", "SHA256SUMS"}, (
        "EvaluationTracker names its files otherwise"
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["sweep"] == {"n": 1}
    assert results["config"]["model"] == results["model_source"] == "a name"
    assert results["results"]["one"]["acc,none"] == 0.75
    assert len((tmp_path / "out" / "samples_one.jsonl").read_text().splitlines()) == 4


def test_results_that_the_tracker_wrote_in_part_are_refused(
    manager: KeptTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = EvaluationTracker.save_results_aggregated

    def write_part(tracker: EvaluationTracker, *args: Any) -> None:  # as on a full disk, which it only logs
        write(tracker, *args)
        [path] = Path(tracker.output_path or "").parent.glob("results*.json")
        os.truncate(path, 100)

    monkeypatch.setattr(EvaluationTracker, "save_results_aggregated", write_part)
    with pytest.raises(Failed, match="could not write the results"):
        run(manager).write(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_commands_results_are_known_once_they_are_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    called: list[Any] = []
    after = ModuleType("after")
    after.__dict__.update(works=lambda *given: called.append(given), fails=lambda *given: 1 / 0)
    monkeypatch.setitem(sys.modules, "after", after)
    original = EvaluationTracker.save_results_aggregated
    for name in ("works", "fails"):
        call_after_saving(EntryPoint(name, f"after:{name}", "test"))
        assert EvaluationTracker.save_results_aggregated is not original
        # As the command calls it: lm_eval/_cli/run.py.
        EvaluationTracker(output_path=str(tmp_path)).save_results_aggregated(results={"a": 1}, samples=None)
        assert EvaluationTracker.save_results_aggregated is original
    ((results, folder),) = called
    assert results["a"] == 1 and folder == str(tmp_path) and len(list(tmp_path.rglob("results_*.json"))) == 2
    assert "save_results_aggregated(" in inspect.getsource(importlib.import_module("lm_eval._cli.run"))


@pytest.mark.parametrize(("most", "lost"), [(1000, "results_"), (25_000, "samples_b_")])
def test_the_command_ends_after_its_tables_where_results_could_not_be_saved(
    most: int, lost: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    resource = pytest.importorskip("resource")
    at_end: list[Any] = []
    for name in ("", "lm_eval", "harness_rect"):  # another test's may write to a file, which is limited here
        monkeypatch.setattr(logging.getLogger(name), "handlers", [logging.NullHandler()])
    monkeypatch.setattr("atexit.register", lambda *given: at_end.insert(0, given))
    scores = {"alias": "a", "acc,none": 0.5}
    results: dict[str, Any] = {"results": {"a": scores, "b": scores}, "configs": {"a": {}, "b": {}}}
    results |= {"versions": {}, "n-shot": {}, "higher_is_better": {}, "groups": {"g": scores}}
    row = {"doc_hash": "x", "prompt_hash": "x", "target_hash": "x", "target": "x"}
    rows = [row | {"arguments": [], "resps": [], "filtered_resps": [], "doc": "x" * 20_000}]
    samples = {"a": rows, "b": rows * 2}
    call_after_saving(EntryPoint("summary", "os:getcwd", "test"))  # it fails, which says nothing
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:  # as in lm_eval/_cli/run.py
        tracker = EvaluationTracker(output_path=str(tmp_path))
        tracker.general_config_tracker.system_instruction = "x" * 2000
        with pytest.raises(SystemExit) as ended:
            tracker.save_results_aggregated(results=results, samples=samples)
            for task in results["configs"]:
                tracker.save_results_samples(task_name=task, samples=samples[task])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for function, *given in at_end:
        function(*given)
    said = capsys.readouterr()
    assert ended.value.code == 1 and said.out.count("|acc") == 3
    assert said.err.startswith(f"error: {tmp_path}") and f"/{lost}" in said.err and "too large" in said.err
    assert len(list(tmp_path.rglob("*.json*"))) == (0 if lost == "results_" else 2)


def test_means_alone_have_standard_errors_and_metrics_may_be_named_as_lm_evals_own(
    manager: KeptTasks,
) -> None:
    found = run(manager, bootstrap_iters=100).results["results"]["one"]
    assert found["f1,none"] == 3, "a metric's own aggregation is not used"
    assert found["acc_stderr,none"] == pytest.approx(0.25)
    assert found["f1_stderr,none"] == "N/A"


def test_tasks_are_loaded_once_and_asked_for_by_name(manager: KeptTasks) -> None:
    assert manager.match_tasks(["o*", "two"]) == ["one", "two"]
    loaded = manager.load(["one", "two"])
    assert list(loaded["tasks"]) == ["one", "two"], "TaskManager.load returns something else"
    assert manager.load(["one", "two"]) is loaded
    assert all(isinstance(task, YamlTask) for task in loaded["tasks"].values())


def test_evaluate_builds_requests_with_the_arguments_we_build_them_with(
    manager: KeptTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls_of(YamlTask, "build_all_requests", monkeypatch)
    run(manager)
    expected = build_arguments(DummyLM(), 4, apply_chat_template=False, system_instruction=None)
    assert seen == [expected], "a sweep would build requests anew for each evaluation"


def test_facts_of_the_machine_are_looked_up_where_they_are_replaced(
    manager: KeptTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "_environment", lambda: "known environment")
    monkeypatch.setattr(compat, "_commit", lambda: "known commit")
    programs = calls_of(collect_env, "get_pretty_env_info", monkeypatch)
    results = run(manager).results
    assert results["git_hash"] == "known commit", "lm-eval starts git for each evaluation"
    assert not programs, "lm-eval starts a dozen programs for each evaluation"


def test_requests_reach_the_method_they_name_and_answers_come_back_in_order() -> None:
    assert callable(getattr(TemplateLM, compat.SCORE_IDS)), "edits are scored by this method"
    task = type("Task", (), {"task_name": "t"})()
    fields = compat.request_fields(task, {"metadata": ("t", 3, 1), "doc_id": 3})
    request = compat.IdRequest(
        request_type=compat.SCORE_IDS, doc={}, arguments=("p", "t", [1], [2, 3]), idx=1, **fields
    )
    assert tuple(request) == (None, [1], [2, 3])
    assert (request.doc_id, request.task_name, request.idx) == (3, "t", 1)


def test_aggregations_are_found_by_name_and_the_mean_is_the_metrics_module_s() -> None:
    assert get_aggregation("mean")([1, 0]) == 0.5
    assert metrics.mean is get_aggregation("mean"), "means would lose their standard errors"
    assert metrics.mean_stderr([1, 0, 1, 1]) == pytest.approx(0.25)


#: Of a request, beside what is asked.
NOWHERE: dict[str, Any] = {"task_name": "t", "doc_id": 0} if compat.SCORERS else {"metadata": ("t", 0, 1)}

#: What compat/ calls or overrides, with the parameters by position or name that it uses.
PARAMETERS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "simple_evaluate": (evaluator.simple_evaluate, ["evaluation_tracker", "fewshot_as_multiturn"]),
    "get_git_commit_hash": (evaluator.get_git_commit_hash, []),
    "get_pretty_env_info": (collect_env.get_pretty_env_info, []),
    "save_results_aggregated": (EvaluationTracker.save_results_aggregated, ["results", "samples"]),
    "save_results_samples": (EvaluationTracker.save_results_samples, ["task_name", "samples"]),
    "TaskManager": (TaskManager.__init__, ["include_path", "include_defaults", "metadata"]),
    "stderr_for_metric": (metrics.stderr_for_metric, ["metric", "bootstrap_iters"]),
    "_loglikelihood_tokens": (HFLM._loglikelihood_tokens, ["requests", "disable_tqdm", "override_bs"]),
    "loglikelihood": (HFLM.loglikelihood, ["requests", "disable_tqdm"]),
    "loglikelihood_rolling": (HFLM.loglikelihood_rolling, ["requests", "disable_tqdm"]),
    "generate_until": (HFLM.generate_until, ["requests", "disable_tqdm"]),
    "set_cache_hook": (HFLM.set_cache_hook, ["cache_hook"]),
    "_batch_scheduler": (HFLM._batch_scheduler, ["pos", "n_reordered_requests"]),
    "_model_call": (HFLM._model_call, ["inps"]),
    "tok_decode": (HFLM.tok_decode, ["tokens", "skip_special_tokens"]),
    "apply_filters": (YamlTask.__mro__[1].apply_filters, []),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_we_pass_them(name: str) -> None:
    function, wanted = PARAMETERS[name]
    found = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
    by_name = name in {"simple_evaluate", "TaskManager"}
    kept = set(wanted) <= set(found) if by_name else found[: len(wanted)] == wanted
    assert kept, f"{name} takes {found}, and compat/ passes {wanted}"


def test_a_model_class_that_has_no_method_of_ours_answers_none() -> None:
    request = compat.Instance(
        request_type=compat.GENERATE_BOTH, doc={}, arguments=("p", {}), idx=0, **NOWHERE
    )
    for name in (compat.GENERATE_BOTH, compat.GENERATE_UNEDITED):
        assert getattr(DummyLM(), name)([request, request]) == [None, None]


def test_generated_texts_are_decoded_and_cut_so_that_they_know_where_they_end(
    make_model, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SharedPassLM(pretrained=make_model("gpt2"), tokenizer=tokenizer, batch_size=2, backend="causal")
    said = tokenizer.decode(range(40, 48))

    def generate(context: torch.Tensor, **given: Any) -> torch.Tensor:
        return torch.cat([context, torch.arange(40, 48).repeat(len(context), 1).to(context)], dim=1)

    monkeypatch.setattr(model, "_model_generate", generate)
    stop = said[len(said) // 2]
    stops: list[list[str]] = [[stop], []]
    requests = [
        compat.Instance(
            request_type=compat.GENERATE,
            doc={},
            arguments=("a", {"until": until, "max_gen_toks": 8}),
            idx=0,
            **NOWHERE,
        )
        for until in stops
    ]
    cut, whole = model.generate_until(requests)
    assert (cut, whole) == (said.split(stop)[0], said)
    assert (cut.ended, whole.ended) == (True, False), "HFLM decodes or cuts in another way"


def test_the_commit_is_looked_up_without_a_word_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert evaluator.get_git_commit_hash() is None
    assert capfd.readouterr().err == "", "lm-eval calls git in another way"
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run(["git", *command], check=True)
    assert re.fullmatch("[0-9a-f]{7,40}", evaluator.get_git_commit_hash())


@pytest.mark.skipif(not compat.SCORERS, reason="lm-eval before 0.5")
def test_a_generate_task_of_05_builds_scorers_and_aggregates() -> None:
    base: Any = lm_eval_task.GenerateTask  # type: ignore[attr-defined, unused-ignore]
    assert callable(base._build_scorers), "metrics named acc or f1 would be refused"
    assert "bootstrap_iters" in inspect.signature(base.aggregate).parameters


def test_hflm_has_what_shared_passes_read(make_model, tokenizer) -> None:
    model = SharedPassLM(pretrained=make_model("gpt2"), tokenizer=tokenizer, batch_size=2, backend="causal")
    assert model.backend == "causal"
    assert model.logits_cache is True, "no request would share a pass"
    assert model.softmax_dtype is None and model.rank == 0 and model.batch_size == 2
    assert model.max_length > 8
    assert model._model_call(torch.tensor([[1, 2, 3]]).to(model.device)).shape[:2] == (1, 3)


def test_hflm_shares_rows_by_the_attributes_that_we_set(make_model, tokenizer) -> None:
    model = HFLM(pretrained=make_model("gpt2"), tokenizer=tokenizer)
    share_rows(model)
    assert (model.rank, model.world_size) == (0, 1)
    accelerator = SimpleNamespace(process_index=1, num_processes=2, gather=lambda tensor: tensor.repeat(2))
    model.accelerator = accelerator
    share_rows(model)
    assert (model.rank, model.world_size) == (1, 2), "each process would evaluate everything"
    assert model.all_gather(torch.tensor([3])).tolist() == [3, 3]


def test_the_store_of_answers_is_a_sqlitedict_that_the_hook_holds(tmp_path: Path) -> None:
    cached = CachingLM(DummyLM(), str(tmp_path / "answers.db"))
    store = CacheHook(cached).dbdict
    assert isinstance(store, SqliteDict), "answers before and after editing would be taken for each other's"
    assert CacheHook(None).dbdict is None


def test_arguments_of_a_model_are_read_as_by_the_command() -> None:
    text = "subfolder=,revision=7,parallelize=True,tokenizer=a=b"
    read: dict[str, Any] = {"subfolder": "", "revision": 7, "parallelize": True, "tokenizer": "a=b"}
    assert compat.parsed_arguments(text) == read  # 0.5.0.dev1 reads neither quotes nor None


def test_how_prompts_are_put_is_read_from_the_evaluation_that_runs(
    manager: KeptTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a model that ``simple_evaluate`` makes, and by a ready one that ``evaluate`` asks."""
    seen: list[PromptOptions | None] = []

    class Watching(DummyLM):
        def __init__(self, *rest: Any, **given: Any) -> None:
            seen.append(options_of_evaluation())
            super().__init__()

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            seen.append(options_of_evaluation())
            return super().generate_until(requests, disable_tqdm)

        def apply_chat_template(self, messages: Any, add_generation_prompt: bool = True) -> str:
            assert add_generation_prompt
            return str(messages[-1]["content"])

    monkeypatch.setattr("lm_eval.api.registry.get_model", lambda name: Watching)
    given: dict[str, Any] = {"tasks": ["one"], "task_manager": manager, "limit": 1}
    for arguments in (dict[str, Any](), ""):
        evaluator.simple_evaluate(
            "a name", arguments, apply_chat_template="tool_use", system_instruction="S", **given
        )
    evaluator.simple_evaluate("a name", {}, apply_chat_template=False, **given)
    ready = Watching()
    evaluator.evaluate(ready, manager.load(["one"]), limit=1, apply_chat_template=True)
    assert seen == [
        *[PromptOptions("tool_use", "S")] * 4,
        *[PromptOptions(False, None)] * 2,
        None,
        (True, None),
    ]


def test_hflm_applies_a_template_with_the_arguments_that_we_add_to(make_model, tokenizer) -> None:
    model = HFLM(pretrained=make_model("gpt2"), tokenizer=tokenizer, enable_thinking=False)
    assert model.chat_template_args == {"enable_thinking": False}
    model.chat_template_args = {"chat_template": "{{ messages[0].content }}:", **model.chat_template_args}
    messages = [{"role": "user", "content": "Who"}]
    assert model.apply_chat_template(messages, add_generation_prompt=True) == "Who:"
    assert ChatTemplate(tokenizer, model.chat_template_args)(messages) == "Who:"
