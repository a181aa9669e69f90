"""Speed of editing against a straightforward implementation of the published loops, both in one process.

    python benchmarks/editing.py [--shape gpt2|gpt2-xl|llama-2-7b|all] [--device cpu|cuda] [--dtype float32]
    [--only rome,...]

Weights, second moments and facts are random. Both sides must give the same result, otherwise nothing is
reported. Times are medians (MEMIT: one run), ratios are published / ours. Results are written after each part
to benchmarks/results/<shape>-<device>-<dtype>.json with a description of the machine; earlier results from
the same machine are kept. Where the published loop takes too long it is timed on fewer facts, and the table
says so. On a CPU the larger shapes run fewer parts and steps by default (ON_CPU). `all` runs every shape that
fits in memory, each in its own process.

`growth` times our side only: how the cost grows with facts, length of contexts, layers and width.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
import transformers
from measuring import (
    RESULTS,
    Row,
    describe,
    merged,
    peak_allocated,
    peak_resident,
    print_table,
    read_results,
    seconds,
    side_by_side,
    write_results,
)
from published import published_memit, published_rome, published_solve
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from harness_rect.edits import Edit
from harness_rect.methods import METHODS, Context, rome, value_search
from harness_rect.methods.key_history import remember_keys, solve_with_history
from harness_rect.methods.memit import MemitHyperParameters
from harness_rect.methods.rome import RomeHyperParameters
from harness_rect.models import EditableLM
from harness_rect.models.lm import chunks, stop_forward
from harness_rect.moments import SecondMoment
from harness_rect.moments.accumulate import accumulate
from harness_rect.regularizers import rect

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
#: Defaults of a shape on a CPU, where the full benchmark would take hours.
ON_CPU: dict[str, dict[str, Any]] = {
    "gpt2-xl": {"only": "rome,history", "repeats": 1, "steps": 5},
    "llama-2-7b": {"only": "rome,history", "repeats": 1, "steps": 3, "dtype": "bfloat16"},
}
DEFAULTS = {"only": "rome,memit,history,moments,rect,growth", "repeats": 3, "steps": 20, "dtype": "float32"}
#: Memory that a run needs: a multiple of the model's, and a number of float64 matrices of d_mlp x d_mlp.
ROOM, MATRICES = 1.1, 8
WORDS = 1000


# ------------------------------------------------------------------------------------------ the set-up


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, so that prompts have realistic lengths."""
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


def agree(ours: Tensor, theirs: Tensor, limit: float, what: str) -> float:
    off = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    if not off <= limit:
        raise SystemExit(f"{what}: results differ by {off:.2g} (limit {limit:g}); a ratio would mean nothing")
    return off


# ----------------------------------------------------------------------------------------- the figures


def bench_rome(
    lm: EditableLM, shape: str, device: str, repeats: int, tolerance: float, steps: int
) -> list[Row]:
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

    # Memory is measured first, before the heap has grown, and without second moments, as the paper edits.
    plain = h.model_copy(update={"mom2_adjustment": False})
    small = make_lm("tiny", device, "float32")  # so that what libraries allocate once is not counted
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
        keep(theirs)  # a warm-up for this side too, unless it would take too long
    mine, published = side_by_side([ours, lambda: keep(theirs)], repeats, device)
    off = agree(results[ours], results[theirs], tolerance, "rome")
    model = model_bytes(lm)
    note = "" if repeats > 1 else "one run each, the published one cold"
    rows = [_row(f"ROME, one edit, 21 contexts, {steps} steps", mine, published, off, note)]
    for peak, work in (
        (allocated, "ROME: peak memory above the model, without second moments"),
        (resident, "ROME: the same with what allocator and libraries hold"),
    ):
        if peak is not None:
            rows.append({"work": work, "share_of_model": peak / model})
    name = lm.architecture.weight_name(layer)
    update, weight = results[ours], lm.weight(name)
    trim = seconds(lambda: rect(update, weight, keep=0.4), 2 * repeats + 1, device)
    rows.append({"work": "RECT of that update, share of the edit", "share_of_edit": trim / mine})
    return rows + parts_of_an_edit(ours, device)


def parts_of_an_edit(run: Callable[[], Any], device: str) -> list[Row]:
    """The time of one edit, split into its parts."""
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
    """GPT-2-small shape, searches of a few steps; one quantity is varied at a time."""
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
    lm: EditableLM, shape: str, device: str, count: int, reference: int, tolerance: float
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
    off = max(agree(mine_few[name], theirs[name], tolerance, f"memit {name}") for name in mine_few)
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
    """The solve for the tenth batch in one layer; each side has the earlier keys in its own form."""
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
    # A lower bound: any exact solve applies an inverse of that size once.
    return [
        row,
        {"work": "taking that batch into the history, ours", "seconds": remember},
        {"work": f"its floor: one product of {d} x {d} and {d} x {size} in float64", "seconds": product},
    ]


def bench_moments(lm: EditableLM, shape: str, device: str, repeats: int, tokens: int = 4096) -> list[Row]:
    """Five layers: one pass per layer against one pass for all.

    The released code sorts documents by length and pads them into batches of up to three model contexts.
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
    further = (all_layers - one) / one / (len(layers) - 1)
    return [
        _row(f"second moments of {len(layers)} layers", all_layers, theirs_s, off),
        {"work": "a further layer of second moments", "share_of_first": further},
    ]


def bench_rect(device: str, repeats: int) -> list[Row]:
    """An update of independent elements, and one of rank one, whose large elements form rows and columns."""
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


def run_all_shapes() -> None:
    """Run this command once for every shape."""
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
    parser.add_argument("--facts", type=int, default=100, help="facts in the MEMIT batch")
    parser.add_argument(
        "--reference-facts", type=int, default=4, help="facts on which the published MEMIT is timed"
    )
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--steps", type=int, help="steps of ROME's search")
    parser.add_argument("--only")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--if-it-fits", action="store_true", help="do nothing if memory is too small")
    arguments = parser.parse_args()
    if arguments.shape == "all":
        if arguments.output:
            parser.error("--output: one file for each shape; leave it out")
        run_all_shapes()
        return
    usual = DEFAULTS | (ON_CPU.get(arguments.shape, {}) if arguments.device == "cpu" else {})
    for key, value in usual.items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, value)
    if arguments.if_it_fits and not fits(arguments.shape, arguments.device, arguments.dtype):
        print(f"{arguments.shape} in {arguments.dtype} does not fit in the memory of this machine")
        return
    wanted = arguments.only.split(",")
    runs_it = set(wanted) - {"history", "rect"}  # those ask for the shape alone
    lm = make_lm(arguments.shape, arguments.device if runs_it else "meta", arguments.dtype)
    tolerance = 1e-3 if arguments.dtype == "float32" else 0.5
    rows: list[Row] = []
    device, shape, repeats = arguments.device, arguments.shape, arguments.repeats
    works: dict[str, Callable[[], list[Row]]] = {
        "rome": lambda: bench_rome(lm, shape, device, repeats, tolerance, arguments.steps),
        "memit": lambda: bench_memit(
            lm, shape, device, arguments.facts, arguments.reference_facts, tolerance
        ),
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
        old = read_results(output)  # figures of another machine are not kept beside these
        same_machine = {key: old.get(key) for key in about} == about
        write_results(output, {**about, "rows": merged(old["rows"] if same_machine else [], rows, ["work"])})
    headings = ["work", "published", "ours", "ratio", "relative difference", ""]
    title = f"{shape}, {device}, {arguments.dtype}, {about['threads']} threads"
    print_table(title, headings, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    if "ratio" in row:
        times = [f"{row['published_s']:.3g} s", f"{row['ours_s']:.3g} s", f"{row['ratio']:.1f} x"]
        return [row["work"], *times, f"{row['difference']:.1g}", row["note"]]
    if "seconds" in row:
        return [row["work"], "", f"{row['seconds']:.3g} s"]
    (share,) = (value for key, value in row.items() if key != "work")
    return [row["work"], "", f"{100 * share:.1f} %"]


if __name__ == "__main__":
    main()
