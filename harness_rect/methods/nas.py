"""Norm-anchored scaling (NAS, arXiv 2602.02543): every value gets the usual norm on the unedited model.

With v* = v0 + d the MLP output that a search finds (for MEMIT and its variants the MLP's part of z) and mu
the mean |v*| of searches for reference facts on the unedited model, those above the 95th percentile left out,

    v* <- mu v* / |v*|        and the fact is skipped if |v*| > limit * mu

where limit is 2 for MEMIT and its variants and 5 for ROME. mu is measured once for each model, set of
hyper-parameters and reference facts, and kept in the user's cache. The published code measures it with
MEMIT's hyper-parameters and bare prompts for every method, and keeps skipped facts in MEMIT's batch with
v* = v0; here it is measured as the method searches, and they are left out.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from harness_rect import embedded
from harness_rect.code_digest import code_digest
from harness_rect.edits import Edit, fingerprint, load_edits
from harness_rect.errors import UserError
from harness_rect.fingerprint import computation_digest, digest, model_fingerprint
from harness_rect.io.cache import cache_folder
from harness_rect.io.files import written_whole
from harness_rect.io.progress import progress_bar
from harness_rect.methods.value_search import SearchHyperParameters
from harness_rect.models import EditableLM
from harness_rect.models.forwards import fused_gelu

log = logging.getLogger(__name__)

#: What decides the measured norms.
CODE = ("compat.transformers", "edits.edit", "methods", "models", "precision")
#: Norms above this quantile are left out of the mean.
QUANTILE = 0.95
#: Reference facts where none are named: for embedded models a hundred of their own.
REFERENCE, EMBEDDED_REFERENCE = "counterfact", "tiny[900:1000]"
#: Facts searched between two updates of the progress bar.
CHUNK = 50


class NasHyperParameters(SearchHyperParameters):
    """Hyper-parameters of the search and of norm-anchored scaling.

    nas: give each value the norm mu, and skip facts whose value is far larger.
    nas_norm: mu; a list has one for each edited layer of ROME, in order. None: measured.
    nas_facts: the reference facts, as ``edits=`` takes them. None: CounterFact, or facts of the embedded
        model's own.
    nas_samples: how many of them are drawn (all, if there are fewer), with seed 0; up to 100,000.
    """

    nas: bool = False
    nas_norm: PositiveFloat | list[PositiveFloat] | None = None
    nas_facts: str | None = None
    nas_samples: int = Field(default=1000, ge=1, le=100_000)

    @model_validator(mode="after")
    def _nas_is_on(self) -> NasHyperParameters:
        if self.nas_norm is not None and not self.nas:
            raise ValueError("nas_norm: expected nas: true beside it")
        return self


#: (model, facts, hyper-parameters, templates, layer) -> the values v* that searches find, (facts, d_model).
FindValues = Callable[[EditableLM, Sequence[Edit], Any, list[Any], int], Tensor]


def with_reference_norms(
    lm: EditableLM,
    hparams: Any,
    model_name: str,
    seed: int,
    *,
    layers: Callable[[Any], list[int]],
    contexts: Callable[[EditableLM, Any, int], list[Any]],
    find_values: FindValues,
) -> NasHyperParameters:
    """A method's ``prepare``: with ``nas_norm`` measured on the unedited model, or taken from the cache.

    Args:
        layers: where these hyper-parameters search values. contexts: the method's.

    Raises:
        UserError: the reference facts cannot be read, or ``nas_norm`` has not one norm for each layer.
    """
    searched, given = layers(hparams), hparams.nas_norm
    if isinstance(given, list) and len(given) != len(searched):
        raise UserError(
            f"nas_norm: expected one number, or {len(searched)}, one for each layer (got {given})"
        )
    if not hparams.nas or given is not None:
        return hparams
    default = EMBEDDED_REFERENCE if embedded.is_embedded(model_name) else REFERENCE
    facts = [fact for fact in load_edits(hparams.nas_facts or default) if fact.has_subject]
    if not facts:
        raise UserError(f"nas_facts={hparams.nas_facts}: no fact has its subject in its prompt")
    facts = random.Random(0).sample(facts, min(len(facts), hparams.nas_samples))
    templates = contexts(lm, hparams, seed)
    key = {
        "model": model_fingerprint(lm.model),
        "computation": computation_digest(lm.model, lm.encoder.tokenizer),
        "hparams": hparams.model_dump(mode="json"),
        "templates": templates,
        "facts": fingerprint(facts),
        "token_ids": [lm.encoder.joined(fact.text, fact.target) for fact in facts],
        "code": code_digest(CODE),
    }
    path = cache_folder("nas") / f"{digest(key)[:32]}.json"
    try:
        norms = json.loads(path.read_text(encoding="utf-8"))
        log.info("NAS: mu %s from the cache: %s", norms, path)
    except (OSError, ValueError):
        with progress_bar() as progress, lm.frozen(), fused_gelu(lm.model):
            bar = progress.add_task("values on the unedited model", total=len(facts) * len(searched))
            norms = []
            for layer in searched:
                found = []
                for start in range(0, len(facts), CHUNK):
                    part = facts[start : start + CHUNK]
                    values = find_values(lm, part, hparams, templates, layer)
                    found.append(values.double().norm(dim=1).cpu())
                    progress.advance(bar, len(part))
                each = torch.cat(found)
                norms.append(float(each[each <= each.quantile(QUANTILE)].mean()))
        log.info("NAS: mu %s, measured on %d facts", norms, len(facts))
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(norms), encoding="utf-8")
    return hparams.model_copy(update={"nas_norm": norms})


def anchored(
    values: Tensor, hparams: NasHyperParameters, limit: float, index: int = 0
) -> tuple[Tensor, list[int]]:
    """Values with the norm mu, and which facts are to be skipped.

    Args:
        values: v*, (facts, d_model). limit: of |v*| / mu. index: of the layer in ``nas_norm``.
    """
    mu = hparams.nas_norm[index] if isinstance(hparams.nas_norm, list) else hparams.nas_norm
    if mu is None:
        raise ValueError("nas_norm is measured by the method's prepare")
    norms = values.norm(dim=1, keepdim=True)
    return values * (mu / norms), (norms.squeeze(1) > limit * mu).nonzero().flatten().tolist()
