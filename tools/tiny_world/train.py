"""Training of an embedded model, on one CPU thread: a fixed number of steps, each with documents of its own.

The documents of a step depend on the seed and the step only, so an interrupted run resumes from its last
save and ends with the same weights. Every document starts at position 0 and sees nothing but
itself, as a prompt does when the model is used: a step sorts its documents by length and pads them in groups.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

from tools.tiny_world.corpus import Corpus, Document
from tools.tiny_world.muon import Muon
from tools.tiny_world.tokenizer import END

SAVE_STEPS = 100


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights, besides the corpus."""

    architecture: str = "gpt2"
    seed: int = 0
    cycles: tuple[tuple[int, float], ...] = ((4000, 3e-3), (1200, 1.5e-3))  # steps and peak rate of each
    tokens_a_step: int = 3072
    vocabulary: int = 2048
    positions: int = 256
    width: int = 128
    inner: int = 512
    layers: int = 6
    heads: int = 4
    warmup: int = 100
    weight_decay: float = 0.05
    plain_weight: float = 0.1  # what a token counts in the loss that is no answer
    group_tokens: int = 768

    def config(self, end: int) -> PreTrainedConfig:
        if self.architecture == "llama":
            return LlamaConfig(
                vocab_size=self.vocabulary, max_position_embeddings=self.positions, hidden_size=self.width,
                intermediate_size=self.inner, num_hidden_layers=self.layers, num_attention_heads=self.heads,
                tie_word_embeddings=True, initializer_range=0.04,
                bos_token_id=end, eos_token_id=end, pad_token_id=end,
            )  # fmt: skip
        return GPT2Config(
            vocab_size=self.vocabulary, n_positions=self.positions, n_embd=self.width, n_inner=self.inner,
            n_layer=self.layers, n_head=self.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            initializer_range=0.04, bos_token_id=end, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip

    def rate(self, step: int) -> float:
        """In each cycle a linear warm-up, then a cosine down to a fiftieth of its peak."""
        for steps, peak in self.cycles:
            if step < self.warmup:
                return peak * (step + 1) / self.warmup
            if step < steps:
                done = (step - self.warmup) / max(1, steps - self.warmup)
                return peak * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
            step -= steps
        raise IndexError("step is after the last cycle")

    @property
    def steps(self) -> int:
        return sum(steps for steps, _ in self.cycles)


Encoded = tuple[list[int], list[float]]  # token ids, and the weight of each as a target


def end_id(tokenizer: Tokenizer) -> int:
    found = tokenizer.token_to_id(END)
    assert found is not None
    return found


def encode(tokenizer: Tokenizer, document: Document, plain_weight: float) -> Encoded:
    """Pieces can be encoded one by one: each begins where the tokenizer splits words anyway."""
    ids: list[int] = []
    weights: list[float] = []
    pieces = tokenizer.encode_batch([text for text, _ in document])
    for (_, is_answer), piece in zip(document, pieces, strict=True):
        weight = 1.0 if is_answer else plain_weight
        ids += piece.ids
        weights += [weight] * len(piece.ids)
    return [*ids, end_id(tokenizer)], [*weights, weight]


def groups(
    corpus: Corpus, tokenizer: Tokenizer, recipe: Recipe, step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The documents of a step: padded ids and target weights, (documents, longest), group by group."""
    rng = random.Random(f"step {recipe.seed} {step}")
    documents: list[Encoded] = []
    total = 0
    while total < recipe.tokens_a_step:
        ids, weights = encode(tokenizer, corpus.document(rng, step), recipe.plain_weight)
        if len(ids) <= recipe.positions:
            documents.append((ids, weights))
            total += len(ids)
    documents.sort(key=lambda document: len(document[0]))
    end = end_id(tokenizer)
    while documents:
        group = [documents.pop(0)]
        while documents and (len(group) + 1) * len(documents[0][0]) <= recipe.group_tokens:
            group.append(documents.pop(0))
        longest = len(group[-1][0])
        yield (
            torch.tensor([ids + [end] * (longest - len(ids)) for ids, _ in group]),
            torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in group]),
        )


#: What `--model` takes. The gated MLP of a Llama has a third matrix, and is narrower for it.
RECIPES = {
    "rect-tiny": Recipe(),
    "rect-tiny-llama": Recipe(architecture="llama", inner=384, cycles=(*Recipe.cycles, (2400, 3e-3))),
}


def loss_sum(model: PreTrainedModel, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the targets' negative log-likelihoods; logits only where they count."""
    hidden = model.base_model(ids[:, :-1], use_cache=False).last_hidden_state
    targets, weights = ids[:, 1:], weights[:, 1:]
    where = weights > 0
    losses = F.cross_entropy(model.lm_head(hidden[where]), targets[where], reduction="none")
    return losses @ weights[where]


def optimisers(model: PreTrainedModel, recipe: Recipe) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices of the blocks (query, key and value apart), AdamW for the rest."""
    blocks, others = [], []
    for name, parameter in model.named_parameters():
        if (".h." in name or ".layers." in name) and parameter.ndim == 2:
            blocks.append((parameter, 3 if name.endswith("attn.c_attn.weight") else 1))
        else:
            others.append(parameter)
    adam = torch.optim.AdamW(others, lr=recipe.rate(0), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return Muon(blocks, recipe.weight_decay), adam


def train(corpus: Corpus, tokenizer: Tokenizer, recipe: Recipe, work: Path) -> PreTrainedModel:
    """Train from scratch, or resume from ``work/state.pt``."""
    torch.set_num_threads(1)  # two threads are slower than one at this width, and this makes sums exact
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(recipe.config(end_id(tokenizer)))
    model.train()
    muon, adam = optimisers(model, recipe)
    state_file = work / "state.pt"
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        muon.buffers = state["muon"]
        first = state["step"]
    started, seen, running = time.monotonic(), 0, 0.0
    for step in range(first, recipe.steps):
        batch = list(groups(corpus, tokenizer, recipe, step))
        weight = sum(float(weights[:, 1:].sum()) for _, weights in batch)
        for ids, weights in batch:
            loss = loss_sum(model, ids, weights) / weight
            loss.backward()
            running += loss.item()
            seen += ids.numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = recipe.rate(step)
        adam.step()
        muon.step(recipe.rate(step))
        model.zero_grad()
        if (step + 1) % SAVE_STEPS == 0 or step + 1 == recipe.steps:
            rate = seen / (time.monotonic() - started)
            print(f"step {step + 1} loss {running / SAVE_STEPS:.4f} tokens/s {rate:.0f}", flush=True)
            running = 0.0
            state = {"model": model.state_dict(), "adam": adam.state_dict(), "muon": muon.buffers}
            torch.save({**state, "step": step + 1}, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").rename(state_file)
    return model.eval()
