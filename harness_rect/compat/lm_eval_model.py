"""What the model class needs of lm-eval's HFLM and HFLM does not promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from sqlitedict import SqliteDict
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from harness_rect.compat.lm_eval import IdRequest
from harness_rect.compat.shared_passes import Ids, grouped_by_prefix, score


class SharedPassLM(HFLM):
    """HFLM that answers several token-id requests on one sequence from one forward pass.

    Attributes:
        quiet: no progress bars.
    """

    quiet = False

    @property
    def run_key(self) -> str | None:
        """Names the weights in lm-eval's ``--use_cache`` file; None: they are as loaded."""
        return None

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Keep answers of this edited model apart from all others in lm-eval's ``--use_cache`` file.

        lm-eval keys that file by the request text alone, so the model before and after editing would
        share answers.
        """
        if self.run_key is not None and cache_hook.dbdict is not None:
            separate_answers(cache_hook.dbdict, self.run_key)
        super().set_cache_hook(cache_hook)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm or self.quiet)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm or self.quiet)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().generate_until(requests, disable_tqdm or self.quiet)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """HFLM's answers; from fewer passes for our editing tasks, which ask about prefixes of a sequence.

        All other requests go to HFLM, and so do those of which no pass can be saved or that must be cut at
        the model's length.
        """
        disable_tqdm = disable_tqdm or self.quiet
        if self.backend == "causal" and self.logits_cache and all(isinstance(r, IdRequest) for r in requests):
            inputs = [(*context, *target[:-1]) for _, context, target in requests]
            groups = grouped_by_prefix(inputs)
            if len(groups) < len(set(inputs)) and len(next(iter(groups))) <= self.max_length:
                return self._answer(requests, inputs, groups, disable_tqdm)
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def _answer(
        self,
        requests: Sequence[Any],
        inputs: Sequence[Ids],
        groups: dict[Ids, list[int]],
        disable_tqdm: bool,
    ) -> list[tuple[float, bool]]:
        """Answers in the order of ``requests``, from batches of the sequences of ``groups``."""
        auto = self.batch_size == "auto"
        if auto:
            self.batch_sizes: dict[int, int] = {}  # as HFLM: those found for other requests do not apply
        # Each sequence by the request that is all of it, which is what HFLM's scheduler reads.
        longest = [(ids, *requests[which[0]][1:]) for ids, which in groups.items()]
        answers: dict[int, tuple[float, bool]] = {}
        quiet = disable_tqdm or self.rank != 0
        done = 0
        with tqdm(total=len(requests), disable=quiet, desc="Running loglikelihood requests") as progress:
            while done < len(longest):
                size = self._batch_scheduler(done, longest) if auto else self.batch_size
                batch = [ids for ids, *_ in longest[done : done + size]]
                done += len(batch)
                # Padding on the right may be any token: none before it attends to it.
                padded = pad_sequence([torch.tensor(ids) for ids in batch], batch_first=True)
                logits = self._model_call(padded.to(self.device))
                logits = logits[:, -padded.shape[1] :]  # without the virtual tokens of prompt tuning
                for ids, row in zip(batch, logits, strict=True):
                    asked = groups[ids]
                    ends, targets = [len(inputs[i]) for i in asked], [requests[i][2] for i in asked]
                    found = score(row, ends, targets, self.softmax_dtype)
                    answers.update(zip(asked, found, strict=True))
                    progress.update(len(asked))
        return [answers[i] for i in range(len(requests))]


class _Prefixed(SqliteDict):
    """lm-eval's store of answers with one run's key in front of every request key."""

    answers_of: str

    def __contains__(self, key: str) -> bool:
        return super().__contains__(f"{self.answers_of}:{key}")

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(f"{self.answers_of}:{key}")

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(f"{self.answers_of}:{key}", value)


def separate_answers(store: SqliteDict, run_key: str) -> None:
    """From now on ``store`` finds and keeps only the answers of the run ``run_key``.

    lm-eval opens the store and passes it on already in use; changing its class is the one way to reach its
    look-ups without changing lm-eval.
    """
    store.__class__ = _Prefixed
    store.answers_of = run_key
