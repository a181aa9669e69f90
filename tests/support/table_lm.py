"""lm-eval model classes that answer from a table, and one of two processes that evaluates with them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).resolve().parents[2] / "tasks"


class TableLM(LM):
    """Generates ``table[prompt]``; an answer whose text is not there is a KeyError."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        super().__init__()
        self.table = table
        self.asked: list[Any] = []

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        self.asked += [request.args for request in requests]
        return [self.table[request.args[0]] for request in requests]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


class ComparingTableLM(TableLM):
    """Knows the unedited model, too: ``table[prompt]`` is (edited, unedited) where both are asked for."""

    def generate_both(self, requests: Sequence[Any]) -> list[tuple[str, str]]:
        self.asked += [request.args for request in requests]
        return [tuple(self.table[request.args[0]]) for request in requests]

    def generate_unedited(self, requests: Sequence[Any]) -> list[str]:
        return [self.table[request.args[0]][1] for request in requests]


class OneOfTwo(ComparingTableLM):
    """One of two processes, exchanging as lm-eval's Hugging Face class does."""

    @property
    def rank(self) -> int:
        return torch.distributed.get_rank()

    @property
    def world_size(self) -> int:
        return 2

    device = torch.device("cpu")

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        found = [torch.zeros_like(tensor) for _ in range(2)]
        torch.distributed.all_gather(found, tensor)
        return torch.stack(found)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        found: list[Any] | None = [None, None] if self.rank == dst else None
        torch.distributed.gather_object(obj, found, dst=dst)
        return found

    def barrier(self) -> None:
        torch.distributed.barrier()


def evaluate(model: LM, task: str, edits: Path, **metadata: Any) -> dict[str, Any] | None:
    """Results of one task on a file of edits, whose tokenizer is the embedded model's; of rank 0 alone."""
    known = {"pretrained": "rect-tiny", "edits": str(edits), **metadata}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=known)
    found = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager, bootstrap_iters=0)
    return found and dict(found)


def metrics(results: Mapping[str, Any] | None, task: str) -> dict[str, float]:
    assert results is not None
    found = {name.removesuffix(",none"): value for name, value in results["results"][task].items()}
    return {n: v for n, v in found.items() if isinstance(v, int | float) and n not in {"sample_len"}}


if __name__ == "__main__":  # python table_lm.py CLASS TABLE TASK EDITS OUTPUT, started once a rank
    name, table, task, edits, output = sys.argv[1:]
    torch.distributed.init_process_group("gloo")
    kind = {"ComparingTableLM": OneOfTwo, "TableLM": type("Plain", (TableLM,), dict(vars(OneOfTwo)))}[name]
    results = evaluate(kind(json.loads(Path(table).read_text())), task, Path(edits))
    if results is not None:
        Path(output).write_text(json.dumps(metrics(results, task)))
    torch.distributed.destroy_process_group()
