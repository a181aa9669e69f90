"""Tokenizers with chat templates of the kinds that instruction-tuned models have, written for these tests.

Each has the structure of the published one: where BOS, roles and ends of turns stand, what is stripped, what
becomes of a system's turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from support.tiny_models import VOCABULARY, make_model, train_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

LENGTH = 512


@dataclass(frozen=True)
class Chat:
    """One kind of chat model.

    family: of ``tiny_models.FAMILIES``. bos: whether its tokenizer prepends BOS. special: its special tokens.
    opening, closing: what stands around the user's words. end: the token that ends an answer.
    system: whether it has a place for a system instruction. strips: whether white space around a prompt is
    lost. space: what its template puts before the assistant's words.
    """

    family: str
    bos: bool
    special: tuple[str, ...]
    template: str
    opening: str
    closing: str
    end: str
    system: bool = True
    strips: bool = False
    space: str = ""


LLAMA3 = """\
{%- for message in messages %}
{%- if loop.first %}{{ bos_token }}{% endif %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

QWEN25 = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a list.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN3 = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

MISTRAL = """\
{{- bos_token }}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for message in messages if message.role != 'system' %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}
{%- if message.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + message.content + '[/INST]' }}
{%- else %}{{ ' ' + message.content | trim + eos_token }}{% endif %}
{%- endfor %}"""

GEMMA = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

_IM = ("<|im_start|>", "<|im_end|>")
CHATS: dict[str, Chat] = {
    "llama3": Chat(
        "llama",
        True,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        LLAMA3,
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        strips=True,
    ),
    "qwen2.5": Chat(
        "qwen2",
        False,
        _IM,
        QWEN25,
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "qwen3": Chat(
        "qwen3",
        False,
        (*_IM, "<think>", "</think>"),
        QWEN3,
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "mistral": Chat("mistral", True, ("[INST]", "[/INST]"), MISTRAL, "[INST] ", "[/INST]", "</s>", space=" "),
    "gemma": Chat(
        "gemma2",
        True,
        ("<start_of_turn>", "<end_of_turn>"),
        GEMMA,
        "<start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
        system=False,
        strips=True,
    ),
}


def chat_tokenizer(kind: str, template: str | Mapping[str, str] | None = None) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with this kind's special tokens and template, or another template."""
    chat = CHATS[kind]
    tokenizer = train_tokenizer(bos=chat.bos)
    names = ["</s>", *chat.special]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    # As published: Llama 3 and Qwen end a text as they end a turn, the others do not.
    tokenizer.eos_token = chat.end if chat.family in {"llama", "qwen2", "qwen3"} else "</s>"
    if not chat.bos:
        tokenizer.bos_token = None
    tokenizer.chat_template = template or chat.template
    return tokenizer


def chat_model(kind: str, seed: int = 0, **config: Any) -> Any:
    """A random model that :func:`chat_tokenizer` fits."""
    chat = CHATS[kind]
    return make_model(
        chat.family,
        seed,
        vocab_size=VOCABULARY + 1 + len(chat.special),
        max_position_embeddings=LENGTH,
        **config,
    )
