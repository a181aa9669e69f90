"""The edited model's answers beside those of the model before it was edited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness_rect.compat.lm_eval import IdRequest
from harness_rect.compat.lm_eval_model import SharedPassLM
from harness_rect.compat.shared_passes import grouped_by_prefix


class Comparison(NamedTuple):
    """The unedited and the edited model at some places of a text.

    kl: sum of KL(unedited || edited) over the places, in nats. changed: at how many of them the likeliest
    next token is another one. log_likelihood: of the text's tokens by the unedited model, in nats.
    """

    kl: float
    changed: int
    log_likelihood: float


class ComparingLM(SharedPassLM):
    """HFLM that answers for the unedited model too, by putting the original weights back for a while.

    Our tasks ask its ``generate_both``, ``generate_unedited`` and ``compare_ids``; see
    :mod:`harness_rect.compat.lm_eval`. The unedited model's answers are kept: a sweep asks for them again and
    again.
    """

    _originals: Mapping[str, Tensor] = {}
    _answers: dict[str, str]

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self._answers = {}

    def edited_from(self, originals: Mapping[str, Tensor]) -> None:
        """From now on the unedited model is this one with ``originals`` (parameter name -> weight) in it."""
        self._originals = dict(originals)

    @property
    def originals(self) -> Mapping[str, Tensor]:
        """Parameter name -> its weight in the unedited model, of those that editing changed."""
        return self._originals

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """The original weights in the model; afterwards the edited ones again, bit for bit."""
        edited: dict[str, Tensor] = {}
        # lm-eval would store the answers as the edited model's.
        with torch.no_grad(), self.answers_not_stored():
            try:
                for name, original in self._originals.items():
                    weight = self.model.get_parameter(name)
                    edited[name] = weight.detach().clone()
                    weight.copy_(original)
                yield
            finally:
                for name, now in edited.items():
                    self.model.get_parameter(name).copy_(now)

    def generate_both(self, requests: Sequence[Any]) -> list[tuple[str, str]]:
        """(edited model's answer, unedited model's answer) of each request, in the order given."""
        answers = self.generate_until(requests)
        if not self._originals:
            self._answers |= zip(map(_key, requests), answers, strict=True)
            return list(zip(answers, answers, strict=True))
        # The same batches for both models: the composition of a batch changes the last bits of its logits.
        return list(zip(answers, self.generate_unedited(requests), strict=True))

    def generate_unedited(self, requests: Sequence[Any]) -> list[str]:
        """The unedited model's answer to each request, in the order given."""
        new = {_key(one): one for one in requests if _key(one) not in self._answers}
        if new:
            with self.unedited():
                self._answers |= zip(new, self.generate_until(list(new.values())), strict=True)
        return [self._answers[_key(one)] for one in requests]

    def compare_ids(self, requests: Sequence[IdRequest]) -> list[Comparison]:
        """How the next-token distributions of the two models differ at the last ids of each request.

        The logits of one sequence at a time are in memory, of both models.
        """
        inputs = [(*context, *target[:-1]) for _, context, target in requests]
        answers: dict[int, Comparison] = {}
        for ids, which in grouped_by_prefix(inputs).items():
            batch = torch.tensor([ids], device=self.device)
            edited = unedited = self._model_call(batch)[0]
            if self._originals:
                with self.unedited():
                    unedited = self._model_call(batch)[0]
            for i in which:
                target = requests[i][2]
                places = slice(len(inputs[i]) - len(target), len(inputs[i]))
                answers[i] = compare(unedited[places], edited[places], target)
        return [answers[i] for i in range(len(requests))]


def compare(unedited: Tensor, edited: Tensor, target: Sequence[int]) -> Comparison:
    """Sums over the places of :class:`Comparison`.

    Args:
        unedited, edited: (places, vocabulary) logits.
        target: the next token at each place.
    """
    before, after = unedited.float().log_softmax(-1), edited.float().log_softmax(-1)
    ids = torch.tensor(target, device=before.device)
    return Comparison(
        kl=float((before.exp() * (before - after)).sum(-1).clamp(min=0).sum()),
        changed=int((before.argmax(-1) != after.argmax(-1)).sum()),
        log_likelihood=float(before.gather(1, ids[:, None]).sum()),
    )


def _key(request: Any) -> str:
    return repr(request.args)
