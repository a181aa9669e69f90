"""How much memory a trajectory needs on each of its devices, from the model's configuration alone.

What one token takes in a forward pass, and what a block keeps of it for a backward pass, was measured on
GPT-2's and Llama's blocks with torch's profiler; attention is taken to be fused. Allocators and libraries
come on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import transformers
from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map

from harness_rect import embedded
from harness_rect.compat.transformers import STEPWISE_GELU
from harness_rect.errors import UserError
from harness_rect.experiments.sweep.plan import ModelEntry, SweepConfig, Trajectory
from harness_rect.fingerprint import CHUNK
from harness_rect.hparams import resolve_hparams
from harness_rect.measure import BATCH_SEQUENCES
from harness_rect.methods import METHODS
from harness_rect.methods.alphaedit import AlphaEditHyperParameters
from harness_rect.methods.contexts import BARE
from harness_rect.methods.fact_reader import CHUNK_TOKENS
from harness_rect.methods.ft import FtHyperParameters
from harness_rect.methods.kn import PASS_TOKENS, KnHyperParameters
from harness_rect.methods.memit import SAMPLED_CONTEXTS, SAMPLED_LENGTH, MassEditHyperParameters
from harness_rect.methods.mend import MendHyperParameters
from harness_rect.methods.nas import CHUNK as NAS_FACTS
from harness_rect.methods.value_search import CPU_TOKENS, SearchHyperParameters, subject_position
from harness_rect.models import EditableLM
from harness_rect.models.architecture import refuse_config
from harness_rect.models.load import check_device, load_errors
from harness_rect.models.prompt_format import PromptFormat

#: Edits whose prompts are looked at.
LOOKED_AT = 64
#: Bytes for each element of a weight while its update is trimmed, or its change measured.
TRIMMING = 32


@dataclass(frozen=True)
class Part:
    """What of a model lies on one device.

    parameters: their names. blocks: those that are computed there. head: whether logits are. moving: most
    bytes of weights that lie there in passing, from main memory or a disk.
    """

    parameters: Set[str]
    blocks: Sequence[int]
    head: bool = True
    moving: int = 0


@dataclass(frozen=True)
class Needed:
    """Bytes on the device.

    weights: of the model. copies: of the edited weights, the originals and those in float32. moments: what
    stays of second moments and of the keys of earlier edits. step: the most that a step takes beside these.
    """

    weights: int
    copies: int
    moments: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.copies + self.moments + self.step


def skeleton(
    entry: ModelEntry, apply_chat_template: bool | str = False, system_instruction: str | None = None
) -> EditableLM:
    """A model without its weights, on torch's device ``meta``; its prompts are put to it as in the sweep.

    Raises:
        UserError: its configuration or its tokenizer cannot be read, or it cannot be edited.
    """
    given: dict[str, Any] = entry.arguments
    name = embedded.resolve_model(entry.pretrained)
    where = {key: given[key] for key in ("revision", "subfolder", "trust_remote_code") if key in given}
    with load_errors(f"models: {entry.pretrained}"):
        config = transformers.AutoConfig.from_pretrained(name, **where)
        refuse_config(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(given.get("tokenizer", name), **where)
        asked = given.get("dtype", "auto")
        dtype = getattr(config, "dtype", None) if asked == "auto" else getattr(torch, str(asked), None)
        if asked != "auto" and not isinstance(dtype, torch.dtype):
            raise UserError(f"models: {entry.pretrained}: torch has no dtype {asked}")
        trusted = {key: where[key] for key in where if key == "trust_remote_code"}
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype or torch.float32, **trusted
            )
    arguments = {key: given[key] for key in ("enable_thinking",) if key in given}
    format = PromptFormat.of(tokenizer, apply_chat_template, system_instruction, arguments)
    return EditableLM(model.eval(), tokenizer, given.get("add_bos_token"), format)


def device_of(entry: ModelEntry, config: SweepConfig) -> torch.device:
    """Where a sweep puts a model.

    Raises:
        UserError: torch knows no such device.
    """
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    asked = entry.arguments.get("device") or config.device or usual
    try:
        return torch.device(asked)
    except (RuntimeError, TypeError):
        raise UserError(f"device: {asked}: expected cpu, cuda, cuda:1, mps") from None


def free_on(device: torch.device) -> int | None:
    """Bytes of memory that are free on a device; None for one that is not here."""
    try:
        check_device(device, "device")
    except UserError:
        return None
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def weights_of(lm: EditableLM) -> int:
    """Bytes of a model's parameters."""
    return sum(p.numel() * p.itemsize for p in lm.model.parameters())


#: Values of ``device_map`` for which accelerate looks for a place for each block; others are a device.
MAPPED = ("auto", "balanced", "balanced_low_0", "sequential")


def parts_of(
    lm: EditableLM, entry: ModelEntry, device: torch.device, free: Mapping[Any, Any] | None = None
) -> dict[torch.device, Part]:
    """The parts of a model on the devices that lm-eval gives it: one, or all GPUs with ``parallelize``.

    Args:
        lm: the model, with or without its weights. device: of a model on one.
        free: number of a GPU, or cpu -> bytes to use; those of this machine by default.
    """
    given: dict[str, Any] = entry.arguments
    if given.get("parallelize") and free is None:
        free = {name: size for name, size in get_max_memory().items() if name != "cpu"}
        if (most := given.get("max_memory_per_gpu")) is not None:
            free = dict.fromkeys(free, most)
    places: Mapping[str, Any] = {"": device}
    if given.get("parallelize") and free:
        if (most := given.get("max_cpu_memory")) is not None:
            free = {**free, "cpu": most}
        asked = given.get("device_map") or "auto"
        places = _mapped(lm.model, asked, free) if asked in MAPPED else {"": asked}
    return parts_in(lm, places)


def _mapped(model: Any, how: str, free: Mapping[Any, Any]) -> dict[str, Any]:
    """Where transformers puts the modules of a model for ``device_map=auto`` and the like."""
    whole = list(model._no_split_modules or [])
    if how != "sequential":
        free = get_balanced_memory(
            model, dict(free), no_split_module_classes=whole, low_zero=how == "balanced_low_0"
        )
    return infer_auto_device_map(model, dict(free), no_split_module_classes=whole)


def parts_in(lm: EditableLM, places: Mapping[str, Any]) -> dict[torch.device, Part]:
    """The parts of a model in a device map: name of a module or parameter -> device, cpu or disk.

    What lies in main memory or on a disk beside GPUs is computed on the first GPU.
    """
    devices = {name: _device(place) for name, place in places.items()}
    first = next((device for device in devices.values() if device.type not in OFFLOADED), None)

    def lies_on(name: str) -> torch.device:
        prefixes = (name.rsplit(".", n)[0] for n in range(name.count(".") + 1))
        return next(devices[prefix] for prefix in (*prefixes, "") if prefix in devices)

    def computed_on(name: str) -> torch.device:
        device = lies_on(name)
        return device if first is None or device.type not in OFFLOADED else first

    a, parameters = lm.architecture, dict(lm.model.named_parameters())
    blocks = [computed_on(a.weight_name(layer)) for layer in range(a.n_layers)]
    head = blocks[-1] if a.head is None else computed_on(f"{a.head}.weight")
    moved = [p.numel() * p.itemsize for name, p in parameters.items() if computed_on(name) != lies_on(name)]
    return {
        device: Part(
            {name for name in parameters if lies_on(name) == device},
            [layer for layer, where in enumerate(blocks) if where == device],
            device == head,
            max(moved, default=0) if device == first else 0,
        )
        for device in dict.fromkeys(devices.values())
        if device.type != "meta"
    }


#: Kinds of devices of weights that are computed elsewhere; ``meta`` stands for a disk.
OFFLOADED = ("cpu", "meta")


def _device(place: Any) -> torch.device:
    return torch.device("meta" if place == "disk" else f"cuda:{place}" if isinstance(place, int) else place)


#: Bytes for each of the elements that a fingerprint sums at a time: three 64-bit tensors.
FINGERPRINT = 24


def needed(
    lm: EditableLM,
    trajectory: Trajectory,
    config: SweepConfig,
    device: torch.device,
    part: Part | None = None,
) -> Needed:
    """What a trajectory needs on a device.

    Args:
        lm: the model, with or without its weights. part: what lies there; all of it by default.

    Raises:
        UserError: the trajectory's hyper-parameters cannot be used with this model.
    """
    return _Estimate(lm, trajectory, config, device, part or parts_in(lm, {"": device})[device]).needed()


def scored_token(lm: EditableLM, part: Part) -> int:
    """Bytes that lm-eval takes on a device for each token of a batch that it scores, padding included.

    While a batch is computed, the log-probabilities of the one before are kept. What is generated takes less.
    """
    passes = _Passes(lm, part)
    row = passes.itemsize * lm.model.config.get_text_config().vocab_size if part.head else 0
    return max(row + len(part.blocks) * passes.kept() + passes.forward(fused=False), 3 * row)


class _Passes:
    """Bytes of forward and backward passes of a model, or of the part of it that is here."""

    def __init__(self, lm: EditableLM, here: Part) -> None:
        self.lm, self.a, self.here = lm, lm.architecture, here
        self.itemsize = next(iter(lm.model.parameters())).itemsize

    def forward(self, fused: bool = True) -> int:
        """Of a token in a pass without gradients."""
        if not self.here.blocks:
            return 0
        return (4 * self.a.d_model + self._mlp(fused, 2) * self.a.d_mlp) * self.itemsize

    def backward(self, fused: bool = True) -> int:
        """Of a token, for each block, what is kept for a backward pass to an input."""
        return (6 * self.a.d_model + self._mlp(fused, 1) * self.a.d_mlp) * self.itemsize

    def kept(self) -> int:
        """Keys and values of a token in a block."""
        config = self.lm.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * heads * head * self.itemsize

    def logits(self, places: int) -> int:
        """The model's own and float32 copies of them."""
        if not self.here.head:
            return 0
        return places * self.lm.model.config.get_text_config().vocab_size * (self.itemsize + 12)

    def _mlp(self, fused: bool, plain: int) -> int:
        """How many tensors of the MLP's width there are."""
        if len(self.a.mlp_matrices[0]) > 2 or self.a.first_projections[0].endswith("gate_up_proj"):
            return 3
        stepwise = any(type(module) in STEPWISE_GELU for module in self.lm.model.modules())
        return 4 if stepwise and not fused else plain


class _Estimate(_Passes):
    """The numbers that decide it.

    Attributes:
        sizes: elements of each edited weight that lies here. first: the first edited block.
        restored: bytes of copies of all but the last edited weight, while they are edited in order.
        networks: bytes of MEND's networks. edits: some of them.
        width, target: most tokens of their prompts with the target, and of the target.
    """

    def __init__(
        self,
        lm: EditableLM,
        trajectory: Trajectory,
        config: SweepConfig,
        device: torch.device,
        here: Part,
    ) -> None:
        super().__init__(lm, here)
        self.device = device
        self.n_edits = len(trajectory.edits)
        self.batch = min(trajectory.config.edit_batch_size, self.n_edits)
        self.method = METHODS[trajectory.config.method]
        self.hparams: Any = None
        rank = copies = 0
        if config.train_mend and trajectory.config.hparams == str(config.networks(trajectory.model)):
            training = config.train_mend.settings(lm)
            rank, copies = training.rank, 5  # gradients, Adam's two, and the best so far
            names = [f"{name}.weight" for layer in training.layers for name in self.a.mlp_matrices[layer]]
        else:
            self.hparams = resolve_hparams(self.method, trajectory.config.hparams, lm).values
            if isinstance(self.hparams, MendHyperParameters):
                rank, copies = self.hparams.description.rank, 1
                names = list(self.hparams.description.inner_params)
            else:
                names = self.method.weights(lm, self.hparams)
        parameters = dict(lm.model.named_parameters())
        mine = [name for name in names if name in here.parameters]
        self.sizes = [parameters[name].numel() for name in mine]
        self.restored = self.itemsize * sum(parameters[name].numel() for name in mine if name != names[-1])
        self.first = next(
            i for i, block in enumerate(self.a.blocks) if any(name.startswith(f"{block}.") for name in names)
        )
        shapes = {tuple(parameters[name].shape) for name in mine}
        # One network for each shape: two layers, each of two matrices of this rank.
        self.networks = 4 * copies * sum(4 * rank * sum(shape) for shape in shapes)
        self.edits = trajectory.edits[:LOOKED_AT]
        pairs = [lm.encoder.continuation(edit.text, edit.target) for edit in self.edits]
        self.width = max(len(prompt) + len(target) for prompt, target in pairs)
        self.target = max(len(target) for _, target in pairs)

    def needed(self) -> Needed:
        read, factors, solving = self._moments()
        moments = read + factors
        if isinstance(self.hparams, MassEditHyperParameters):
            # In a stream of one step, nothing is factored until all values are found.
            one_step = self.n_edits <= self.batch
            method = max(self._search(self.batch) - factors * one_step, self.restored + solving)
        elif isinstance(self.hparams, SearchHyperParameters):
            method = self.restored + max(self._search(1), solving)
        else:
            method = self._gradients()
        dense = 4 * sum(self.sizes) + TRIMMING * max(self.sizes, default=0)
        copies = sum(self.sizes) * (4 + self.itemsize)
        step = max(method, dense, self._measuring()) + self.here.moving
        here = [p for n, p in self.lm.model.named_parameters() if n in self.here.parameters]
        weights = sum(p.numel() * p.itemsize for p in here)
        # Before there are copies, the fingerprint of the model is taken, and the usual norm for NAS measured.
        first = FINGERPRINT * min(CHUNK, max((p.numel() for p in here), default=0))
        if getattr(self.hparams, "nas", False) and self.hparams.nas_norm is None:
            first = max(first, read + self._search(NAS_FACTS, read_in_contexts=False))
        step = max(step, first - copies - self.networks - moments)
        return Needed(weights, copies + self.networks, moments, step)

    def _measuring(self) -> int:
        prompts = sum(1 + len(edit.paraphrases) + len(edit.neighborhood) for edit in self.edits)
        sequences = min(BATCH_SEQUENCES, prompts)
        return sequences * self.width * self.forward(fused=False) + self.logits(sequences * self.target)

    def _search(self, asked: int, read_in_contexts: bool = True) -> int:
        """Reading keys, and the search for the values of as many of the facts as are searched together."""
        h: Any = self.hparams
        templates = _templates(h)
        context = max(len(self.lm.encoder.tokens(template.replace(BARE, ""))) for template in templates)
        width, contexts, layer = self.width + context, len(templates) + 1, max(h.layers)
        behind = max(  # from the subject's last token on
            len(self.lm.encoder.joined(edit.text, edit.target)) - subject_position(self.lm, edit, BARE)
            for edit in self.edits
        )
        # A GPU takes as many facts at a time as fit in its free memory.
        limit = 0 if self.device.type == "cuda" else CPU_TOKENS
        facts = max(1, min(asked, limit // (contexts * width)))
        rows, later = facts * contexts, self._blocks_from(layer)
        kept = self.kept()
        # The next facts' first pass runs before what was kept of these is freed.
        still = rows * width * later * kept if facts < asked else 0
        first = still + rows * width * (len(self.here.blocks) * kept + self.forward())
        steps = rows * width * later * kept + rows * behind * later * self.backward()
        read = asked * width * (contexts if read_in_contexts else 1)
        reading = min(CHUNK_TOKENS, read) * self.forward()
        return max(reading, max(first, steps) + self.logits(rows * self.target))

    def _gradients(self) -> int:
        """Of the other methods: a backward pass through the blocks from the first edited one on."""
        h, blocks, tokens, beside = self.hparams, self._blocks_from(self.first), self.batch * self.width, 0
        if isinstance(h, KnHyperParameters):
            tokens = min(PASS_TOKENS, self.a.n_layers * h.steps * self.width)
        elif isinstance(h, FtHyperParameters):
            tokens = min(self.batch, h.batch_size) * self.width
            beside = 5 * 4 * sum(self.sizes)  # gradients, Adam's two, and copies
        else:
            beside = 3 * 4 * tokens * len(self.sizes) * (self.a.d_model + self.a.d_mlp)  # x and g
        return tokens * blocks * self.backward(fused=False) + beside

    def _blocks_from(self, layer: int) -> int:
        return sum(block >= layer for block in self.here.blocks)

    def _moments(self) -> tuple[int, int, int]:
        """(sums that are read, factors and keys that stay from step to step, what factoring takes beside)."""
        if self.hparams is None:
            return 0, 0, 0
        layers = [n for n in self.method.needs_statistics(self.hparams) if n in self.here.blocks]
        matrix = 8 * self.a.d_mlp**2
        if not layers and len(self.here.blocks) < self.a.n_layers:
            return 0, 0, 0
        alphaedit = isinstance(self.hparams, AlphaEditHyperParameters)
        stays = len(layers) * matrix
        if alphaedit or getattr(self.hparams, "history", "none") == "keys":
            stays += 2 * 8 * self.a.d_mlp * min(self.n_edits, self.a.d_mlp)
        read = len(layers) * matrix // 2 if self.device.type == "cpu" else 0  # in float32, in main memory
        # C, and for its condition or its eigenvectors two more.
        return read, stays, 3 * matrix if layers else 0


def _templates(hparams: Any) -> list[str]:
    """Templates as long as those that will be sampled."""
    if given := hparams.context_templates:
        return [t for group in given for t in ([group] if isinstance(group, str) else group)]
    lengths = getattr(hparams, "context_template_length_params", [(SAMPLED_LENGTH, SAMPLED_CONTEXTS)])
    return [BARE, *(f"The{' the' * (length - 1)}. {BARE}" for length, count in lengths for _ in range(count))]
