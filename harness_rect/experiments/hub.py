"""Exported edit runs on the Hugging Face hub, with a card that says what was edited and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os.path import exists
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from harness_rect import embedded
from harness_rect.errors import UserError
from harness_rect.session.report import EditReport

#: At most so many edits are listed in a card.
LISTED = 50
#: What vLLM 0.32 takes as ``max_lora_rank``; 16 if it is told none.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
USES = {
    "full": "The folder is a checkpoint: `AutoModelForCausalLM.from_pretrained` loads it.",
    "peft": "The folder is a LoRA adapter: `PeftModel.from_pretrained(base, folder)` loads it.",
    "delta": "The folder holds edited minus base, zero in all other weights: add it to the base model.",
}


def check_hub(name: str) -> huggingface_hub.HfApi:
    """The hub's interface, before any work is done.

    Raises:
        UserError: there is no token, or it is not accepted.
    """
    api = huggingface_hub.HfApi()
    if not huggingface_hub.get_token():
        raise UserError(f"--push-to-hub {name}: no token of the hub: run `hf auth login`, or set HF_TOKEN")
    try:
        api.whoami()
    except Exception as error:  # what comes out depends on the HTTP stack below
        raise UserError(
            f"--push-to-hub {name}: the hub does not answer to this token: {_line(error)}"
        ) from None
    return api


def upload(api: huggingface_hub.HfApi, name: str, folder: Path) -> str:
    """Upload a folder as the model repository of this name, made if it is not there; returns its address.

    Raises:
        UserError: the hub refused; the folder is unchanged.
    """
    try:
        url = api.create_repo(name, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, repo_type="model")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"--push-to-hub {name}: {_line(error)}; the folder {folder} is complete") from None
    return str(url)


def model_card(
    report: EditReport,
    edits: Sequence[Mapping[str, Any]],
    base: str,
    format: str,
    cost: str | None = None,
    rank: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """The text of README.md.

    Args:
        edits: of the run; those after the report's are left out. base: name or folder of the base model.
        cost: a comparison of results before and after, in Markdown. rank: of a LoRA adapter. arguments: those
            of lm-eval's class by which the base model is loaded, beside its name.
    """
    kept = (
        f", regularizer {report.regularizer} {report.settings or ''}" if report.regularizer != "none" else ""
    )
    local = embedded.is_embedded(base) or Path(base).exists()
    # By names alone: a folder of this machine says nothing elsewhere.
    given = [f"{n}={_cell(Path(str(v)).name if exists(str(v)) else v)}" for n, v in (arguments or {}).items()]
    how = f" ({', '.join(given)})" if given else ""
    lines = [
        "---",
        *([] if local else [f"base_model: {base}"]),
        f"library_name: {'peft' if format == 'peft' else 'transformers'}",
        "tags: [knowledge-editing, harness-rect]",
        "---",
        f"# {Path(base).name} after {report.n_edits} edits",
        "",
        f"{report.n_edits} facts were edited in `{Path(base).name if local else base}`{how} by"
        f" {report.method}{kept}, {report.edit_batch_size} at a time. {USES[format]}",
        *([] if rank is None else [rank_in_words(rank)]),
        f"`edit_report.json` has all settings and measurements (run `{(report.run or '')[:12]}`).",
        "",
        "## What was edited",
        "",
        "| prompt | target |",
        "|---|---|",
    ]
    of_these = edits[: report.n_edits]
    for edit in of_these[:LISTED]:
        prompt = str(edit["prompt"]).replace("{}", str(edit["subject"]), 1)
        lines.append(f"| {_cell(prompt)} | {_cell(edit['target_new'])} |")
    if len(of_these) > LISTED:
        lines.append(f"| ... {len(of_these) - LISTED} more | |")
    lines += ["", "## What it cost", ""]
    if report.at_the_end:
        before, end = report.before_each_edit, report.at_the_end
        lines += ["| metric of the edits | before | at the end |", "|---|---|---|"]
        lines += [f"| {name} | {_number(before.get(name))} | {_number(end[name])} |" for name in sorted(end)]
    unknown = "General abilities were not measured for this card; editing usually harms them."
    lines += ["", cost or unknown]
    return "\n".join(lines) + "\n"


def rank_in_words(rank: int) -> str:
    """The rank of an adapter, and what vLLM has to be told of it, in a sentence."""
    allowed = next((most for most in VLLM_RANKS if most >= rank), None)
    if allowed is None:
        return f"Its rank is {rank}; vLLM takes at most {VLLM_RANKS[-1]}."
    return f"Its rank is {rank}; vLLM needs `enable_lora=True, max_lora_rank={allowed}`."


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
