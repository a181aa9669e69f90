"""The task class behind our YAML configs, and the tokenizer of the tasks that count tokens."""

from __future__ import annotations

from typing import Any

import transformers

from harness_rect import embedded
from harness_rect.compat.lm_eval import YamlTask
from harness_rect.errors import UserError
from harness_rect.models.lm import TextEncoder
from harness_rect.models.load import load_errors


class RectTask(YamlTask):
    """lm-eval's YAML task, never served from its request cache.

    ``--cache_requests`` identifies a task by its name alone: requests built for one ``data`` folder or one
    list of edits would be taken for those of another, and scored against the wrong rows.
    """

    def build_all_requests(self, **kwargs: Any) -> None:
        super().build_all_requests(**kwargs | {"cache_requests": False})


def load_tokenizer(metadata: dict[str, Any]) -> TextEncoder:
    """The tokenizer of the model under evaluation, as lm-eval's Hugging Face class loads it.

    Raises:
        UserError: if the metadata name none, or it cannot be loaded.
    """
    metadata = embedded.of_tasks(metadata)
    name = metadata.get("tokenizer") or embedded.resolve_model(metadata.get("pretrained"))
    if not isinstance(name, str):
        raise UserError(
            "the editing tasks and rect_drift need the tokenizer's name; give tokenizer=NAME in metadata"
        )
    add_bos = metadata.get("add_bos_token")
    options = {} if add_bos is None else {"add_bos_token": add_bos}
    if metadata.get("subfolder"):
        options["subfolder"] = metadata["subfolder"]
    with load_errors(f"tokenizer {name}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name,
            revision=str(metadata.get("revision", "main")),
            trust_remote_code=bool(metadata.get("trust_remote_code", False)),
            use_fast=metadata.get("use_fast_tokenizer", True),
            **options,
        )
    return TextEncoder(tokenizer, add_bos)
