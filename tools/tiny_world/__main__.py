"""Make an embedded model and its data:

    python -m tools.tiny_world [--model NAME] [--work FOLDER] [--only STAGE ..]

Writes the embedded folder (default harness_rect/tiny): data, edits, model, second moments, model card. Data
and edits are the same for both models. Training resumes from WORK/state.pt if it exists; the scores go into
WORK/scores.json and the card.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import harness_rect.cli
from harness_rect import embedded
from harness_rect.evaluation.catalogue import TASKS
from tools.tiny_world import evaluate
from tools.tiny_world.build import (
    edit_rows,
    write_corpus,
    write_drift_text,
    write_jsonl,
    write_task_rows,
    write_word_frequencies,
)
from tools.tiny_world.card import write_card
from tools.tiny_world.consequences import rows_of
from tools.tiny_world.corpus import Corpus
from tools.tiny_world.tokenizer import save_tokenizer, train_tokenizer
from tools.tiny_world.train import RECIPES, train
from tools.tiny_world.world import World

SEED = 0
STAGES = ("data", "train", "stats", "score")
#: Blocks whose second moments are shipped: those in the first half, where facts are edited.
STATS_LAYERS = "1-3"
#: The single edits that are scored: none of those that the preset was chosen on (1000 to 1039).
SINGLE_EDITS = slice(1060, 1140)


def main() -> None:
    root = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_world", description=__doc__)
    parser.add_argument("--model", choices=RECIPES, default=embedded.NAME)
    parser.add_argument("--work", type=Path, help="for what is not shipped; default .tiny_world/MODEL")
    parser.add_argument("--output", type=Path, default=root / "harness_rect" / "tiny")
    parser.add_argument("--only", choices=STAGES, action="append")
    arguments = parser.parse_args()
    output = arguments.output
    work = arguments.work or root / ".tiny_world" / arguments.model
    place = output / embedded.MODELS[arguments.model].relative_to(embedded.ROOT)
    stages = arguments.only or STAGES
    recipe = RECIPES[arguments.model]
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)

    world = World(SEED)
    corpus = Corpus(world, SEED)
    if "data" in stages:
        write_task_rows(output / "data", world, SEED)
        write_word_frequencies(output / "data", corpus, SEED, RECIPES[embedded.NAME].steps - 1)
        zsre, counterfact = edit_rows(world, SEED)
        write_jsonl(output / "edits.jsonl", zsre)
        write_jsonl(output / "edits_counterfact.jsonl", counterfact)
        last_step = RECIPES[embedded.NAME].steps - 1  # the text is the same for both models
        write_drift_text(output / "data" / TASKS["rect_drift"].file, corpus, SEED, last_step)
        write_corpus(work / "corpus.txt", corpus, SEED, recipe.steps - 1)
    if "train" in stages:
        tokenizer = train_tokenizer(corpus, recipe.vocabulary, SEED)
        started = time.monotonic()
        model = train(corpus, tokenizer, recipe, work)
        print(f"trained in {(time.monotonic() - started) / 60:.1f} minutes")
        model.save_pretrained(place / "model")
        save_tokenizer(tokenizer, place / "model", recipe.positions)
    if "stats" in stages:
        moments, text = place / "stats", str(work / "corpus.txt")
        where = ["--model", str(place / "model"), "--layers", STATS_LAYERS, "--output", str(moments)]
        harness_rect.cli.main(["stats", *where, "--text", text])
    if "score" in stages:
        scores = {
            "single edits count": SINGLE_EDITS.stop - SINGLE_EDITS.start,
            "tasks": evaluate.task_scores(place / "model", output / "data"),
            "facts": evaluate.fact_scores(evaluate.load(place / "model"), world),
            "consequences": evaluate.consequence_scores(
                place / "model",
                output / "data",
                rows_of(world.facts[:: len(world.facts) // 100], world, SEED),
            ),
            "single edits": evaluate.single_edits(place / "model", output / "edits.jsonl", SINGLE_EDITS),
        }
        (work / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(scores, indent=2))
        write_card(place / "model" / "README.md", arguments.model, recipe, world, scores)


if __name__ == "__main__":
    main()
