"""Hyper-parameters of an editing run: a published file, a preset of this package, or a method's default.

JSON and YAML files of ROME, MEMIT, AlphaEdit and EasyEdit load unchanged. Their keys for module names,
devices and paths are ignored; a key that no published file has is an error.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from harness_rect.errors import UserError, did_you_mean
from harness_rect.io.rows import parse_json, read_text
from harness_rect.io.yaml_files import read_yaml
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
    known, more = presets(method), ""
    name = preset_for(method, lm) if spec is None else spec
    if name in known:
        preset, origin = known[name], f"preset {name}"
        raw, more = preset.values, f" ({preset.about}), {preset.source}"
    elif spec is None:
        raw, origin = method.default_hparams(lm.architecture), f"default of {method.name} for any model"
        more = f"; no published values known for {_family(lm)}"
    elif (path := Path(spec)).suffix in {".json", ".yaml", ".yml"}:
        raw, origin = read_hparams_file(path), str(path)
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
    log.info("hyper-parameters of %s: %s", method.name, origin + more)
    return ResolvedHparams(values, origin)


def read_hparams_file(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file.

    Raises:
        UserError: the file is missing, does not parse, or is not a mapping.
    """
    name = f"hparams={path}"
    raw = parse_json(read_text(path, name), name) if path.suffix == ".json" else read_yaml(path, name)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of hyper-parameters, found {type(raw).__name__}")
    return {str(key): value for key, value in raw.items()}  # YAML keys can be numbers or booleans


class Preset(BaseModel):
    """Hyper-parameters for a model.

    about: which. match: the values of the model's configuration by which it is chosen; without, by name only.
    published: where its values are published; empty where they were chosen for an embedded model.
    values: the hyper-parameters. training: settings of a method that is trained first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    about: str
    match: dict[str, Any] = {}
    published: str = ""
    values: dict[str, Any] = Field(alias="hparams")
    training: dict[str, Any] = {}

    @property
    def source(self) -> str:
        """Where its values come from, for messages."""
        return f"values published in {self.published}" if self.published else "values chosen for this model"


@cache
def presets(method: Method) -> dict[str, Preset]:
    """The presets of a method by name."""
    files = sorted((PRESETS / (method.presets or method.name)).glob("*.yaml"))
    texts = {path.stem: path.read_text(encoding="utf-8") for path in files}
    return {name: Preset.model_validate(yaml.safe_load(text)) for name, text in texts.items()}


def preset_for(method: Method, lm: EditableLM) -> str | None:
    """The name of the preset for the model's family and size, None if there is none."""
    config = lm.model.config.get_text_config()
    for name, preset in presets(method).items():
        match = preset.match
        if match and all(getattr(config, key, None) == value for key, value in match.items()):
            return name
    return None


def _family(lm: EditableLM) -> str:
    n, width = lm.architecture.n_layers, lm.architecture.d_model
    return f"{lm.model.config.get_text_config().model_type} with {n} blocks of width {width}"


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
