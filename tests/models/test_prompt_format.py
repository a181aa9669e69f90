"""Prompts as turns of a chat: lm-eval's tokens, BOS once, positions, and what templates do to a prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from support.chat_models import CHATS, chat_model, chat_tokenizer
from support.tiny_models import make_edit

from harness_rect.compat.lm_eval import KeptTasks
from harness_rect.errors import UserError
from harness_rect.methods.contexts import fill
from harness_rect.methods.value_search import _rows, until_subject
from harness_rect.models import EditableLM
from harness_rect.models.lm import TextEncoder
from harness_rect.models.prompt_format import PromptFormat

PROMPTS = [
    "The mother tongue of Danielle Darrieux is",
    " Where is Łódź (東京)? ",
    "",
    "{{ a }} <b>&amp;</b>\n",
]
INSTRUCTION = "You are a list. The mother tongue of Danielle Darrieux is"
TASK = """
task: chat
class: !function harness_rect.compat.lm_eval.YamlTask
custom_dataset: !function chat_rows.rows
test_split: test
fewshot_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
num_fewshot: 0
process_results: !function chat_rows.score
metric_list:
  - metric: acc
    aggregation: mean
"""
ROWS = f"""
def rows(**metadata):
    import datasets
    return {{"test": datasets.Dataset.from_list([{{"q": q, "a": "A"}} for q in {PROMPTS!r}])}}
def score(doc, results):
    return {{"acc": 0}}
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A task of lm-eval that asks PROMPTS."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "chat_rows.py").write_text(ROWS, encoding="utf-8")
    (folder / "chat.yaml").write_text(TASK)
    manager = KeptTasks(include_path=str(folder), include_defaults=False, metadata={})
    (found,) = manager.load(["chat"])["tasks"].values()
    return found


def asked(task: Any, lm: HFLM, chat: bool, **given: Any) -> list[list[int]]:
    """Token ids that lm-eval's model reads for each prompt before it generates."""
    task.build_all_requests(apply_chat_template=chat, chat_template=lm.apply_chat_template, **given)
    contexts = [request.args[0] for request in task.instances]
    return [lm.tok_batch_encode([context])[0][0].tolist() for context in contexts]


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("multiturn", [True, False])
@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("kind", CHATS)
def test_a_prompt_has_the_tokens_that_lm_eval_generates_from(
    kind, thinking, instruction, multiturn, add_bos, task, models
) -> None:
    lm = models(kind)
    lm.add_bos_token = add_bos
    lm.chat_template_args = {} if thinking is None else {"enable_thinking": thinking}
    theirs = asked(task, lm, True, system_instruction=instruction, fewshot_as_multiturn=multiturn)
    format = PromptFormat.of(lm.tokenizer, True, instruction, lm.chat_template_args)
    encoder = TextEncoder(lm.tokenizer, add_bos, format)
    assert [encoder.ids(prompt) for prompt in PROMPTS] == theirs
    if CHATS[kind].bos:  # the template writes it; the tokenizer would add another
        assert all(ids.count(lm.tokenizer.bos_token_id) == 1 for ids in theirs)
    # As a task asks for it, with the model's own method.
    other = TextEncoder(lm.tokenizer, add_bos, PromptFormat(lm.apply_chat_template, instruction))
    assert [other.continuation(p, " Paris") for p in PROMPTS] == [
        encoder.continuation(p, " Paris") for p in PROMPTS
    ]


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
@pytest.mark.parametrize("kind", ["llama3", "qwen3"])
def test_without_a_chat_an_instruction_stands_where_lm_eval_puts_it(kind, instruction, task, models) -> None:
    lm = models(kind)
    lm.add_bos_token = None
    encoder = TextEncoder(lm.tokenizer, None, PromptFormat.of(lm.tokenizer, False, instruction))
    assert [encoder.ids(p) for p in PROMPTS if p] == [
        ids
        for ids, p in zip(asked(task, lm, False, system_instruction=instruction), PROMPTS, strict=True)
        if p
    ]
    before, target = encoder.continuation(PROMPTS[0], " Paris")
    assert lm.tokenizer.decode(target) == " Paris"
    assert lm.tokenizer.decode(before, skip_special_tokens=True) == (instruction or "") + PROMPTS[0]


@pytest.fixture(scope="module")
def models() -> Callable[[str], HFLM]:
    found: dict[str, HFLM] = {}

    def model(kind: str) -> HFLM:
        if kind not in found:
            tokenizer: Any = chat_tokenizer(kind)
            found[kind] = HFLM(
                pretrained=chat_model(kind), tokenizer=tokenizer, backend="causal", device="cpu"
            )
        return found[kind]

    return model


@pytest.fixture
def lm_of(models: Callable[[str], HFLM]) -> Callable[..., EditableLM]:
    """``lm_of(kind, instruction=, **template arguments)``: the model, its prompts in a chat."""

    def lm_of(kind: str, instruction: str | None = None, **arguments: Any) -> EditableLM:
        model = models(kind)
        format = PromptFormat.of(model.tokenizer, True, instruction, arguments)
        found: Any = model.model
        return EditableLM(found, model.tokenizer, None, format)

    return lm_of


def decoded(lm: EditableLM, ids: list[int]) -> str:
    return str(lm.encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


# ----------------------------------------------------------------------------------------- positions

EDITS = {
    "start": ("{} plays the sport of", "LeBron James"),
    "middle": ("The mother tongue of {} is", "Danielle Darrieux"),
    "end": ("Where is the {}", "Toodyay Fire Station"),
    "in the instruction, too": ("The mother tongue of Danielle Darrieux is {}", "list"),
    "a word of the template": ("The {} of it is", "user"),
    "twice": ("Paris, not the other {}, is large", "Paris"),
    "multi-byte": ("The city of {} is large", "Århus–東京"),
    "space around": (" {}  ", "Giulia Rossi"),
}


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
@pytest.mark.parametrize("template", ["{}", "The city is large. {}", "user\n\n. {}"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("kind", CHATS)
def test_the_tokens_up_to_the_subject_end_with_it_inside_the_users_turn(
    kind, edit, template, instruction, lm_of
) -> None:
    lm, fact, chat = lm_of(kind, instruction), make_edit(*edit), CHATS[kind]
    read = decoded(lm, until_subject(lm, fact, template))
    prompt = fill(template, fact.text[: fact.subject_span[1]])
    shown = instruction + "\n\n" if kind == "mistral" and instruction else ""
    assert read.endswith(chat.opening + shown + (prompt.lstrip() if chat.strips else prompt))
    whole = decoded(lm, lm.encoder.ids(fill(template, fact.text)))
    assert whole.startswith(read) and whole.endswith(chat.closing)
    assert instruction is None or (instruction in whole) == chat.system


@given(st.text(st.sampled_from(" \n\taZ{%}é東"), max_size=12), st.data())
@pytest.mark.parametrize("kind", CHATS)
def test_every_character_is_found_in_the_chat(kind: str, prompt: str, data: st.DataObject) -> None:
    format = FORMATS[kind]
    if prompt.strip():
        left = [i for i in range(len(prompt)) if prompt[: i + 1].strip() and prompt[i:].strip()]
        char = data.draw(st.sampled_from(left))
        assert format.text(prompt)[format.index(prompt, char)] == prompt[char]


FORMATS = {kind: PromptFormat.of(chat_tokenizer(kind), True, "aZ") for kind in CHATS}


@pytest.mark.parametrize("kind", CHATS)
def test_positions_without_offsets_are_those_of_fast_tokenizers(kind, lm_of) -> None:
    class Slow:
        is_fast, bos_token = False, chat_tokenizer(kind).bos_token

        def __call__(self, text: str, **kwargs: Any) -> Any:
            return lm.encoder.tokenizer(text, **kwargs)

    lm, fact, slow = lm_of(kind, INSTRUCTION), make_edit(*EDITS["middle"]), Slow()
    found: Any = slow
    char = fact.subject_span[1] - 1
    assert TextEncoder(found, None, lm.encoder.format).token_at(fact.text, char) == lm.encoder.token_at(
        fact.text, char
    )


def test_a_search_reads_the_kl_prompt_at_the_subject_of_a_users_turn(lm_of) -> None:
    for kind, chat in CHATS.items():
        lm = lm_of(kind)
        inside = _rows(lm, 0, make_edit("The sport of {} is", "LeBron James", "football"), ["{}", "You. {}"])
        assert [row.kl for row in inside] == [False, False, True]
        assert decoded(lm, inside[2].sequence).endswith(chat.opening + "LeBron James")
        for row in inside[:2]:
            assert decoded(lm, list(row.targets)) == chat.space + "football"
            assert decoded(lm, row.sequence[: row.first + 1]).endswith(chat.closing)
        first, under = _rows(lm, 0, make_edit("{} plays", "LeBron James", "football"), ["{}", "You. {}"])
        assert first.kl and not under.kl, "a prompt that begins with the subject serves for both"


# ------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("target", ["Paris", " Paris", "  Paris", "old Vienna, Austria"])
@pytest.mark.parametrize("kind", CHATS)
def test_a_target_begins_the_assistants_turn_without_a_space_of_ours(kind, target, lm_of) -> None:
    encoder = lm_of(kind).encoder
    edit = make_edit(target=target)
    prompt, answer = encoder.continuation(edit.text, edit.target)
    assert prompt == encoder.ids(edit.text)
    assert encoder.tokenizer.decode(answer) == CHATS[kind].space + target.removeprefix(" ")


@pytest.mark.parametrize("kind", CHATS)
def test_an_answer_ends_with_the_token_that_closes_the_assistants_turn(kind, lm_of) -> None:
    encoder = lm_of(kind).encoder
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.end_of_answer) == CHATS[kind].end
    plain = TextEncoder(encoder.tokenizer)
    assert plain.end_of_answer == encoder.tokenizer.eos_token_id


# ----------------------------------------------------------------------------------- which template


def test_the_description_has_the_hash_that_lm_eval_records(models) -> None:
    for kind in CHATS:
        lm = models(kind)
        lm.chat_template_args = {}
        recorded = hashlib.sha256(lm.chat_template(True).encode()).hexdigest()  # its tracker's hash_string
        format = PromptFormat.of(lm.tokenizer, True, INSTRUCTION, {"enable_thinking": False})
        assert format.describe() == {
            "chat_template_sha": recorded,
            "chat_template_args": {"enable_thinking": False},
            "system_instruction": INSTRUCTION if CHATS[kind].system else None,
        }
    nothing = {"chat_template_sha": None, "chat_template_args": None, "system_instruction": None}
    assert PromptFormat.of(lm.tokenizer, False, None, {"enable_thinking": False}).describe() == nothing
    assert PromptFormat().describe() == nothing


NAMED = {"default": CHATS["qwen3"].template, "tool_use": "{{ messages[0].content }} ANSWER:"}


def test_a_name_chooses_one_of_several_templates() -> None:
    tokenizer = chat_tokenizer("qwen3", NAMED)
    assert PromptFormat.of(tokenizer, "tool_use").text("Who?") == "Who? ANSWER:"
    names: list[bool | str] = [*NAMED, True]
    shas = {PromptFormat.of(tokenizer, name).describe()["chat_template_sha"] for name in names}
    assert len(shas) == 2
    assert PromptFormat.of(tokenizer, True).text("Who?") == FORMATS_WITHOUT["qwen3"].text("Who?")
    with pytest.raises(UserError, match=r"apply_chat_template=rag: .* default, tool_use$"):
        PromptFormat.of(tokenizer, "rag")


FORMATS_WITHOUT = {kind: PromptFormat.of(chat_tokenizer(kind), True) for kind in CHATS}


def test_the_name_means_nothing_where_there_is_one_template() -> None:
    named = PromptFormat.of(chat_tokenizer("qwen3"), "tool_use")
    assert named.text("Who?") == FORMATS_WITHOUT["qwen3"].text("Who?")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('never') }}", "cannot be applied: never"),
        ("{{ messages[0].content + 1 }}", "cannot be applied"),
    ],
)
def test_a_template_that_is_not_there_or_fails_is_one_line(template: str | None, problem: str) -> None:
    tokenizer = chat_tokenizer("qwen3")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=problem) as error:
        PromptFormat.of(tokenizer, True)
    assert "\n" not in str(error.value)


def test_a_template_that_changes_a_prompt_leaves_no_position() -> None:
    encoder = TextEncoder(
        tokenizer := chat_tokenizer("qwen3", "{{ messages[0].content | upper }}:"),
        None,
        PromptFormat.of(tokenizer, True),
    )
    assert encoder.ids("Who")
    with pytest.raises(UserError, match="does not keep the prompt 'Who'") as error:
        encoder.token_at("Who", 1)
    assert "\n" not in str(error.value)
