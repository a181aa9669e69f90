"""A causal LM with its tokenizer, and the forward passes that editing methods need.

Token positions are always counted from the start of the sequence: batches are padded on the right,
which leaves every real token's position id and attention unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness_rect.errors import UserError
from harness_rect.models.architecture import check_floating, is_transposed, locate, offloaded
from harness_rect.models.prompt_format import ChatTemplate, PromptFormat
from harness_rect.processes import ALONE, Processes


class _StopForward(Exception):
    """Raised in a hook to end a forward pass early; see :func:`stop_forward`."""


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids: ``ids`` and ``mask`` are (sequences, longest), int64, on the input device."""

    ids: Tensor
    mask: Tensor
    lengths: tuple[int, ...]

    @property
    def last(self) -> list[int]:
        """Index of each sequence's last token, if there is no padding before it."""
        return [length - 1 for length in self.lengths]


class TextEncoder:
    """Prompts and targets to token ids, as evaluation makes them.

    Args:
        tokenizer: any Hugging Face tokenizer; fast ones give exact subject positions from offsets.
        add_special_tokens: None leaves it to the tokenizer (Llama prepends BOS, GPT-2 nothing), as lm-eval
            does unless ``add_bos_token`` is given.
        format: what becomes of a prompt before it is tokenized: by default nothing.

    Attributes:
        embeddings: how many tokens the model has embeddings of; a text with another one is refused.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        add_special_tokens: bool | None = None,
        format: PromptFormat | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.embeddings: int | None = None
        self.format = format or PromptFormat()
        self._kwargs = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text as it is, special tokens included."""
        ids = list(self.tokenizer(text, verbose=False, **self._options(text))["input_ids"])
        if self.embeddings is not None and ids and (last := max(ids)) >= self.embeddings:
            token = self.tokenizer.convert_ids_to_tokens(last)
            raise UserError(
                f"{text!r} has the token {token!r}, number {last}, and the model has embeddings of"
                f" {self.embeddings} tokens: take the model's own tokenizer, or resize its embeddings"
            )
        return ids

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a whole prompt, up to where its answer begins."""
        return self.tokens(self.format.text(prompt))

    def joined(self, prompt: str, target: str) -> list[int]:
        """Token ids of a prompt and a target behind it, from one tokenization."""
        return self.tokens(self.format.text(prompt) + self.format.answer(target))

    def continuation(self, prompt: str, target: str) -> tuple[list[int], list[int]]:
        """Ids of ``prompt`` and of ``target`` as it stands after that prompt.

        Both come from one tokenization of the concatenated text, split after the prompt's own tokens.
        Where the boundary falls inside a token, that token belongs to the target. Neither part is empty.
        """
        whole, alone = self.joined(prompt, target), self.ids(prompt)
        split = 0
        for a, b in zip(whole, alone, strict=False):
            if a != b:
                break
            split += 1
        if split == 0 or split == len(whole):
            raise UserError(f"the tokenizer gives no tokens of its own to {target!r} after {prompt!r}")
        return whole[:split], whole[split:]

    def token_at(self, prompt: str, char: int) -> int:
        """Index in :meth:`ids` of the token that covers character ``char`` of ``prompt``."""
        text, place = self.format.text(prompt), self.format.index(prompt, char)
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, return_offsets_mapping=True, **self._options(text))
            covering = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a <= place < b]
            if covering:  # several when one character is spread over byte tokens: the last one ends it
                return covering[-1]
        # Without offsets: the tokens of the text up to and including the character.
        return len(self.tokens(text[: place + 1])) - 1

    @property
    def end_of_answer(self) -> int | None:
        """The token that ends an answer: of an assistant's turn what closes it, else the end of the text."""
        if isinstance(template := self.format.chat_template, ChatTemplate):
            added = self.tokenizer.added_tokens_decoder
            for token in self.tokenizer(template.after_answer, add_special_tokens=False)["input_ids"]:
                if token in added and added[token].special:
                    return int(token)
        return self.tokenizer.eos_token_id

    def _options(self, text: str) -> dict[str, bool]:
        """As lm-eval, no second BOS before a text that begins with it, as rendered chats do."""
        bos = getattr(self.tokenizer, "bos_token", None)
        return {"add_special_tokens": False} if bos and text.startswith(bos) else self._kwargs


class EditableLM:
    """A causal LM, its tokenizer and its :class:`Architecture`.

    Attributes:
        model: the transformers model, in evaluation mode.
        pad_id: the token id of padding, which is masked.
        encoder: the :class:`TextEncoder`.
        architecture: names of blocks, down projections, norm and head.
        processes: those that hold this model too and help with value searches; None but this one by default.
        changing: names of the weights that edits change, which helpers get before each search.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        add_special_tokens: bool | None = None,
        format: PromptFormat | None = None,
    ) -> None:
        self.model = model
        self.encoder = TextEncoder(tokenizer, add_special_tokens, format)
        self.architecture = locate(model)
        self.processes: Processes = ALONE
        self.changing: Sequence[str] = ()
        self._modules = dict(model.named_modules())
        self._writes: dict[int, bool] = {}
        pad = tokenizer.pad_token_id
        rows = len(model.get_input_embeddings().weight)
        self.encoder.embeddings = rows
        readable = pad is not None and pad < rows
        self.pad_id = pad if readable else 0  # masked, so any id that has an embedding can be used

    # -- parts ------------------------------------------------------------------------------------

    @property
    def input_device(self) -> torch.device:
        device = next(self.model.get_input_embeddings().parameters()).device
        if device.type == "meta":
            raise offloaded("the input embedding")
        return device

    def down_projection(self, layer: int) -> nn.Module:
        return self._of_block(layer, self.architecture.down_projections)

    def first_projection(self, layer: int) -> nn.Module:
        return self._of_block(layer, self.architecture.first_projections)

    def block(self, layer: int) -> nn.Module:
        return self._of_block(layer, self.architecture.blocks)

    def _of_block(self, layer: int, names: Sequence[str]) -> nn.Module:
        self.check_layers([layer])
        return self._modules[names[layer]]

    def weight(self, name: str) -> nn.Parameter:
        """The parameter ``name``, checked to be editable in place."""
        module, _, attribute = name.rpartition(".")
        weight = getattr(self._modules[module], attribute)
        check_floating(weight, name)
        return weight

    def widths(self, name: str) -> tuple[int, int]:
        """(inputs, outputs) of the matrix whose weight is called ``name``."""
        rows, columns = self.weight(name).shape
        return (rows, columns) if self.is_transposed(name) else (columns, rows)

    def is_transposed(self, name: str) -> bool:
        """Whether the weight ``name`` is stored as (inputs, outputs)."""
        return is_transposed(self._modules[name.rpartition(".")[0]])

    def check_layers(self, layers: Sequence[int]) -> None:
        n = self.architecture.n_layers
        if len(set(layers)) < len(layers):
            raise UserError("a layer is named twice")
        for layer in layers:
            if not 0 <= layer < n:
                raise UserError(f"layer {layer} does not exist: this model has layers 0 to {n - 1}")

    def oriented(self, layer: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of an update in the parameter's own orientation.

        Args:
            left: (d_model, r), the output side. right: (d_mlp, r), the key side.

        Returns:
            (a, b) with update = a @ b.T of the shape of the stored weight.
        """
        return (right, left) if is_transposed(self.down_projection(layer)) else (left, right)

    @property
    def max_length(self) -> int:
        """Longest sequence the position embeddings allow, in tokens (2048 where the config does not say)."""
        config = self.model.config.get_text_config()
        for key in ("max_position_embeddings", "n_positions", "n_ctx"):
            if isinstance(length := getattr(config, key, None), int):
                return length
        return 2048

    # -- running ----------------------------------------------------------------------------------

    def check_length(self, sequences: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, sequences))
        if longest > self.max_length:
            raise UserError(
                f"a prompt of {longest} tokens is longer than the {self.max_length} this model can read"
            )

    def batch(self, sequences: Sequence[Sequence[int]], shifts: Sequence[int] | None = None) -> Batch:
        """Pad on the right; ``shifts``: the number of padding tokens on the left of each sequence."""
        self.check_length(sequences)
        begin = shifts or [0] * len(sequences)
        longest = max(start + len(sequence) for start, sequence in zip(begin, sequences, strict=True))
        ids = torch.full((len(sequences), longest), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (start, sequence) in enumerate(zip(begin, sequences, strict=True)):
            ids[row, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
            mask[row, start : start + len(sequence)] = 1
        device = self.input_device
        return Batch(ids.to(device), mask.to(device), tuple(map(len, sequences)))

    def logits(self, batch: Batch) -> Tensor:
        """(sequences, longest, vocabulary) logits in the model's dtype."""
        # token_type_ids are never passed: GPT-2 would add an embedding for them.
        return self.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits

    def logits_at(self, batch: Batch, rows: Tensor, positions: Tensor) -> Tensor:
        """(n, vocabulary) logits at n places of a batch; the head is applied there alone.

        Args:
            rows, positions: (n,) int64 on the CPU, the places' sequences and token positions.
        """
        return self.with_head_at(rows, positions, lambda: self.logits(batch))

    def with_head_at(self, rows: Tensor, columns: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """As :meth:`logits_at`, of the logits that ``run`` computes in one forward pass of the model."""
        if self.architecture.head is None:
            logits = run()
            return logits[rows.to(logits.device), columns.to(logits.device)]

        def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0]
            return (hidden[rows.to(hidden.device), columns.to(hidden.device)].unsqueeze(0), *args[1:])

        handle = self._modules[self.architecture.head].register_forward_pre_hook(gather)
        try:
            return run().squeeze(0)  # not [0], whose gradient would be a copy
        finally:
            handle.remove()

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits of residual-stream vectors (..., d_model) through the final norm and the head."""
        norm, head = self.architecture.norm, self.architecture.head
        if head is None:
            raise UserError(
                "this model's output embedding is not a module; v_loss_layer must be its last layer"
            )
        if norm is not None:
            hidden = self._modules[norm](hidden)
        return self._modules[head](hidden)

    @torch.no_grad()
    def down_projection_io(
        self, layers: Sequence[int], batch: Batch, positions: Sequence[int] | Tensor
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and outputs of down projections at one position per sequence, from one forward pass.

        The pass ends at the deepest of ``layers``.

        Returns:
            layer -> (keys (sequences, d_mlp), outputs (sequences, d_model)), float32, outputs with bias.
        """
        found: dict[int, tuple[Tensor, Tensor]] = {}
        rows, where = torch.arange(len(batch.lengths)), torch.as_tensor(positions).cpu()

        def keep(layer: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            key, value = (unflatten(tensor, batch)[rows, where].float() for tensor in (args[0], output))
            found[layer] = key, value
            if layer == max(layers):
                stop_forward()

        self.run_hooked({layer: partial(keep, layer) for layer in layers}, batch)
        return found

    @torch.no_grad()
    def block_output(self, layer: int, batch: Batch, positions: Sequence[int]) -> Tensor:
        """Output of a block at one position per sequence: (sequences, d_model), float32."""
        found: list[Tensor] = []
        rows, where = torch.arange(len(batch.lengths)), torch.as_tensor(positions)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found.append(hidden_of(output)[rows, where].float())
            stop_forward()

        self._run({self.block(layer): hook}, batch)
        return found[0]

    @torch.no_grad()
    def writes_to_stream(self, layer: int) -> bool:
        """Whether a vector added to the down projection's output is added to the block's output unchanged.

        This holds if the MLP's output is added to the residual stream without a norm in between. It is tested
        once per layer, in float32; False for models in 16 bits, where the two sums are rounded differently.
        """
        if layer not in self._writes:
            batch = self.batch([self.encoder.tokens("The city is large")])
            added = torch.randn(self.architecture.d_model, generator=torch.Generator().manual_seed(0))
            last = batch.ids.shape[1] - 1

            def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                out = unflatten(output, batch).clone()
                out[0, last] += added.to(out)
                return out.view_as(output)

            before = self.block_output(layer, batch, [last])[0]
            with self.hooked({self.down_projection(layer): add}):
                change = self.block_output(layer, batch, [last])[0] - before
            off = (change - added.to(change)).abs().max()
            exact = next(self.model.parameters()).dtype in (torch.float32, torch.float64)
            self._writes[layer] = exact and bool(off < 1e-5 * (1 + before.abs().max()))
        return self._writes[layer]

    def run_hooked(self, hooks: dict[int, Callable[..., object]], batch: Batch) -> None:
        """Forward pass with a hook on the down projection of each given layer; a hook may end the pass."""
        self._run({self.down_projection(layer): hook for layer, hook in hooks.items()}, batch)

    def _run(self, hooks: Mapping[nn.Module, Callable[..., object]], batch: Batch) -> None:
        with self.hooked(hooks):
            try:
                self.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
            except _StopForward:
                pass

    @contextmanager
    def hooked(self, hooks: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
        """Register forward hooks on modules within the block."""
        handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def weights_restored(self, names: Sequence[str]) -> Iterator[None]:
        """Restore the named weights bit for bit at the end of the block, in which they may be changed."""
        before = {name: self.weight(name).data.clone() for name in names}
        try:
            yield
        finally:
            for name, weight in before.items():
                self.weight(name).data.copy_(weight)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode, and no gradients for weights, within the block."""
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, training in modes:
                module.training = training


def chunks(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of sequences with these lengths, in batches of at most ``tokens`` tokens, padding included.

    Sequences of similar length share a batch; one that is longer than ``tokens`` is a batch of its own.
    """
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if found and (len(found[-1]) + 1) * lengths[index] <= tokens:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def hidden_of(output: Any) -> Tensor:
    """The hidden states in the return value of a block: the value itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def unflatten(hidden: Tensor, batch: Batch) -> Tensor:
    """(sequences, longest, width) view of a module's tensor; some OPT versions flatten it for their MLP."""
    return hidden if hidden.dim() == 3 else hidden.view(*batch.ids.shape, hidden.shape[-1])


def stop_forward() -> None:
    """End the forward pass from within a hook of :meth:`EditableLM.run_hooked`."""
    raise _StopForward
