"""What the embedded models are said to come from is what the tools make."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from harness_rect import embedded
from harness_rect.evaluation.catalogue import TASKS

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tools are not installed
try:
    from tools.tiny_world.build import (
        edit_rows,
        write_corpus,
        write_drift_text,
        write_word_frequencies,
    )
    from tools.tiny_world.consequences import Consequences
    from tools.tiny_world.corpus import Corpus
    from tools.tiny_world.glue import MAKERS, glue_rows
    from tools.tiny_world.train import RECIPES
    from tools.tiny_world.world import World
finally:
    sys.path.pop(0)


@pytest.mark.parametrize("name", RECIPES)
def test_the_shipped_second_moments_are_of_the_text_the_recipe_makes(name: str, tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    write_corpus(text, Corpus(World(0), 0), 0, RECIPES[name].steps - 1)
    made = hashlib.sha256(text.read_bytes()).hexdigest()
    files = sorted(Path(str(embedded.stats_folder(name))).glob("*.npz"))
    assert len(files) == 3
    for file in files:
        with np.load(file) as arrays:
            assert made in str(arrays["fingerprint"]), file


def test_the_shipped_rows_of_the_glue_suite_are_those_the_tools_make() -> None:
    world = World(0)
    assert list(MAKERS) == [name for name, task in TASKS.items() if task.group == "rect_glue"]
    for name in MAKERS:
        lines = (embedded.DATA / TASKS[name].file).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == glue_rows(name, world, 0), name


def test_the_shipped_edits_are_those_the_tools_make() -> None:
    for name, rows in zip(("edits", "edits_counterfact"), edit_rows(World(0), 0), strict=True):
        lines = (embedded.ROOT / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows, name


def test_a_subject_is_described_by_facts_that_no_other_subject_shares() -> None:
    world = World(0)
    made = Consequences(world)
    described = {made.described(fact): fact.subject for fact in world.facts}
    assert len(described) > 300
    plays = {fact.subject: fact.object for fact in world.facts if fact.relation.name == "instrument"}
    for text, subject in described.items():
        if " plays the " in text:
            assert plays[subject] in text.split()
    shots = (embedded.DATA / "multihop_shots.txt").read_text(encoding="utf-8")
    assert shots == made.shots(0)


def test_the_shipped_word_frequencies_are_of_the_training_text(tmp_path: Path) -> None:
    write_word_frequencies(tmp_path, Corpus(World(0), 0), 0, RECIPES["rect-tiny"].steps - 1)
    for name in ("idf.npy", "tfidf_vocab.json"):
        assert (tmp_path / name).read_bytes() == (embedded.DATA / name).read_bytes()


def test_the_shipped_text_of_rect_drift_is_the_one_the_tools_make(tmp_path: Path) -> None:
    write_drift_text(tmp_path / "drift.txt", Corpus(World(0), 0), 0, RECIPES["rect-tiny"].steps - 1)
    shipped = embedded.DATA / TASKS["rect_drift"].file
    assert (tmp_path / "drift.txt").read_bytes() == shipped.read_bytes()


def test_the_rate_falls_and_rises_again_with_every_cycle() -> None:
    recipe = RECIPES["rect-tiny-llama"]
    rates = [recipe.rate(step) for step in range(recipe.steps)]
    assert [rates[step] for step in (99, 4099, 5299)] == [3e-3, 1.5e-3, 3e-3]
    assert max(rates[step] for step in (3999, 5199, 7599)) < 7e-5
    assert rates[:5200] == [RECIPES["rect-tiny"].rate(step) for step in range(5200)]
