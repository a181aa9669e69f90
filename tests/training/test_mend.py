"""Training MEND: what a step computes, that it learns, and that nothing is lost when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.mend_training import facts, settings, trainer
from support.tiny_models import make_edit
from torch import nn

from harness_rect import cli
from harness_rect.errors import UserError
from harness_rect.hparams import presets
from harness_rect.io.resume import Resumable, save_state
from harness_rect.methods.gradients import Targets, inputs_and_gradients, targets_of, token_nll
from harness_rect.methods.mend import active
from harness_rect.methods.mend_weights import load_editor, read_description
from harness_rect.models import EditableLM
from harness_rect.training import mend as module
from harness_rect.training.mend import MendTrainer, inner_params, training_rows

ROOT = Path(__file__).resolve().parents[2]


def perturb(trainer: MendTrainer) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainer.editor.networks.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def mean_nll(lm: EditableLM, targets: Targets) -> torch.Tensor:
    return token_nll(lm, targets).mean()


def weighted_nll(lm: EditableLM, targets: Targets) -> torch.Tensor:
    return (token_nll(lm, targets) * targets.weights).sum()


# -- one step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "phi3"])
def test_the_loss_is_that_of_models_with_dense_updates(family, make_lm):
    """Fact by fact, with W + lr dW put into the model, and the same gradients for what is trained."""
    lm = make_lm(family)
    t = trainer(lm, c_edit=0.7, c_loc=0.4)
    perturb(t)
    episodes, weights = t._episodes(0)[:3], list(t.editor.weights)
    with lm.frozen():
        loss, sums = t._loss(episodes, training=True)
        total = torch.zeros(())
        for e in episodes:
            targets = targets_of(lm, [e.rewrite])
            found = inputs_and_gradients(lm, weights, targets.batch, partial(mean_nll, lm, targets))
            changed = {}
            for name in t.editor.weights:
                network, mode, lr = t.editor.of(name)
                x, g = found[name]
                used = active(x, g)
                x_new, g_new = network(x[used], g[used], mode)
                dw = x_new.T @ g_new if lm.is_transposed(name) else g_new.T @ x_new
                changed[name] = lm.weight(name) + lr * dw

            def logits(pair, weights):
                ids = torch.tensor([pair[0] + pair[1][:-1]])
                out = torch.func.functional_call(lm.model, weights, (ids,), {"use_cache": False}).logits
                return out[0, len(pair[0]) - 1 :].log_softmax(-1)

            edit = nn.functional.nll_loss(logits(e.paraphrase, changed), torch.tensor(e.paraphrase[1]))
            before, after = logits(e.locality, {}), logits(e.locality, changed)
            total = total + 0.7 * edit + 0.4 * (before.exp() * (before - after)).sum(-1).mean()
    torch.testing.assert_close(loss, total / 3, rtol=1e-4, atol=1e-5)
    assert sums["kl"] > 1e-4
    parameters = list(t.editor.parameters())
    for got, want in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(total / 3, parameters), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * max(1.0, float(want.abs().max())))


def test_statistics_are_those_of_all_training_tokens_and_frozen_afterwards(make_lm):
    lm = make_lm("llama")
    t = trainer(lm)
    rows: dict[str, list[torch.Tensor]] = {key: [] for key in t.running}
    with lm.frozen():
        for step in range(3):
            targets = targets_of(lm, [e.rewrite for e in t._episodes(step)])
            found = inputs_and_gradients(
                lm, list(t.editor.weights), targets.batch, partial(weighted_nll, lm, targets)
            )
            for name in t.editor.weights:
                x, g = found[name]
                used = active(x, g)
                rows[t.editor.key(name)].append(torch.cat([x[used], g[used]], -1).double())
            t.step()
        for _ in range(2):
            for key, seen in rows.items():
                network: Any = t.editor.networks[key]
                every = torch.cat(seen)
                mean = torch.cat([network.x_mean, network.g_mean]).double()
                deviation = torch.cat([network.x_std, network.g_std]).double()
                torch.testing.assert_close(mean, every.mean(0), rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(deviation, every.std(0), rtol=1e-4, atol=1e-6)
            t.validate()


def test_every_epoch_takes_each_fact_once_in_a_new_order(make_lm):
    t = trainer(make_lm("gpt2"))
    rewrites = [tuple(e.rewrite[0]) for step in range(7) for e in t._episodes(step)]
    epochs = [rewrites[i : i + 7] for i in range(0, 28, 7)]
    assert all(len(set(epoch)) == 7 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_edits_start_against_the_gradient(make_lm):
    t = trainer(make_lm("gpt2"), edit_lr=0.25)
    assert t.editor.lr.tolist() == [-0.25, -0.25]


# -- a whole training --------------------------------------------------------------------------------


def test_training_lowers_the_loss_of_held_out_edits(make_lm, tmp_path):
    lm = make_lm("gpt2")
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    t = trainer(lm, steps=40, layers=[0, 1], edit_lr=3e-3)
    with lm.frozen():
        t._loss(t._episodes(0), training=True)  # statistics
        start = t.validate()
    described = t.run(tmp_path / "mend")
    assert described.validation["loss"] < 0.8 * start["loss"]
    assert described.validation["edit"] < start["edit"]
    assert {"kl", "reliability", "generalization", "locality"} <= described.validation.keys()
    assert sorted(path.name for path in (tmp_path / "mend").iterdir()) == ["mend.safetensors", "mend.yaml"]
    assert read_description(tmp_path / "mend") == described
    read = load_editor(tmp_path / "mend")
    assert read.weights == inner_params(lm, [0, 1])
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())


def test_the_best_state_is_kept_and_waiting_has_an_end(make_lm, tmp_path, monkeypatch):
    t = trainer(make_lm("gpt2"), steps=40, patience=3)
    losses = iter([5.0, 2.0, 3.0, float("nan"), 4.0, 1.0])
    states = []

    def validate():
        states.append({name: p.clone() for name, p in t.editor.state_dict().items()})
        return {"loss": next(losses)}

    monkeypatch.setattr(t, "validate", validate)
    described = t.run(tmp_path / "mend")
    assert (described.training["best_step"], described.training["last_step"]) == (2, 5)
    assert described.validation == {"loss": 2.0}
    state = load_editor(tmp_path / "mend").state_dict()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in state.items())
    assert not torch.equal(state["lr"], states[0]["lr"])


def test_a_training_that_only_explodes_is_no_result(make_lm, tmp_path, monkeypatch):
    t = trainer(make_lm("gpt2"), steps=2)
    monkeypatch.setattr(t, "validate", lambda: {"loss": float("nan")})
    with pytest.raises(UserError, match="lower --edit-lr or --lr"):
        t.run(tmp_path / "mend")
    assert not (tmp_path / "mend" / "mend.yaml").exists()


def test_rows_lack_what_the_loss_needs(make_lm, caplog):
    lm = make_lm("gpt2")
    bare = [make_edit(id=str(i)) for i in range(3)]
    with pytest.raises(UserError, match="--train: no row has a locality prompt"):
        MendTrainer(lm, bare, facts(), settings())
    with pytest.raises(UserError, match="--val: no row has a locality prompt"):
        MendTrainer(lm, facts(), bare, settings())
    t = MendTrainer(lm, bare, bare, settings(c_loc=0))
    assert "3 of 3 rows have no paraphrase" in caplog.text
    with lm.frozen():
        scores = t.validate()
    assert scores["generalization"] == scores["reliability"] and "locality" not in scores


# -- interruptions -----------------------------------------------------------------------------------


def test_an_unfinished_training_is_not_continued_by_other_code(make_lm, tmp_path, monkeypatch):
    def stop(tensors, state):
        raise KeyboardInterrupt

    lm = make_lm("gpt2")
    monkeypatch.setattr("harness_rect.io.resume.SAVE_SECONDS", -1.0)
    save = Resumable.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Resumable, "save", lambda self, *state: [save(self, *state), stop(*state)])
        trainer(lm, steps=8).run(tmp_path)
    monkeypatch.setattr(module, "GRADIENT_CLIP", 50.0)
    with pytest.raises(UserError, match="or code"):
        trainer(lm, steps=8).run(tmp_path)


def test_an_unfinished_training_is_not_continued_with_other_settings(make_lm, tmp_path, caplog):
    lm = make_lm("gpt2")
    folder = tmp_path / "mend"
    save_state(folder / module.PARTIAL, "of other settings", {}, {})
    with pytest.raises(UserError, match="the state of a training with other settings"):
        trainer(lm).run(folder)
    (folder / module.PARTIAL).write_bytes(b"nothing")
    trainer(lm, steps=1).run(folder)
    assert "is damaged" in caplog.text and (folder / f"{module.PARTIAL}.damaged").is_file()


@pytest.mark.parametrize("written", [["mend.safetensors"], ["mend.safetensors", "mend.yaml"]])
def test_a_training_killed_between_its_last_save_and_its_end_is_done_again(make_lm, tmp_path, written):
    """``mend.yaml`` is written after the networks, and the state removed after both."""
    lm = make_lm("gpt2")
    trainer(lm, steps=2).run(tmp_path / "whole")
    folder = tmp_path / "killed"
    folder.mkdir()
    for name in written:
        (folder / name).write_bytes(b"half")
    if "mend.yaml" in written:
        with pytest.raises(UserError, match="exists already"):
            module.check_folder(folder)
        unfinished = trainer(lm, steps=2)
        unfinished._save(Resumable(folder / module.PARTIAL, unfinished._task))
    module.check_folder(folder)
    trainer(lm, steps=2).run(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["mend.safetensors", "mend.yaml"]
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


# -- the command -------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, make_model, bos_tokenizer) -> Path:
    make_model("llama").save_pretrained(tmp_path / "model")
    bos_tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {
            "subject": e.subject,
            "src": e.text,
            "alt": e.target_new,
            "rephrase": e.paraphrases[0],
            "loc": "nq question: Where is the Space Needle? In",
            "loc_ans": "Seattle",
        }
        for e in facts()
    ]
    (tmp_path / "facts.json").write_text(json.dumps(rows))
    return tmp_path


def command(place: Path, *more: str, output: str = "mend") -> list[str]:
    usual = ["train-mend", "--model", str(place / "model"), "--train", f"{place / 'facts.json'}[0:8]"]
    sizes = ["--rank", "4", "--steps", "8", "--batch-size", "3", "--device", "cpu"]
    return [*usual, *sizes, "--output", str(place / output), *more]


KILLED = """
import os, signal, sys
from harness_rect import cli
from harness_rect.io import resume
resume.SAVE_SECONDS = -1.0
save = resume.Resumable.save
def stop(self, tensors, state):
    save(self, tensors, state)
    if state["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
resume.Resumable.save = stop
cli.main(sys.argv[1:])
"""


@pytest.mark.posix
def test_the_command_survives_being_killed_and_its_weights_edit(place, capsys):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *command(place)], env=environment, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = subprocess.run(
        [sys.executable, "-m", "harness_rect", *command(place)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "resuming an interrupted training after 3 steps" in done.stderr
    assert "edit with: --method mend --hparams" in done.stdout
    assert cli.main(command(place, output="whole")) == 0
    folders = [place / "mend", place / "whole"]
    assert len({(folder / "mend.safetensors").read_bytes() for folder in folders}) == 1
    assert len({(folder / "mend.yaml").read_bytes() for folder in folders}) == 1
    described = read_description(place / "mend")
    assert described.training["layers"] == [0, 1] and described.training["facts"] == 7  # one is held out
    edit = ["edit", "--model", str(place / "model"), "--method", "mend", "--hparams", str(place / "mend")]
    rest = ["--edits", f"{place / 'facts.json'}[8:10]", "--edit-cache", "off", "--device", "cpu"]
    assert cli.main([*edit, *rest, "--output", str(place / "edited")]) == 0
    report = json.loads((place / "edited" / "edit_report.json").read_text())
    assert report["hparams"]["weights_sha256"] == described.sha256
    assert report["n_edits"] == 2 and "no_change" not in report["flagged"]
    capsys.readouterr()
    assert cli.main(command(place)) == 2
    assert "mend: exists already; give another folder or remove it" in capsys.readouterr().err


@pytest.fixture
def own_presets(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """An empty folder in place of the package's presets, which other tests have read already."""
    monkeypatch.setattr("harness_rect.hparams.PRESETS", tmp_path / "presets")
    presets.cache_clear()
    yield tmp_path / "presets"
    presets.cache_clear()


def test_published_settings_are_those_of_the_model_unless_an_option_is_given(place, own_presets, caplog):
    folder = own_presets / "mend"
    folder.mkdir(parents=True)
    match = {"model_type": "llama", "num_hidden_layers": 2}
    training = {"layers": [1], "rank": 3, "steps": 4, "lr": 1e-4}
    preset = {"about": "MEND", "match": match, "published": "a file", "hparams": {}, "training": training}
    (folder / "two-blocks.yaml").write_text(json.dumps(preset))
    options = {"--rank": "4", "--steps": "8"}
    asked = [word for word in command(place) if word not in {*options, *options.values()}]
    with caplog.at_level("INFO"):
        assert cli.main([*asked, "--steps", "2"]) == 0
    assert "settings of the training: preset two-blocks, values published in a file" in caplog.messages
    described = read_description(place / "mend")
    settings = described.training
    assert (settings["layers"], described.rank, settings["steps"], settings["lr"]) == ([1], 3, 2, 1e-4)
    assert settings["batch_size"] == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rank", "0"], "command line: rank: Input should be greater than or equal to 1"),
        (["--edit-lr", "-1"], "command line: edit_lr: Input should be greater than 0"),
        (["--layers", "0-7"], "layer 2 does not exist: this model has layers 0 to 1"),
        (["--layers", "x"], "--layers x: expected numbers"),
        (["--val", "nowhere.json"], "there is no file"),
        (["--train", "tiny[0]"], "--train: at least two rows are needed"),
        (["--model", "nowhere"], "--model nowhere: cannot be loaded"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(more, message, place, capsys):
    assert cli.main(command(place, *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (place / "mend").exists()


@pytest.mark.parametrize(
    ("spec", "read"),
    [("zsre", "zsre_train"), ("zsre[:9]", "zsre_train[:9]"), ("zsre.json", "zsre.json"), ("tiny", "tiny")],
)
def test_zsre_means_its_training_rows(spec, read):
    assert training_rows(spec) == read
