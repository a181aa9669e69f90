"""Hyper-parameters of an editing run: a published file, a preset of this package, or a method's default.

JSON and YAML files of ROME, MEMIT, AlphaEdit and EasyEdit load unchanged. Their keys for module names,
devices and paths are ignored; a key that no published file has is an error.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness_rect.errors import UserError, did_you_mean
from harness_rect.methods import METHODS, Method
from harness_rect.methods.base import HyperParameters
from harness_rect.models import EditableLM
from harness_rect.validation import validated

log = logging.getLogger(__name__)

PRESETS = Path(__file__).parent / "presets"

#: Keys of published files that are ignored: module names, devices, paths, settings of evaluation.
IGNORED_KEYS = {
    "alg_name",
    "model_name",
    "tokenizer_name",
    "tokenizer_class",
    "model_class",
    "device",
    "model_parallel",
    "fp16",
    "stats_dir",
    "results_dir",
    "archive",
    "weight_cache",
    "max_length",
    "max_new_tokens",
    "batch_size",
    "evaluation_type",
    "api_key",
    "v_loss_layer",
    "layer_selection",
    "objective_optimization",
    "layer_module_tmp",
    "mlp_module_tmp",
    "attn_module_tmp",
    "ln_f_module",
    "lm_head_module",
}
#: The published key for the edited module; compared with the module that is edited here.
REWRITE_MODULE = "rewrite_module_tmp"
#: Keys of all methods, for a more helpful error than "unknown".
OTHER_METHODS = {key for m in METHODS.values() for key in (*m.hparams.model_fields, *m.ignored_keys)}


@dataclass(frozen=True)
class ResolvedHparams:
    """Validated hyper-parameters, and the preset, file or default they came from."""

    values: HyperParameters
    origin: str


def resolve_hparams(method: Method, spec: str | None, lm: EditableLM) -> ResolvedHparams:
    """Hyper-parameters for a method on a model.

    Args:
        spec: a preset name (``gpt2-xl``), a path to a .json/.yaml/.yml file, for a trained method the folder
            of its weights, or None for the preset of the model's family, else the method's default for any
            model.

    Raises:
        UserError: naming the file or preset and the key.
    """
    known = presets(method)
    if spec is None:
        raw, origin = _for_model(method, lm)
    elif (path := Path(spec)).suffix in {".json", ".yaml", ".yml"}:
        raw, origin = read_hparams_file(path), str(path)
    elif spec in known:
        raw, origin = known[spec]["hparams"], f"preset {spec}"
    elif "weights" in method.hparams.model_fields:
        raw, origin = {"weights": spec}, spec
    else:
        raise UserError(
            f"hparams={spec}: no such preset for {method.name} ({did_you_mean(spec, known)}); a file must"
            " end in .json, .yaml or .yml"
        )
    values = validated(method.hparams, _ours(method, raw, origin, lm), origin)
    layers, last = getattr(values, "layers", []), lm.architecture.n_layers - 1
    try:
        lm.check_layers(layers)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    if method.at_subject and last in layers:
        log.warning(
            "layer %d is the last: an edit there at the subject cannot influence the tokens of the target",
            last,
        )
    log.info("hyper-parameters of %s: %s", method.name, origin)
    return ResolvedHparams(values, origin)


def read_hparams_file(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file.

    Raises:
        UserError: the file is missing, does not parse, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"hparams={path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"hparams={path}: not a text file in UTF-8") from None
    try:
        raw = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: does not parse: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of hyper-parameters, found {type(raw).__name__}")
    return {str(key): value for key, value in raw.items()}  # YAML keys can be numbers or booleans


def presets(method: Method) -> dict[str, dict[str, Any]]:
    """The presets of a method by name: each has ``hparams``, and ``match`` if it is chosen by the model.

    MEND's also have ``training``, the settings of its training.
    """
    files = sorted((PRESETS / (method.presets or method.name)).glob("*.yaml"))
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}


def matching_preset(method: Method, lm: EditableLM) -> tuple[str, dict[str, Any]] | None:
    """The name and the content of the preset of a model's family; None if there is none."""
    config = lm.model.config.get_text_config()
    for name, preset in presets(method).items():
        match = preset.get("match")
        if match and all(getattr(config, key, None) == value for key, value in match.items()):
            return name, preset
    return None


def _for_model(method: Method, lm: EditableLM) -> tuple[dict[str, Any], str]:
    if (found := matching_preset(method, lm)) is not None:
        return found[1]["hparams"], f"preset {found[0]}"
    return method.default_hparams(lm.architecture), f"default of {method.name} for a model without a preset"


def _ours(method: Method, raw: dict[str, Any], origin: str, lm: EditableLM) -> dict[str, Any]:
    """The hyper-parameters in a published file that the method uses."""
    known = method.hparams.model_fields
    for key in raw:
        if key in known or key in IGNORED_KEYS or key in method.ignored_keys:
            continue
        if key == REWRITE_MODULE:
            _check_rewrite_module(raw[key], origin, lm)
        elif key in OTHER_METHODS:
            raise UserError(
                f"{origin}: {key} is not a hyper-parameter of {method.name}; is the file for another method?"
            )
        else:
            raise UserError(f"{origin}: unknown hyper-parameter {key!r}; {did_you_mean(key, known)}")
    return {key: value for key, value in raw.items() if key in known}


def _check_rewrite_module(template: object, origin: str, lm: EditableLM) -> None:
    """Refuse a file for another matrix than the MLP's down projection."""
    downs = lm.architecture.down_projections
    asked = str(template).replace("{}", "0")
    if asked != downs[0] and asked in dict(lm.model.named_modules()):
        raise UserError(
            f"{origin}: {REWRITE_MODULE}={template} is not the MLP's down projection ({downs[0]} in block 0),"
            " the only matrix this method is defined on"
        )
    if asked != downs[0]:
        log.warning("%s was written for another model (%s=%s)", origin, REWRITE_MODULE, template)
