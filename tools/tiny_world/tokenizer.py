"""The tokenizer of the embedded models: byte-level BPE, trained on the world's own text."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.tiny_world.corpus import Corpus

END = "<|endoftext|>"
SAMPLE = 30_000
MIDDLE = 1000  # documents as they come in this step


def train_tokenizer(corpus: Corpus, vocabulary: int, seed: int) -> Tokenizer:
    rng = random.Random(f"tokenizer {seed}")
    texts = ["".join(text for text, _ in corpus.document(rng, MIDDLE)) for _ in range(SAMPLE)]
    # Objects become one token or two (targets that short make single edits comparable); names stay in pieces.
    relations = {fact.relation for fact in corpus.world.facts}
    texts += [
        f" {word}" for relation in sorted(relations, key=lambda r: r.name) for word in relation.objects
    ] * 100
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """Files that AutoTokenizer loads as a fast tokenizer, without network."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
