"""What a model reads for a prompt: the prompt, a system instruction and it, or a chat in which it is a turn.

A chat is made by the call that lm-eval's models make, so that editing and evaluation read the same tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from harness_rect.edits.edit import shorten
from harness_rect.errors import UserError

Messages = list[dict[str, str]]

#: A text that templates leave as it is, to find the place of a prompt or an answer.
_MARK = "\ue000"


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, applied as lm-eval's ``HFLM.apply_chat_template`` does.

    arguments: of the template (``enable_thinking``); ``chat_template`` among them replaces the tokenizer's.
    """

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, name: bool | str, arguments: Mapping[str, Any]
    ) -> ChatTemplate:
        """The template that lm-eval's ``apply_chat_template`` asks for.

        Args:
            name: chooses one of several templates; True: the one that is the default.
            arguments: lm-eval's ``chat_template_args``, with ``enable_thinking``.

        Raises:
            UserError: the tokenizer has no such template.
        """
        templates = tokenizer.chat_template
        if isinstance(templates, dict):
            chosen = "default" if name is True else name
            if chosen not in templates:
                names = ", ".join(sorted(templates))
                raise UserError(f"apply_chat_template={chosen}: the tokenizer's chat templates are {names}")
            if name is not True:
                arguments = {**arguments, "chat_template": templates[chosen]}
        elif templates is None and "chat_template" not in arguments:
            raise UserError(
                "apply_chat_template: the tokenizer of this model has no chat template; leave the option out,"
                " or take a model that was trained for chats"
            )
        return cls(tokenizer, arguments)

    def __call__(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        how = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self._render(messages, how)
        except jinja2.TemplateError:  # Gemma's refuses the system's turn
            return self._render([one for one in messages if one["role"] != "system"], how)

    def _render(self, messages: Messages, how: Mapping[str, bool]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **how, **self.arguments))

    @cached_property
    def sha(self) -> str:
        """sha256 (hex) of the template, ``chat_template_sha`` in lm-eval's results."""
        text = self.tokenizer.get_chat_template(self.arguments.get("chat_template"))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def after_answer(self) -> str:
        """What follows the assistant's words in its turn."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        return self._render(turns, {}).rpartition(_MARK)[2]


@dataclass(frozen=True)
class PromptFormat:
    """What a prompt becomes before it is tokenized; by default it stays as it is.

    chat_template: (messages, ``add_generation_prompt``) -> text that ends where the assistant's words begin:
        a :class:`ChatTemplate`, or an lm-eval model's ``apply_chat_template``. The prompt is the user's turn.
        None: no chat.
    system_instruction: the system's turn; without a chat it stands right before the prompt, as in lm-eval.
    """

    chat_template: Callable[..., str] | None = None
    system_instruction: str | None = None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        apply_chat_template: bool | str = False,
        system_instruction: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> PromptFormat:
        """The format that lm-eval's options of these names mean.

        Args:
            system_instruction: left out where the template has no place for it.
            apply_chat_template, arguments: see :meth:`ChatTemplate.of`.

        Raises:
            UserError: the tokenizer has no such template, or it cannot be applied.
        """
        if not apply_chat_template:
            return cls(None, system_instruction or None)
        template = ChatTemplate.of(tokenizer, apply_chat_template, arguments or {})
        plain, whole = cls(template), cls(template, system_instruction or None)
        return plain if whole.text(_MARK) == plain.text(_MARK) else whole

    def describe(self) -> dict[str, Any]:
        """What an edit report says of the format, named as in lm-eval's results and arguments."""
        sha = arguments = None
        if isinstance(self.chat_template, ChatTemplate):
            sha, given = self.chat_template.sha, self.chat_template.arguments
            arguments = {name: value for name, value in given.items() if name != "chat_template"}
        return {
            "chat_template_sha": sha,
            "chat_template_args": arguments,
            "system_instruction": self.system_instruction,
        }

    def text(self, prompt: str) -> str:
        """What is tokenized for a prompt, up to where its answer begins.

        Raises:
            UserError: the chat template cannot be applied.
        """
        return self._render(prompt)

    def _render(self, prompt: str, answer: str | None = None) -> str:
        """The text up to where the answer to a prompt begins; in a chat also up to the end of a given one."""
        if self.chat_template is None:
            return (self.system_instruction or "") + prompt
        turns = {"system": self.system_instruction, "user": prompt, "assistant": answer}
        messages = [{"role": role, "content": text} for role, text in turns.items() if text is not None]
        try:
            return self.chat_template(messages, add_generation_prompt=answer is None)
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the chat template cannot be applied: {reason}") from None

    def index(self, prompt: str, char: int) -> int:
        """Where character ``char`` of a prompt is in :meth:`text`.

        Templates may strip white space around a prompt; a character there counts as the nearest one left.

        Raises:
            UserError: the chat template puts something else in the prompt's place.
        """
        if self.chat_template is None:
            return len(self.system_instruction or "") + char
        text, before, core = self.text(prompt), self._before, prompt.strip()
        space = len(prompt) - len(prompt.lstrip())
        if text.startswith(before + prompt[:space] + core):
            start = len(before)
        elif text.startswith(before + core):
            start = len(before) - space
        else:
            raise UserError(f"the chat template does not keep the prompt {shorten(prompt)!r} as it is")
        return start + min(char, space + len(core) - 1)

    @cached_property
    def _before(self) -> str:
        return self.text(_MARK).partition(_MARK)[0]

    def answer(self, target: str) -> str:
        """A target as it stands behind :meth:`text`: in a chat as the assistant's words, without the space
        between words with which targets begin, but with one that the template puts there (Mistral's).
        """
        return target if self.chat_template is None else self._space + target.removeprefix(" ")

    @cached_property
    def _space(self) -> str:
        try:
            whole = self._render(_MARK, answer=_MARK)
        except UserError:  # a template for chats that end with the user
            return ""
        between = whole.removeprefix(self.text(_MARK)).removesuffix(_MARK)
        return between if between.isspace() else ""
