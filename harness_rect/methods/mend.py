"""MEND: Fast Model Editing at Scale (Mitchell et al., ICLR 2022, arXiv 2110.11309), as in its code.

One forward and one backward pass of the edit loss (mean NLL over all target tokens of the batch) give, at
every token, the input x of an edited weight W and the gradient g at its output. Their outer products, summed
over tokens, are W's gradient. A trained hypernetwork changes the pair before that product is taken:

    h_0 = [(x - mean_x) / (std_x + 1e-7); (g - mean_g) / (std_g + 1e-7)]
    h_i = h_i-1 + max(scale_m * (U_i V_i h_i-1 + b_i) + shift_m, 0),        i = 1, 2
    [x~; g~] = h_2
    dW = sum over tokens of g~ x~^T,        W <- W + lr_W dW

with one network for each distinct (width of x, width of g), shared by the weights of that shape; m is a
weight's mode, its index among them. Tokens whose x or g is zero (padding, and in the last block all positions
that do not predict the target) are left out. The whitening is not undone. The update is added, so while
x~, g~ are near the whitened pair an edit lowers the loss only if lr_W is negative, as it is initially in
``harness-rect train-mend``.

:func:`update` is this rule on plain tensors, without gradients; training calls the networks itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import computed_field, field_validator, model_validator
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.errors import UserError
from harness_rect.fingerprint import model_fingerprint
from harness_rect.methods.base import Context, HyperParameters, Method, Proposal
from harness_rect.methods.gradients import target_gradients
from harness_rect.methods.mend_network import Editor, HyperNetwork
from harness_rect.methods.mend_weights import Description, load_editor, read_description, weights_folder
from harness_rect.models import EditableLM
from harness_rect.updates import LowRank, Update

log = logging.getLogger(__name__)


@torch.no_grad()
def factors(x: Tensor, g: Tensor, network: HyperNetwork, mode: int) -> tuple[Tensor, Tensor]:
    """(x~ (n, a), g~ (n, b)) of the n tokens where neither x nor g is zero.

    Args:
        x: (..., a), inputs of the weight. g: (..., b), gradients of the loss at its outputs; the leading
            dimensions are the same and are pooled. network: for these widths, of the same dtype and device.
        mode: the weight's index among those that share the network.
    """
    used = active(x, g)
    return network(x[used], g[used], mode)


def active(x: Tensor, g: Tensor) -> Tensor:
    """(...) bool: the tokens at which neither x (..., a) nor g (..., b) is zero."""
    return (x != 0).any(-1) & (g != 0).any(-1)


@torch.no_grad()
def update(
    x: Tensor,
    g: Tensor,
    network: HyperNetwork,
    mode: int,
    lr: float | Tensor = 1.0,
    *,
    transposed: bool = False,
) -> Tensor:
    """What MEND adds to one weight, lr * dW.

    Args:
        x, g, network, mode: as for :func:`factors`. lr: the weight's learned scalar.
        transposed: whether the weight is stored as (inputs, outputs), as GPT-2's ``Conv1D`` does.

    Returns:
        (b, a), or (a, b) if ``transposed``: the shape of the stored weight.
    """
    x_new, g_new = factors(x, g, network, mode)
    return lr * (x_new.T @ g_new if transposed else g_new.T @ x_new)


class MendHyperParameters(HyperParameters):
    """Hyper-parameters of an edit with MEND; the shape of the networks is fixed by their training.

    weights: folder written by ``harness-rect train-mend``, or ``rect-tiny`` for the embedded one.
    inner_params: names of the edited weights, as in published files; compared with the trained ones.
    """

    weights: str
    inner_params: list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _trained(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("weights"):
            raise ValueError(
                "method=mend needs a hypernetwork trained for this model: make one with `harness-rect"
                " train-mend --model M --train FILE --output DIR` and give hparams=DIR (or weights: DIR in"
                " a file)"
            )
        return values

    @field_validator("weights")
    @classmethod
    def _readable(cls, folder: str) -> str:
        read_description(weights_folder(folder))
        return folder

    @model_validator(mode="after")
    def _same_weights(self) -> MendHyperParameters:
        trained = list(self.description.inner_params)
        if self.inner_params is not None and sorted(self.inner_params) != sorted(trained):
            raise ValueError(
                f"inner_params: {self.weights} was trained for {', '.join(trained)}; leave inner_params out"
            )
        return self

    @property
    def folder(self) -> Path:
        return weights_folder(self.weights)

    @cached_property
    def description(self) -> Description:
        return read_description(self.folder)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def weights_sha256(self) -> str:
        """Identifies the trained networks in reports and kept runs, independently of their folder."""
        return self.description.sha256


def edited_weights(lm: EditableLM, hparams: MendHyperParameters) -> list[str]:
    """The trained weights' names, after checking that this model has them in the trained shapes."""
    trained = hparams.description
    matrices = {f"{name}.weight" for block in lm.architecture.mlp_matrices for name in block}
    for name, widths in trained.inner_params.items():
        if name not in matrices:
            raise UserError(f"{hparams.folder}: trained for another model: this one has no MLP matrix {name}")
        found = lm.widths(name)
        if found != widths:
            raise UserError(
                f"{hparams.folder}: trained for another model: {name} maps {widths[0]} to {widths[1]} there"
                f" and {found[0]} to {found[1]} here"
            )
    load_editor(hparams.folder)
    if trained.model_fingerprint != model_fingerprint(lm.model):
        log.warning(
            "%s was trained for %s (%s); this model has other weights, so edits may fail",
            hparams.folder,
            trained.model,
            trained.dtype,
        )
    if trained.training.get("chat_template_sha") != lm.encoder.format.describe()["chat_template_sha"]:
        log.warning(
            "%s was trained on prompts without, or with another, chat template; edits may fail",
            hparams.folder,
        )
    return list(trained.inner_params)


def propose(
    lm: EditableLM, edits: Sequence[Edit], hparams: MendHyperParameters, context: Context
) -> Proposal:
    """Updates of all trained weights for one batch of facts."""
    editor = load_editor(hparams.folder)
    _, found, details = target_gradients(lm, edits, list(editor.weights), lambda targets, nll: nll.mean())
    updates: dict[str, Update] = {}
    for name, (x, g) in found.items():
        network, mode, lr = editor.of(name)
        x_new, g_new = factors(x, g.to(x.device), network.to(x.device), mode)
        g_new = lr.to(x.device) * g_new
        updates[name] = LowRank(x_new.T, g_new.T) if lm.is_transposed(name) else LowRank(g_new.T, x_new.T)
    return Proposal(updates, details)


#: Keys of published files that describe the training or the trained network.
PUBLISHED_KEYS = frozenset(
    (
        *("alg", "archive", "edit_lr", "lr", "lr_lr", "seed", "debug", "cedit", "cloc", "cbase", "dropout"),
        *("train_base", "no_grad_layers", "one_sided", "n_hidden", "hidden_dim", "init", "norm", "combine"),
        *("x_only", "delta_only", "act", "rank", "mlp_class", "shared", "model_save_pt", "edit_bs", "silent"),
        *("log_interval", "val_interval", "early_stop_patience", "early_stop_key", "eval_only", "half"),
        *("save", "log_errors", "unlikelihood", "max_iters", "val_batch_size", "accumulate_bs", "val_steps"),
        *("opt", "grad_clip", "max_epochs", "task", "counterfact"),
        *("lr_scale", "eval_log_interval", "final_eval", "verbose"),
    )
)

MEND = Method(
    name="mend",
    title="MEND",
    paper="[Mitchell et al. 2022](https://arxiv.org/abs/2110.11309)",
    summary="MLP matrices of the last blocks",
    needs="training (`harness-rect train-mend`)",
    cost="one forward and one backward pass",
    hparams=MendHyperParameters,
    default_hparams=lambda architecture: {},
    propose=propose,
    weights=edited_weights,
    batches=True,
    ignored_keys=PUBLISHED_KEYS,
)

__all__ = ["MEND", "Editor", "HyperNetwork", "active", "factors", "update"]
