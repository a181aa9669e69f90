"""Token positions, continuations, padding, and that a model comes back from a search as it went in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import FAMILIES, LENGTH, make_edit

from harness_rect.errors import UserError
from harness_rect.methods.value_search import subject_position
from harness_rect.models import EditableLM
from harness_rect.models.lm import TextEncoder, chunks

PROMPTS = {
    "start": ("{} plays the sport of", "LeBron James"),
    "middle": ("The mother tongue of {} is", "Danielle Darrieux"),
    "end": ("What is the profession of {}", "Giulia Rossi"),
    "many tokens": ("In {}, it was raining", "Quuxleyzwxv"),
    "multi-byte": ("The city of {} is large", "Århus–東京"),
    "multi-byte at the end": ("You can visit 東京 and {}", "Łódź"),
    "emoji": ("The {} is a text", "🦜🦜"),
    "twice": ("{} and the other James, not LeBron James, play", "LeBron James"),
    "second of two": ("Paris, not the other {}, is large", "Paris"),
    "part of a word": ("The {}ian capital", "Ital"),
    "punctuation after": ("{}, a native speaker of", "Giulia Rossi"),
    "one letter": ("{} is", "I"),
}
TEMPLATES = ["{}", "The city is large. {}", "Because it was 🦜 raining\n{}", "I. {}"]


def expected_position(lm: EditableLM, text: str, end: int) -> int:
    """The first token after which the decoded text has reached character ``end``, counted from raw bytes.

    Byte-level tokens are pieces of the UTF-8 text, so this needs no offsets.
    """
    tokenizer = lm.encoder.tokenizer
    ids = tokenizer(text)["input_ids"]
    wanted = len(text[:end].encode())
    length = 0
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        length += 0 if ids[index] in tokenizer.all_special_ids else len(token)  # one letter stands for a byte
        if length >= wanted:
            return index
    raise AssertionError("the text is shorter than that")


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt, subject", PROMPTS.values(), ids=PROMPTS)
def test_thesubject_position_is_its_last_token(bos, template, prompt, subject, lm_of):
    lm = lm_of(bos)
    edit = make_edit(prompt, subject)
    before = template.index("{}")
    text = template.replace("{}", edit.text)
    end = before + prompt.index("{}") + len(subject)
    position = subject_position(lm, edit, template)
    assert position == expected_position(lm, text, end)


@pytest.fixture(scope="module")
def lm_of(make_model, tokenizer, bos_tokenizer):
    model = make_model("gpt2")
    pair = {bos: EditableLM(model, bos_tokenizer if bos else tokenizer) for bos in (False, True)}
    return pair.__getitem__


def test_bos_moves_every_position_by_one(lm_of):
    for prompt, subject in PROMPTS.values():
        edit = make_edit(prompt, subject)
        assert subject_position(lm_of(True), edit, "{}") == subject_position(lm_of(False), edit, "{}") + 1


def test_the_tokens_of_some_subjects_really_are_several(lm_of):
    """Otherwise the test above would show little."""
    ids = lm_of(False).encoder.ids
    assert len(ids(" Quuxleyzwxv")) >= 4
    assert len(ids("🦜")) >= 2


class SlowTokenizer:
    """Hides offsets, as tokenizers without a Rust half do."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.is_fast = False

    def __call__(self, text, **kwargs):
        assert "return_offsets_mapping" not in kwargs
        return self._tokenizer(text, **kwargs)


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_positions_without_offsets_agree_at_word_ends(bos, lm_of):
    encoder = lm_of(bos).encoder
    tokenizer: Any = SlowTokenizer(encoder.tokenizer)
    slow = TextEncoder(tokenizer)
    for name, (prompt, subject) in PROMPTS.items():
        if name == "part of a word":
            continue
        text = prompt.replace("{}", subject)
        last = prompt.index("{}") + len(subject) - 1
        assert slow.token_at(text, last) == encoder.token_at(text, last), name


def test_special_tokens_can_be_switched_off(bos_tokenizer, tokenizer):
    text = "The city is large"
    assert TextEncoder(bos_tokenizer, False).ids(text) == tokenizer(text)["input_ids"]
    assert TextEncoder(bos_tokenizer, True).ids(text) == TextEncoder(bos_tokenizer).ids(text)
    assert TextEncoder(bos_tokenizer, False).token_at(text, 8) + 1 == TextEncoder(bos_tokenizer).token_at(
        text, 8
    )


# -- continuations --------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize(
    "prompt, target",
    [
        ("LeBron James plays the sport of", " football"),
        ("The mother tongue of Danielle Darrieux is", "  English"),
        ("Where is the Toodyay Fire Station", " ? It stands in old Vienna, Austria"),
        ("You live in", " 東京"),
        ("You live in ", "Paris"),  # joined, " Paris" is one token: the boundary falls inside it
        ("Par", "is"),
    ],
)
def test_prompt_and_target_are_the_joint_tokenization_split_in_two(bos, prompt, target, lm_of):
    encoder = lm_of(bos).encoder
    first, second = encoder.continuation(prompt, target)
    assert first + second == encoder.tokenizer(prompt + target)["input_ids"]
    assert first and second
    assert encoder.tokenizer.decode(first, skip_special_tokens=True) in prompt
    assert encoder.tokenizer.decode(second).endswith(target)


def test_a_clean_boundary_leaves_the_prompt_whole(lm_of):
    encoder = lm_of(True).encoder
    first, second = encoder.continuation("The city of", " Paris is large")
    assert first == encoder.ids("The city of")
    assert second == encoder.tokenizer(" Paris is large", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("prompt, target", [("The city", ""), ("", " Paris")])
def test_a_target_or_prompt_without_tokens_is_one_line(prompt, target, lm_of):
    with pytest.raises(UserError) as error:
        lm_of(False).encoder.continuation(prompt, target)
    assert "\n" not in str(error.value)


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family, make_lm):
    lm = make_lm(family)
    texts = ["I", "The city is large. You can use a list here", "Where is the Toodyay"]
    sequences = [lm.encoder.ids(text) for text in texts]
    batch = lm.batch(sequences)
    assert batch.lengths == tuple(map(len, sequences))
    with torch.no_grad():
        padded = lm.logits(batch)
        for row, ids in enumerate(sequences):
            alone = lm.model(input_ids=torch.tensor([ids])).logits[0]
            torch.testing.assert_close(padded[row, : len(ids)], alone, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_without_padding_token_serves(make_model, tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    lm = EditableLM(make_model("llama"), bare)
    batch = lm.batch([[5, 6, 7], [8]])
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.ids[1, 0] == 8


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_prompts_longer_than_the_model_are_refused(family, make_lm):
    lm = make_lm(family)
    assert lm.max_length == LENGTH
    with torch.no_grad():
        lm.logits(lm.batch([[5] * LENGTH]))
    with pytest.raises(UserError) as error:
        lm.batch([[5], [5] * (LENGTH + 1)])
    assert str(LENGTH + 1) in str(error.value) and str(LENGTH) in str(error.value)
    assert "\n" not in str(error.value)


# -- frozen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_frozen_gives_the_model_back_as_it_was(training, fails, make_lm):
    lm = make_lm("gpt2")
    lm.model.train(training)
    parameters = dict(lm.model.named_parameters())
    for index, parameter in enumerate(parameters.values()):
        parameter.requires_grad_(index % 2 == 0)
    before = {name: p.requires_grad for name, p in parameters.items()}
    try:
        with lm.frozen():
            assert not lm.model.training
            assert not any(p.requires_grad for p in parameters.values())
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert {name: p.requires_grad for name, p in parameters.items()} == before
    assert all(module.training is training for module in lm.model.modules())


def test_frozen_keeps_modules_apart_that_were_in_different_modes(make_lm):
    lm = make_lm("gpt2")
    lm.model.train()
    lm.model.transformer.h[0].eval()
    before = [module.training for module in lm.model.modules()]
    with lm.frozen():
        assert not any(module.training for module in lm.model.modules())
    assert [module.training for module in lm.model.modules()] == before


def test_a_failing_forward_leaves_no_hooks(make_lm):
    lm = make_lm("gpt2")

    def breaks(*args):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        lm.run_hooked({0: breaks}, lm.batch([[5, 6]]))
    assert all(not module._forward_hooks for module in lm.model.modules())


def test_chunks_hold_every_sequence_once_within_the_limit():
    lengths = [5, 40, 3, 3, 9, 8, 8, 1, 12]
    found = chunks(lengths, 24)
    assert sorted(i for chunk in found for i in chunk) == list(range(len(lengths)))
    assert all(len(c) == 1 or len(c) * max(lengths[i] for i in c) <= 24 for c in found)
    assert [1] in found and len(found) < len(lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_a_norm_behind_the_mlp_keeps_what_is_added_from_the_stream(family, make_lm):
    lm = make_lm(family)
    assert lm.writes_to_stream(1) == (family not in {"gemma2", "gemma3_text", "olmo2"})
    lm.model.bfloat16()
    assert lm.writes_to_stream(1) == (family not in {"gemma2", "gemma3_text", "olmo2"})  # asked once
    assert not lm.writes_to_stream(0)
