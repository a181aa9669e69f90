"""Samples that depend on the prompt alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from scipy import stats

from harness_rect.compat.lm_eval import SCORERS
from harness_rect.compat.lm_eval_model import SeededSampling
from harness_rect.model_wrappers.edited_hf import EditedHF


def test_tokens_are_drawn_by_their_probability_among_the_likeliest() -> None:
    scores = torch.tensor([[1.0, -3.0, 0.5, 0.0, 1.5]])
    n, top_k = 3000, 3
    context = torch.arange(n).unsqueeze(1)
    sampling = SeededSampling(context, torch.ones_like(context), top_k)
    drawn = sampling(context, scores.expand(n, -1)).argmax(-1)
    counts = torch.bincount(drawn, minlength=5)
    assert counts[[1, 3]].tolist() == [0, 0]
    expected = scores[0, [4, 0, 2]].double().softmax(-1) * n
    assert stats.chisquare(counts[[4, 0, 2]].numpy(), expected.numpy()).pvalue > 1e-3


def request(prompt: str) -> Instance:
    kwargs = {"do_sample": True, "top_k": 5, "temperature": 1.0, "until": [], "max_gen_toks": 12}
    return instance("generate_seeded", prompt, kwargs)


def instance(kind: str, prompt: str, kwargs: dict[str, Any]) -> Instance:
    of: dict[str, Any] = {"task_name": "any", "doc_id": 0} if SCORERS else {}
    return Instance(request_type=kind, doc={}, arguments=(prompt, kwargs), idx=0, **of)


PROMPTS = ["Lidia Messaem plays the", "On stage you see", "The"]


@pytest.fixture(scope="module")
def model() -> Any:
    return EditedHF(pretrained="rect-tiny", method="none", device="cpu", batch_size=1)


def test_a_sample_depends_on_its_prompt_alone(model: Any) -> None:
    alone = [model.generate_seeded([request(prompt)])[0] for prompt in PROMPTS]
    torch.manual_seed(7)
    model.batch_size_per_gpu = 3
    together = model.generate_seeded([request(prompt) for prompt in reversed(PROMPTS)])
    model.batch_size_per_gpu = 1
    assert list(reversed(together)) == alone
    assert len(set(alone)) == 3
    greedy = instance("generate_until", PROMPTS[1], {"do_sample": False, "until": [], "max_gen_toks": 12})
    assert model.generate_until([greedy])[0] != alone[1]


def test_other_tasks_sample_as_lm_eval_does(model: Any) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model.generate_until([request(PROMPTS[1])])[0])
    assert found[0] == found[1] != found[2]
