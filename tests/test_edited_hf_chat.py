"""``--apply_chat_template`` and ``--system_instruction``: edits and evaluation put prompts alike."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager
from support.chat_models import CHATS, chat_model, chat_tokenizer
from support.lm_eval_command import lm_eval_command
from support.lm_eval_files import without_groups
from transformers import AutoTokenizer

import harness_rect._autoload  # noqa: F401  registers edited_hf
from harness_rect import cli
from harness_rect.compat.lm_eval import KeptTasks
from harness_rect.embedded import resolve_model
from harness_rect.errors import UserError
from harness_rect.model_wrappers.edited_hf import EditedHF

ROOT = Path(__file__).resolve().parent.parent
EDITING = ["rect_zsre", "rect_counterfact"]
INSTRUCTION = "You speak English."
CHAT: dict[str, Any] = {"apply_chat_template": True, "system_instruction": INSTRUCTION}
FACTS = [
    {
        "prompt": "{} plays the sport of",
        "subject": subject,
        "target_new": sport,
        "target_true": "a list",
        "rephrase_prompt": f"What does {subject} play?",
        "locality_prompt": "The capital of France is",
        "locality_ground_truth": "Paris",
    }
    for subject, sport in (("LeBron James", "football"), ("Giulia Rossi", "raining"))
]
HPARAMS = {"layers": [0, 1], "num_steps": 25, "lr": 1e-2}
#: Another template by name; it has no turns.
NAMED = {"default": CHATS["qwen3"].template, "short": "{{ messages[-1].content }} ANSWER:"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of a model of each kind, one with several templates, one with none; edits, hyper-parameters."""
    folder = tmp_path_factory.mktemp("chat")
    for kind in CHATS:
        chat_model(kind).save_pretrained(folder / kind)
        chat_tokenizer(kind).save_pretrained(folder / kind)
    for name, template in (("several", NAMED), ("none", None)):
        shutil.copytree(folder / "qwen3", folder / name)
        tokenizer = chat_tokenizer("qwen3", template)
        tokenizer.chat_template = template
        (folder / name / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(folder / name)
    (folder / "edits.json").write_text(json.dumps(FACTS))
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    names = {"edits": "edits.json", "hparams": "hparams.json", "several": "several", "none": "none"}
    return {key: str(folder / name) for key, name in (names | {kind: kind for kind in CHATS}).items()}


@pytest.fixture
def arguments(place: dict[str, str]) -> Callable[..., dict[str, Any]]:
    """``arguments(kind, **more)``: model_args of an edited run."""

    def arguments(kind: str = "qwen3", **more: Any) -> dict[str, Any]:
        usual = {"pretrained": place[kind], "method": "ft"}
        return usual | {name: place[name] for name in ("edits", "hparams")} | more

    return arguments


def evaluate(model: Any, model_args: dict[str, Any], tasks: list[str] | None = None, **more: Any) -> Any:
    """Results of ``simple_evaluate``; the tasks get ``model_args`` as metadata, as under the command."""
    manager = more.pop("manager", TaskManager)(
        include_path=str(ROOT / "tasks"), include_defaults=False, metadata=model_args
    )
    theirs = {name: value for name, value in model_args.items() if model != "hf" or name != "edits"}
    results = lm_eval.simple_evaluate(
        model=model,
        model_args=theirs,
        tasks=tasks or EDITING,
        task_manager=manager,
        **({"device": "cpu", "batch_size": 4, "bootstrap_iters": 0} | more),
    )
    assert results is not None
    return without_groups(results)


def scores(results: Any) -> dict[str, Any]:
    return {
        f"{task} {name}": value
        for task, found in results["results"].items()
        for name, value in found.items()
        if name.endswith(",none") and "_stderr" not in name
    }


def agrees_with_the_session(results: Any) -> None:
    """rect_zsre has the numbers that the session measured at the end."""
    at_the_end, found = results["config"]["edit"]["at_the_end"], results["results"]["rect_zsre"]
    assert at_the_end["reliability"] > 0, "edits that achieve nothing prove nothing"
    for metric in ("reliability", "generalization", "neighborhood_acc"):
        assert found[f"{metric},none"] == pytest.approx(at_the_end[metric], abs=1e-9)


@pytest.mark.parametrize("kind", ["llama3", "qwen3", "gemma"])
def test_the_model_is_edited_in_the_chat_it_is_evaluated_in(kind: str, arguments) -> None:
    given, multiturn = arguments(kind, measure="generated"), kind in {"llama3", "gemma"}
    tasks = [*EDITING, "rect_autoregressive"]
    results = evaluate("edited_hf", given, tasks, fewshot_as_multiturn=multiturn, **CHAT)
    agrees_with_the_session(results)
    at_the_end, found = results["config"]["edit"]["at_the_end"], results["results"]["rect_autoregressive"]
    for metric in ("reliability", "generalization", "locality"):
        assert found[f"{metric},none"] == pytest.approx(at_the_end[f"{metric}_gen"], abs=1e-9)
    asked = [one[0] for doc in results["samples"]["rect_autoregressive"] for one in doc["arguments"]]
    chat, tokenizer = CHATS[kind], AutoTokenizer.from_pretrained(given["pretrained"])
    for task in EDITING:
        for doc in results["samples"][task]:
            for prompt, _, context, _ in doc["arguments"]:
                text = tokenizer.decode(context)
                assert f"{prompt}{chat.closing}" in text and chat.opening in text
                assert (INSTRUCTION in text) == chat.system
                assert task == "rect_zsre" or text in asked, "generated answers follow the same text"
    edit = results["config"]["edit"]
    assert edit["system_instruction"] == (INSTRUCTION if chat.system else None)


def test_arguments_as_text_and_thinking_switched_off(arguments) -> None:
    given = arguments(enable_thinking=False)
    text = ",".join(f"{name}={value}" for name, value in given.items())
    manager = TaskManager(include_path=str(ROOT / "tasks"), include_defaults=False, metadata=given)
    results = lm_eval.simple_evaluate(
        model="edited_hf",
        model_args=text,
        tasks=["rect_zsre"],
        task_manager=manager,
        device="cpu",
        apply_chat_template=True,
    )
    assert results is not None
    results = without_groups(results)
    agrees_with_the_session(results)
    assert results["config"]["edit"]["chat_template_args"] == {"enable_thinking": False}
    tokenizer = AutoTokenizer.from_pretrained(given["pretrained"])
    context = results["samples"]["rect_zsre"][0]["arguments"][0][2]
    assert tokenizer.decode(context).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_named_template_is_the_one_of_editing_and_evaluation(arguments) -> None:
    results = evaluate("edited_hf", arguments("several"), apply_chat_template="short")
    agrees_with_the_session(results)
    (prompt, _, context, _) = results["samples"]["rect_zsre"][0]["arguments"][0]
    assert AutoTokenizer.from_pretrained(arguments("several")["pretrained"]).decode(context) == (
        f"{prompt} ANSWER:"
    )


def test_an_instruction_without_a_chat_stands_before_prompts_of_edits_and_tasks(arguments) -> None:
    results = evaluate("edited_hf", arguments(), system_instruction=INSTRUCTION)
    agrees_with_the_session(results)
    (prompt, _, context, _) = results["samples"]["rect_zsre"][0]["arguments"][0]
    text = AutoTokenizer.from_pretrained(arguments()["pretrained"]).decode(context)
    assert text == INSTRUCTION + prompt


@pytest.mark.parametrize("kind", ["llama3", "gemma"])
def test_the_exported_checkpoint_gives_hf_the_same_numbers_with_the_same_options(
    kind: str, arguments, tmp_path: Path
) -> None:
    ours = evaluate("edited_hf", arguments(kind, save_edited=str(tmp_path / "edited")), **CHAT)
    exported = {"pretrained": str(tmp_path / "edited"), "edits": arguments()["edits"]}
    theirs = evaluate("hf", exported, **CHAT)
    assert scores(ours) == pytest.approx(scores(theirs), abs=1e-6)
    assert scores(evaluate("hf", exported)) != pytest.approx(scores(theirs), abs=1e-6)


def test_a_task_that_is_asked_again_puts_prompts_as_it_is_told_then(arguments) -> None:
    given = arguments(method="none")
    kept = KeptTasks(include_path=str(ROOT / "tasks"), include_defaults=False, metadata=given)
    tokenizer = AutoTokenizer.from_pretrained(given["pretrained"])
    for options in ({}, CHAT, {}):
        results = evaluate("edited_hf", given, ["rect_counterfact"], manager=lambda **_: kept, **options)
        asked = [one for doc in results["samples"]["rect_counterfact"] for one in doc["arguments"]]
        assert all((INSTRUCTION in tokenizer.decode(one[2])) == bool(options) for one in asked)


def test_harness_rect_edit_makes_the_same_edits(arguments, tmp_path: Path) -> None:
    given = arguments()
    line = ["edit", "--model", given["pretrained"], "--method", "ft", "--edits", given["edits"]]
    line += ["--hparams", given["hparams"], "--device", "cpu", "--output", str(tmp_path / "edited")]
    line += ["--apply-chat-template", "--enable-thinking", "false", "--system-instruction", INSTRUCTION]
    assert cli.main(line) == 0
    report = json.loads((tmp_path / "edited" / "edit_report.json").read_text())
    results = evaluate("edited_hf", given | {"enable_thinking": False}, **CHAT)
    assert results["config"]["edit"]["run"] == report["run"]


def test_a_sweep_edits_and_evaluates_in_the_chat(arguments, tmp_path: Path, monkeypatch, capsys) -> None:
    # All of lm-eval's own tasks take seconds to list.
    few = functools.partial(KeptTasks, include_defaults=False)
    monkeypatch.setattr("harness_rect.experiments.sweep.evaluate.KeptTasks", few)
    given = arguments()
    config = {
        "output": str(tmp_path / "out"),
        "models": [{"pretrained": given["pretrained"], "name": "m", "enable_thinking": False}],
        "edits": given["edits"],
        "methods": [{"method": "ft", "hparams": given["hparams"]}],
        "checkpoints": [0, 2],
        "tasks": EDITING,
        "device": "cpu",
        **CHAT,
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml")]) == 0
    single = evaluate("edited_hf", given | {"enable_thinking": False}, **CHAT)
    swept = json.loads((tmp_path / "out" / "m" / "ft" / "order0" / "edits_002" / "results.json").read_text())
    assert swept["config"]["edit"]["run"] == single["config"]["edit"]["run"]
    assert scores(without_groups(swept)) == pytest.approx(scores(single), abs=1e-6)
    assert swept["chat_template_sha"] == swept["config"]["edit"]["chat_template_sha"]
    assert (swept["system_instruction"], swept["fewshot_as_multiturn"]) == (INSTRUCTION, True)
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml")]) == 0, "the same sweep is done"
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config | {"apply_chat_template": False}))
    capsys.readouterr()
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml")]) == 2, "results of other prompts are not taken"
    assert "unedited/results.json: made with chat_template_sha" in capsys.readouterr().err


# ------------------------------------------------------------------------ what does not fit together


def test_a_ready_model_is_evaluated_as_it_was_edited_or_not_at_all(arguments) -> None:
    chat = EditedHF(**arguments(), **CHAT, device="cpu")
    plain = EditedHF(**arguments(), device="cpu")
    metadata = {"pretrained": arguments()["pretrained"], "edits": arguments()["edits"]}
    agrees_with_the_session(evaluate(chat, metadata, **CHAT))
    agrees_with_the_session(evaluate(plain, metadata))
    wrong: list[tuple[EditedHF, dict[str, Any], str]] = [
        (plain, CHAT, "chat_template_sha None"),
        (chat, {}, "evaluated with None"),
        (chat, {"apply_chat_template": True}, f"system_instruction {INSTRUCTION} and .* None"),
        (chat, CHAT | {"system_instruction": "Be brief."}, "Be brief."),
        (plain, {"system_instruction": "Be brief."}, "Be brief."),
    ]
    for model, options, message in wrong:
        for task in EDITING:
            with pytest.raises(UserError, match=message) as error:
                evaluate(model, metadata, [task], **options)
            assert "\n" not in str(error.value)
    model = EditedHF(**{**arguments(), "method": "none"}, device="cpu")
    assert evaluate(model, metadata, **CHAT), "nothing was edited"
    assert model.loglikelihood([]) == [], "outside of an evaluation nothing is asked"


def test_another_one_of_several_templates_does_not_fit(arguments) -> None:
    model = EditedHF(**arguments("several"), apply_chat_template="short", device="cpu")
    metadata = {"pretrained": arguments("several")["pretrained"], "edits": arguments()["edits"]}
    agrees_with_the_session(evaluate(model, metadata, apply_chat_template="short"))
    with pytest.raises(UserError, match="edited with chat_template_sha"):
        evaluate(model, metadata, apply_chat_template="default")


@pytest.mark.parametrize("given", [False, "short"])
def test_an_argument_that_is_not_the_evaluations_is_refused_before_editing(given: Any, arguments) -> None:
    with pytest.raises(UserError, match=f"apply_chat_template={given}, but the evaluation has .*=True"):
        evaluate(
            "edited_hf", arguments(pretrained="nowhere", apply_chat_template=given), apply_chat_template=True
        )


@pytest.mark.parametrize("method", ["ft", "none"])
def test_a_model_without_a_template_is_one_line(method: str, arguments) -> None:
    with pytest.raises(UserError, match="tokenizer of this model has no chat template") as error:
        evaluate("edited_hf", arguments("none", method=method), apply_chat_template=True)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------ the command


def test_the_command_edits_rect_tiny_in_a_chat_of_its_own(tmp_path: Path) -> None:
    """From the options alone; the results file and the edit report name the same template."""
    shutil.copytree(resolve_model("rect-tiny"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = (
        "{% for one in messages %}{{ ' ' if one.role == 'assistant' }}{{ one.content }}"
        "{{ '\\n' if one.role != 'assistant' }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = "pretrained=model,method=rome,edits=tiny[0:3]"
    command = ["--model", "edited_hf", "--model_args", arguments, "--tasks", "rect_editing"]
    command += ["--output_path", "out", "--system_instruction", INSTRUCTION, "--apply_chat_template"]
    done = lm_eval_command(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = without_groups(json.loads(path.read_text()))
    agrees_with_the_session(results)
    edit = results["config"]["edit"]
    assert edit["chat_template_sha"] == results["chat_template_sha"]
    assert edit["system_instruction"] == results["system_instruction"] == INSTRUCTION
