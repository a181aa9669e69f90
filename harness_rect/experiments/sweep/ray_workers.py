"""The trajectories of a sweep in workers of Ray, on one machine or on a cluster.

Every worker is a Ray actor that keeps its model loaded and runs one trajectory after the other. The process
that was started, the driver, hands them out, shows what the workers say, and alone writes the index. When a
worker or its node is lost, another worker continues from the last saved state.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any

import torch

from harness_rect.compat.lm_eval import describe_machine
from harness_rect.errors import UserError
from harness_rect.experiments.sweep.clock import Clock
from harness_rect.experiments.sweep.display import EDITING, EVALUATING, Row
from harness_rect.experiments.sweep.inbox import Inbox
from harness_rect.experiments.sweep.memory import needed, skeleton
from harness_rect.experiments.sweep.plan import Plan, Shard
from harness_rect.experiments.sweep.ray_start import ray_running
from harness_rect.experiments.sweep.work import Changed, Worker, rows_of
from harness_rect.io.progress import logging_only

log = logging.getLogger("harness_rect.sweep")

#: The kind of time that the driver spends while workers work.
WAITING = "waiting"
#: A trajectory that was lost so many times in a row without getting any further is given up.
LOSSES = 3
#: Bytes that a worker takes beside what a trajectory needs: libraries, and lm-eval's batches on a CPU.
LIBRARIES = 2**30


@dataclass(frozen=True)
class Resources:
    """What each worker takes. gpus: None for one where the cluster has any and the sweep is not on a CPU."""

    cpus: float = 1
    gpus: float | None = None


def run_with_ray(plan: Plan, states: Path, asked: Resources, clock: Clock, changed: Changed) -> None:
    """Make the evaluations of a plan that are not done.

    Args:
        states: the folder for unfinished trajectories; like the results, it must be on a disk that all nodes
            share.
        clock: gets the seconds of all workers. changed: see :class:`Worker`; called in this process.

    Raises:
        UserError: Ray is not installed, no node has these resources, or as of :meth:`Worker.run`.
        RuntimeError: a trajectory lost one worker after another.
    """
    with clock.running("starting Ray"), ray_running() as ray, clock.running(WAITING):
        _Driver(ray, plan, states, asked, clock, changed).run()


class _Driver:
    """Hands out the units of a plan until all are done."""

    def __init__(
        self, ray: Any, plan: Plan, states: Path, asked: Resources, clock: Clock, changed: Changed
    ) -> None:
        self.ray, self.clock, self.changed = ray, clock, changed
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self.inbox = ray.remote(Inbox).options(num_cpus=0, scheduling_strategy=here).remote()
        self.resources = _resources(ray, plan, asked)
        self._worker = ray.remote(_RayWorker).options(**self.resources)
        self._given = (ray.put(plan), str(states.resolve()), os.getcwd(), self.inbox)
        self._units = len(plan.units)
        self._todo = deque(range(1, self._units + 1))
        #: What is waited for -> the worker, and its unit; None while it starts.
        self._waiting: dict[Any, tuple[Any, int | None]] = {}
        self._lost: Counter[int | None] = Counter()
        self._latest: dict[str, Row] = {}
        self._names = {unit: next(iter(rows_of(plan.part(Shard(unit, self._units))))) for unit in self._todo}
        self._before_loss: dict[int, tuple[int, int]] = {}

    def run(self) -> None:
        if self._todo and not self._slots():
            wanted = ", ".join(f"{name} {value:g}" for name, value in self.resources.items())
            raise UserError(f"--backend ray: no node of the Ray cluster has what a worker takes ({wanted})")
        while self._todo or any(unit for _, unit in self._waiting.values()):
            while self._todo and len(self._waiting) < min(self._slots(), self._left()):
                worker = self._worker.remote(*self._given)
                self._waiting[worker.ready.remote()] = worker, None
            ended, _ = self.ray.wait(list(self._waiting), timeout=0.5)
            self._read_inbox()
            for one in ended:
                self._ended(one, *self._waiting.pop(one))
        self._read_inbox()

    def _left(self) -> int:
        return len(self._todo) + sum(unit is not None for _, unit in self._waiting.values())

    def _slots(self) -> int:
        """How many workers the nodes that are alive can hold."""
        wanted = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        need = {kind: self.resources.get(name, 0) for kind, name in wanted.items()}
        found = 0
        for node in self.ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                found += min(int(has.get(kind, 0) // n) for kind, n in need.items() if n)
        return found

    def _ended(self, one: Any, worker: Any, unit: int | None) -> None:
        """A worker has started, or finished a unit, or is lost: give it the next, or start over."""
        try:
            seconds: Mapping[str, float] = self.ray.get(one)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from None
        except self.ray.exceptions.RayError as error:
            self.ray.kill(worker)
            self._count_loss(unit, error)
            if unit is not None:
                self._todo.appendleft(unit)
            return
        if unit is None:
            self._lost[None] = 0
        for kind, taken in seconds.items():
            self.clock.seconds[kind] += taken
        if not self._todo:
            self.ray.kill(worker)
            return
        unit = self._todo.popleft()
        self._waiting[worker.run.remote(unit, self._units)] = worker, unit

    def _count_loss(self, unit: int | None, error: Exception) -> None:
        name = "a worker that was starting" if unit is None else self._names[unit]
        row = self._latest.get(name)
        reached = (row.evaluations, row.edits) if row else (0, 0)
        if unit is not None and self._before_loss.get(unit) != reached:
            self._lost[unit], self._before_loss[unit] = 0, reached
        self._lost[unit] += 1
        reason = " ".join(str(error).split())[:200]
        if self._lost[unit] >= LOSSES:
            raise RuntimeError(f"{name}: lost {LOSSES} workers in a row: {reason}") from error
        log.warning("%s: its worker is lost; another one continues (%s)", name, reason)
        if row:
            row.doing = ""
            self.changed(row, "")

    def _read_inbox(self) -> None:
        for what in map(pickle.loads, self.ray.get(self.inbox.take.remote())):
            if isinstance(what, logging.LogRecord):
                logging.getLogger(what.name).handle(what)
            else:
                row, line = what
                self._latest[row.name] = row
                self.changed(row, line)


def _resources(ray: Any, plan: Plan, asked: Resources) -> dict[str, float]:
    """What a worker reserves: the cores and GPUs asked for, and on a CPU the memory of the largest unit."""
    gpus = asked.gpus
    if gpus is None:
        given = [entry.model_extra or {} for entry in plan.config.models]
        devices = [str(of.get("device", plan.config.device or "cuda")) for of in given]
        there = ray.cluster_resources().get("GPU", 0) if any(d.startswith("cuda") for d in devices) else 0
        if there and any(of.get("parallelize") or "device_map" in of for of in given):
            raise UserError("a model over several GPUs: give --gpus G, those of each worker")
        gpus = min(1, there)
    if gpus:
        return {"num_cpus": asked.cpus, "num_gpus": gpus}
    cpu, most = torch.device("cpu"), 0
    for entry in plan.config.models:
        mine = {t.label: t for t in plan.trajectories if t.model is entry}.values()
        with logging_only(logging.ERROR, "harness_rect"):
            lm = skeleton(entry, **plan.config.prompts) if mine else None
        most = max([most, *(needed(lm, t, plan.config, cpu).total for t in mine if lm)])
    return {"num_cpus": asked.cpus, "memory": most + LIBRARIES}


class _RayWorker:
    """A worker of a sweep as a Ray actor.

    Args:
        plan: the part of the sweep that Ray runs. folder: the driver's working directory.
    """

    def __init__(self, plan: Plan, states: str, folder: str, inbox: Any) -> None:
        self.plan, self.folder, self.inbox, self.clock = plan, folder, inbox, Clock()
        self.worker = Worker(Path(states), self.clock, self._changed)
        self._last: Any = None
        logging.getLogger().handlers[:] = [_ToInbox(inbox)]

    def ready(self) -> dict[str, float]:
        try:  # not in __init__: Ray hides what is raised there
            os.chdir(self.folder)
        except OSError:
            raise UserError(f"{self.folder}: not there on a node of Ray; the folder must be shared") from None
        with self.clock.running("loading"):
            describe_machine()
        return {}

    def run(self, index: int, number: int) -> dict[str, float]:
        """Run one unit; the seconds of everything but editing and evaluating."""
        import ray

        before = dict(self.clock.seconds)
        part = self.plan.part(Shard(index, number))
        with logging_only(logging.WARNING, "lm_eval"):
            self.worker.run(part, rows_of(part))
        if self._last is not None:
            ray.get(self._last)  # so that the driver knows of everything when this returns
        after = {kind: s - before.get(kind, 0) for kind, s in self.clock.seconds.items()}
        return {kind: s for kind, s in after.items() if kind not in (EDITING, EVALUATING, "other")}

    def _changed(self, row: Row, line: str) -> None:
        self._last = self.inbox.put.remote(pickle.dumps((row, line)))


class _ToInbox(QueueHandler):
    """Sends warnings to the driver."""

    def __init__(self, inbox: Any) -> None:
        super().__init__(inbox)
        self.setLevel(logging.WARNING)

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.put.remote(pickle.dumps(record))  # type: ignore[attr-defined]
