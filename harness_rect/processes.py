"""Several processes that share one computation, started by ``accelerate launch`` or ``torchrun``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
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


def of_all_processes(value: Any, number: int) -> list[Any]:
    """A value of each of ``number`` processes that lm-eval runs in, by rank; all must call it."""
    found = [value] * number
    if number > 1:
        torch.distributed.all_gather_object(found, value)
    return found


ALONE = Processes()
