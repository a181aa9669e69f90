"""Sessions on chat models: each method edits and measures inside the chat, whose format is in a run's key."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_models import CHATS, chat_model, chat_tokenizer
from support.every_method import EDITS, HPARAMS, config_of, write_moments
from support.tiny_models import depth

from harness_rect import cli
from harness_rect.config import EditConfig
from harness_rect.edits import Probe
from harness_rect.errors import UserError
from harness_rect.fingerprint import digest
from harness_rect.methods.contexts import sample_templates
from harness_rect.methods.kn import continuation
from harness_rect.methods.mend_weights import read_description
from harness_rect.models import EditableLM
from harness_rect.models.prompt_format import PromptFormat
from harness_rect.session import EditSession
from harness_rect.session.report import EditReport
from harness_rect.session.runs import EditCache

INSTRUCTION = "You speak English."
TRAINED = {"num_steps": 20, "lr": 5e-3}
FACTS = [
    replace(
        edit,
        paraphrases=(f"Because {edit.text}",),
        neighborhood=(Probe("The capital of France is", "Paris"), Probe("Where is it?", None)),
    )
    for edit in EDITS
]


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moments(tmp_path_factory.mktemp("moments"))


@pytest.fixture
def session_of(moments: Path, tmp_path: Path) -> Callable[..., EditSession]:
    """``session_of(kind, method="rome", hparams, template_args, **arguments of EditConfig)``."""

    def session_of(
        kind: str,
        method: str = "rome",
        hparams: dict[str, Any] | None = None,
        template_args: dict[str, Any] | None = None,
        **more: Any,
    ) -> EditSession:
        config = config_of(method, tmp_path, moments, "none", **(hparams or {})).model_copy(update=more)
        model = chat_model(kind, **depth(CHATS[kind].family, 3))
        return EditSession(model, chat_tokenizer(kind), config, FACTS, chat_template_args=template_args)

    return session_of


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("method", HPARAMS)
def test_a_method_reads_nothing_but_prompts_in_the_users_turn(
    method: str, kind: str, session_of, monkeypatch
) -> None:
    session = session_of(kind, method, apply_chat_template=True, system_instruction=INSTRUCTION)
    chat, encoder = CHATS[kind], session.lm.encoder
    read: list[str] = []
    batch = EditableLM.batch

    def seen(self: EditableLM, sequences: Any, *rest: Any) -> Any:
        read.extend(encoder.tokenizer.decode(ids) for ids in sequences)
        return batch(self, sequences, *rest)

    monkeypatch.setattr(EditableLM, "batch", seen)
    report = session.run()
    monkeypatch.undo()
    assert all(step["applied"] for step in report["steps"])
    probe = encoder.tokenizer.decode(encoder.tokens("The city is large"))  # of EditableLM.writes_to_stream
    prompts = [text for text in read if text != probe]
    assert prompts and all(chat.opening in text for text in prompts)
    assert all((INSTRUCTION in text) == chat.system for text in prompts)
    # What was measured before an edit: its prompt, its paraphrase and its locality prompts.
    for fact in FACTS:
        for prompt in (fact.text, *fact.paraphrases, *(probe.prompt for probe in fact.neighborhood)):
            assert any(f"{prompt}{chat.closing}" in text for text in prompts), prompt
    assert report["chat_template_sha"] and report["chat_template_args"] == {}
    assert report["system_instruction"] == (INSTRUCTION if chat.system else None)


#: A chat with nothing in it but what the two say, separated by a space.
NOTHING = "{{ messages[0].content }}{% if messages[1:] %}{{ ' ' + messages[1].content }}{% endif %}"


@pytest.mark.parametrize("method", HPARAMS)
def test_a_template_that_adds_nothing_leaves_every_bit_as_it_is(
    method: str, make_model, tokenizer, moments: Path, tmp_path: Path
) -> None:
    found = []
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = NOTHING
    for applied in (False, True):
        config = config_of(method, tmp_path, moments).model_copy(update={"apply_chat_template": applied})
        session = EditSession(make_model("gpt2", n_layer=3), chat, config, FACTS)
        found.append((session.run(), [session.lm.weight(name) for name in session.weight_names]))
    (plain, before), (report, after) = found
    assert all(map(torch.equal, before, after))
    assert report["edits"] == plain["edits"]
    assert report["token_ids_sha256"] == plain["token_ids_sha256"] and report["run"] != plain["run"]


@pytest.mark.parametrize("kind", CHATS)
def test_an_edit_makes_the_assistant_say_the_target(kind: str, session_of) -> None:
    session = session_of(kind, "locft_bf", TRAINED, apply_chat_template=True)
    report = session.run()
    assert report["before_each_edit"]["reliability"] == 0 and report["at_the_end"]["reliability"] > 0.6
    # Measured by hand, from the template's text alone.
    (one, _), tokenizer = FACTS, session.lm.encoder.tokenizer
    text = session.lm.encoder.format.text(one.text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    target = tokenizer(CHATS[kind].space + one.target_new, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = session.lm.model(torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1]
    nll = -logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum()
    assert report["edits"][0]["end"]["target_probability"] == pytest.approx(float(torch.exp(-nll)), rel=1e-4)


def test_locft_bf_trains_the_end_of_the_assistants_turn(session_of) -> None:
    for kind, chat in CHATS.items():
        session = session_of(kind, "locft_bf", TRAINED, apply_chat_template=True)
        session.run()
        encoder = session.lm.encoder
        prompt, target = encoder.continuation(FACTS[0].text, FACTS[0].target)
        with torch.no_grad():
            best = int(session.lm.model(torch.tensor([prompt + target])).logits[0, -1].argmax())
        assert encoder.tokenizer.convert_ids_to_tokens(best) == chat.end


def test_kn_replaces_what_the_assistant_would_say(session_of) -> None:
    lm = session_of("llama3", "kn", apply_chat_template=True).lm
    ids = torch.tensor([lm.encoder.ids(FACTS[0].text)])
    with torch.no_grad():
        assert continuation(lm, FACTS[0].text, 1) == [int(lm.model(ids).logits[0, -1].argmax())]


def test_mend_is_trained_and_edits_in_the_chat(tmp_path: Path, caplog) -> None:
    chat_model("llama3").save_pretrained(tmp_path / "model")
    chat_tokenizer("llama3").save_pretrained(tmp_path / "model")
    rows = [
        {
            "prompt": "{} is known for",
            "subject": town,
            "target_new": "football",
            "rephrase_prompt": f"What is in {town}?",
            "locality_prompt": "The capital of France is",
            "locality_ground_truth": "Paris",
        }
        for town in ("Ulm", "Brno", "Ghent", "Turku", "Split", "Oslo")
    ]
    (tmp_path / "facts.json").write_text(json.dumps(rows))
    model, facts = ["--model", str(tmp_path / "model")], str(tmp_path / "facts.json")
    chat = ["--apply-chat-template", "--system-instruction", INSTRUCTION, "--enable-thinking", "false"]
    training = ["train-mend", *model, "--train", facts, "--output", str(tmp_path / "mend"), "--device", "cpu"]
    assert cli.main([*training, "--steps", "4", "--batch-size", "2", "--rank", "4", *chat]) == 0
    trained = read_description(tmp_path / "mend").training
    edit = ["edit", *model, "--method", "mend", "--hparams", str(tmp_path / "mend"), "--edits", facts]
    with caplog.at_level(logging.WARNING, "harness_rect"):
        assert cli.main([*edit, "--device", "cpu", "--output", str(tmp_path / "edited"), *chat]) == 0
    assert "chat template" not in caplog.text
    report = json.loads((tmp_path / "edited" / "edit_report.json").read_text())
    for name in ("chat_template_sha", "chat_template_args", "system_instruction"):
        assert trained[name] == report[name] and report[name]
    assert cli.main([*edit, "--device", "cpu", "--output", str(tmp_path / "plain")]) == 0
    assert "was trained on prompts without, or with another, chat template" in caplog.text


def test_prefixes_are_sampled_from_plain_text() -> None:
    """They stand inside the user's turn; what the model samples them from is no chat."""
    model, tokenizer = chat_model("llama3"), chat_tokenizer("llama3")
    plain = EditableLM(model, tokenizer)
    chat = EditableLM(model, tokenizer, None, PromptFormat.of(tokenizer, True))
    params = [(5, 3)]
    assert sample_templates(chat, params, 0) == sample_templates(plain, params, 0)


# ------------------------------------------------------------------------------------------ the key


def test_a_runs_key_and_report_know_how_prompts_were_put(session_of) -> None:
    forms: dict[str, dict[str, Any]] = {
        "plain": {},
        "chat": {"apply_chat_template": True},
        "no thinking": {"apply_chat_template": True, "template_args": {"enable_thinking": False}},
        "thinking": {"apply_chat_template": True, "template_args": {"enable_thinking": True}},
        "instruction": {"apply_chat_template": True, "system_instruction": INSTRUCTION},
        "instruction alone": {"system_instruction": INSTRUCTION},
    }
    sessions = {name: session_of("qwen3", **given) for name, given in forms.items()}
    assert len({digest(session.identity()) for session in sessions.values()}) == len(forms)
    hashes = {name: session.identity()["token_ids_sha256"] for name, session in sessions.items()}
    assert hashes["chat"] == hashes["thinking"], "a template may treat them alike"
    assert len(set(hashes.values())) == len(forms) - 1
    unused = session_of("qwen3", template_args={"enable_thinking": False})
    assert digest(unused.identity()) == digest(sessions["plain"].identity())
    report = EditReport.read(sessions["no thinking"].run())
    assert report.chat_template_args == {"enable_thinking": False}
    assert report.system_instruction is None and len(report.chat_template_sha or "") == 64


def test_a_kept_run_is_found_by_a_session_of_the_same_format_alone(session_of, tmp_path: Path) -> None:
    cache = EditCache(tmp_path / "runs")
    given: dict[str, Any] = {"apply_chat_template": True, "system_instruction": INSTRUCTION}
    first = session_of("qwen3", **given).run(cache)
    again = session_of("qwen3", **given).run(cache)
    assert again == first | {"from_cache": True, "seconds": again["seconds"]}
    assert not session_of("qwen3", apply_chat_template=True).run(cache)["from_cache"]
    assert not session_of("qwen3").run(cache)["from_cache"]


# -------------------------------------------------------------------------------------- bad input


def test_a_tokenizer_without_a_template_is_one_line(make_model, tokenizer) -> None:
    config = EditConfig(method="ft", edits="two", apply_chat_template=True)
    with pytest.raises(UserError, match="has no chat template") as error:
        EditSession(make_model("gpt2"), tokenizer, config, FACTS)
    assert "\n" not in str(error.value)


def test_an_instruction_that_a_template_refuses_is_left_out_with_a_warning(session_of, caplog) -> None:
    with caplog.at_level(logging.WARNING, "harness_rect"):
        session = session_of("gemma", apply_chat_template=True, system_instruction=INSTRUCTION)
    assert "system_instruction has no effect" in caplog.text
    without = session_of("gemma", apply_chat_template=True)
    assert digest(session.identity()) == digest(without.identity())
