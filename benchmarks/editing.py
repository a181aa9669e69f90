"""Speed of editing against a straightforward implementation of the published loops, both in one process.

    python benchmarks/editing.py [--shape gpt2|gpt2-xl|llama-2-7b|all] [--device cpu|cuda] [--dtype float32]
    [--only rome,...]

Random weights of the shape, random second moments, random facts. Every pair is checked to give the same
result, else there is no figure; figures are medians (MEMIT: one run), ratios are published / ours. Written
part by part to benchmarks/results/<shape>-<device>-<dtype>.json with the machine described, beside what was
measured on the same machine before. What takes too long for the published loop is timed on fewer facts, and
the table says so. On a CPU the larger shapes do less unless told otherwise (ON_CPU). `all` takes one shape
after the other, each in a process of its own, and leaves out those that do not fit in memory.

`growth` times our side alone: how its cost grows with facts, length of contexts, layers and width.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
import transformers
from machine import describe
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from harness_rect.edits import Edit
from harness_rect.io.files import written_whole
from harness_rect.methods import METHODS, Context, rome, value_search
from harness_rect.methods.contexts import fill
from harness_rect.methods.key_history import remember_keys, solve_with_history
from harness_rect.methods.memit import MemitHyperParameters
from harness_rect.methods.rome import RomeHyperParameters
from harness_rect.methods.value_search import subject_position
from harness_rect.models import EditableLM
from harness_rect.models.lm import chunks, hidden_of, stop_forward
from harness_rect.moments import SecondMoment
from harness_rect.moments.accumulate import accumulate
from harness_rect.regularizers import rect

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, Any] = {
    "tiny": lambda: GPT2Config(n_layer=6, n_embd=128, n_inner=512, n_head=4, vocab_size=2048),
    "gpt2": lambda **config: GPT2Config(**config),
    "gpt2-xl": lambda: GPT2Config(n_layer=48, n_embd=1600, n_head=25),
    "llama-2-7b": lambda: LlamaConfig(),
}
ROME_LAYER = {"tiny": 2, "gpt2": 4, "gpt2-xl": 17, "llama-2-7b": 5}
MEMIT_LAYERS = {
    "tiny": [0, 1, 2],
    "gpt2": [3, 4, 5, 6, 7],
    "gpt2-xl": [13, 14, 15, 16, 17],
    "llama-2-7b": [4, 5, 6, 7, 8],
}
#: What a shape does on a CPU, where all of it would take hours.
ON_CPU: dict[str, dict[str, Any]] = {
    "gpt2-xl": {"only": "rome,history", "repeats": 1, "steps": 5},
    "llama-2-7b": {"only": "rome,history", "repeats": 1, "steps": 3, "dtype": "bfloat16"},
}
USUAL = {"only": "rome,memit,history,moments,rect,growth", "repeats": 3, "steps": 20, "dtype": "float32"}
#: Memory a run needs: this multiple of its model's, and so many float64 matrices of d_mlp x d_mlp.
ROOM, MATRICES = 1.1, 8
WORDS = 1000
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------ the set-up


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token: prompts then have the lengths of real ones."""
    vocabulary = {"[UNK]": 0} | {f"w{i}": i + 1 for i in range(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[UNK]", eos_token="[UNK]")


def make_lm(shape: str, device: str, dtype: str, **config: int) -> EditableLM:
    torch.manual_seed(0)
    with torch.device(device):
        settings = SHAPES[shape](**config)
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return EditableLM(model.eval(), tokenizer())


def model_bytes(lm: EditableLM) -> int:
    return sum(p.numel() * p.element_size() for p in lm.model.parameters())


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(count))


def facts(count: int) -> list[Edit]:
    """Prompts of 7 tokens with a subject of 3 in front, targets of 2: about what CounterFact has."""
    rng = random.Random(0)
    return [
        Edit(f"{i}", "{} " + words(rng, 4), words(rng, 3), words(rng, 2), None, (), ()) for i in range(count)
    ]


def rome_templates() -> list[str]:
    rng = random.Random(1)
    return ["{}"] + [words(rng, n) + " {}" for n in [5] * 10 + [10] * 10]


def memit_templates() -> list[list[str]]:
    rng = random.Random(1)
    return [["{}"], [words(rng, 10) + " {}" for _ in range(5)]]


def moment(d_mlp: int, seed: int, device: str) -> SecondMoment:
    generator = torch.Generator(device=device).manual_seed(seed)
    factor = torch.randn(d_mlp, d_mlp, generator=generator, device=device)
    total = factor @ factor.T / d_mlp + 0.1 * torch.eye(d_mlp, device=device)
    return SecondMoment(total.cpu(), 1, "random")


# --------------------------------------------------------------------------------- the published loops


def published_search(
    lm: EditableLM, edit: Edit, templates: list[str], layer: int, h: Any, at_block: bool
) -> Tensor:
    """v0 + d: full passes over all prompts, logits at every position, as the released code does it."""
    rows = [(t, *lm.encoder.continuation(fill(t, edit.text), edit.target)) for t in templates]
    kl_text = edit.subject + " is a"
    sequences = [prompt + target[:-1] for _, prompt, target in rows] + [lm.encoder.ids(kl_text)]
    batch = lm.batch(sequences)
    where = [subject_position(lm, edit, t) for t, *_ in rows]
    where.append(lm.encoder.token_at(kl_text, len(edit.subject) - 1))
    labels = torch.full_like(batch.ids, -100)
    for i, (_, prompt, target) in enumerate(rows):
        start = len(prompt) - 1
        labels[i, start : start + len(target)] = torch.tensor(target)
    device = batch.ids.device
    d = torch.zeros(lm.architecture.d_model, requires_grad=True, device=device)
    optimiser = torch.optim.Adam([d], lr=h.v_lr)
    module = lm.block(layer) if at_block else lm.down_projection(layer)
    v0: list[Tensor] = []
    kl_before: Tensor | None = None
    every = torch.arange(len(sequences))

    def add(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if not v0:
            v0.append(hidden[0, where[0]].detach().float().clone())
        hidden = hidden.clone()
        hidden[every, where] = (hidden[every, where].float() + d).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with lm.hooked({module: add}):
        for step in range(h.v_num_grad_steps):
            optimiser.zero_grad()
            with torch.enable_grad():
                logits = lm.logits(batch)
                kl_now = logits[-1, where[-1]].float().log_softmax(-1)
                kl_before = kl_now.detach().clone() if kl_before is None else kl_before
                log_probs = logits.float().log_softmax(-1)
                mask = (labels != -100).float()
                taken = log_probs.gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2)
                nll = -(taken * mask).sum(1)[:-1] / mask.sum(1)[:-1]
                kl = h.kl_factor * (kl_now.exp() * (kl_now - kl_before)).sum()
                loss = nll.mean() + kl + h.v_weight_decay * d.norm() / v0[0].norm() ** 2
            if loss < 5e-2 or step == h.v_num_grad_steps - 1:
                break
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                limit = h.clamp_norm_factor * v0[0].norm()
                if d.norm() > limit:
                    d.mul_(limit / d.norm())
    return v0[0] + d.detach()


@torch.no_grad()
def published_reading(
    lm: EditableLM, module: Any, prompts: list[tuple[Edit, str]], at_once: int = 128
) -> tuple[Tensor, Tensor]:
    """(inputs, outputs) of a module at the subjects: whole passes over whole prompts, so many at once."""
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(prompts), at_once):
        some = prompts[start : start + at_once]
        at = torch.tensor([subject_position(lm, edit, t) for edit, t in some])

        def keep(module: Any, args: Any, output: Any, at: Tensor = at) -> None:
            inputs, outputs = (x[torch.arange(len(at)), at].float() for x in (args[0], hidden_of(output)))
            found.append((inputs, outputs))

        with lm.hooked({module: keep}):
            lm.logits(lm.batch([lm.encoder.ids(fill(t, edit.text)) for edit, t in some]))
    inputs, outputs = zip(*found, strict=True)
    return torch.cat(inputs), torch.cat(outputs)


def published_rome(
    lm: EditableLM, edit: Edit, templates: list[str], h: RomeHyperParameters, c: SecondMoment
) -> tuple[Tensor, Tensor]:
    """(v, u): the inverse of C is computed once by the released code too, so it is given."""
    (layer,) = h.layers
    u = published_reading(lm, lm.down_projection(layer), [(edit, t) for t in templates])[0].mean(0)
    if h.mom2_adjustment:
        u = c.solve(u)
    u = u / u.norm()
    target = published_search(lm, edit, templates, layer, h, at_block=False)
    key, output = published_reading(lm, lm.down_projection(layer), [(edit, "{}")])
    return (target - output[0]) / (key[0] @ u), u


def published_solve(c: Tensor, keys: Tensor, weight: float, history: Tensor | None) -> Tensor:
    """The dense d_mlp x d_mlp system of every batch and layer, in float64."""
    system = weight * c.double() + keys @ keys.T
    if history is not None:
        system = system + history
    return torch.linalg.solve(system, keys)


def published_memit(
    lm: EditableLM,
    edits: list[Edit],
    groups: list[list[str]],
    h: MemitHyperParameters,
    moments: dict[int, Tensor],
) -> dict[str, Tensor]:
    """The dense update of each layer: a search for each fact alone, keys and outputs by whole passes."""
    flat = [t for group in groups for t in group]
    last = h.layers[-1]
    z = torch.stack([published_search(lm, e, flat, last, h, at_block=True) for e in edits])
    updates: dict[str, Tensor] = {}
    names = [lm.architecture.weight_name(layer) for layer in h.layers]
    with lm.weights_restored(names):
        for index, (layer, name) in enumerate(zip(h.layers, names, strict=True)):
            prompts = [(edit, t) for edit in edits for t in flat]
            each = published_reading(lm, lm.down_projection(layer), prompts)[0].view(
                len(edits), len(flat), -1
            )
            means = [part.mean(1) for part in each.split([len(group) for group in groups], 1)]
            k = torch.stack(means).mean(0).T.double()
            _, outputs = published_reading(lm, lm.block(last), [(edit, "{}") for edit in edits])
            residual = (z - outputs).T.double() / (len(h.layers) - index)
            adjusted = published_solve(moments[layer], k, h.mom2_update_weight, None)
            update = residual @ adjusted.T
            updates[name] = update.T if lm.is_transposed(name) else update
            lm.weight(name).data += updates[name].to(lm.weight(name))
    return updates


# --------------------------------------------------------------------------------------------- timing


def seconds(run: Callable[[], Any], repeats: int, device: str) -> float:
    return side_by_side([run], repeats, device)[0]


def side_by_side(runs: Sequence[Callable[[], Any]], repeats: int, device: str) -> list[float]:
    """Median seconds of each, taken in turns: what else the machine does then falls on all of them."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, times, strict=True):
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def agree(ours: Tensor, theirs: Tensor, limit: float, what: str) -> float:
    off = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    if not off <= limit:
        raise SystemExit(f"{what}: results differ by {off:.2g} (limit {limit:g}); a ratio would mean nothing")
    return off


def peak_allocated(run: Callable[[], Any], device: str) -> int:
    """Largest sum of tensors held at a time while it runs, in bytes, above what was held at its start."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    totals = [e["args"]["Total Allocated"] for e in changes]
    return max(totals) - totals[0] + changes[0]["args"]["Bytes"]


def peak_resident(run: Callable[[], Any]) -> int:
    """Largest resident memory of this process while it runs, in bytes, above that at its start."""
    process, stop = psutil.Process(), threading.Event()
    start = top = process.memory_info().rss

    def watch() -> None:
        nonlocal top
        while not stop.wait(0.005):
            top = max(top, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        stop.set()
        thread.join()
    return top - start


# ----------------------------------------------------------------------------------------- the figures


def bench_rome(lm: EditableLM, shape: str, device: str, repeats: int, loose: float, steps: int) -> list[Row]:
    layer = ROME_LAYER[shape]
    h = RomeHyperParameters(layers=[layer], v_num_grad_steps=steps, v_weight_decay=0.5, mom2_adjustment=True)
    templates, (edit,) = rome_templates(), facts(1)
    c = moment(lm.architecture.d_mlp, 0, device)
    context = Context(templates, lambda _: c)

    def ours() -> Tensor:
        (update,) = METHODS["rome"].propose(lm, [edit], h, context).updates.values()
        return update.dense()

    def theirs() -> Tensor:
        v, u = published_rome(lm, edit, templates, h, c)
        left, right = lm.oriented(layer, v.unsqueeze(1), u.unsqueeze(1))
        return left @ right.T

    # Memory first, before anything has grown the heap, and as the paper edits: without second moments.
    plain = h.model_copy(update={"mom2_adjustment": False})
    small = make_lm("tiny", device, "float32")  # what libraries take once for all
    METHODS["rome"].propose(small, [edit], plain.model_copy(update={"layers": [2]}), context)

    def edit_once() -> None:
        METHODS["rome"].propose(lm, [edit], plain.model_copy(update={"v_num_grad_steps": 3}), context)

    resident = peak_resident(edit_once) if device == "cpu" else None
    allocated = peak_allocated(edit_once, device)
    results: dict[Any, Tensor] = {}

    def keep(run: Callable[[], Tensor]) -> None:
        results[run] = run()

    keep(ours)
    if repeats > 1:
        keep(theirs)  # neither side is timed cold, unless that would take too long
    mine, published = side_by_side([ours, lambda: keep(theirs)], repeats, device)
    off = agree(results[ours], results[theirs], loose, "rome")
    model = model_bytes(lm)
    note = "" if repeats > 1 else "one run each, the published one cold"
    rows = [_row(f"ROME, one edit, 21 contexts, {steps} steps", mine, published, off, note)]
    rows.append(
        {
            "work": "ROME: peak memory above the model, without second moments",
            "share_of_model": allocated / model,
        }
    )
    if resident is not None:
        row = {
            "work": "ROME: the same with what allocator and libraries hold",
            "share_of_model": resident / model,
        }
        rows.append(row)
    name = lm.architecture.weight_name(layer)
    update, weight = results[ours], lm.weight(name)
    trim = seconds(lambda: rect(update, weight, keep=0.4), 2 * repeats + 1, device)
    rows.append({"work": "RECT of that update, share of the edit", "share_of_edit": trim / mine})
    return rows + parts_of_an_edit(ours, device)


def parts_of_an_edit(run: Callable[[], Any], device: str) -> list[Row]:
    """Where the seconds of one edit go."""
    places: dict[str, tuple[Any, str]] = {
        "keys": (rome, "_keys"),
        "the full pass": (value_search, "open_forward"),
        "search": (value_search._LossTerms, "evaluate"),
    }
    spent = dict.fromkeys(places, 0.0)
    with ExitStack() as stack:
        for part, (owner, name) in places.items():
            called = getattr(owner, name)

            def timed(*args: Any, called: Any = called, part: str = part, **kwargs: Any) -> Any:
                kept: list[Any] = []
                spent[part] += seconds(lambda: kept.append(called(*args, **kwargs)), 1, device)
                return kept[0]

            stack.enter_context(patch.object(owner, name, timed))
        total = seconds(run, 1, device)
    rows: list[Row] = [{"work": f"ROME: {part}", "seconds": value} for part, value in spent.items()]
    return [*rows, {"work": "ROME: the rest", "seconds": total - sum(spent.values())}]


def bench_growth(device: str, dtype: str, repeats: int, steps: int = 5) -> list[Row]:
    """GPT-2-small shape, searches of a few steps; one thing changes at a time."""
    rows: list[Row] = []
    rng = random.Random(2)

    def time_rome(what: str, length: int = 10, **config: int) -> None:
        lm = make_lm("gpt2", device, dtype, **config)
        h = RomeHyperParameters(
            layers=[lm.architecture.n_layers // 3], v_num_grad_steps=steps, v_weight_decay=0.5
        )
        context = Context(["{}"] + [words(rng, length) + " {}" for _ in range(20)], no_moment)
        (edit,) = facts(1)
        METHODS["rome"].propose(lm, [edit], h, context)
        took = seconds(lambda: METHODS["rome"].propose(lm, [edit], h, context), repeats, device)
        rows.append({"work": f"ROME, {steps} steps, {what}", "seconds": took})

    for length in (5, 20, 80, 320):
        time_rome(f"20 contexts of {length} tokens", length)
    for layers in (6, 12, 24, 48):
        time_rome(f"{layers} layers", n_layer=layers)
    for width in (384, 768, 1536):
        time_rome(f"width {width}", n_embd=width)
    lm = make_lm("gpt2", device, dtype)
    h = MemitHyperParameters(layers=MEMIT_LAYERS["gpt2"], v_num_grad_steps=steps)
    moments = {layer: moment(lm.architecture.d_mlp, layer, device) for layer in h.layers}
    context = Context(memit_templates(), lambda layer: moments[layer])

    def memit(count: int) -> Any:
        return METHODS["memit"].propose(lm, facts(count), h, context)

    memit(1)
    for count in (1, 4, 16, 64):
        took = seconds(partial(memit, count), 1, device)
        rows.append({"work": f"MEMIT, {steps} steps, {count} facts", "seconds": took})
    return rows


def no_moment(layer: int) -> SecondMoment:
    raise ValueError("not wanted")


def bench_memit(
    lm: EditableLM, shape: str, device: str, count: int, reference: int, loose: float
) -> list[Row]:
    h = MemitHyperParameters(layers=MEMIT_LAYERS[shape], v_num_grad_steps=25)
    groups = memit_templates()
    moments = {layer: moment(lm.architecture.d_mlp, layer, device) for layer in h.layers}
    context = Context(groups, lambda layer: moments[layer])

    def ours(edits: list[Edit]) -> dict[str, Tensor]:
        updates = METHODS["memit"].propose(lm, edits, h, context).updates
        return {name: update.dense() for name, update in updates.items()}

    means = {layer: m.mean.to(device) for layer, m in moments.items()}
    few, many = facts(reference), facts(count)
    mine_few, theirs = ours(few), {}

    def run_theirs() -> None:
        theirs.update(published_memit(lm, few, groups, h, means))

    published = seconds(run_theirs, 1, device)
    off = max(agree(mine_few[name], theirs[name], loose, f"memit {name}") for name in mine_few)
    keys = torch.randn(lm.architecture.d_mlp, reference, dtype=torch.float64, device=device)
    c = means[h.layers[0]]
    solve = seconds(lambda: published_solve(c, keys, h.mom2_update_weight, None), 1, device)
    fixed = len(h.layers) * solve  # does not grow with the facts (up to thousands of them)
    scaled = fixed + (published - fixed) * count / reference
    mine = seconds(lambda: ours(many), 1, device)
    note = (
        f"published timed on {reference} facts, its part that grows with facts scaled"
        if count != reference
        else ""
    )
    return [_row(f"MEMIT, {count} facts, {len(h.layers)} layers, 25 steps", mine, scaled, off, note)]


def bench_history(lm: EditableLM, device: str, repeats: int, batches: int = 10, size: int = 100) -> list[Row]:
    """Solves of the tenth batch, one layer; both sides hold the earlier keys in the form they keep them."""
    d, weight = lm.architecture.d_mlp, 15_000.0
    c = moment(d, 0, device)
    keys = [torch.randn(d, size, dtype=torch.float64, device=device) for _ in range(batches)]
    state: dict[str, Tensor] = {}

    def prior(k: Tensor) -> Tensor:
        return c.solve_columns(k) / weight

    for k in keys[:-1]:
        remember_keys(prior, k, state, "0")
    history = sum((k @ k.T for k in keys[:-1]), torch.zeros(d, d, dtype=torch.float64, device=device))
    mean = c.mean.to(device)
    inverse = torch.linalg.inv(mean)
    product = seconds(lambda: inverse @ keys[-1], 2 * repeats + 1, device)
    ours = solve_with_history(prior, keys[-1], state, "0")
    off = agree(ours, published_solve(mean, keys[-1], weight, history), 1e-8, "history")
    mine, published = side_by_side(
        [
            lambda: solve_with_history(prior, keys[-1], state, "0"),
            lambda: published_solve(mean, keys[-1], weight, history),
        ],
        repeats,
        device,
    )
    row = _row(f"MEMIT, batch {batches} of {size} with history, solve of a layer", mine, published, off)
    remember = seconds(lambda: remember_keys(prior, keys[-1], dict(state), "0"), repeats, device)
    # Any exact solve applies an inverse of that size once.
    return [
        row,
        {"work": "taking that batch into the history, ours", "seconds": remember},
        {"work": f"its floor: one product of {d} x {d} and {d} x {size} in float64", "seconds": product},
    ]


def bench_moments(lm: EditableLM, shape: str, device: str, repeats: int, tokens: int = 4096) -> list[Row]:
    """Five layers: a pass for each, against one pass for all.

    The released code sorts documents by length and packs them, padded, up to three contexts of the model.
    """
    layers = MEMIT_LAYERS[shape]
    rng = random.Random(0)
    sequences: list[list[int]] = []
    while sum(map(len, sequences)) < tokens:
        sequences.append([rng.randrange(1, WORDS) for _ in range(rng.choice((20, 60, 120, 250, 500)))])

    packed = chunks([len(ids) for ids in sequences], 3 * min(1024, lm.max_length))
    batches = [lm.batch([sequences[i] for i in chunk]) for chunk in packed]

    def published() -> dict[int, Tensor]:
        sums = {}
        for layer in layers:
            total = torch.zeros(lm.architecture.d_mlp, lm.architecture.d_mlp, device=device)
            for batch in batches:

                def keep(
                    module: Any, args: Any, output: Any, total: Tensor = total, batch: Any = batch
                ) -> None:
                    rows = args[0].view(-1, args[0].shape[-1])[batch.mask.flatten().bool()].float()
                    total += rows.T @ rows
                    stop_forward()  # as the released code does

                with torch.no_grad():
                    lm.run_hooked({layer: keep}, batch)
            sums[layer] = total
        return sums

    def ours(which: list[int]) -> dict[int, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            return accumulate(lm, which, sequences, Path(folder) / "partial.safetensors", "benchmark")[0]

    theirs, mine = published(), ours(layers)
    off = max(agree(mine[layer].to(device), theirs[layer], 1e-4, f"moments {layer}") for layer in layers)
    runs = [lambda: ours(layers), lambda: ours(layers[-1:]), published]
    all_layers, one, theirs_s = side_by_side(runs, repeats, device)
    row = _row(f"second moments of {len(layers)} layers", all_layers, theirs_s, off)
    return [
        row,
        {
            "work": "a further layer of second moments",
            "share_of_first": (all_layers - one) / one / (len(layers) - 1),
        },
    ]


def bench_rect(device: str, repeats: int) -> list[Row]:
    """Independent elements, and a rank-one update, whose large elements stand in rows and columns."""
    rows, columns = 4096, 11008
    weight = torch.randn(rows, columns, device=device)
    dense = torch.randn(rows, columns, device=device)
    rank_one = torch.randn(rows, 1, device=device) @ torch.randn(1, columns, device=device)

    def published(update: Tensor) -> np.ndarray:
        dw, w = update.cpu().numpy(), weight.cpu().numpy()
        with np.errstate(divide="ignore"):
            delta = np.abs(dw / w).ravel()
        count = delta.size - int(delta.size * 0.6)
        kept = np.zeros(delta.size, dtype=bool)
        kept[np.argpartition(delta, -count)[-count:]] = True
        return np.where(kept.reshape(dw.shape), dw, 0)

    found = []
    for update, what in ((dense, ""), (rank_one, ", update of rank one")):
        a, b = rect(update, weight, keep=0.4).cpu().numpy(), published(update)
        with np.errstate(divide="ignore"):
            delta = np.abs(update.cpu().numpy() / weight.cpu().numpy())
        other = (a != 0) != (b != 0)  # argpartition takes any of several elements at the threshold
        if np.count_nonzero(a) != np.count_nonzero(b) or len(np.unique(delta[other])) > 1:
            raise SystemExit("rect: results differ")
        del a, b, delta, other
        runs: list[Callable[[], Any]] = [
            partial(rect, update, weight, keep=0.4),
            partial(published, update),
        ]
        mine, theirs = side_by_side(runs, 5 * repeats, device)
        work = f"RECT on {rows} x {columns}, against numpy's argpartition{what}"
        found.append(_row(work, mine, theirs, 0.0))
    return found


def _row(work: str, ours: float, published: float, off: float, note: str = "") -> Row:
    return {
        "work": work,
        "ours_s": ours,
        "published_s": published,
        "ratio": published / ours,
        "difference": off,
        "note": note,
    }


def fits(shape: str, device: str, dtype: str) -> bool:
    lm = make_lm(shape, "meta", dtype)
    needed = ROOM * model_bytes(lm) + MATRICES * 8 * lm.architecture.d_mlp**2
    return needed < (torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available)


def one_after_the_other() -> None:
    """This command for every shape."""
    for shape in SHAPES:
        if shape != "tiny":  # of an option that is given twice the last counts
            subprocess.run([sys.executable, *sys.argv, "--shape", shape, "--if-it-fits"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="gpt2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype")
    parser.add_argument("--facts", type=int, default=100, help="of the MEMIT batch")
    parser.add_argument("--reference-facts", type=int, default=4, help="that the published MEMIT is timed on")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--steps", type=int, help="of ROME's search")
    parser.add_argument("--only")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--if-it-fits", action="store_true", help="do nothing where memory is too small")
    arguments = parser.parse_args()
    if arguments.shape == "all":
        if arguments.output:
            parser.error("--output: one file for each shape; leave it out")
        one_after_the_other()
        return
    usual = USUAL | (ON_CPU.get(arguments.shape, {}) if arguments.device == "cpu" else {})
    for key, value in usual.items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, value)
    if arguments.if_it_fits and not fits(arguments.shape, arguments.device, arguments.dtype):
        print(f"{arguments.shape} in {arguments.dtype} does not fit in the memory of this machine")
        return
    wanted = arguments.only.split(",")
    runs_it = set(wanted) - {"history", "rect"}  # those ask for the shape alone
    lm = make_lm(arguments.shape, arguments.device if runs_it else "meta", arguments.dtype)
    loose = 1e-3 if arguments.dtype == "float32" else 0.5
    rows: list[Row] = []
    device, shape, repeats = arguments.device, arguments.shape, arguments.repeats
    works: dict[str, Callable[[], list[Row]]] = {
        "rome": lambda: bench_rome(lm, shape, device, repeats, loose, arguments.steps),
        "memit": lambda: bench_memit(lm, shape, device, arguments.facts, arguments.reference_facts, loose),
        "history": lambda: bench_history(lm, device, repeats),
        "moments": lambda: bench_moments(lm, shape, device, repeats),
        "rect": lambda: bench_rect(device, repeats),
        "growth": lambda: bench_growth(device, arguments.dtype, repeats),
    }
    if unknown := set(wanted) - set(works):
        parser.error(f"--only {', '.join(unknown)}: expected some of {', '.join(works)}")
    output = arguments.output or RESULTS / f"{shape}-{device}-{arguments.dtype}.json"
    about = {"shape": shape, "dtype": arguments.dtype, **describe(device)}
    for name in wanted:
        rows += works[name]()
        with written_whole(output) as temporary:
            kept = json.dumps({**about, "rows": _merged(output, about, rows)}, indent=2)
            temporary.write_text(kept + "\n", encoding="utf-8")
    _print(rows, f"{shape}, {device}, {arguments.dtype}, {about['threads']} threads")


def _merged(path: Path, about: dict[str, Any], rows: list[Row]) -> list[Row]:
    """These rows in the place of older ones of the same work, if the older ones are of the same machine."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if {key: old.get(key) for key in about} != about:
        return rows
    merged = {row["work"]: row for row in [*old["rows"], *rows]}
    return list(merged.values())


def _print(rows: list[Row], title: str) -> None:
    table = Table(title=title)
    for heading in ("work", "published", "ours", "ratio", "relative difference", ""):
        table.add_column(heading, justify="left" if heading in {"work", ""} else "right")
    for row in rows:
        if "ratio" in row:
            cells = [
                f"{row['published_s']:.3g} s",
                f"{row['ours_s']:.3g} s",
                f"{row['ratio']:.1f} x",
                f"{row['difference']:.1g}",
            ]
            table.add_row(row["work"], *cells, row["note"])
        elif "seconds" in row:
            table.add_row(row["work"], "", f"{row['seconds']:.3g} s", "", "", "")
        else:
            (share,) = (value for key, value in row.items() if key != "work")
            table.add_row(row["work"], "", f"{100 * share:.1f} %", "", "", "")
    console = Console()
    Console(width=max(console.width, 130)).print(table)


if __name__ == "__main__":
    main()
