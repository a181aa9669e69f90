"""The value search of a MEMIT batch in one process and shared out over several, one thread each.

    python benchmarks/processes.py [--shape gpt2] [--facts 64] [--steps 5] [--processes 2]

Weights and facts are random. Wall time says what a user waits for, if every process has a core of its own;
CPU time, of the process that computes longest, what it would be on free cores. Both ways must find the same
values. The result is written to benchmarks/results/processes.json with the load of the machine before.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # torch.set_num_threads does not reach the threads of the backward pass

import torch
from editing import MEMIT_LAYERS, facts, make_lm, memit_templates
from measuring import RESULTS, describe, print_table, write_results
from torch import multiprocessing

from harness_rect.methods.fact_reader import FactReader
from harness_rect.methods.memit import MemitHyperParameters
from harness_rect.methods.value_search import Request, search_share, search_values
from harness_rect.models.forwards import fused_gelu
from harness_rect.processes import Processes, of_all_processes


def rank(index: int, arguments: argparse.Namespace, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": arguments.processes, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    processes = Processes.launched(cuda=False)
    lm = make_lm(arguments.shape, "cpu", "float32")
    lm.changing = [lm.architecture.weight_name(layer) for layer in MEMIT_LAYERS[arguments.shape]]
    layer, groups = MEMIT_LAYERS[arguments.shape][-1], memit_templates()
    h = MemitHyperParameters(layers=MEMIT_LAYERS[arguments.shape], v_num_grad_steps=arguments.steps)
    edits = facts(arguments.facts)
    templates = [template for group in groups for template in group]
    bare = FactReader(lm, edits, groups).bare_outputs(layer)
    requests = [Request(edit, v0) for edit, v0 in zip(edits, bare, strict=True)]

    def search() -> tuple[list[torch.Tensor], float]:
        started = time.perf_counter()
        with fused_gelu(lm.model):
            found = search_values(lm, requests, templates, layer, h, at_block=True)
        return [d for d, _ in found], time.perf_counter() - started

    search_values(lm, requests[:2], templates, layer, h, at_block=True)  # what libraries do only once
    alone, wall = None, 0.0
    cpu = time.process_time()
    if index == 0:
        alone, wall = search()
    cpu_alone = time.process_time() - cpu
    torch.distributed.barrier()
    cpu = time.process_time()
    lm.processes = processes
    if index == 0:
        shared, wall_shared = search()
        processes.dismiss()
    else:
        processes.help(lambda job: search_share(lm, job))
    spent = of_all_processes(time.process_time() - cpu, arguments.processes)
    if index == 0 and alone is not None:
        off = max(float((a - b).norm() / a.norm()) for a, b in zip(alone, shared, strict=True))
        results.put({"wall": [wall, wall_shared], "cpu": [cpu_alone, max(spent)], "off": off})
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=MEMIT_LAYERS, default="gpt2")
    parser.add_argument("--facts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(rank, (arguments, port, results), nprocs=arguments.processes)
    found = results.get()
    if found["off"] > 1e-3:
        raise SystemExit(f"values differ by {found['off']:.2g}; a ratio would mean nothing")
    rows = [
        [kind, *(f"{s:.1f} s" for s in found[kind]), f"{found[kind][0] / found[kind][1]:.2f}"]
        for kind in ("wall", "cpu")
    ]
    print_table(
        f"{arguments.facts} facts, load {load:.1f}", ["", "one", str(arguments.processes), "ratio"], rows
    )
    write_results(
        RESULTS / "processes.json", describe("cpu") | vars(arguments) | {"load_before": load} | found
    )


if __name__ == "__main__":
    main()
