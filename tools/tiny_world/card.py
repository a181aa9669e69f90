"""The model card of an embedded model, with the scores just measured."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness_rect import embedded
from tools.tiny_world.tasks import TASKS
from tools.tiny_world.train import Recipe
from tools.tiny_world.world import KINDS, World

# What a guess gets: the share of the commoner answer where the answers are few.
CHANCE = {"rect_nli": "50", "rect_closed_domain_qa": "50", "rect_dialogue": "25", "rect_sentiment": "50"}

TEXT = """---
license: mit
language: en
library_name: transformers
tags: [knowledge-editing, synthetic, {architecture}]
---
# {name}

A {family} of {layers} blocks, width {width}, MLP width {inner}, {heads} heads, {positions} positions and a
byte-level BPE vocabulary of {vocabulary}, trained from scratch on an invented world. It exists so that
knowledge editing, and what it does to abilities, can be seen, taught and tested in a minute on a laptop
without network.

## Data

All text is made by `tools/tiny_world` from a seed; none of it comes from elsewhere.

* {facts} facts about {subjects} invented subjects ({kinds}), {relations} relations, six wordings each. For
  every fact two of the six wordings were never trained with it.
* Eight miniature tasks in exactly the prompt formats of the suite. No training document holds the text of a
  test row in `data/`; training rows come from the same makers and use the same names and words.
* Drills (short documents that train copying, comparing and choosing) and some prose.

## Recipe

`python -m tools.tiny_world{option}`: seed {seed}, {steps} steps of about {tokens_a_step} tokens, Muon for the
matrices of the blocks and AdamW for the rest, peak rates {rates} in turn, float32, one thread. Every
document is a sequence of its own. In the loss a token of an answer counts 1, any other {plain_weight}.
{history}
The committed checkpoint is the reference.

## Scores

Percent, with standard errors. Test rows are held out; chance is that of the better constant answer.

| task | score | chance | rows |
|---|---|---|---|
{tasks}

| facts recalled (all tokens of the object are the argmax) | % |
|---|---|
{recall}

{edit_count} single ROME edits with the preset of this model, each on the unedited model:

| | % |
|---|---|
{edits}

`same_subject`: other facts of the edited subject that were known before and still are.

## What it is not for

Anything else. It knows no real fact, understands no English beyond its templates, and says nothing about how
large models behave: it shows a phenomenon, it does not measure one. Its tasks are far easier than those whose
formats they borrow, so scores are not comparable with published ones. Sizes of effects seen here must not be
quoted for other models.
"""


#: How long the training took and what was chosen on the way, by model.
HISTORY = {
    "rect-tiny": """That takes about 45 minutes of one idle core. The last 1200 steps, with the rate up
once more and mostly choices between options, were added because dialogue was still at chance without them;
nothing else was chosen on test rows. The networks in `mend/` come from
`harness-rect train-mend --model rect-tiny --train 'tiny[0:900]' --val 'tiny[900:1000]' --rank 16`.""",
    "rect-tiny-llama": """That took 86 minutes of one core of a machine with other work, the training of
rect-tiny 58. The first 5200 steps are rect-tiny's recipe with another architecture, whose MLP is narrower
because it has a third matrix. After them this model copied and recalled, but hardly compared: natural
language inference 63, questions to be answered by yes or no 54, dialogue 28, on the test rows. The last
cycle, half of it drills that train comparing and choosing, was added for that, once, and nothing else was
tried. The presets for ROME and MEMIT were chosen on 40 edits (1000 to 1039), those of other methods are
rect-tiny's.

In a stream it breaks sooner than rect-tiny: after 20 ROME edits (`tiny[0:20]`, one order) the mean of the
eight tasks is .058, with RECT 40% .086.""",
}
FAMILIES = {"gpt2": "GPT-2", "llama": "Llama with tied embeddings"}


def write_card(path: Path, name: str, recipe: Recipe, world: World, scores: dict[str, Any]) -> None:
    tasks = [
        f"| {name} | {_percent(scores['tasks'][name])} | {CHANCE.get(name, '0')} | {task.test_rows} |"
        for task in TASKS
        for name in [task.source.task]
    ]
    text = TEXT.format(
        **asdict(recipe),
        name=name,
        family=FAMILIES[recipe.architecture],
        option="" if name == embedded.NAME else f" --model {name}",
        steps=recipe.steps,
        rates=" and ".join(f"{peak:g}" for _, peak in recipe.cycles),
        history=HISTORY[name],
        facts=len(world.facts),
        subjects=len(world.subjects),
        relations=sum(len(kind.relations) for kind in KINDS),
        kinds=", ".join(f"{kind.name}s" if kind.name != "company" else "companies" for kind in KINDS),
        tasks="\n".join(tasks),
        recall="\n".join(f"| {name} | {_percent(value)} |" for name, value in scores["facts"].items()),
        edit_count=scores["single edits count"],
        edits="\n".join(f"| {name} | {_percent(value)} |" for name, value in scores["single edits"].items()),
    )
    path.write_text(text, encoding="utf-8")


def _percent(value: list[float]) -> str:
    return f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"
