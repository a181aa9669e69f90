"""Hyper-parameters: published files as they are, presets as published, errors that name the key."""

from __future__ import annotations

import json
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml

from harness_rect.errors import UserError
from harness_rect.hparams import preset_for, presets, resolve_hparams
from harness_rect.methods import METHODS
from harness_rect.methods.rome import RomeHyperParameters
from harness_rect.models import Architecture
from harness_rect.models.architecture import locate

ROME = METHODS["rome"]

#: With the keys that the file of the ROME repository has for a GPT-2.
ORIGINAL = {
    "layers": [1],
    "fact_token": "subject_last",
    "v_num_grad_steps": 20,
    "v_lr": 5e-1,
    "v_loss_layer": 47,
    "v_weight_decay": 0.5,
    "clamp_norm_factor": 4,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "context_template_length_params": [[5, 10], [10, 10]],
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "transformer.wte",
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
}
#: EasyEdit writes YAML, with more keys, and 5e-1 without a dot is a text in YAML 1.1.
EASYEDIT = """\
alg_name: "ROME"
model_name: "./hugging_cache/llama-2-7b"
stats_dir: "./data/stats"
device: 0
layers: [1]
fact_token: "subject_last"
v_num_grad_steps: 25
v_lr: 5e-1
v_loss_layer: 31
v_weight_decay: 1e-3
clamp_norm_factor: 4
kl_factor: 0.0625
mom2_adjustment: false
context_template_length_params: [[5, 10], [10, 10]]
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
layer_module_tmp: "model.layers.{}"
mlp_module_tmp: "model.layers.{}.mlp"
attn_module_tmp: "model.layers.{}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
model_parallel: false
max_length: 40
batch_size: 1
fp16: false
"""


@pytest.fixture
def write(tmp_path):
    def write(content: object, name: str = "h.json") -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


@pytest.fixture
def lm(make_lm):
    return make_lm("gpt2")


def refused(method, spec, lm) -> str:
    with pytest.raises(UserError) as error:
        resolve_hparams(method, spec, lm)
    message = str(error.value)
    assert message and "\n" not in message
    return message


# -- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_a_file_of_the_rome_repository_loads_as_it_is(suffix, write, lm):
    content = json.dumps(ORIGINAL) if suffix == "json" else yaml.safe_dump(ORIGINAL)
    path = write(content, f"gpt2-xl.{suffix}")
    found = resolve_hparams(ROME, path, lm)
    used = {key: value for key, value in ORIGINAL.items() if not re.search("_tmp|_module|loss_layer", key)}
    assert found.origin == path
    assert found.values == RomeHyperParameters.model_validate(used)


@pytest.mark.parametrize("method", ["rome", "r_rome"])
def test_a_file_of_easyedit_loads_as_it_is(method, write, make_lm):
    values: Any = resolve_hparams(METHODS[method], write(EASYEDIT, "llama.yaml"), make_lm("llama")).values
    assert (list(values.layers), values.v_lr, values.v_weight_decay) == ([1], 0.5, 1e-3)
    assert values.mom2_adjustment is False and values.v_num_grad_steps == 25


def test_templates_can_be_fixed(write, lm):
    templates = ["{}", "It was {so}. {}"]
    values: Any = resolve_hparams(ROME, write(ORIGINAL | {"context_templates": templates}), lm).values
    assert list(values.context_templates) == templates
    for wrong in (["none"], [], "{}", [["{}"]]):
        assert "context_templates" in refused(ROME, write(ORIGINAL | {"context_templates": wrong}), lm)


def test_an_unknown_key_is_named_with_what_was_meant(write, lm):
    message = refused(ROME, write(ORIGINAL | {"v_num_grad_step": 3}), lm)
    assert "'v_num_grad_step'" in message and "'v_num_grad_steps'" in message and "h.json" in message
    assert "'zzz'" in refused(ROME, write(ORIGINAL | {"zzz": 3}), lm)
    assert "5" in refused(ROME, write("layers: [1]\n5: 3\n", "h.yaml"), lm)
    assert "True" in refused(ROME, write("layers: [1]\non: 3\n", "h.yaml"), lm)


@pytest.mark.parametrize("key", ["mom2_update_weight", "nullspace_threshold", "adaptive_threshold"])
def test_a_file_for_another_method_is_recognised(key, write, lm):
    message = refused(ROME, write(ORIGINAL | {key: 1}), lm)
    assert key in message and "another method" in message


@pytest.mark.parametrize(
    "key, value",
    [
        ("layers", "five"),
        ("layers", []),
        ("layers", [1.5]),
        ("layers", 1),
        ("v_lr", "fast"),
        ("v_lr", 0),
        ("v_num_grad_steps", 0),
        ("v_num_grad_steps", 2.5),
        ("v_weight_decay", -1),
        ("v_weight_decay", float("nan")),
        ("kl_factor", None),
        ("clamp_norm_factor", [4]),
        ("mom2_adjustment", "perhaps"),
        ("mom2_dtype", "float16"),
        ("mom2_n_samples", 0),
        ("fact_token", "last"),
        ("context_template_length_params", [[5]]),
    ],
)
def test_a_wrong_value_is_named_by_its_key(key, value, write, lm):
    message = refused(ROME, write(ORIGINAL | {key: value}), lm)
    assert key in message and "h.json" in message


def test_a_missing_key_is_named(write, lm):
    assert "layers" in refused(ROME, write({"v_lr": 0.5}), lm)


def test_a_layer_the_model_does_not_have_is_named(write, lm):
    message = refused(ROME, write(ORIGINAL | {"layers": [17]}), lm)
    assert "17" in message and "0 to 1" in message


def test_a_layer_that_is_named_twice_is_refused(write, lm):
    assert "a layer is named twice" in refused(ROME, write(ORIGINAL | {"layers": [1, 1]}), lm)


def test_a_module_that_is_not_the_down_projection_is_refused(write, lm):
    message = refused(ROME, write(ORIGINAL | {"rewrite_module_tmp": "transformer.h.{}.mlp.c_fc"}), lm)
    assert "rewrite_module_tmp" in message and "c_fc" in message and "c_proj" in message
    # Another family's names mean nothing here: the file's numbers are still of use.
    resolve_hparams(ROME, write(ORIGINAL | {"rewrite_module_tmp": "model.layers.{}.mlp.down_proj"}), lm)


@pytest.mark.parametrize(
    "name, content",
    [
        ("h.json", "{broken"),
        ("h.json", "[1, 2]"),
        ("h.json", ""),
        ("h.yaml", "a: [1\nb: }"),
        ("h.yaml", ""),
        ("h.yml", "just words"),
    ],
)
def test_a_file_that_does_not_parse_is_named(name, content, write, lm):
    assert name in refused(ROME, write(content, name), lm)


def test_files_that_cannot_be_read_are_named(tmp_path, lm):
    assert "missing.json" in refused(ROME, str(tmp_path / "missing.json"), lm)
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml" in refused(ROME, str(tmp_path / "folder.yaml"), lm)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00layers")
    assert "binary.yaml" in refused(ROME, str(tmp_path / "binary.yaml"), lm)


# -- presets ------------------------------------------------------------------------------------------

GPT2_XL = {"layers": [17], "v_num_grad_steps": 20, "v_weight_decay": 0.5, "mom2_adjustment": False}
LLAMA = {"layers": [5], "v_num_grad_steps": 25, "v_weight_decay": 0.001, "mom2_adjustment": False}
PRESETS = {
    "gpt2-xl": GPT2_XL,
    "gpt2-xl-original": GPT2_XL | {"mom2_adjustment": True},
    "llama-7b": LLAMA,
    "llama-2-7b": LLAMA,
    "gpt-j-6b": GPT2_XL | {"layers": [5], "mom2_adjustment": True},
    "gpt-neox-20b": GPT2_XL | {"layers": [15], "mom2_adjustment": True},
    **dict.fromkeys(["llama-3-8b", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b", "qwen2.5-7b"], LLAMA),
    **dict.fromkeys(["qwen3-8b", "gemma-2-9b", "gemma-3-4b", "olmo-2-7b"], LLAMA),
    # The paper's setting but for the layer and the step of the search.
    "rect-tiny": GPT2_XL | {"layers": [3], "v_num_grad_steps": 25, "v_lr": 2.0},
    "rect-tiny-llama": GPT2_XL | {"layers": [1], "v_num_grad_steps": 25, "v_lr": 2.0, "clamp_norm_factor": 8},
}


def model_of(config: transformers.PretrainedConfig) -> Any:
    """As much of an EditableLM as choosing hyper-parameters needs; no weights."""
    n = config.num_hidden_layers
    names = tuple(f"h.{i}" for i in range(n))
    architecture = Architecture(
        names,
        names,
        tuple((n,) for n in names),
        names,
        None,
        None,
        config.hidden_size,
        4 * config.hidden_size,
    )
    return SimpleNamespace(
        model=SimpleNamespace(config=config), architecture=architecture, check_layers=lambda _: None
    )


LARGE = model_of(transformers.GPT2Config(n_layer=48, n_embd=1600, n_head=25))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_values(name):
    found = resolve_hparams(ROME, name, LARGE)
    assert found.origin == f"preset {name}"
    common = {"v_lr": 0.5, "clamp_norm_factor": 4, "kl_factor": 0.0625, "fact_token": "subject_last"}
    lengths = {"context_template_length_params": [[5, 10], [10, 10]], "context_templates": None}
    moments = {"mom2_dataset": "wikipedia", "mom2_n_samples": 100000, "mom2_dtype": "float32"}
    expected = common | lengths | PRESETS[name]
    if expected["mom2_adjustment"]:
        expected |= moments
    values = found.values.model_dump(mode="json")
    assert {key: values[key] for key in expected} == expected


def test_every_preset_is_checked_here():
    assert set(presets(ROME)) == set(PRESETS) == set(presets(METHODS["r_rome"]))


FOUR_TO_EIGHT = [4, 5, 6, 7, 8]
#: Layers, steps, learning rate, decay, clamp, and lambda of MEMIT or L2 of AlphaEdit.
MASS_EDITING = {
    ("memit", "gpt2-xl"): ([13, 14, 15, 16, 17], 20, 0.5, 0.5, 0.75, 20000),
    ("memit", "gpt-j-6b"): ([3, 4, 5, 6, 7, 8], 25, 0.5, 0.5, 0.75, 15000),
    ("memit", "llama-3-8b"): (FOUR_TO_EIGHT, 25, 0.1, 0.5, 0.75, 15000),
    **{
        ("memit", name): (FOUR_TO_EIGHT, 25, 0.5, 0.001, 4, 15000)
        for name in (
            *("llama-7b", "llama-2-7b", "llama-3.2-1b", "llama-3.2-3b"),
            *("mistral-7b", "qwen2.5-7b", "qwen3-8b", "olmo-2-7b"),
        )
    },
    ("alphaedit", "gpt2-xl"): ([13, 14, 15, 16, 17], 20, 0.5, 0.5, 0.75, 10),
    ("alphaedit", "gpt-j-6b"): ([3, 4, 5, 6, 7, 8], 25, 0.5, 0.5, 0.75, 10),
    ("alphaedit", "llama-3-8b"): (FOUR_TO_EIGHT, 25, 0.1, 0.5, 0.75, 10),
    ("alphaedit", "qwen2.5-7b"): (FOUR_TO_EIGHT, 25, 0.5, 0.001, 4, 1),
}


@pytest.mark.parametrize(("method", "name"), MASS_EDITING)
def test_presets_of_memit_and_alphaedit_have_the_published_values(method, name):
    h: Any = resolve_hparams(METHODS[method], name, LARGE).values
    assert h.kl_factor == 0.0625
    assert method == "memit" or h.nullspace_threshold == 0.02
    search = (h.layers, h.v_num_grad_steps, h.v_lr, h.v_weight_decay, h.clamp_norm_factor)
    weight = h.mom2_update_weight if method == "memit" else h.L2
    assert (*search, weight) == MASS_EDITING[method, name]


def test_all_presets_of_memit_and_alphaedit_are_checked_here():
    there = {(m, n) for m in ("memit", "alphaedit") for n, p in presets(METHODS[m]).items() if p.published}
    assert there == set(MASS_EDITING)


def test_kn_presets_have_the_published_values():
    known = {name: preset.values for name, preset in presets(METHODS["kn"]).items()}
    assert (known["gpt2-xl"]["steps"], known["gpt2-xl"]["adaptive_threshold"]) == (20, 0.2)
    assert (known["gpt-j-6b"]["steps"], known["gpt-j-6b"]["adaptive_threshold"]) == (20, 0.1)
    for name in known.keys() - {"gpt2-xl", "gpt-j-6b"}:
        assert known[name] == {"steps": 1, "adaptive_threshold": 0.2, "p": 0.4, "refine": False}


def test_the_papers_four_methods_have_presets_for_its_three_models():
    for method in ("kn", "mend", "rome", "memit"):
        assert {"gpt2-xl", "llama-7b", "llama-2-7b"} <= presets(METHODS[method]).keys(), method


ALL_PRESETS = [(m, name) for m in METHODS for name in presets(METHODS[m])]


@pytest.fixture(scope="module")
def full_size():
    """``full_size(match)``: a model of the size that a preset is for, without memory for its weights."""

    @cache
    def make(match: str) -> Any:
        given = json.loads(match)
        heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), given["hidden_size"] // 64)
        config = transformers.AutoConfig.for_model(given.pop("model_type"), **given, **heads)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        n = len(locate(model).blocks)
        return SimpleNamespace(
            model=model,
            architecture=locate(model),
            check_layers=lambda layers: [range(n)[layer] for layer in layers],
        )

    return make


@pytest.mark.parametrize(("method", "name"), ALL_PRESETS)
def test_a_preset_is_chosen_for_its_model_and_the_log_says_where_it_is_from(method, name, full_size, caplog):
    of, preset = METHODS[method], presets(METHODS[method])[name]
    assert preset.published or name.startswith("rect-tiny")
    if not preset.match:
        same = [other for other in presets(of).values() if other.match and other.values == preset.values]
        assert same or name == "gpt2-xl-original"
        return
    lm = full_size(json.dumps(preset.match))
    assert preset_for(of, lm) == name
    if method == "mend":
        for layer in preset.training.get("layers", []):
            assert lm.architecture.blocks[layer]
        return
    with caplog.at_level("INFO"):
        found = resolve_hparams(of, None, lm)
    assert found.origin == f"preset {name}"
    said = f"values published in {preset.published}" if preset.published else "values chosen for this model"
    assert f"hyper-parameters of {method}: preset {name} ({preset.about}), {said}" in caplog.messages
    weights = dict(lm.model.named_parameters())
    edited = of.weights(lm, found.values)
    assert edited and all(weight in weights for weight in edited)


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (transformers.GPTNeoXConfig(num_hidden_layers=12, hidden_size=768), "gpt_neox with 12 blocks"),
        (transformers.Qwen3Config(num_hidden_layers=28, hidden_size=1024), "qwen3 with 28 blocks"),
        (transformers.Gemma2Config(num_hidden_layers=26, hidden_size=2304), "gemma2 with 26 blocks"),
        (transformers.Phi3Config(num_hidden_layers=32, hidden_size=3072), "phi3 with 32 blocks"),
        (transformers.Olmo2Config(num_hidden_layers=16, hidden_size=2048), "olmo2 with 16 blocks"),
        (transformers.LlamaConfig(num_hidden_layers=80, hidden_size=8192), "llama with 80 blocks"),
    ],
)
@pytest.mark.parametrize("method", ["rome", "memit", "kn", "ft", "ultraedit"])
def test_the_log_says_where_no_values_are_published_for_a_size(method, config, family, caplog):
    with caplog.at_level("INFO"):
        resolve_hparams(METHODS[method], None, model_of(config))
    assert f"default of {method} for any model; no published values known for {family}" in caplog.text


def test_the_text_model_of_a_model_with_images_has_its_preset():
    match = presets(ROME)["gemma-3-4b"].match
    text = {key: value for key, value in match.items() if key != "model_type"}
    config = transformers.Gemma3Config(text_config=text)
    lm: Any = SimpleNamespace(model=SimpleNamespace(config=config))
    assert preset_for(ROME, lm) == "gemma-3-4b"


@pytest.mark.parametrize(("name", "l2"), [("gpt2-xl", 1), ("llama-2-7b", 4), ("llama-3-8b", 4)])
def test_evoedit_presets_have_the_published_values(name, l2):
    h: Any = resolve_hparams(METHODS["evoedit"], name, LARGE).values
    search = (h.layers, h.v_num_grad_steps, h.v_lr, h.v_weight_decay, h.clamp_norm_factor)
    published = MASS_EDITING["alphaedit", "gpt2-xl" if name == "gpt2-xl" else "llama-3-8b"]
    assert (*search, h.kl_factor, h.nullspace_threshold, h.L2) == (*published[:-1], 0.0625, 0.02, l2)


@pytest.mark.parametrize("name", ["gpt2-xl", "llama-3-8b"])
def test_lyaplock_presets_have_the_published_values(name):
    h: Any = resolve_hparams(METHODS["lyaplock"], name, LARGE).values
    search = (h.layers, h.v_num_grad_steps, h.v_lr, h.v_weight_decay, h.clamp_norm_factor)
    assert search == MASS_EDITING["alphaedit", name][:-1]
    assert (h.kl_factor, h.mom2_update_weight, h.alpha, h.V, h.b) == (0.0625, 1000, 60, 1, 0)
    assert h.mom2_dtype == "float64"


def test_an_unknown_preset_is_told_the_nearest():
    assert "'gpt2-xl'" in refused(ROME, "gpt2-x", LARGE)
    assert "llama-7b" in refused(ROME, "zzz", LARGE)


@pytest.mark.parametrize(
    "config, origin",
    [
        (transformers.GPT2Config(n_layer=48, n_embd=1600, n_head=25), "preset gpt2-xl"),
        (
            transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008),
            "preset llama-7b",
        ),
    ],
)
def test_a_family_gets_its_preset(config, origin, caplog):
    with caplog.at_level("INFO"):
        assert resolve_hparams(ROME, None, model_of(config)).origin == origin
    assert origin in caplog.text


@pytest.mark.parametrize(
    "config, layer",
    [
        (transformers.GPT2Config(), 4),  # GPT-2 small is no GPT-2 XL
        (transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336), 10),
        (transformers.MistralConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008), 10),
        (transformers.GPTNeoXConfig(num_hidden_layers=1, hidden_size=64), 0),
    ],
)
def test_any_other_model_gets_a_documented_default(config, layer):
    found = resolve_hparams(ROME, None, model_of(config))
    assert "default" in found.origin
    values: Any = found.values
    assert list(values.layers) == [layer]
    assert values.mom2_adjustment is False


def test_hyper_parameters_cannot_be_changed(lm, write):
    values: Any = resolve_hparams(ROME, write(ORIGINAL), lm).values
    with pytest.raises(ValueError, match="frozen"):
        values.v_lr = 1.0


# -- files as published ------------------------------------------------------------------------------

SEARCH = {
    "layers": [13, 14, 15, 16, 17],
    "clamp_norm_factor": 0.75,
    "layer_selection": "all",
    "fact_token": "subject_last",
    "v_num_grad_steps": 20,
    "v_lr": 0.5,
    "v_loss_layer": 47,
    "v_weight_decay": 0.5,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "mom2_update_weight": 20000,
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
    "model_name": "./hugging_cache/gpt2-xl",
    "stats_dir": "./data/stats",
    "device": 0,
}
PUBLISHED = {
    "alphaedit": SEARCH | {"alg_name": "AlphaEdit", "nullspace_threshold": 0.02, "L2": 10, "P_loc": "./P.pt"},
    "evoedit": SEARCH | {"nullspace_threshold": 0.02, "L2": 1, "apply_woodbury": True},
    "lyaplock": SEARCH | {"mom2_update_weight": 1000, "mom2_dtype": "float64"},
    "emmet": SEARCH | {"alg_name": "EMMET", "update_norm_lambda": 0, "emmet_lambda": 0.1},
    "ft": {
        "alg_name": "FT",
        "layers": [21],
        "num_steps": 25,
        "batch_size": 1,
        "max_length": 40,
        "lr": 5e-4,
        "weight_decay": 0,
        "kl_factor": 0,
        "norm_constraint": False,
        "wd_power_law": None,
        "objective_optimization": "target_new",
        "model_parallel": False,
    },
    "kn": {
        "alg_name": "KN",
        "lr_scale": 1.0,
        "n_toks": 10,
        "refine": False,
        "batch_size": 1,
        "steps": 20,
        "adaptive_threshold": 0.2,
        "p": 0.4,
        "model_parallel": False,
    },
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_published_files_of_the_other_methods_load_as_they_are(method, write):
    values = resolve_hparams(METHODS[method], write(PUBLISHED[method]), LARGE).values.model_dump()
    for key in ("layers", "lr", "L2", "emmet_lambda", "adaptive_threshold", "v_lr"):
        if key in values and key in PUBLISHED[method]:
            assert values[key] == PUBLISHED[method][key]


@pytest.mark.parametrize(
    ("method", "values", "says"),
    [
        ("ft_l", {"layers": [0], "norm_constraint": False}, "method=ft"),
        ("ft", {"layers": [0], "kl_factor": 0.1}, "kl_factor"),
        ("memit", {"layers": [3, 4], "v_loss_layer": 4}, "v_loss_layer: expected a block behind"),
        ("ultraedit", {"lr": 1e-6}, "either layers or inner_params"),
        ("memit", {"layers": [3], "mom2_update_weight": float("inf")}, "mom2_update_weight"),
        # Counts with which an edit would never end.
        (
            "rome",
            {"layers": [0], "v_num_grad_steps": 100_001},
            "v_num_grad_steps: Input should be less than or equal to 100000 ",
        ),
        (
            "rome",
            {"layers": [0], "context_template_length_params": [[1001, 1]]},
            "params.0.0: Input should be less than or equal to 1000 ",
        ),
        ("rome", {"layers": [0], "context_template_length_params": [[5, 500]] * 3}, "1500 context templates"),
        ("rome", {"layers": [0], "context_templates": ["{}"] * 1001}, "1001 context templates"),
        ("memit", {"layers": [0], "context_templates": [["{}"]] * 1001}, "1001 context templates"),
        ("ft", {"layers": [0], "num_steps": 100_001}, "num_steps: Input should be less"),
        ("kn", {"steps": 10_001}, "steps: Input should be less"),
    ],
)
def test_settings_that_make_no_sense_are_refused(method, values, says, write):
    assert says in refused(METHODS[method], write(values), LARGE)


def test_ft_l_has_a_box_unless_a_file_gives_another(write):
    h: Any = resolve_hparams(METHODS["ft_l"], write({"layers": [0], "lr": 0.01}), LARGE).values
    assert h.norm_constraint == 5e-4
