"""Context templates: checked, filled without format(), and sampled as seeded text of the model."""

from __future__ import annotations

import pytest
import torch

from harness_rect.errors import UserError
from harness_rect.methods import contexts
from harness_rect.methods.contexts import START_WORDS, check_templates, fill, sample_templates
from harness_rect.models import EditableLM

PARAMS = [(6, 10), (12, 5)]


def test_filling_leaves_other_braces_alone():
    assert fill("The city. {}", "a {b} {} {0} is") == "The city. a {b} {} {0} is"


@pytest.mark.parametrize("bad", [["no marker"], ["{}", "{} and {}"], [], [3]])
def test_wrong_templates_are_named_in_one_line(bad):
    with pytest.raises(UserError, match="context_templates") as error:
        check_templates(bad)
    assert "\n" not in str(error.value)
    if bad:
        assert repr(bad[-1]) in str(error.value)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_samples_have_their_number_start_words_and_length(family, make_lm):
    lm = make_lm(family)
    templates = sample_templates(lm, PARAMS, seed=0)
    assert check_templates(templates) == templates
    assert templates[0] == "{}"
    assert len(templates) == 1 + 10 + 5
    for group, (length, count) in ((templates[1:11], PARAMS[0]), (templates[11:], PARAMS[1])):
        for index, template in enumerate(group):
            assert template.endswith(". {}")
            text = template.removesuffix(". {}")
            assert text.startswith(START_WORDS[index * 5 // count])
            assert "<s>" not in text
            starts = lm.encoder.tokenizer(START_WORDS[index * 5 // count], add_special_tokens=False)
            assert len(starts["input_ids"]) <= length
    words = [
        next(w for w in sorted(START_WORDS, key=len, reverse=True) if t.startswith(w))
        for t in templates[1:11]
    ]
    assert {word: words.count(word) for word in words} == dict.fromkeys(START_WORDS, 2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_texts_grow_to_their_length_in_tokens(family, make_lm, monkeypatch):
    """The start word counts, BOS does not."""
    lm = make_lm(family)
    lengths = []
    decode = type(lm.encoder.tokenizer).decode

    def spy(self, ids, **kwargs):
        lengths.append(sum(i not in self.all_special_ids for i in ids))
        return decode(self, ids, **kwargs)

    monkeypatch.setattr(type(lm.encoder.tokenizer), "decode", spy)
    sample_templates(lm, [(9, 5)], seed=0)
    assert lengths == [9] * 5


def test_the_seed_decides_and_nothing_else(make_lm):
    lm = make_lm("gpt2")
    first = sample_templates(lm, PARAMS, seed=1)
    torch.manual_seed(123)
    torch.rand(5)
    assert sample_templates(lm, PARAMS, seed=1) == first
    assert sample_templates(lm, PARAMS, seed=2) != first
    state = torch.get_rng_state()
    sample_templates(lm, PARAMS, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_token_is_among_the_likeliest_of_the_model(make_lm, monkeypatch):
    monkeypatch.setattr(contexts, "TOP_K", 3)
    lm = make_lm("llama")
    sampled = []
    decode = lm.encoder.tokenizer.decode
    lm.encoder.tokenizer.decode = lambda ids, **kwargs: (sampled.append(list(ids)), decode(ids, **kwargs))[1]
    try:
        sample_templates(lm, [(8, 5)], seed=0)
    finally:
        del lm.encoder.tokenizer.decode
    ranks = set()
    for ids, word in zip(sampled, START_WORDS, strict=True):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([ids])).logits[0]
        logits[:, 0] = -torch.inf  # never sampled: see below
        for place in range(len(lm.encoder.ids(word)), len(ids)):
            ranks.add(int((logits[place - 1] > logits[place - 1, ids[place]]).sum()))
    assert ranks <= {0, 1, 2}
    assert len(ranks) > 1  # sampled, not greedy


def test_braces_in_sampled_text_do_not_become_markers(make_lm):
    lm = make_lm("gpt2")
    braces = [lm.encoder.ids(c)[0] for c in "{}"]

    def only_braces(module, args, output):
        output = torch.full_like(output, -50.0)
        output[..., braces] = 5.0
        return output

    handle = lm.model.lm_head.register_forward_hook(only_braces)
    templates = sample_templates(lm, [(10, 5)], seed=0)
    handle.remove()
    assert check_templates(templates) == templates


def test_a_special_token_beyond_the_models_vocabulary_does_not_matter(make_model):
    """Users add a padding token to the tokenizer and leave the embedding as it is."""
    from support.tiny_models import train_tokenizer

    tokenizer = train_tokenizer(bos=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model = make_model("llama")
    assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    assert len(sample_templates(EditableLM(model, tokenizer), [(5, 5)], seed=0)) == 6


def test_a_text_never_ends_a_document(make_lm):
    lm = make_lm("llama")
    special = lm.encoder.tokenizer.eos_token_id

    def eager_to_end(module, args, output):
        output = output.clone()
        output[..., special] = 100.0
        return output

    before = sample_templates(lm, [(8, 5)], seed=0)
    handle = lm.model.lm_head.register_forward_hook(eager_to_end)
    after = sample_templates(lm, [(8, 5)], seed=0)
    handle.remove()
    assert after == before
