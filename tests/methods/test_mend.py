"""MEND: the published updates, dense gradients, every family, and weights that do not fit."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.tiny_models import FAMILIES, TWO_FACTS
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from harness_rect import embedded
from harness_rect.config import EditConfig
from harness_rect.edits import load_edits
from harness_rect.errors import UserError
from harness_rect.fingerprint import model_fingerprint
from harness_rect.hparams import resolve_hparams
from harness_rect.methods import METHODS, Context
from harness_rect.methods.gradients import inputs_and_gradients, targets_of, token_nll
from harness_rect.methods.mend import Editor, HyperNetwork, factors, update
from harness_rect.methods.mend_weights import read_description, save_editor
from harness_rect.models import EditableLM
from harness_rect.moments import SecondMoment
from harness_rect.session import EditSession
from harness_rect.training.mend import inner_params

GOLDENS = Path(__file__).parent.parent / "data" / "goldens"
MEND = METHODS["mend"]
CASES = {
    "mend_gpt2": ("tiny_gpt2", "transformer.h.2.mlp.c_proj.weight"),
    "mend_llama": ("tiny_llama", "model.layers.2.mlp.up_proj.weight"),
}
LAYER_PARTS = ("u", "v", "bias", "mode_scale", "mode_shift")


def golden_network(golden: dict[str, torch.Tensor], widths: tuple[int, int]) -> HyperNetwork:
    name = f"hyper.x{widths[0]}_d{widths[1]}"
    layers = [{part: golden[f"{name}.layer{i}.{part}"] for part in LAYER_PARTS} for i in range(2)]
    names = {"x_mean": "u_mean", "x_std": "u_std", "g_mean": "v_mean", "g_std": "v_std"}
    return HyperNetwork(layers, **{ours: golden[f"{name}.{theirs}"] for ours, theirs in names.items()})


def no_second_moment(layer: int) -> SecondMoment:
    raise AssertionError("MEND needs none")


def random_editor(lm: EditableLM, scale: float = 0.05) -> Editor:
    """Of all MLP matrices of all blocks, with nothing left at its start."""
    layers = list(range(lm.architecture.n_layers))
    editor = Editor.identity(inner_params(lm, layers), 6, -1e-3)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in editor.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor += scale * (noise.abs() if name.endswith("std") else noise) * (1e-2 if name == "lr" else 1)
    return editor


def save(folder: Path, lm: EditableLM, editor: Editor) -> str:
    save_editor(
        folder,
        editor,
        model="a model",
        dtype="float32",
        model_fingerprint=model_fingerprint(lm.model),
        rank=next(tensor for name, tensor in editor.state_dict().items() if name.endswith(".u")).shape[1],
    )
    return str(folder)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> bool:
    assert got.shape == want.shape
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


# -- the published numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_rule_on_plain_tensors_is_the_published_one(case):
    name = CASES[case][1]
    golden = load_file(GOLDENS / case / "golden.safetensors")
    meta = json.loads((GOLDENS / case / "meta.json").read_text())
    x, g = golden[f"{name}.x"], golden[f"{name}.delta"]
    network, mode = golden_network(golden, (x.shape[-1], g.shape[-1])), meta["mode_index"][name]
    lr = golden["edit_lrs"][meta["inner_params"].index(name)]
    x_new, g_new = factors(x, g, network, mode)
    assert len(x_new) == meta["rows_used"][name]
    assert close(x_new, golden[f"{name}.out_x"])
    assert close(g_new, golden[f"{name}.out_delta"])
    dw, transposed = golden[f"{name}.dW"], case == "mend_gpt2"
    assert close(update(x, g, network, mode, transposed=transposed), dw)
    assert close(update(x, g, network, mode, lr, transposed=transposed), lr * dw)
    outer = x.flatten(0, 1).T @ g.flatten(0, 1)
    assert close(outer if transposed else outer.T, golden[f"{name}.grad"])


@pytest.mark.parametrize("case", CASES)
def test_a_batch_through_the_model_is_the_published_one(case, tmp_path):
    """From the facts, by way of files, to every weight's update."""
    folder = GOLDENS / CASES[case][0]
    lm = EditableLM(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    golden = load_file(GOLDENS / case / "golden.safetensors")
    meta = json.loads((GOLDENS / case / "meta.json").read_text())
    widths = {name: lm.widths(name) for name in meta["inner_params"]}
    networks = {f"x{a}_g{b}": golden_network(golden, (a, b)) for a, b in set(widths.values())}
    spec = save(tmp_path / "mend", lm, Editor(widths, networks, golden["edit_lrs"]))
    edits = load_edits(str(GOLDENS / case / "requests.json"))
    h = resolve_hparams(MEND, spec, lm).values
    assert MEND.weights(lm, h) == meta["inner_params"]
    with lm.frozen():
        updates = MEND.propose(lm, edits, h, Context([], no_second_moment)).updates
    assert list(updates) == meta["inner_params"]
    for lr, (name, found) in zip(golden["edit_lrs"], updates.items(), strict=True):
        if f"{name}.dW" in golden:
            assert close(found.dense(), lr * golden[f"{name}.dW"]), name
        else:
            assert close(found.dense()[::16], lr * golden[f"{name}.dW.rows"]), name


# -- against direct computations ---------------------------------------------------------------------


def plain_network(x_width: int, g_width: int) -> HyperNetwork:
    """The identity without whitening: divides by (1 - 1e-7) + 1e-7."""
    network = HyperNetwork.identity(x_width, g_width, 1, 4).double()
    network.x_std -= 1e-7
    network.g_std -= 1e-7
    return network


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_outer_products_of_untransformed_rows_are_the_dense_gradient(kind):
    torch.manual_seed(0)
    module = (nn.Linear(5, 7) if kind is nn.Linear else Conv1D(7, 5)).double()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    x[1, 2:] = 0  # padding
    out = module(x)
    out.retain_grad()
    (out.tanh()[:, :-1] ** 2 * torch.rand(7, dtype=torch.float64)).sum().backward()
    found = update(x, out.grad, plain_network(5, 7), 0, transposed=kind is Conv1D)
    torch.testing.assert_close(found, module.weight.grad, rtol=1e-12, atol=1e-12)


def test_at_the_start_an_edit_is_the_gradient_of_whitened_rows():
    generator = torch.Generator().manual_seed(1)
    x, g = torch.randn(6, 5, generator=generator), torch.randn(6, 3, generator=generator)
    network = HyperNetwork.identity(5, 3, modes=2, rank=4, generator=generator)
    for part, rows in (("x", x), ("g", g)):
        getattr(network, f"{part}_mean").copy_(rows.mean(0))
        getattr(network, f"{part}_std").copy_(rows.std(0))
    whitened = [(rows - rows.mean(0)) / (rows.std(0) + 1e-7) for rows in (x, g)]
    for mode in (0, 1):
        torch.testing.assert_close(update(x, g, network, mode, -0.5), -0.5 * whitened[1].T @ whitened[0])


def test_tokens_without_input_or_gradient_take_no_part():
    """The network alone would make something of zeros."""
    network = HyperNetwork.identity(4, 3, 1, 2)
    network.x_mean += 1.0
    network.g_mean -= 2.0
    x, g = torch.ones(4, 4), torch.ones(4, 3)
    x[1], g[2] = 0, 0
    torch.testing.assert_close(update(x, g, network, 0), update(x[[0, 3]], g[[0, 3]], network, 0))
    assert float(update(torch.zeros(2, 4), torch.ones(2, 3), network, 0).abs().sum()) == 0


def test_weights_of_one_shape_share_a_network_and_differ_by_mode(make_lm):
    editor = random_editor(make_lm("llama"))
    names = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("gate", "up", "down")]
    assert list(editor.weights) == names
    assert [editor.of(name)[1] for name in names] == [0, 1, 0, 2, 3, 1]
    assert editor.of(names[0])[0] is editor.of(names[4])[0] is not editor.of(names[2])[0]
    assert [editor.of(name)[2].item() for name in names] == editor.lr.tolist()


# -- in a session ------------------------------------------------------------------------------------


def session(lm: EditableLM, spec: str | None, **config) -> EditSession:
    usual = {"method": "mend", "edits": "given", "hparams": spec, "edit_batch_size": 2}
    return EditSession(lm.model, lm.encoder.tokenizer, EditConfig(**usual | config), TWO_FACTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_edited(family, make_lm, tmp_path):
    lm = make_lm(family)
    editor = random_editor(lm)
    spec = save(tmp_path / "mend", lm, editor)
    targets = targets_of(lm, [lm.encoder.continuation(edit.text, edit.target) for edit in TWO_FACTS])
    with lm.frozen():
        found = inputs_and_gradients(
            lm, list(editor.weights), targets.batch, lambda: token_nll(lm, targets).mean()
        )
    before = {name: lm.weight(name).detach().clone() for name in editor.weights}
    run = session(lm, spec)
    report = run.run()
    assert report["flagged"].get("not_finite") is None
    assert set(report["weights"]) == set(editor.weights)
    for name, old in before.items():
        network, mode, lr = editor.of(name)
        change = update(*found[name], network, mode, lr, transposed=lm.is_transposed(name))
        assert float(change.detach().norm()) > 0
        torch.testing.assert_close(lm.weight(name).detach(), old + change.detach(), rtol=1e-5, atol=1e-6)
    run.revert()
    assert all(torch.equal(lm.weight(name), old) for name, old in before.items())


def test_weights_below_float32_are_edited(make_lm, tmp_path, caplog):
    lm = make_lm("gpt2")
    spec = save(tmp_path / "mend", lm, random_editor(lm))
    lm.model.to(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        report = session(lm, spec, regularizer="rect", keep=0.4).run()
    assert "was trained for a model (float32); this model has other weights" in caplog.text
    weights = [w for step in report["steps"] for w in step["weights"].values()]
    assert all(w["finite"] and w["kept"] == pytest.approx(0.4, abs=0.01) for w in weights)
    assert max(w["changed"] for w in weights) > 0


def test_a_run_is_named_by_what_was_trained_not_by_its_folder_alone(make_lm, tmp_path):
    lm = make_lm("gpt2")
    runs = []
    for scale in (0.05, 0.06):
        run = session(lm, save(tmp_path / "mend", lm, random_editor(lm, scale)))
        runs.append(run.run()["run"])
        run.revert()
    assert runs[0] != runs[1]


# -- hyper-parameters and weights that do not fit ----------------------------------------------------

PUBLISHED = {
    "alg_name": "MEND",
    "model_name": "./hugging_cache/gpt2-xl",
    "archive": "./results/models/MEND/gpt2-xl",
    "alg": "MEND",
    "lr": 1e-6,
    "edit_lr": 1e-4,
    "lr_lr": 1e-4,
    "cedit": 0.1,
    "cloc": 1.0,
    "rank": 1920,
    "act": "relu",
    "shared": True,
    "batch_size": 1,
    "max_iters": 100000,
}


def test_a_published_file_needs_trained_weights(make_lm, tmp_path):
    lm = make_lm("gpt2")
    path = tmp_path / "mend-gpt2.yaml"
    names = list(inner_params(lm, [0, 1]))
    path.write_text(yaml.safe_dump(PUBLISHED | {"inner_params": names}))
    with pytest.raises(UserError, match=r"mend-gpt2\.yaml: .*harness-rect train-mend"):
        resolve_hparams(MEND, str(path), lm)
    spec = save(tmp_path / "mend", lm, random_editor(lm))
    path.write_text(yaml.safe_dump(PUBLISHED | {"inner_params": names[::-1], "weights": spec}))
    assert resolve_hparams(MEND, str(path), lm).values.model_dump()["weights"] == spec
    path.write_text(yaml.safe_dump(PUBLISHED | {"inner_params": names[:1], "weights": spec}))
    with pytest.raises(UserError, match=r"inner_params: .* was trained for transformer"):
        resolve_hparams(MEND, str(path), lm)
    path.write_text(yaml.safe_dump({"weights": spec, "v_lr": 0.5}))
    with pytest.raises(UserError, match="v_lr is not a hyper-parameter of mend"):
        resolve_hparams(MEND, str(path), lm)
    with pytest.raises(UserError, match="is not a hyper-parameter of rome; is the file for another method"):
        path.write_text(yaml.safe_dump(PUBLISHED))
        resolve_hparams(METHODS["rome"], str(path), lm)


def test_a_model_without_trained_weights_is_told_what_to_do(make_lm, tmp_path, monkeypatch):
    lm = make_lm("gpt2")
    with pytest.raises(UserError, match="harness-rect train-mend"):
        session(lm, None)
    with pytest.raises(UserError, match=r"nowhere: no trained MEND there .*--output nowhere"):
        session(lm, "nowhere")
    monkeypatch.setattr(embedded, "MEND", tmp_path / "mend")
    with pytest.raises(UserError, match="no trained MEND there"):
        session(lm, "rect-tiny")
    save(tmp_path / "mend", lm, random_editor(lm))
    assert session(lm, "rect-tiny").weight_names


def test_weights_trained_for_another_model_are_refused(make_lm, tmp_path):
    lm = make_lm("gpt2")
    spec = save(tmp_path / "mend", lm, random_editor(lm))
    with pytest.raises(
        UserError, match=r"mend: trained for another model: this one has no MLP matrix transf"
    ):
        session(make_lm("llama"), spec)
    with pytest.raises(UserError, match=r"c_fc\.weight maps 32 to 48 there and 32 to 64 here"):
        session(make_lm("gpt2", n_inner=64), spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-4] + b"abcd"), "damaged, or not the file"),
        (Path.unlink, "No such file"),
    ],
)
def test_damaged_tensors_are_named(change, message, make_lm, tmp_path):
    lm = make_lm("gpt2")
    spec = save(tmp_path / "mend", lm, random_editor(lm))
    change(tmp_path / "mend" / "mend.safetensors")
    with pytest.raises(UserError, match=rf"mend\.safetensors: .*{message}|mend\.safetensors: {message}"):
        session(lm, spec)


@pytest.mark.parametrize("text", ["", "[1]", "{rank: 3", "model: x\nrank: three\n"])
def test_a_damaged_description_is_named(text, make_lm, tmp_path):
    lm = make_lm("gpt2")
    spec = save(tmp_path / "mend", lm, random_editor(lm))
    (tmp_path / "mend" / "mend.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mend\.yaml: not a description of a trained MEND") as caught:
        session(lm, spec)
    assert "\n" not in str(caught.value)


def test_a_description_with_another_number_is_not_taken(make_lm, tmp_path):
    lm = make_lm("gpt2")
    spec = save(tmp_path / "mend", lm, random_editor(lm))
    path = tmp_path / "mend" / "mend.yaml"
    whole = path.read_text()
    path.write_text(whole.replace("dtype: float32", "dtype: float16"))
    with pytest.raises(UserError, match=r"mend\.yaml: not the description that was written"):
        session(lm, spec)
    lines = whole.splitlines(keepends=True)
    for end in range(1, len(lines) - 2):  # the last two are empty mappings, as missing ones are
        path.write_text("".join(lines[:end]))
        with pytest.raises(UserError, match=r"mend\.yaml: not "):
            read_description(path.parent)
