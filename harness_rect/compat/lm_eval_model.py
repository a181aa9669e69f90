"""The parts of lm-eval's HFLM that the model class overrides and that are not documented as stable."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from lm_eval.api.model import LM, CacheHook
from lm_eval.models.huggingface import HFLM
from sqlitedict import SqliteDict
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from harness_rect.answers import Answer
from harness_rect.compat.lm_eval import IdRequest
from harness_rect.compat.shared_passes import Ids, grouped_by_prefix, score
from harness_rect.errors import UserError
from harness_rect.fingerprint import digest
from harness_rect.io.progress import logging_only


class KeyedAnswers(LM):
    """A model class whose answers ``--use_cache`` keeps apart for each edited model."""

    @property
    def run_key(self) -> str | None:
        """Identifies the weights in lm-eval's ``--use_cache`` file; None for unedited weights."""
        return None

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Store answers of this edited model separately in lm-eval's ``--use_cache`` file.

        lm-eval keys that file by the request text alone, so the model before and after editing would
        share answers.
        """
        if self.run_key is not None and cache_hook.dbdict is not None:
            separate_answers(cache_hook.dbdict, self.run_key)
        super().set_cache_hook(cache_hook)


class SeededLM(KeyedAnswers):
    """A model class that samples from a seed of each prompt while ``_seeded`` is set."""

    _seeded = False

    def generate_seeded(self, requests: Any) -> Any:
        """Samples that depend on the prompt alone, not on the batch or on what was sampled before."""
        self._seeded = True
        try:
            return self.generate_until(requests)
        finally:
            self._seeded = False


def _no_mask_missed() -> AbstractContextManager[None]:
    """Without transformers' warning that token ids may be padded and that no mask was given.

    lm-eval pads what it scores on the right, where no mask is needed; what it generates from has one, which
    transformers puts aside where nothing is padded, and then it takes answers that have ended for padding.
    """
    return logging_only(logging.ERROR, "transformers.modeling_utils")


def share_rows(model: HFLM) -> None:
    """Let each of several processes evaluate its part of the rows.

    HFLM does so only where it sees several GPUs: on CPUs each process would evaluate everything.
    It has no ``accelerator`` where processes hold parts of one model (``tp_plan``).
    """
    accelerator = getattr(model, "accelerator", None)
    if accelerator is not None and model.world_size < accelerator.num_processes:
        model._rank, model._world_size = accelerator.process_index, accelerator.num_processes


#: Names of the most tokens to generate, the first that is given counts.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
#: Below it softmax(logits / temperature) overflows.
COLDEST = 1e-3


class CheckedLM(LM):
    """A class of lm-eval that tells in a line what it would only assert, or fail on, while it answers.

    Raises:
        UserError: the model is too short for an answer, or it is to sample without a temperature.
    """

    max_length: int
    max_gen_toks: int

    @property
    def longest_answer(self) -> int:
        """The most tokens of an answer that can be scored."""
        return self.max_length

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        decoder_only = getattr(self, "backend", "causal") == "causal"
        for _, given in (request.args for request in requests):
            wanted = next((given[name] for name in LENGTHS if given.get(name)), self.max_gen_toks)
            if decoder_only and int(wanted) >= self.max_length:
                most = f"the model reads {self.max_length} tokens at most (max_length)"
                raise UserError(f"max_gen_toks={wanted}: {most}, with the prompt")
            if given.get("do_sample") and (given.get("temperature") or 0) < COLDEST:
                raise UserError(f"gen_kwargs: do_sample needs a temperature of {COLDEST} or more")
        return super().generate_until(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **given: Any) -> Any:
        longest = max((len(target) for _, _, target in requests), default=0)
        if longest > self.longest_answer:
            raise UserError(f"max_length={self.max_length}: an answer of the tasks has {longest} tokens")
        return super()._loglikelihood_tokens(requests, *args, **given)


class CheckedHF(CheckedLM, HFLM):
    """HFLM with these checks. ``batch_size=auto:N`` may ask for more measurements than there are requests."""

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        fewer = min(self.batch_schedule, len(n_reordered_requests))
        with mock.patch.object(self, "batch_schedule", fewer):
            return super()._batch_scheduler(pos, n_reordered_requests)


class SharedPassLM(SeededLM, CheckedHF):
    """HFLM that answers several token-id requests on one sequence from one forward pass.

    Attributes:
        quiet: no progress bars.
    """

    quiet = False

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        share_rows(self)

    @contextmanager
    def answers_not_stored(self) -> Iterator[None]:
        """No answer goes into lm-eval's ``--use_cache`` file."""
        with mock.patch.object(self, "cache_hook", CacheHook(None)):
            yield

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm or self.quiet)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm or self.quiet)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().generate_until(requests, disable_tqdm or self.quiet)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **given: Any) -> Tensor:
        if self._seeded:
            sampling = SeededSampling(context, given["attention_mask"], given.pop("top_k"))
            given |= {"do_sample": False, "logits_processor": LogitsProcessorList([sampling])}
            given.pop("temperature", None)
        with _no_mask_missed():
            return super()._model_generate(context, max_length, stop, **given)

    def _model_call(self, *args: Any, **given: Any) -> Tensor:
        with _no_mask_missed():
            return super()._model_call(*args, **given)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Answer:
        """A text that remembers whether an end-of-text token is among its tokens.

        HFLM decodes what was generated by this method, and cuts it at a stop by ``split``.
        """
        ends = self.model.generation_config.eos_token_id if self.model.can_generate() else None
        ends = {self.eot_token_id, *(ends if isinstance(ends, list) else [ends])}
        ended = not ends.isdisjoint(tokens if isinstance(tokens, list) else [tokens])
        return Answer(super().tok_decode(tokens, skip_special_tokens), ended)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """HFLM's answers, with fewer passes for the editing tasks, whose requests share sequences.

        All other requests are passed to HFLM, as are those where no pass can be saved or that exceed the
        model's length.
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
            self.batch_sizes: dict[int, int] = {}  # as in HFLM: sizes found for other requests do not apply
        # HFLM's scheduler needs the request that consists of the whole sequence.
        longest = [(ids, *requests[which[0]][1:]) for ids, which in groups.items()]
        answers: dict[int, tuple[float, bool]] = {}
        quiet = disable_tqdm or self.rank != 0
        done = 0
        with tqdm(total=len(requests), disable=quiet, desc="Running loglikelihood requests") as progress:
            while done < len(longest):
                size = self._batch_scheduler(done, longest) if auto else self.batch_size
                batch = [ids for ids, *_ in longest[done : done + size]]
                done += len(batch)
                # Any token can be used as padding on the right: earlier tokens do not attend to it.
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


def prompt_seed(prompt: list[int]) -> int:
    """The seed of the sample that continues these token ids."""
    return int(digest({"prompt": prompt})[:15], 16)


class SeededSampling(LogitsProcessor):
    """Top-k sampling as an argmax, by noise of the Gumbel distribution from a seed for each sequence.

    The greedy choice of logits + noise is a sample of their softmax. The seed is made of the prompt's tokens,
    so that a sample does not depend on the other sequences of its batch.

    Args:
        context, mask: (sequences, tokens), the prompts and which of their tokens are no padding.
        top_k: how many of the likeliest tokens may be drawn.
    """

    def __init__(self, context: Tensor, mask: Tensor, top_k: int) -> None:
        self.top_k = top_k
        rows = zip(context.tolist(), mask.tolist(), strict=True)
        prompts = [[token for token, kept in zip(*row, strict=True) if kept] for row in rows]
        self._generators = [torch.Generator().manual_seed(prompt_seed(prompt)) for prompt in prompts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.float().topk(min(self.top_k, scores.shape[1]))
        draws = [torch.rand(best.values.shape[1], generator=g, dtype=torch.float64) for g in self._generators]
        noise = -torch.log(-torch.log(torch.stack(draws)))
        drawn = (best.values.log_softmax(-1) + noise.to(best.values)).argmax(-1, keepdim=True)
        chosen = torch.full_like(scores, -torch.inf)
        return chosen.scatter_(1, best.indices.gather(1, drawn), 0.0)


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
    """Restrict ``store`` to the answers of the run ``run_key``.

    lm-eval opens the store itself; without changing lm-eval, its look-ups can be changed only by changing the
    class of the open store.
    """
    store.__class__ = _Prefixed
    store.answers_of = run_key
