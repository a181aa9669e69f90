"""What each trick of the value search, of reading keys and of RECT buys: each is switched off in turn.

    python benchmarks/ablation.py [--shape gpt2|gpt2-xl] [--works WORK,...] [--only TRICK,...] [--rounds 5]

For the time of a run a trick is replaced by the plain way; nothing in the library can switch it off. The
work is run with and without it in turns, in one process and on one thread. A figure is the median over the
rounds of (without / with): 1.20 says that the work takes 20 % longer without the trick; the smallest and the
largest stand beside it. Figures are of CPU time, since the machine may have other work. Weights are random.

Works: ``rome step`` and ``memit step`` are one evaluation of the loss and its gradient, in a search for one
fact under 21 contexts and for 32 facts (GPT-2-XL: 2) under 6; ``keys`` reads the keys of 8 facts in five
layers and the outputs of the last, as MEMIT does; ``moments`` sums second moments in one pass; ``rect``
and ``rect rank one`` trim a weight of 4096 x 11008. Results go to benchmarks/results/ablation.json, which
also keeps the rows of tricks that have been deleted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from editing import MEMIT_LAYERS, ROME_LAYER, make_lm, memit_templates, rome_templates, words
from machine import describe
from measuring import RESULTS, merged, read_results, timed, write_results
from torch import Tensor

from harness_rect.compat.transformers import _Layer
from harness_rect.edits import Edit
from harness_rect.methods import fact_reader, value_search
from harness_rect.methods.fact_reader import FactReader
from harness_rect.methods.value_search import Request, SearchHyperParameters, _LossTerms, search_values
from harness_rect.models import EditableLM, forwards
from harness_rect.models.forward import Forward, FullForward, PrefixForward, Prompts
from harness_rect.moments import accumulate as moments

rect_file = import_module("harness_rect.regularizers.rect")  # the package has a function of this name

Work = Callable[[], Any]
Off = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Trick:
    """name: in the table. works: where it could matter. off: a context in which the plain way is taken."""

    name: str
    works: tuple[str, ...]
    off: Off


def swapped(owner: Any, name: str, value: Any) -> Off:
    return lambda: patch.object(owner, name, value)


def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> Off:
    """``around`` in the place of a function, called with that function and its arguments."""
    original = getattr(owner, name)
    return swapped(owner, name, lambda *args, **named: around(original, *args, **named))


# ------------------------------------------------------------------------------------ the plain ways


def in_full(lm: EditableLM, prompts: Prompts) -> tuple[Forward, Tensor]:
    forward = FullForward(lm, prompts)
    with torch.no_grad():
        return forward, forward.logits(torch.zeros(len(prompts.sequences), lm.architecture.d_model))


def kl_apart(rows: Work, *args: Any) -> list[Any]:
    found = rows(*args)
    (row,) = [row for row in found if row.kl]
    if not row.targets:
        return found
    alone = value_search._Row(row.fact, row.sequence[: row.subject + 1], row.subject, kl=True)
    return [*(replace(row, kl=False) for row in found), alone]


def by_autograd(terms_of: Any, d: Tensor, *, gradient: bool) -> tuple[Tensor, ...]:
    terms = torch.zeros(terms_of.facts, 3)
    d = d.detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        log_p = terms_of.forward.logits(d[terms_of.row_fact]).float().log_softmax(-1)
        said, kl = log_p[: len(terms_of.targets)], log_p[len(terms_of.targets) :]
        nll = -said.gather(1, terms_of.targets.unsqueeze(1)).squeeze(1) * terms_of.weights
        divergence = terms_of.kl_factor * (kl.exp() * (kl - terms_of.kl_before)).sum(-1)
        loss = nll.sum() + divergence.sum()
    terms[:, 0].index_add_(0, terms_of.said_fact, nll.detach())
    terms[:, 1].index_add_(0, terms_of.kl_fact, divergence.detach())
    return (terms, torch.autograd.grad(loss, d)[0]) if gradient else (terms,)


def all_logits(lm: EditableLM, rows: Tensor, columns: Tensor, run: Work) -> Tensor:
    logits = run()
    return logits[rows, columns]


def concatenated(layer: Any, keys: Tensor, values: Tensor, *args: Any, **named: Any) -> Any:
    layer.keys, layer.values = torch.cat([layer.keys, keys], -2), torch.cat([layer.values, values], -2)
    return layer.keys, layer.values


def whole_prompts(until_subject: Any, lm: EditableLM, edit: Edit, template: str) -> list[int]:
    return lm.encoder.ids(value_search.fill(template, edit.text))


def nothing_held(keys: Any, reader: FactReader, layers: list[int], hold: bool = False) -> Any:
    return keys(reader, layers)


def all_bare(init: Any, reader: Any, *args: Any) -> None:
    init(reader, *args)
    for chunk in reader._chunks:
        chunk.bare = True


def to_the_end(run: Any, lm: EditableLM, hooks: Any, batch: Any) -> None:
    def deaf(hook: Any) -> Any:
        def called(*args: Any) -> Any:
            with suppress(Exception):  # the private one that ends a pass
                return hook(*args)

        return called

    run(lm, {module: deaf(hook) for module, hook in hooks.items()}, batch)


def boolean_mask(changes: Any, cut: Any, ties: int) -> Tensor:
    result = torch.zeros_like(changes.update)
    pieces = zip(changes.update.split(changes.size), changes, result.split(changes.size), strict=True)
    for part, delta, out in pieces:
        torch.where(delta >= cut.threshold, part, torch.zeros(()), out=out)
    return result


def with_torch(function: Any, *args: Any) -> Any:
    with patch.object(rect_file, "_has_numpy", lambda tensor: False):
        return function(*args)


STEPS = ("rome step", "memit step")
HUGE = 1 << 60
TRICKS = [
    Trick("PrefixForward, not FullForward", STEPS, swapped(value_search, "open_forward", in_full)),
    Trick("head at the read places alone", STEPS, swapped(EditableLM, "with_head_at", all_logits)),
    Trick(
        "last MLP at the read places alone",
        STEPS,
        swapped(PrefixForward, "_last_mlp_at_places", lambda forward: nullcontext()),
    ),
    Trick("keys and values written behind the kept ones", STEPS, swapped(_Layer, "update", concatenated)),
    Trick(
        "ROME's vector added at the block",
        ("rome step",),
        swapped(EditableLM, "writes_to_stream", lambda lm, layer: False),
    ),
    Trick("one kernel for GELU", (*STEPS, "keys", "moments"), swapped(forwards, "STEPWISE_GELU", ())),
    Trick(
        "KL read in a prompt that begins with the subject", STEPS, wrapped(value_search, "_rows", kl_apart)
    ),
    Trick("gradients in closed form", STEPS, swapped(_LossTerms, "_terms", by_autograd)),
    Trick(
        "keys from prompts that end at the subject",
        ("keys",),
        wrapped(fact_reader, "until_subject", whole_prompts),
    ),
    Trick("blocks below the first edited one run once", ("keys",), wrapped(FactReader, "keys", nothing_held)),
    Trick("bare prompts in batches of their own", ("keys",), wrapped(FactReader, "__init__", all_bare)),
    Trick("passes end at the deepest layer", ("keys",), wrapped(EditableLM, "_run", to_the_end)),
]
RECT_WORKS = ("rect", "rect rank one")
TRICKS += [
    Trick("threshold bracketed by a sample", RECT_WORKS, swapped(rect_file, "_SAMPLE", HUGE)),
    Trick("sample from all columns", RECT_WORKS, swapped(rect_file.math, "gcd", lambda a, b: 1)),
    Trick("chunks that stay in the cache", RECT_WORKS, swapped(rect_file, "_CHUNK", HUGE)),
    Trick(
        "comparisons without a pass for NaN",
        RECT_WORKS,
        swapped(rect_file._Changes, "against", lambda self, bound: self),
    ),
    Trick("numpy's sort", RECT_WORKS, wrapped(rect_file, "_sorted", with_torch)),
    Trick("numpy's comparisons", RECT_WORKS, wrapped(rect_file, "_above_and_between", with_torch)),
    Trick("numpy's partition", RECT_WORKS, wrapped(rect_file, "_searched", with_torch)),
    Trick("large pages for the result", RECT_WORKS, wrapped(rect_file, "_empty_like", with_torch)),
    Trick("numpy altogether", RECT_WORKS, swapped(rect_file, "_has_numpy", lambda tensor: False)),
    Trick("mask of numbers, multiplied by", RECT_WORKS, swapped(rect_file, "_kept", boolean_mask)),
]


# -------------------------------------------------------------------------------------------- works


def varied_facts(count: int) -> list[Edit]:
    """Prompts of 5 to 11 tokens with subjects of 1 to 4 in front, or behind two words; targets of 1 to 3."""
    rng = random.Random(0)
    found = []
    for i in range(count):
        begin = "" if i % 2 else words(rng, 2) + " "
        prompt = begin + "{} " + words(rng, rng.randint(3, 7))
        found.append(
            Edit(f"{i}", prompt, words(rng, rng.randint(1, 4)), words(rng, rng.randint(1, 3)), None, (), ())
        )
    return found


class Bench:
    """A model of a shape, and what is run on it; what a work needs that is not timed is made once a trick."""

    def __init__(self, shape: str) -> None:
        self.shape, self.lm = shape, make_lm(shape, "cpu", "float32")
        self.generator = torch.Generator().manual_seed(0)

    def requests(self, count: int) -> list[Request]:
        width = self.lm.architecture.d_model
        return [Request(edit, torch.randn(width, generator=self.generator)) for edit in varied_facts(count)]

    def _step(self, count: int, templates: list[str], layer: int, at_block: bool) -> Work:
        found: list[_LossTerms] = []

        def taken(terms: _LossTerms, v0: Tensor, settings: Any) -> list[Any]:
            found.append(terms)
            return [None] * len(v0)

        with patch.object(value_search, "_search", taken), forwards.fused_gelu(self.lm.model):
            requests, settings = self.requests(count), SearchHyperParameters()
            search_values(self.lm, requests, templates, layer, settings, at_block=at_block)

        def step() -> None:
            with forwards.fused_gelu(self.lm.model):
                for terms in found:
                    d = torch.randn(terms.facts, self.lm.architecture.d_model, generator=self.generator)
                    terms._terms(d, gradient=True)

        return step

    def prepare(self, work: str) -> Work:
        """The work as a function, made under the same trick under which it will be run."""
        memit_layers, rome_layer = MEMIT_LAYERS[self.shape], ROME_LAYER[self.shape]
        groups = memit_templates()
        flat = [template for group in groups for template in group]
        if work == "rome step":
            return self._step(1, rome_templates(), rome_layer, False)
        if work == "memit step":
            return self._step({"gpt2": 32}.get(self.shape, 2), flat, memit_layers[-1], True)
        if work == "keys":
            return partial(self._keys, groups, memit_layers)
        if work == "moments":
            rng = random.Random(0)
            sequences = [[rng.randrange(1, 1000) for _ in range(n)] for n in (20, 60, 120, 250)]
            return partial(self._moments, memit_layers, sequences)
        return self._rect(work)

    def _keys(self, groups: list[list[str]], layers: list[int]) -> None:
        with forwards.fused_gelu(self.lm.model):
            reader = FactReader(self.lm, varied_facts(8), groups)
            for layer in layers:
                reader.keys([layer], hold=True)
                reader.bare_outputs(layers[-1])

    def _moments(self, layers: list[int], sequences: list[list[int]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            moments.accumulate(self.lm, layers, sequences, Path(folder) / "partial", "benchmark")

    def _rect(self, work: str) -> Work:
        rows, columns = 4096, 11008
        weight = torch.randn(rows, columns, generator=self.generator)
        if work == "rect":
            update = torch.randn(rows, columns, generator=self.generator)
        else:
            update = torch.randn(rows, 1, generator=self.generator) @ torch.randn(
                1, columns, generator=self.generator
            )
        return lambda: rect_file.rect(update, weight, keep=0.4)


# -------------------------------------------------------------------------------------------- timing


def ablate(bench: Bench, trick: Trick, work: str, plain: Work, rounds: int) -> dict[str, Any]:
    with trick.off():
        without = bench.prepare(work)
    pairs = []
    for _ in range(rounds):
        on = timed(plain)
        with trick.off():
            off = timed(without)
        pairs.append((on, off))
    wall, cpu = ([off[i] / on[i] for on, off in pairs] for i in range(2))
    return {
        "trick": trick.name,
        "work": work,
        "shape": bench.shape if work not in RECT_WORKS else "4096 x 11008",
        "ratio": round(statistics.median(cpu), 3),
        "smallest": round(min(cpu), 3),
        "largest": round(max(cpu), 3),
        "wall_ratio": round(statistics.median(wall), 3),
        "cpu_seconds": round(statistics.median(on[1] for on, _ in pairs), 4),
        "rounds": rounds,
        "deleted": False,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["tiny", "gpt2", "gpt2-xl"], default="gpt2")
    parser.add_argument("--works")
    parser.add_argument("--only", help="names of tricks, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "ablation.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.shape)
    wanted = arguments.works.split(",") if arguments.works else sorted({w for t in TRICKS for w in t.works})
    names = arguments.only.split(",") if arguments.only else [trick.name for trick in TRICKS]
    for work in wanted:
        plain = bench.prepare(work)
        plain()
        for trick in TRICKS:
            if work in trick.works and trick.name in names:
                row = ablate(bench, trick, work, plain, arguments.rounds)
                spread = f"{row['ratio']:.2f} ({row['smallest']:.2f} to {row['largest']:.2f})"
                print(f"{row['shape']:12} {work:14} {trick.name:50} {spread}", flush=True)
                rows = merged(read_results(arguments.output)["rows"], [row], ["trick", "work", "shape"])
                write_results(arguments.output, {**describe("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
