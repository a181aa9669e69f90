"""``rect_fluency``: what the model writes about a subject after the edit (CounterFact, arXiv 2202.05262)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import log2
from typing import Any, ClassVar

from harness_rect.errors import one_line_errors
from harness_rect.evaluation.editing.consistency import References
from harness_rect.evaluation.editing.task import EditingTask, Generation, Question

#: Tokens of a text that are read, the prompt's included.
TOKENS = 100
#: n -> weight of the entropy of n-grams.
WEIGHTS = {2: 2 / 3, 3: 4 / 3}


class FluencyTask(EditingTask):
    """Texts that continue the generation prompts: sampled from the five likeliest tokens, seeded.

    ngram_entropy: (2/3 H2 + 4/3 H3) / 2 in bits, Hn being the entropy of a text's word n-grams; the mean over
    the texts of an edit. Low where the model repeats itself. consistency: cosine of the TF-IDF vectors of all
    these texts and of texts about things that have the new target in the same relation.
    """

    fields: ClassVar = [
        *("id", "subject", "prompt", "target_new"),
        *("generation_prompts", "reference_texts", "relation", "target_id"),
    ]
    needs: ClassVar = {
        "ngram_entropy": ("generation prompts",),
        "consistency": ("generation prompts", "reference texts", "word frequencies"),
    }

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        with one_line_errors():
            self._references = References.find(self.config.metadata or {})

    def questions(self, doc: dict[str, Any]) -> list[Question]:
        return [Generation(prompt, sampled=True) for prompt in doc["generation_prompts"]]

    def scores(self, doc: dict[str, Any], answers: Sequence[Any]) -> dict[str, Any]:
        if not doc["generation_prompts"]:
            return {}
        # An assistant's words begin without a space.
        space = "" if self.encoder.format.chat_template is None else " "
        pairs = zip(doc["generation_prompts"], answers, strict=True)
        texts = [self._beginning(f"{prompt}{space}{answer}") for prompt, answer in pairs]
        scores = {"ngram_entropy": sum(map(ngram_entropy, texts)) / len(texts)}
        references = doc["reference_texts"] or self._references.texts(doc["relation"], doc["target_id"])
        if references and self._references.comparable:
            scores["consistency"] = self._references.similarity(" ".join(texts), " ".join(references))
        return scores

    def _beginning(self, text: str) -> str:
        tokenizer = self.encoder.tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= TOKENS else str(tokenizer.decode(ids[:TOKENS]))


def ngram_entropy(text: str) -> float:
    """The weighted entropy of a text's word n-grams in bits, as in ROME's evaluation; a mark is a word."""
    words = re.findall(r"\w+|[^\w\s]", text)
    return sum(weight * _entropy(words, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = counts.total()
    return -sum(count / total * log2(count / total) for count in counts.values())
