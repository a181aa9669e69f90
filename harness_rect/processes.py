"""Several processes that share one computation, started by ``accelerate launch`` or ``torchrun``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from harness_rect.errors import UserError


class Processes:
    """This process (``rank``) among the ``number`` that share the computation; rank 0 is the main one.

    Args:
        state: None for a process that computes alone.
    """

    def __init__(self, state: PartialState | None = None) -> None:
        self._state = state
        self.rank: int = state.process_index if state else 0
        self.number: int = state.num_processes if state else 1

    @classmethod
    def launched(cls, cuda: bool) -> Processes:
        """All processes of this command; sums are exchanged by NCCL with CUDA, else by gloo.

        Raises:
            UserError: there is no GPU for this process.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        # One process may take much longer than the others to load a model; the default is ten minutes.
        state = PartialState(cpu=not cuda, timeout=timedelta(days=1))
        if cuda and state.local_process_index >= (gpus := torch.cuda.device_count()):
            raise UserError(f"each process needs a GPU of its own: start at most {gpus} on this machine")
        return cls(state)

    @classmethod
    def joined(cls) -> Processes:
        """All processes of the group that lm-eval made for this command."""
        dist = torch.distributed
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return cls()
        found = cls(PartialState())
        if found.number != dist.get_world_size():
            raise UserError("torch.distributed was started beside accelerate; start with accelerate launch")
        return found

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def own_device(self, device: str | None) -> str | None:
        """The device of this process; with CUDA each of several processes has its own GPU.

        Raises:
            UserError: ``--device`` names one GPU for several processes.
        """
        if self._state is None or self._state.device.type != "cuda":
            return device
        if device not in (None, "cuda"):
            raise UserError(f"--device {device}: each of {self.number} processes has a GPU of its own")
        return str(self._state.device)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Wait for all processes at the end; if any of several raised a UserError, the main one prints it and
        all exit with status 2.

        Raises:
            UserError: of a process that computes alone, unchanged.
        """
        if self._state is None:
            yield
            return
        error = None
        try:
            yield
        except UserError as failed:
            error = str(failed)
        errors = [message for message in gather_object([error]) if message is not None]
        if errors:
            if self.is_main:
                print(f"error: {errors[0]}", file=sys.stderr, flush=True)
            # When one process exits, the launcher stops the others: wait until the line is printed.
            self._state.wait_for_everyone()
            self.leave()
            raise SystemExit(2)

    # -- the main process hands out work --------------------------------------------------------------

    def share(self, order: Any, run: Callable[[Any], Any]) -> list[Any]:
        """Of the main process: what ``run`` makes of an order in every process, by rank.

        The others must be in :meth:`help`. The order and what is returned are pickled.

        Raises:
            UserError: that of one of the processes.
        """
        self.from_main(order)
        found = of_all_processes(_tried(run, order), self.number)
        for one in found:
            if isinstance(one, UserError):
                raise one
        return found

    def help(self, run: Callable[[Any], Any]) -> None:
        """Of all other processes: run the orders of the main one until it calls :meth:`dismiss`."""
        while (order := self.from_main(None)) is not None:
            of_all_processes(_tried(run, order), self.number)

    def dismiss(self) -> None:
        """Of the main process: there are no more orders."""
        self.from_main(None)

    def as_main_(self, tensor: Tensor) -> None:
        """Give a tensor the main process's values, in place; all processes must call it."""
        if self.number > 1:
            torch.distributed.broadcast(tensor, src=0)

    # -- all processes do the same --------------------------------------------------------------------

    def from_main(self, value: Any) -> Any:
        """The main process's value; all processes must call it."""
        box = [value]
        if self.number > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def check_equal(self, value: Any, problem: str) -> None:
        """Raise in all processes unless all have the same value.

        Raises:
            UserError: ``problem``, with the ranks of the processes that differ from the main one.
        """
        first, *others = of_all_processes(value, self.number)
        if different := [str(rank) for rank, one in enumerate(others, start=1) if one != first]:
            raise UserError(f"{problem} (ranks that differ from rank 0: {', '.join(different)})")

    def add_up(self, total: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on the CPU; ``total`` may be changed in place."""
        if self._state is None:
            return total.cpu()
        total = total.to(self._state.device)
        torch.distributed.all_reduce(total)
        return total.cpu()

    def leave(self) -> None:
        """Leave the process group; all processes must call it."""
        if self._state is not None:
            torch.distributed.destroy_process_group()


def _tried(run: Callable[[Any], Any], order: Any) -> Any:
    """What ``run`` returns, or the UserError that it raises."""
    try:
        return run(order)
    except UserError as error:
        return error


def of_all_processes(value: Any, number: int) -> list[Any]:
    """A value of each of ``number`` processes that lm-eval runs in, by rank; all must call it."""
    found = [value] * number
    if number > 1:
        torch.distributed.all_gather_object(found, value)
    return found


ALONE = Processes()
