"""``replay``, ``export`` and ``cache``: what they make of kept runs, and what they refuse."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harness_rect import cli
from harness_rect.errors import UserError
from harness_rect.experiments.cost import cost
from harness_rect.experiments.hub import rank_in_words
from harness_rect.fingerprint import model_fingerprint
from harness_rect.io.cache import parse_size, size_limit
from harness_rect.io.checksums import write_sums
from harness_rect.model_wrappers.edited_hf import EditedHF
from harness_rect.session.report import EditReport
from harness_rect.session.runs import EditCache, KeptRun

HPARAMS = {"layers": [0, 1], "v_num_grad_steps": 2, "v_lr": 0.3, "context_templates": ["{}", "I went. {}"]}
TOWNS = ("Ulm", "Brno", "Ghent")
ROWS = [
    {"prompt": "The mayor of {} is", "subject": town, "target_new": f"Ms {town[0]} | Co", "case_id": town}
    for town in TOWNS
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_model, tokenizer) -> Path:
    """Models ``gpt2`` and ``llama``, what they give after three ROME edits, and the kept runs."""
    place = tmp_path_factory.mktemp("made")
    (place / "facts.json").write_text(json.dumps(ROWS))
    (place / "hparams.json").write_text(json.dumps(HPARAMS))
    for family, regularizer in (("gpt2", "none"), ("llama", "none"), ("gpt2", "rect")):
        model, name = place / family, f"{family}-{regularizer}"
        make_model(family).save_pretrained(model)
        tokenizer.save_pretrained(model)
        options = ["--model", model, "--method", "rome", "--edits", place / "facts.json", "--device", "cpu"]
        options += ["--hparams", place / "hparams.json", "--output", place / name]
        options += ["--edit-cache", place / f"{name}-runs", "--regularizer", regularizer]
        options += ["--keep", "0.4"] if regularizer == "rect" else []
        assert cli.main(["edit", *map(str, options)]) == 0
    return place


@pytest.fixture
def run_of(made: Path) -> Callable[[str], str]:
    """The folder of the run of ``gpt2-none``, ``llama-none`` or ``gpt2-rect``."""

    def run_of(name: str) -> str:
        (entry,) = EditCache(made / f"{name}-runs").entries()
        return str(entry.path)

    return run_of


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40).unsqueeze(0)).logits


def same(one: Any, other: Any) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# --------------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize("name", ["gpt2-rect", "llama-none"])
def test_a_replayed_checkpoint_is_the_edited_one(made: Path, run_of, tmp_path: Path, name: str) -> None:
    key, cache = Path(run_of(name)).name[:6], str(made / f"{name}-runs")
    done = cli.main(
        ["replay", key, "--edit-cache", cache, "--device", "cpu", "--output", str(tmp_path / "o")]
    )
    assert done == 0
    assert same(load(tmp_path / "o"), load(made / name))
    reports = [
        json.loads((folder / "edit_report.json").read_text()) for folder in (tmp_path / "o", made / name)
    ]
    assert reports[0].pop("from_cache") and reports[1].pop("seconds") and not reports[1].pop("from_cache")
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("nothing", [], "nothing: no such folder and no kept run"),
        ("gpt2-rect", ["--upto", "4"], "--upto 4: expected a number of edits from 1 to 3"),
        ("gpt2-rect", ["--rect", "0.2"], "depends on what was added in earlier ones"),
        ("gpt2-rect", ["--keep", "0.2"], "keep is given, but there is no regularizer"),
        ("gpt2-rect", ["--model", "llama"], "its weights are not those that the run was made with"),
        ("gpt2-rect", ["--edit-cache", "off", "--model", "x"], "cannot be loaded"),
        ("gpt2", [], "the kept edit run is damaged: SHA256SUMS is missing"),
        ("gpt2-rect", ["--model-args", "revision"], "--model-args revision: expected NAME=VALUE"),
        ("gpt2-rect", ["--model-args", "subfolder=x,device=cpu"], "--model-args device: --device names it"),
        ("gpt2-rect", ["--model-args", "method=rome"], "--model-args method: the run says how"),
        ("gpt2-rect", ["--model-args", "subfolder=x"], "cannot be loaded: "),
    ],
)
def test_what_cannot_be_replayed_is_one_line(
    made: Path, run_of, tmp_path: Path, name: str, options: list[str], said: str, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(made)
    run = run_of(name) if name.endswith("rect") else name
    assert cli.main(["replay", run, "--output", str(tmp_path / "o"), "--device", "cpu", *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "o").exists()


# ------------------------------------------------------------------------------- how the base is loaded


@pytest.fixture(scope="module")
def below(made: Path) -> Path:
    """``all/sub``, the model gpt2; ``runs``, with the run that edited_hf makes of it; and ``edited``."""
    place = made / "below"
    shutil.copytree(made / "gpt2", place / "all" / "sub")
    editing = {"method": "rome", "edits": str(made / "facts.json"), "hparams": str(made / "hparams.json")}
    editing |= {"edit_cache": str(place / "runs"), "save_edited": str(place / "edited"), "device": "cpu"}
    EditedHF(str(place / "all"), subfolder="sub", **editing)
    return place


def run_below(below: Path, to: Path, change: Callable[[dict[str, Any]], Any] = lambda base: None) -> str:
    """A copy of the run whose ``base`` is changed, as another program may have written it."""
    (entry,) = EditCache(below / "runs").entries()
    shutil.copytree(entry.path, to)
    content = json.loads((to / "run.json").read_text())
    change(content["base"])
    (to / "run.json").write_text(json.dumps(content))
    write_sums(to)
    return str(to)


def test_a_base_in_a_subfolder_is_loaded_as_the_run_was_made(
    made: Path, below: Path, run_of, tmp_path: Path
) -> None:
    run, edited, base = run_below(below, tmp_path / "run"), load(below / "edited"), str(below / "all")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["base"]["arguments"] == {
        "subfolder": "sub"
    }
    there = json.loads(Path(run_of("gpt2-none"), "run.json").read_text())
    assert there["key"] == KeptRun.read(Path(run)).key and there["base"].keys() == {"model", "dtype"}

    assert cli.main(["replay", run, "--device", "cpu", "--output", str(tmp_path / "o")]) == 0
    assert same(load(tmp_path / "o"), edited)
    assert export(run, tmp_path / "delta", "--format", "delta") == 0
    model, found = loaded(tmp_path / "delta")
    torch.testing.assert_close(model.state_dict(), edited.state_dict(), rtol=1e-5, atol=1e-8)
    assert found["pretrained"]["base"] == base
    card = (tmp_path / "delta" / "README.md").read_text()
    assert "edited in `all` (subfolder=sub) by" in card and str(tmp_path) not in card
    assert export(run, tmp_path / "adapter", "--format", "peft") == 0
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == f"{base}/sub"


@pytest.mark.parametrize("old", [False, True], ids=["recorded", "of an older version"])
def test_the_command_line_overrides_how_the_base_is_loaded(
    below: Path, tmp_path: Path, old: bool, capsys
) -> None:
    run = run_below(
        below, tmp_path / "run", (lambda base: base.pop("arguments")) if old else lambda base: None
    )

    def replayed(*options: str) -> int:
        shutil.rmtree(tmp_path / "o", ignore_errors=True)
        return cli.main(["replay", run, "--device", "cpu", "--output", str(tmp_path / "o"), *options])

    shutil.copytree(below / "all", moved := tmp_path / "moved")
    assert replayed("--model", str(moved / "sub"), *([] if old else ["--model-args", "subfolder="])) == 0
    assert replayed("--model", str(moved)) == (2 if old else 0)
    assert replayed("--model", str(moved), "--model-args", "subfolder=sub,revision=main") == 0
    assert replayed("--model-args", "subfolder=none_there") == 2
    assert not (tmp_path / "o").exists() and capsys.readouterr().err.count("\nerror: ") == (2 if old else 1)


@pytest.mark.parametrize("arguments", [None, {"subfolder": "sub", "trust_remote_code": True}])
def test_code_of_a_model_is_run_only_if_the_command_says_so(
    below: Path, tmp_path: Path, arguments: Any, capsys
) -> None:
    shutil.copytree(below / "all", place := tmp_path / "all")
    config = json.loads((file := place / "sub" / "config.json").read_text())
    file.write_text(json.dumps(config | {"model_type": "x", "auto_map": {"AutoConfig": "x.C"}}))
    (place / "sub" / "x.py").write_text("raise ValueError('it ran')")
    model = str(place / "sub" if arguments is None else place)

    def change(base: dict[str, Any]) -> None:
        del base["arguments"]
        base |= {"model": model} | ({} if arguments is None else {"arguments": arguments})

    run = run_below(below, tmp_path / "run", change)
    assert cli.main(["replay", run, "--device", "cpu", "--output", str(tmp_path / "o")]) == 2
    out, err = capsys.readouterr()
    assert "--model-args trust_remote_code=True runs it" in err and "it ran" not in out + err
    assert "Do you wish" not in out


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        (["subfolder"], "damaged: not as harness-rect writes it"),
        ({"revision": 5}, "base.arguments.revision: Input should be a valid string"),
        ({"subfolder": ["sub"]}, "base.arguments.subfolder"),
        ({"add_bos_token": "perhaps"}, "base.arguments.add_bos_token"),
        ({"tokenizer": "\0"}, "cannot be loaded: "),
        ({"subfolder": "sub", "peft": "x"}, "whose checkpoint would hold the adapter alone"),
        (
            {"subfolder": "sub", "trust_remote_code": True, "device_map": "x", "save_edited": "x", "a": 1},
            None,
        ),
    ],
)
def test_arguments_that_a_file_must_not_give_are_refused_or_ignored(
    below: Path, tmp_path: Path, recorded: Any, said: str | None, capsys, monkeypatch
) -> None:
    run = run_below(below, tmp_path / "run", lambda base: base.update(arguments=recorded))
    given: dict[str, Any] = {}

    def watched(*names: Any, **arguments: Any) -> Any:
        given.update(arguments)
        return EditedHF(*names, **arguments)

    monkeypatch.setattr("harness_rect.model_wrappers.edited_hf.EditedHF", watched)
    status = cli.main(["replay", run, "--device", "cpu", "--output", str(tmp_path / "o")])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    if said is None:
        assert status == 0 and lines == []
        assert given == {"method": "none", "dtype": "float32", "device": "cpu", "subfolder": "sub"}
    else:
        assert status == 2 and len(lines) == 1 and said in lines[0]
        assert not (tmp_path / "o").exists()


# --------------------------------------------------------------------------------------------- export


def export(run: str, output: Path, *options: str) -> int:
    return cli.main(["export", run, "--output", str(output), "--device", "cpu", *options])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_peft_loads_the_adapter_and_gives_the_same_logits(
    made: Path, run_of, tmp_path: Path, family: str
) -> None:
    peft = pytest.importorskip("peft")
    assert export(run_of(f"{family}-none"), tmp_path / "adapter", "--format", "peft") == 0
    base, edited = logits(load(made / family)), logits(load(made / f"{family}-none"))
    adapted = peft.PeftModel.from_pretrained(load(made / family), tmp_path / "adapter")
    assert (base - edited).abs().max() > 1e-3
    torch.testing.assert_close(logits(adapted), edited, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), edited, atol=2e-6, rtol=1e-5)
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(alone), edited, atol=2e-6, rtol=1e-5)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "Its rank is 3; vLLM needs `enable_lora=True, max_lora_rank=8`." in card


def test_the_adapter_of_an_embedded_model_names_its_folder(tmp_path: Path, capsys) -> None:
    peft = pytest.importorskip("peft")
    options = ["--model", "rect-tiny", "--method", "rome", "--edits", "tiny[0:1]", "--device", "cpu"]
    options += ["--edit-cache", str(tmp_path / "runs"), "--output", str(tmp_path / "edited")]
    assert cli.main(["edit", *options]) == 0
    (run,) = EditCache(tmp_path / "runs").entries()
    assert export(str(run.path), tmp_path / "adapter", "--format", "peft") == 0
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(adapted), logits(load(tmp_path / "edited")), atol=1e-4, rtol=0)
    assert "base_model:" not in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(("rank", "said"), [(1, "=1`"), (20, "=32`"), (512, "=512`"), (513, "at most 512")])
def test_the_rank_of_an_adapter_is_given_as_vllm_takes_it(rank: int, said: str) -> None:
    assert said in rank_in_words(rank)


def test_an_adapter_is_refused_after_rect_with_the_reason(run_of, tmp_path: Path, capsys) -> None:
    assert export(run_of("gpt2-rect"), tmp_path / "adapter", "--format", "peft") == 2
    assert "regularizer rect leaves a matrix of full rank" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()
    options = ["--format", "peft", "--upto", "1", "--regularizer", "scale", "--keep", "0.5"]
    assert export(run_of("gpt2-rect"), tmp_path / "first", *options) == 0


def test_base_and_delta_are_the_edited_weights(made: Path, run_of, tmp_path: Path, capsys) -> None:
    assert export(run_of("gpt2-rect"), tmp_path / "delta", "--format", "delta") == 0
    (share,) = re.findall(r"differs from the edited weights in ([\d.]+)% of edited", capsys.readouterr().out)
    base, delta, edited = (load(folder) for folder in (made / "gpt2", tmp_path / "delta", made / "gpt2-rect"))
    differing = edited_elements = 0
    for (name, b), d, e in zip(base.named_parameters(), delta.parameters(), edited.parameters(), strict=True):
        if not name.endswith("mlp.c_proj.weight"):
            assert torch.count_nonzero(d) == 0
            continue
        torch.testing.assert_close(b + d, e, rtol=1e-6, atol=0)
        differing += int(torch.count_nonzero(b + d != e))
        edited_elements += d.numel()
    assert float(share) == pytest.approx(100 * differing / edited_elements, abs=1e-3)


# ----------------------------------------------------------------------------------------- provenance


def loaded(folder: Path, **more: Any) -> tuple[Any, dict[str, Any]]:
    """The model that ``edited_hf`` evaluates, and the provenance in the results file."""
    lm = EditedHF(str(folder), **{"method": "none", "device": "cpu", **more})
    return lm.model, json.loads(json.dumps(lm.get_model_info()["provenance"]))


def test_results_say_what_was_done_to_the_model_before(made: Path, run_of, tmp_path: Path, caplog) -> None:
    folder = made / "gpt2-rect"
    report = json.loads((folder / "edit_report.json").read_text())
    model, found = loaded(folder)
    assert found["model_fingerprint"] == model_fingerprint(load(folder))
    said = found["pretrained"]
    same = ("method", "regularizer", "regularizer_settings", "edits_sha256", "n_edits", "run")
    assert {name: said[name] for name in same} == {name: report[name] for name in same}
    assert (said["base"], said["base_fingerprint"]) == ("gpt2", model_fingerprint(load(made / "gpt2")))
    assert said["as_written"] is True and said["replay_of"] == "unknown"

    again, others = tmp_path / "again", {"edits": f"{made / 'facts.json'}[0:1]", "method": "rome"}
    others |= {"hparams": str(made / "hparams.json"), "edit_cache": "off", "save_edited": str(again)}
    _, twice = loaded(folder, **others)
    assert twice == found, "what these edits did is under `edit`"
    assert loaded(again)[1]["pretrained"]["provenance"] == found

    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[0, 0] += 1
    model.save_pretrained(changed := Path(shutil.copytree(folder, tmp_path / "changed")))
    _, found = loaded(changed)
    assert found["pretrained"]["as_written"] is False and "not those that edit_report.json" in caplog.text
    for text, line in {"[]": "expected an object", "{": "malformed JSON", '{"method": 3}': "method"}.items():
        (changed / "edit_report.json").write_text(text)
        assert loaded(changed)[1]["pretrained"] == "unknown"
        assert line in caplog.messages[-1] and "counts as unknown" in caplog.messages[-1]
    assert loaded(made / "gpt2")[1]["pretrained"] == "unknown"
    assert export(run_of("gpt2-none"), tmp_path / "adapter", "--format", "peft") == 0
    _, found = loaded(made / "gpt2", peft=str(tmp_path / "adapter"))
    assert found["pretrained"] == "unknown" and found["peft"]["n_edits"] == 3


def test_a_folder_of_deltas_is_evaluated_on_its_base(made: Path, run_of, tmp_path: Path, capsys) -> None:
    delta = tmp_path / "delta"
    assert export(run_of("gpt2-rect"), delta, "--format", "delta") == 0
    model, found = loaded(delta)
    by_argument, said = loaded(made / "gpt2", delta=str(delta))
    assert same(model, by_argument)
    torch.testing.assert_close(model.state_dict(), load(made / "gpt2-rect").state_dict(), rtol=1e-6, atol=0)
    assert found["pretrained"] == said["delta"] | {"as_written": True}
    assert found["pretrained"]["base"] == str(made / "gpt2") and found["pretrained"]["n_edits"] == 3
    assert found["model_fingerprint"] == said["model_fingerprint"] == model_fingerprint(model)

    with pytest.raises(UserError, match="holds differences, which cannot be combined with delta"):
        loaded(delta, delta=str(delta))
    assert cli.main(["replay", run_of("gpt2-rect"), "--model", str(delta), "--output", "o"]) == 2
    assert f"holds differences; use its base, {made / 'gpt2'}" in capsys.readouterr().err
    report = json.loads((delta / "edit_report.json").read_text())
    for other, line in (("gpt2-none", "from other weights than"), ("gone", "cannot be loaded")):
        (delta / "edit_report.json").write_text(json.dumps(report | {"delta_of": str(made / other)}))
        with pytest.raises(UserError, match=line):
            loaded(delta)


def test_the_card_says_what_was_edited_and_is_uploaded_with_the_folder(
    run_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    uploads: list[tuple[str, set[str]]] = []

    class Hub:
        def whoami(self) -> dict[str, str]:
            return {"name": "me"}

        def create_repo(self, name: str, **more: Any) -> Any:
            from huggingface_hub import RepoUrl

            return RepoUrl(f"https://huggingface.co/me/{name}")

        def upload_folder(self, repo_id: str, folder_path: Path, repo_type: str) -> None:
            uploads.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert export(run_of("gpt2-rect"), tmp_path / "none", "--push-to-hub", "edited") == 2
    assert "no token of the hub" in capsys.readouterr().err and not (tmp_path / "none").exists()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    assert export(run_of("gpt2-rect"), tmp_path / "o", "--push-to-hub", "edited") == 0
    assert "uploaded: https://huggingface.co/me/edited" in capsys.readouterr().out
    ((name, files),) = uploads
    assert name == "me/edited" and {"README.md", "model.safetensors", "edit_report.json"} <= files
    card = (tmp_path / "o" / "README.md").read_text()
    assert "3 facts were edited in `gpt2` by rome, regularizer rect" in card
    assert r"| The mayor of Brno is | Ms B \| Co |" in card
    assert "reliability" in card and "were not measured" in card


def results(path: Path, **config: Any) -> str:
    rows = {"mine": {"acc,none": 0.5, "acc_stderr,none": 0.1}}
    tasks = {"mine": {"dataset_path": f"/data/{path.stem}/rows", "test_split": "test"}}
    path.write_text(json.dumps({"results": rows, "configs": tasks, "config": config}))
    return str(path)


def test_the_card_has_only_results_of_the_base_and_of_this_run(
    made: Path, run_of, tmp_path: Path, capsys
) -> None:
    report = json.loads((made / "gpt2-rect" / "edit_report.json").read_text())
    run, fingerprint, edited = report["run"], report["model_fingerprint"], {"method": "rome", "n_edits": 3}

    def of(name: str, model: str, edit: dict[str, Any] | None = None, **more: Any) -> str:
        pretrained = {"pretrained": str(made / model)}
        edit = {"method": "none"} if edit is None else edit
        return results(
            tmp_path / f"{name}.json", model_args=pretrained | more.pop("args", {}), edit=edit, **more
        )

    def weights(found: str, **more: Any) -> dict[str, Any]:
        return {"provenance": {"model_fingerprint": found, **more}}

    base = of("base", "gpt2")
    after = of("after", "gpt2", edited | {"run": run})
    elsewhere = {"pretrained": {"run": run, "as_written": True}}
    for first in (base, of("moved", "gone", **weights(fingerprint))):
        for second in (after, of("ours", "gpt2-rect"), of("kept", "gone", **weights("0" * 64, **elsewhere))):
            assert "| mine | acc" in cost([first, second], EditReport.read(report), str(made / "gpt2"))
    refused = {
        "after 3 edits": (after, after),
        "of other weights": (of("w", "gpt2", **weights("0" * 64)), after),
        "of another model": (of("m", "llama"), after),
        "of a model with peft=x": (of("p", "gpt2", args={"peft": "x"}), after),
        "must be of the base model": (of("e", "gpt2-rect"), after),
        "of other edits (run abc)": (base, of("o", "gpt2", edited | {"run": "abc"})),
        "of other edits;": (base, of("n", "gpt2-none")),
        "says nothing of edits": (base, of("h", "gone")),
        "not those that the run left": (
            base,
            of("c", "gone", **weights("0" * 64, pretrained={"run": run, "as_written": False})),
        ),
    }
    for line, two in refused.items():
        with pytest.raises(UserError, match=re.escape(line)):
            cost(two, EditReport.read(report), str(made / "gpt2"))

    assert (
        export(run_of("gpt2-rect"), tmp_path / "o", "--model", str(made / "gpt2"), "--results", after, base)
        == 2
    )
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: --results {after}: is of a model after 3 edits")
    assert not (tmp_path / "o").exists()
    assert (
        export(run_of("gpt2-rect"), tmp_path / "o", "--model", str(made / "gpt2"), "--results", base, after)
        == 0
    )
    card = (tmp_path / "o" / "README.md").read_text()
    assert "base: gpt2; other: gpt2, 3 edits by rome" in card and "| mine | acc" in card
    assert not re.search(r"(^|[\s`(\[])/\w", card), "no folders of this machine"


# ---------------------------------------------------------------------------------------------- cache


def test_the_cache_is_listed_shown_verified_pruned_and_cleared(made: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(made / "gpt2-none-runs", folder)
    (run,) = (entry.path for entry in EditCache(folder).entries())
    other = folder / ("0" * 32)
    shutil.copytree(run, other)
    (folder / f"{'1' * 32}.partial.safetensors").write_bytes(b"x" * 3000)
    (folder / f"{'2' * 32}.damaged-2").mkdir()
    (folder / "mine.txt").write_text("not ours")

    def cache(*arguments: str) -> tuple[int, str]:
        status = cli.main(["cache", *arguments, "--edit-cache", str(folder)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    status, text = cache("list")
    assert status == 0 and run.name[:12] in text and "unfinished" in text and "4 entries" in text
    status, text = cache("show", run.name[:8])
    assert status == 0 and "3 of" in text and "rome" in text and "2 of" not in text
    status, text = cache("verify")
    assert status == 1 and f"damaged: {other}: another run's" in text and "4 entries" in text
    assert (
        "2.damaged-2: set aside before" in text and "1.partial.safetensors: " in text and "3 damaged" in text
    )
    status, text = cache("prune", "--max-size", "2.9kB")
    assert status == 0 and {path.name for path in folder.iterdir()} >= {"mine.txt"}
    assert [entry.kind for entry in EditCache(folder).entries()] in ([], ["unfinished"])
    shutil.copytree(made / "gpt2-none-runs", folder, dirs_exist_ok=True)
    with EditCache(folder).lock(run.name):
        cache("clear")
        assert [entry.path for entry in EditCache(folder).entries()] == [run], "in use"
    assert cache("clear")[0] == 0
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    for wrong in (["show"], ["list", "abc"], ["prune"], ["clear", "--max-size", "1"], ["show", "abc"]):
        status, text = cache(*wrong)
        assert status == 2 and text.count("\n") == 1 and "error: " in text


def test_the_list_reads_no_tensors_and_marks_a_damaged_report(made: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(made / "gpt2-none-runs", folder := tmp_path / "runs")
    (run,) = (entry.path for entry in EditCache(folder).entries())

    def cells() -> list[str]:
        assert cli.main(["cache", "list", "--edit-cache", str(folder)]) == 0
        return capsys.readouterr().out.splitlines()[1].split()[2:6]

    (run / "updates.safetensors").write_bytes(b"x")
    assert cells() == ["gpt2", "rome", "none", "3"]
    report = (run / "report.json").read_text()
    for damaged in (report.replace('"rome"', '"memit"'), "[]", ""):
        (run / "report.json").write_text(damaged)
        assert cells() == ["?"] * 4
    (run / "report.json").unlink()
    assert cells() == ["?"] * 4


@pytest.mark.parametrize("form", ["full", "delta", "peft"])
def test_an_export_whose_card_cannot_be_written_leaves_nothing(
    run_of, tmp_path: Path, form: str, monkeypatch, capsys
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("harness_rect.cli.export.model_card", lambda *given: (_ for _ in ()).throw(full))
    options = ["--format", form, "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(["export", run_of("gpt2-none"), *options]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_lock_and_no_run_of_its_name_stops_nothing(made: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(made / "gpt2-none-runs", tmp_path / "runs")
    cache = EditCache(tmp_path / "runs")
    (run,) = (entry for entry in cache.entries() if entry.kind == "run")
    (tmp_path / "runs" / ("0" * 32)).symlink_to(run.path)
    (tmp_path / "runs" / ("1" * 32)).mkdir()
    (tmp_path / "runs" / ("1" * 32 + ".lock")).mkdir()
    options = ["--edit-cache", str(tmp_path / "runs")]
    assert cli.main(["cache", "show", "000", *options]) == 2
    assert "another run's" in capsys.readouterr().err
    assert cli.main(["cache", "prune", "--max-size", "0", *options]) == 0
    assert [entry.key for entry in cache.entries()] == ["1" * 32]


def test_sizes_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"10GB": 10**10, "1.5 kb": 1500, "7": 7, "2M": 2 * 10**6}
    assert [parse_size(text, "") for text in texts] == list(texts.values())
    for text in ("", "-1", "ten", "1XB", "9" * 400 + "GB"):
        with pytest.raises(UserError, match="expected a size"):
            parse_size(text, f"--max-size {text}")
    for text, limit in {"": 10**10, "2MB": 2 * 10**6, "off": None}.items():
        monkeypatch.setenv("HARNESS_RECT_CACHE_SIZE", text)
        assert size_limit() == limit
    monkeypatch.setenv("HARNESS_RECT_CACHE_SIZE", "much")
    with pytest.raises(UserError, match=r"HARNESS_RECT_CACHE_SIZE=much: expected a size .* or off"):
        EditCache.from_spec(None)
