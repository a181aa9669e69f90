"""Training MEND's hypernetworks for a frozen model (``harness-rect train-mend``).

One step takes a batch of facts, each an edit of its own. Their x and g come from one forward and one backward
pass. One forward pass of the edited model, in which each sequence uses the update of its own fact, gives the
loss, the mean over facts of

    c_edit * NLL of the target at a paraphrase + c_loc * KL(unedited || edited) at a locality prompt

per token, the KL divergence at the positions that predict the prompt's reference answer (Mitchell et al.
2022, section 3). The update is never a dense matrix: W + lr * dW acts as the hook
``output + lr * (input x~^T) g~``. Means and standard deviations of x and g are those of all training tokens
so far; they are fixed in validation and editing.

lr starts at ``-edit_lr``: initially x~ and g~ are the whitened x and g themselves, and an edit lowers its
loss only against the gradient; from a positive start training would have to cross zero first.

The state is saved regularly; an interrupted training resumes from it and ends with the same bits.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from harness_rect.code_digest import code_digest
from harness_rect.edits import Edit, fingerprint
from harness_rect.errors import UserError
from harness_rect.fingerprint import computation_digest, digest, model_fingerprint
from harness_rect.hparams import preset_for, presets
from harness_rect.io.files import check_output, check_parent
from harness_rect.io.progress import progress_bar
from harness_rect.io.resume import Resumable
from harness_rect.measure import EditProbes, Pair, probes
from harness_rect.methods import METHODS
from harness_rect.methods.gradients import inputs_and_gradients, targets_of, token_nll
from harness_rect.methods.mend import active
from harness_rect.methods.mend_network import Editor
from harness_rect.methods.mend_weights import DESCRIPTION, TENSORS, Description, save_editor
from harness_rect.models import EditableLM
from harness_rect.models.lm import Batch, unflatten
from harness_rect.moments.running import Running

log = logging.getLogger(__name__)

#: Modules that determine the trained networks.
CODE = ("compat.transformers", "edits.edit", "measure", "methods", "models", "moments.running", "training")
#: The state of an unfinished training, in the output folder.
PARTIAL = ".training.safetensors"
#: Validations in a training that is not stopped early.
VALIDATIONS = 40
#: Without a validation file a tenth of the training facts is held out, at most this many.
HELD_OUT = 500
#: Learning rate of the scalar of a weight, relative to its initial value.
LR_SHARE = 0.02
GRADIENT_CLIP = 100.0

#: Weight name -> (x~ (facts, tokens, inputs), lr * g~ (facts, tokens, outputs)).
Factors = dict[str, tuple[Tensor, Tensor]]


class MendTraining(BaseModel):
    """Settings of a training; the options of ``harness-rect train-mend`` are made from these fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: list[int] = Field(min_length=1, description="blocks whose MLP matrices are edited")
    rank: int = Field(default=32, ge=1, le=10_000, description="rank of the networks' layers")
    steps: int = Field(default=1000, ge=1, le=1_000_000, description="maximum number of steps")
    batch_size: int = Field(
        default=16, ge=1, le=100_000, description="facts per step, each an edit of its own"
    )
    lr: float = Field(default=1e-3, gt=0, le=1e3, description="learning rate of Adam for the networks")
    edit_lr: float = Field(
        default=1e-3, gt=0, le=1e3, description="minus the initial value of every weight's scalar"
    )
    c_edit: float = Field(default=1.0, ge=0, description="weight of the edit loss at paraphrases")
    c_loc: float = Field(default=1.0, ge=0, description="weight of the divergence at locality prompts")
    patience: int = Field(
        default=10,
        ge=1,
        description=f"validations, of {VALIDATIONS}, without a lower loss after which training stops",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="seed of the networks' initial weights and the order of facts"
    )


def usual_settings(lm: EditableLM) -> dict[str, Any]:
    """The published settings for this model; for any other the last three blocks."""
    method = METHODS["mend"]
    if (name := preset_for(method, lm)) and (preset := presets(method)[name]).training:
        log.info("settings of the training: preset %s, %s", name, preset.source)
        return preset.training
    n = lm.architecture.n_layers
    return {"layers": list(range(max(0, n - 3), n))}


def inner_params(lm: EditableLM, layers: Sequence[int]) -> dict[str, tuple[int, int]]:
    """All MLP weights of the blocks -> (inputs, outputs), in the model's order."""
    lm.check_layers(layers)
    names = [f"{module}.weight" for layer in layers for module in lm.architecture.mlp_matrices[layer]]
    return {name: lm.widths(name) for name in names}


def training_rows(spec: str) -> str:
    """``zsre``, with its slice, replaced by ZsRE's training rows: its evaluation rows are for editing."""
    return re.sub(r"^\s*zsre\s*(?=$|\[)", "zsre_train", spec)


def hold_out(edits: tuple[Edit, ...]) -> tuple[tuple[Edit, ...], tuple[Edit, ...]]:
    """(training, validation) facts of a file without validation rows: its last rows are held out."""
    n = min(HELD_OUT, max(1, len(edits) // 10))
    if len(edits) < 2:
        raise UserError("--train: at least two rows are needed, one of them for validation")
    return edits[:-n], edits[-n:]


def check_folder(folder: Path) -> None:
    """Check that a training can write into ``folder``: new, empty, or of a training that did not end.

    Raises:
        UserError: it cannot.
    """
    if not (folder / PARTIAL).is_file():  # the networks are written before the state is removed
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        check_output(folder, resumable=True, besides={TENSORS} if DESCRIPTION not in there else set())
    check_parent(folder / TENSORS)


@dataclass(frozen=True)
class Episode:
    """One edit in training: the fact, a paraphrase, and a locality prompt if the row has one."""

    rewrite: Pair
    paraphrase: Pair
    locality: Pair | None


@dataclass
class Progress:
    """The state of a training without its tensors.

    step: steps done. best, best_step: lowest validation loss and the step it was reached at. waited:
    validations since then. scores: all scores of that validation.
    """

    step: int = 0
    best: float = float("inf")
    best_step: int = 0
    waited: int = 0
    scores: dict[str, float] | None = None


class MendTrainer:
    """Trains an :class:`~harness_rect.methods.mend_network.Editor`; the model is never changed.

    Args:
        train, validation: facts. model_name: for the description.

    Raises:
        UserError: a row cannot be read by this model, or no row has what a part of the loss needs.
    """

    def __init__(
        self,
        lm: EditableLM,
        train: Sequence[Edit],
        validation: Sequence[Edit],
        settings: MendTraining,
        model_name: str = "",
    ) -> None:
        self.lm, self.settings, self.model_name = lm, settings, model_name
        self.train = [probes(lm, edit) for edit in train]
        self.validation = [probes(lm, edit) for edit in validation]
        for part, found in (("--train", self.train), ("--val", self.validation)):
            if settings.c_loc and not any(p.locality for p in found):
                raise UserError(f"{part}: no row has a locality prompt (loc); give some, or --c-loc 0")
        without = sum(not p.paraphrases for p in self.train)
        if without:
            log.warning("%d of %d rows have no paraphrase; their own prompt is used", without, len(train))
        self.editor = Editor.identity(
            inner_params(lm, settings.layers), settings.rank, -settings.edit_lr, settings.seed
        ).to(lm.input_device)
        self.running = {
            self.editor.key(name): Running.empty(sum(widths), lm.input_device)
            for name, widths in self.editor.weights.items()
        }
        self.optimiser = torch.optim.Adam(
            [
                {"params": list(self.editor.networks.parameters()), "lr": settings.lr},
                {"params": [self.editor.lr], "lr": LR_SHARE * settings.edit_lr},
            ]
        )
        self.best = self._snapshot()
        self.progress = Progress()
        self._fingerprint = model_fingerprint(lm.model)
        prompts = {name: value for name, value in lm.encoder.format.describe().items() if value is not None}
        hashes = {"train_sha256": fingerprint(train), "validation_sha256": fingerprint(validation)}
        self._facts = hashes | prompts
        computation = computation_digest(lm.model, lm.encoder.tokenizer)
        task = {"settings": settings.model_dump(mode="json"), "model": self._fingerprint, **self._facts}
        self._task = digest(task | {"computation": computation, "code": code_digest(CODE)})

    # -- the loop ---------------------------------------------------------------------------------

    def run(self, folder: Path) -> Description:
        """Train, and write the best state by validation loss into ``folder``."""
        unfinished, settings = Resumable(folder / PARTIAL, self._task), self.settings
        self._resume(unfinished)
        every = max(1, settings.steps // VALIDATIONS)
        with self.lm.frozen(), progress_bar() as bars:
            bar = bars.add_task("training MEND", total=settings.steps, completed=self.progress.step)
            while self.progress.step < settings.steps and self.progress.waited < settings.patience:
                self.step()
                bars.advance(bar)
                if self.progress.step % every == 0 or self.progress.step == settings.steps:
                    scores = self._validated()
                    text = ", ".join(f"{name} {value:.3g}" for name, value in scores.items())
                    bars.console.print(f"step {self.progress.step}: {text}", highlight=False)
                if unfinished.due:
                    self._save(unfinished)
        if self.progress.scores is None:
            raise UserError(
                f"no validation loss was finite in {self.progress.step} steps: lower --edit-lr or --lr"
            )
        described = self._write(folder)
        unfinished.finish()
        for path in folder.glob(f".{PARTIAL}.*.tmp"):  # of a run that was killed while saving
            path.unlink()
        return described

    def step(self) -> None:
        """Change the networks once; :meth:`run` does it as often as it takes."""
        loss, _ = self._loss(self._episodes(self.progress.step), training=True)
        self.optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.editor.parameters(), GRADIENT_CLIP)
        if torch.isfinite(norm):
            self.optimiser.step()
        else:
            log.warning("step %d: the gradient is not finite; the step is skipped", self.progress.step)
        self.progress.step += 1

    def _validated(self) -> dict[str, float]:
        """Measure the held-out facts; keep the networks if their loss is the lowest so far."""
        scores = self.validate()
        if scores["loss"] < self.progress.best:
            self.best = self._snapshot()
            self.progress.best, self.progress.best_step = scores["loss"], self.progress.step
            self.progress.waited, self.progress.scores = 0, scores
        else:
            self.progress.waited += 1
        return scores

    def _episodes(self, step: int) -> list[Episode]:
        """The facts of a step. Each epoch has a new order; it depends on the seed and the epoch only."""
        n, size, seed = len(self.train), self.settings.batch_size, self.settings.seed
        chosen: list[EditProbes] = []
        for place in range(step * size, (step + 1) * size):
            epoch, index = divmod(place, n)
            if not chosen or index == 0:
                order = list(range(n))
                random.Random(f"{seed} epoch {epoch}").shuffle(order)
            chosen.append(self.train[order[index]])
        draw = random.Random(f"{seed} step {step}")
        return [episode(p, draw.choice) for p in chosen]

    # -- loss -------------------------------------------------------------------------------------

    def _loss(self, episodes: Sequence[Episode], training: bool) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of the edits, and sums over them of its parts and of the accuracies."""
        targets = targets_of(self.lm, [e.rewrite for e in episodes])
        found = inputs_and_gradients(
            self.lm,
            list(self.editor.weights),
            targets.batch,
            lambda: (token_nll(self.lm, targets) * targets.weights).sum(),
        )
        if training:
            self._update_statistics(found)
        factors = self._factors(found)
        sums = {"edit": 0.0, "kl": 0.0}
        owners = list(range(len(episodes)))
        with torch.set_grad_enabled(training):
            log_p, places = self._log_probs([e.paraphrase for e in episodes], factors, owners)
            nll = -log_p[torch.arange(len(log_p)), places.tokens] * places.weights
            edit = nll.sum()
            sums["edit"] = float(edit.detach())
            sums["generalization"] = _accuracy(log_p, places)
            total = self.settings.c_edit * edit
            held = [i for i in owners if episodes[i].locality is not None]
            if held:
                pairs = [pair for e in episodes if (pair := e.locality) is not None]
                with torch.no_grad():
                    before, _ = self._log_probs(pairs)
                after, places = self._log_probs(pairs, factors, held)
                kl = ((before.exp() * (before - after)).sum(-1) * places.weights).sum()
                sums["kl"] = float(kl.detach())
                same = (before.argmax(-1) == after.argmax(-1)).float()
                sums["locality"] = float((same * places.weights).sum())
                total = total + self.settings.c_loc * kl
        if not training:
            with torch.no_grad():
                sums["reliability"] = _accuracy(
                    *self._log_probs([e.rewrite for e in episodes], factors, owners)
                )
        return total / len(episodes), sums

    def _update_statistics(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Update the networks' means and deviations with the training tokens' x and g."""
        for name, (x, g) in found.items():
            used, key = active(x, g), self.editor.key(name)
            if used.any():
                pair = torch.cat([x[used], g[used]], -1)
                self.running[key] = self.running[key].updated(pair.to(self.lm.input_device))
        for key, running in self.running.items():
            network: Any = self.editor.networks[key]
            widths = [len(network.x_mean), len(network.g_mean)]
            for target, value in (("mean", running.mean), ("std", running.deviation)):
                x, g = value.float().split(widths)
                getattr(network, f"x_{target}").copy_(x)
                getattr(network, f"g_{target}").copy_(g)

    def _factors(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> Factors:
        """The factors of each fact's update of each weight; rows of tokens that take no part are zero."""
        factors: Factors = {}
        for name, pair in found.items():
            network, mode, lr = self.editor.of(name)
            x, g = (tensor.to(self.lm.input_device) for tensor in pair)
            used = active(x, g).unsqueeze(-1)
            x_new, g_new = network(x, g, mode)
            factors[name] = (x_new * used, lr * g_new * used)
        return factors

    def _log_probs(
        self, pairs: Sequence[Pair], factors: Factors | None = None, owners: Sequence[int] = ()
    ) -> tuple[Tensor, Any]:
        """(n, vocabulary) float32 log-probabilities of the target tokens' positions, and the targets.

        Args:
            factors, owners: updates, and the fact whose update each pair uses; None for the unedited model.
        """
        targets = targets_of(self.lm, pairs)
        with edited(self.lm, factors or {}, owners, targets.batch):
            logits = self.lm.logits_at(targets.batch, targets.rows, targets.positions)
        return logits.to(targets.tokens.device).float().log_softmax(-1), targets

    def validate(self) -> dict[str, float]:
        """``loss`` and its parts ``edit`` (nats a token) and ``kl`` (nats), reliability, generalization and
        locality (in [0, 1]) of single edits, means over the held-out facts.
        """
        sums: dict[str, float] = {}
        size = self.settings.batch_size
        draw = random.Random("validation")  # the same prompts in every validation
        chosen = [episode(p, draw.choice) for p in self.validation]
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            with torch.no_grad():
                loss, found = self._loss(part, training=False)
            for name, value in {"loss": float(loss) * len(part), **found}.items():
                sums[name] = sums.get(name, 0.0) + value
        n_held = sum(e.locality is not None for e in chosen)
        return {name: value / (n_held if name == "locality" else len(chosen)) for name, value in sums.items()}

    # -- files ------------------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.editor.state_dict().items()}

    def _write(self, folder: Path) -> Description:
        self.editor.load_state_dict(self.best)
        return save_editor(
            folder,
            self.editor,
            model=self.model_name,
            dtype=str(next(self.lm.model.parameters()).dtype).removeprefix("torch."),
            model_fingerprint=self._fingerprint,
            rank=self.settings.rank,
            training={
                **self.settings.model_dump(mode="json"),
                "facts": len(self.train),
                "best_step": self.progress.best_step,
                "last_step": self.progress.step,
                **self._facts,
            },
            validation={name: round(value, 6) for name, value in (self.progress.scores or {}).items()},
        )

    def _save(self, unfinished: Resumable) -> None:
        tensors = {f"editor.{name}": tensor for name, tensor in self._snapshot().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for key, running in self.running.items():
            tensors |= {f"running.{key}.{part}": tensor.clone() for part, tensor in vars(running).items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{part}": tensor for part, tensor in state.items()}
        unfinished.save(tensors, vars(self.progress))

    def _resume(self, unfinished: Resumable) -> None:
        """Continue an unfinished training of the same settings, model and facts."""
        found = unfinished.load()
        if found is None:
            if unfinished.path.is_file():
                raise UserError(
                    f"{unfinished.path}: the state of a training with other settings, model, facts or code;"
                    " give another --output, or remove the file to start over"
                )
            return
        tensors, state = found
        self.progress = Progress(**state)
        self.editor.load_state_dict(_under(tensors, "editor"))
        self.best = {name: t.to(self.lm.input_device) for name, t in _under(tensors, "best").items()}
        for key in self.running:
            device = self.running[key].mean.device
            parts = {n: t.to(device) for n, t in _under(tensors, f"running.{key}").items()}
            self.running[key] = Running(**parts)
        adam = self.optimiser.state_dict()
        for name, tensor in _under(tensors, "adam").items():
            index, _, part = name.partition(".")
            adam["state"].setdefault(int(index), {})[part] = tensor
        self.optimiser.load_state_dict(adam)
        log.info("resuming an interrupted training after %d steps", self.progress.step)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}


def episode(p: EditProbes, choose: Callable[[Sequence[Pair]], Pair]) -> Episode:
    """An edit with one of its paraphrases (or its own prompt, if it has none) and of its locality prompts."""
    return Episode(
        p.rewrite, choose(p.paraphrases or [p.rewrite]), choose(p.locality) if p.locality else None
    )


def _accuracy(log_probs: Tensor, places: Any) -> float:
    right = (log_probs.argmax(-1) == places.tokens).float()
    return float((right * places.weights).sum())


@contextmanager
def edited(lm: EditableLM, factors: Factors, owners: Sequence[int], batch: Batch) -> Iterator[None]:
    """Apply to each sequence of a batch the update of its own fact, within the block.

    Args:
        factors: weight -> (x~ (facts, tokens, inputs), lr * g~ (facts, tokens, outputs)).
        owners: for each sequence the index of its fact.
    """

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x_new, g_new = (tensor[list(owners)] for tensor in factors[name])
        inputs = unflatten(args[0], batch).to(x_new)
        change = (inputs @ x_new.transpose(1, 2)) @ g_new
        return output + change.to(output).view_as(output)

    modules = {lm.model.get_submodule(name.removesuffix(".weight")): name for name in factors}
    with lm.hooked({module: partial(hook, name) for module, name in modules.items()}):
        yield
