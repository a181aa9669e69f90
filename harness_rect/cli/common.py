"""What several commands share: the model of ``--model``, options made from declared fields, layer lists."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers

from harness_rect import embedded
from harness_rect.config import declared_arguments
from harness_rect.errors import UserError
from harness_rect.io.files import expanded
from harness_rect.models.architecture import refuse_config
from harness_rect.models.load import check_device, load_errors
from harness_rect.session.provenance import report_beside

#: More layers than any model has.
DEEPEST = 9999
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    names = " or ".join(embedded.MODELS)
    parser.add_argument(
        "--model", required=True, help=f"hub name or folder of a causal language model, or {names}"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16 or auto (as stored, the default)"
    )


def add_option(parser: argparse.ArgumentParser, name: str, text: str, default: Any, **more: Any) -> None:
    """Add an option whose help text says the declared default; it is None where it is not given."""
    if default is not None:
        text += f" (default {default:g})" if isinstance(default, float) else f" (default {default})"
    # argparse formats help texts.
    parser.add_argument(f"--{name.replace('_', '-')}", help=text.replace("%", "%%"), **more)


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how prompts are put to the model, as those of ``lm_eval``."""
    declared = declared_arguments()
    template, instruction = declared["apply_chat_template"], declared["system_instruction"]
    add_option(parser, template.name, template.help, None, nargs="?", const=True, metavar="NAME")
    add_option(parser, instruction.name, instruction.help, None)
    parser.add_argument(
        "--enable-thinking",
        choices=("true", "false"),
        help="argument of chat templates that have it (Qwen 3)",
    )


def template_arguments(arguments: argparse.Namespace) -> dict[str, bool]:
    """Arguments of the chat template that the options give."""
    given = arguments.enable_thinking
    return {} if given is None else {"enable_thinking": given == "true"}


def load_model(arguments: argparse.Namespace, trust_remote_code: bool | None = None) -> tuple[Any, Any]:
    """The model and tokenizer of ``--model``; one that cannot be edited is refused before it is loaded.

    Args:
        trust_remote_code: whether code of the model is run; None: transformers asks on a terminal.
    """
    name = embedded.resolve_model(expanded(arguments.model))
    check_device(arguments.device, f"--device {arguments.device}")
    if arguments.dtype not in DTYPES:
        raise UserError(f"--dtype {arguments.dtype}: expected one of {', '.join(DTYPES)}")
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with load_errors(f"--model {arguments.model}"):
        trust = {"trust_remote_code": trust_remote_code}
        refuse_config(transformers.AutoConfig.from_pretrained(name, **trust))
        if (found := report_beside(name)) and found.delta_of is not None:
            raise UserError(f"--model {arguments.model}: holds differences; use its base, {found.delta_of}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **trust)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **trust)
    model.to(device)
    return model.eval(), tokenizer


def parse_layers(text: str) -> list[int]:
    """Block numbers from "5", "3,5,8" or "13-17", sorted and without repetition.

    Raises:
        UserError: for anything else.
    """
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--layers {text}: expected numbers such as 5, 3,5,8 or 13-17")
        if max(len(first), len(last)) > len(str(DEEPEST)):
            raise UserError(f"--layers {text[:100]}: no model has that many layers")
        layers |= set(range(int(first), int(last or first) + 1))
    if not layers:
        raise UserError(f"--layers {text}: an empty range")
    return sorted(layers)
