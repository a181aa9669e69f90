"""How the base model of a kept run, or of differences, is loaded: what is taken of it from their files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class BaseArguments(BaseModel):
    """Arguments of lm-eval's ``hf`` that decide which model its ``pretrained`` is, each only where given.

    A file may be somebody else's, so others in it are ignored: ``trust_remote_code`` and those that write.
    Where the model is put (``device``, ``parallelize``, ...) is a matter of the machine.
    """

    model_config = ConfigDict(extra="ignore")

    revision: str | None = None
    subfolder: str | None = None
    gguf_file: str | None = None
    tokenizer: str | None = None
    use_fast_tokenizer: bool | None = None
    add_bos_token: bool | None = None
    peft: str | None = None
    delta: str | None = None

    def given(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


#: Those that are true or false; all others are texts.
_FLAGS = {"use_fast_tokenizer", "add_bos_token"}


def base_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of :class:`BaseArguments` among the arguments of a model class; objects have no name to keep."""
    found = {name: given[name] for name in BaseArguments.model_fields if given.get(name) not in (None, "")}
    plain = {name: value for name, value in found.items() if isinstance(value, str | int | float)}
    return {name: bool(value) if name in _FLAGS else str(value) for name, value in plain.items()}
