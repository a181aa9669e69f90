"""``--model edited_hf``: lm-eval's Hugging Face model, edited before it is evaluated.

Everything ``HFLM`` takes works here too. The class knows nothing of editing methods: it validates the
arguments, hands the model to an :class:`~harness_rect.session.EditSession`, and reports what was done.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from harness_rect import embedded
from harness_rect.compat.request_cache import separate_answers
from harness_rect.config import EditConfig
from harness_rect.edits import load_edits
from harness_rect.errors import UserError, closest, one_line_errors
from harness_rect.evaluation.editing import IdRequest
from harness_rect.evaluation.shared_passes import Ids, carriers, score
from harness_rect.io.files import check_output
from harness_rect.models.architecture import check_editable, refuse_config
from harness_rect.models.load import load_errors
from harness_rect.moments.provider import layout_name
from harness_rect.session.checkpoint import save_checkpoint
from harness_rect.session.report import EditReport
from harness_rect.session.runs import EditCache
from harness_rect.session.stream import EditSession, check_edits

log = logging.getLogger("harness_rect.edited_hf")

QUANTISING = ("load_in_8bit", "load_in_4bit", "autogptq", "gptqmodel")


class EditedHF(HFLM):
    """A causal LM into which a stream of edits goes before evaluation.

    Args:
        pretrained: as in HFLM; without it the embedded model ``rect-tiny``.
        method: rome, r_rome, memit or none (lm-eval turns ``method=none`` into None, which means the same).
        edits, edit_batch_size, rect, regularizer, keep, rect_convention, hparams, stats, edit_cache,
            edit_seed: see :class:`~harness_rect.config.EditConfig` and the README.
        data: where the tasks read from; it reaches them as metadata and is not used here.
        save_edited: a folder for the edited checkpoint.
        **kwargs: HFLM's own arguments.

    Raises:
        UserError: something asked for cannot be done; under the ``lm_eval`` command one line and exit
            status 2. The checks that need no weights come before the model is loaded.
    """

    def __init__(
        self,
        pretrained: str | transformers.PreTrainedModel | None = None,
        method: str | None = "rome",
        edits: str | None = None,
        edit_batch_size: int = 1,
        rect: float | str | None = None,
        regularizer: str | None = None,
        keep: float | str | None = None,
        rect_convention: str | None = None,
        hparams: str | None = None,
        stats: str | None = None,
        edit_cache: str | None = None,
        edit_seed: int = 0,
        data: str | None = None,
        save_edited: str | None = None,
        **kwargs: Any,
    ) -> None:
        with one_line_errors():
            share_logging()
            if pretrained is None and method == "rome" and (edits, rect, regularizer, keep) == (None,) * 4:
                rect = embedded.DEFAULT_RECT
            if pretrained is None:
                pretrained = embedded.NAME
                embedded.use_as_default()
            if embedded.is_embedded(pretrained):
                edits = edits or embedded.DEFAULT_EDITS
                log.info(
                    "embedded model %s: method %s, rect %s, edits %s, data %s",
                    *(pretrained, method, rect, edits, data or "tiny"),
                )
            name = pretrained if isinstance(pretrained, str) else getattr(pretrained, "name_or_path", "")
            pretrained = embedded.resolve_model(pretrained)
            config = EditConfig.from_args(
                method=method if method is not None else "none",
                edits=edits,
                edit_batch_size=edit_batch_size,
                rect=rect,
                regularizer=regularizer,
                keep=keep,
                rect_convention=rect_convention,
                hparams=hparams,
                stats=stats,
                edit_cache=edit_cache,
                edit_seed=edit_seed,
            )
            self._run_key: str | None = None
            self._edit_report: dict[str, Any] = {"method": "none"}
            editing = config.method != "none"
            # Not self.rank: without several GPUs lm-eval gives every process rank 0.
            saves = save_edited is not None and os.environ.get("RANK", "0") == "0"
            if saves:
                check_output(Path(str(save_edited)))
            _check_arguments(data, kwargs)
            stream = load_edits(config.edits) if editing and config.edits else None
            if stream is not None:
                check_edits(config, stream)
            _check_before_loading(pretrained, editing, kwargs)
            if kwargs.get("device") is None:  # HFLM's own default is a GPU, there or not
                kwargs["device"] = "cuda" if torch.cuda.is_available() else "cpu"
            with load_errors(f"pretrained={pretrained}"):
                super().__init__(pretrained=pretrained, **kwargs)
            if editing and stream is not None:
                check_editable(self.model)
                self._edit(config, stream, layout_name(name))
            if saves:
                report = EditReport.read(self._edit_report)
                save_checkpoint(Path(str(save_edited)), self.model, self.tokenizer, report)

    def _edit(self, config: EditConfig, stream: Any, model_name: str) -> None:
        """Edit on the first process and give every other process the same weights."""
        dist = torch.distributed
        shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not shared or dist.get_rank() == 0:
            session = EditSession(
                self.model, self.tokenizer, config, stream, model_name, add_special_tokens=self.add_bos_token
            )
            self._edit_report = session.run(EditCache.from_spec(config.edit_cache))
        if shared:
            box = [self._edit_report]
            dist.broadcast_object_list(box, src=0)
            self._edit_report = box[0]
            parameters = dict(self.model.named_parameters())
            for name in self._edit_report["weights"]:
                dist.broadcast(parameters[name].data, src=0)
        self._run_key = self._edit_report["run"]

    def describe(self, edit_report: dict[str, Any] | None) -> None:
        """Say what was done to the model by somebody else's session; None: nothing.

        For a sweep, which edits one model in many ways. Not together with lm-eval's ``--use_cache``.
        """
        self._edit_report = edit_report or {"method": "none"}
        self._run_key = self._edit_report.get("run")

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Keep answers of this edited model apart from all others in lm-eval's ``--use_cache`` file.

        lm-eval keys that file by the request text alone, so the model before and after editing would
        share answers.
        """
        if self._run_key is not None and cache_hook.dbdict is not None:
            separate_answers(cache_hook.dbdict, self._run_key)
        super().set_cache_hook(cache_hook)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """HFLM's answers, where our editing tasks ask from one pass for all beginnings of a sequence.

        All other requests are HFLM's own business, and so are those of which no pass can be saved or that
        must be cut at the model's length.
        """
        if self.backend == "causal" and self.logits_cache and all(isinstance(r, IdRequest) for r in requests):
            inputs = [(*context, *target[:-1]) for _, context, target in requests]
            passes = carriers(inputs)
            if len(passes) < len(set(inputs)) and len(next(iter(passes))) <= self.max_length:
                return self._answer(requests, inputs, passes, disable_tqdm)
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def _answer(
        self,
        requests: Sequence[Any],
        inputs: Sequence[Ids],
        passes: dict[Ids, list[int]],
        disable_tqdm: bool,
    ) -> list[tuple[float, bool]]:
        """Answers in the order of ``requests``, from the sequences ``passes`` in batches, longest first."""
        auto = self.batch_size == "auto"
        if auto:
            self.batch_sizes: dict[int, int] = {}  # as HFLM: those found for other requests are not ours
        chunks = Collator.get_chunks(
            # Each sequence by the request that is all of it, which is what lm-eval's scheduler reads.
            [(ids, *requests[which[0]][1:]) for ids, which in passes.items()],
            n=0 if auto else self.batch_size,
            fn=self._batch_scheduler if auto else None,
        )
        answers: dict[int, tuple[float, bool]] = {}
        quiet = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=quiet, desc="Running loglikelihood requests") as progress:
            for chunk in chunks:
                batch = [ids for ids, *_ in chunk]
                # On the right any token serves for padding: none before it sees it.
                padded = pad_sequence([torch.tensor(ids) for ids in batch], batch_first=True)
                logits = self._model_call(padded.to(self.device))
                logits = logits[:, -padded.shape[1] :]  # without the virtual tokens of prompt tuning
                for ids, row in zip(batch, logits, strict=True):
                    asked = passes[ids]
                    ends, targets = [len(inputs[i]) for i in asked], [requests[i][2] for i in asked]
                    found = score(row, ends, targets, self.softmax_dtype)
                    answers.update(zip(asked, found, strict=True))
                    progress.update(len(asked))
        return [answers[i] for i in range(len(requests))]

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's information, and under ``edit`` what was done to the model."""
        return {**super().get_model_info(), "edit": self._edit_report}


def share_logging() -> None:
    """Let our log lines come out with lm-eval's, which are not passed to the root logger."""
    ours, theirs = logging.getLogger("harness_rect"), logging.getLogger("lm_eval")
    if theirs.handlers and not ours.handlers:
        ours.handlers, ours.propagate = list(theirs.handlers), theirs.propagate
        ours.setLevel(theirs.level)


def _check_arguments(data: str | None, kwargs: dict[str, Any]) -> None:
    """Refuse what would only be found wrong once the model is loaded, or edited.

    HFLM passes arguments it does not know on to transformers, so only those close to ours are questioned.
    """
    if data not in (None, "hub", "tiny") and not Path(str(data)).expanduser().is_dir():
        raise UserError(f"data={data}: expected hub, tiny or a folder that exists")
    ours = [
        name for name in inspect.signature(EditedHF.__init__).parameters if name not in {"self", "kwargs"}
    ]
    known = inspect.signature(HFLM.__init__).parameters
    for name in kwargs.keys() - known.keys():
        if close := closest(name, ours, cutoff=0.75):
            raise UserError(f"model_args: unknown argument {name!r}: did you mean {close!r}?")


def _check_before_loading(pretrained: object, editing: bool, kwargs: dict[str, Any]) -> None:
    """Everything that can be refused from the arguments and the configuration file alone."""
    if editing and (asked := [key for key in QUANTISING if kwargs.get(key)]):
        raise UserError(f"{asked[0]}: a quantised model cannot be edited; leave it out, or use method=none")
    if editing and kwargs.get("tp_plan") is not None:
        raise UserError("tp_plan: editing needs whole weight matrices; leave it out, or use method=none")
    if not editing or not isinstance(pretrained, str):
        return
    with load_errors(f"pretrained={pretrained}"):
        config = transformers.AutoConfig.from_pretrained(
            pretrained,
            revision=str(kwargs.get("revision", "main")),
            subfolder=kwargs.get("subfolder", ""),
            trust_remote_code=kwargs.get("trust_remote_code", False),
            gguf_file=kwargs.get("gguf_file"),
        )
    refuse_config(config)
