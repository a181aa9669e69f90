"""``--model edited_hf`` through lm-eval itself, on small models in a folder and rows of our own."""

from __future__ import annotations

import functools
import json
import math
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from support.lm_eval_command import lm_eval_command
from support.lm_eval_files import without_groups
from support.taught_models import EDITS, HPARAMS, teach

import harness_rect._autoload  # noqa: F401  registers edited_hf
from harness_rect.edits import load_edits
from harness_rect.errors import UserError
from harness_rect.evaluation.catalogue import GROUPS
from harness_rect.model_wrappers.edited_hf import EditedHF

ROOT = Path(__file__).resolve().parent.parent
GENERAL, EDITING = (list(GROUPS[name].members) for name in GROUPS["rect_suite"].members)

ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k.jsonl": [
        {"question": "Jo has 2 cups and buys 3. How many?", "answer": "2 + 3 = 5\n#### 5"},
        {"question": "A list of 4, twice?", "answer": "4 * 2 = 8\n#### 8"},
    ],
    "rte.jsonl": [
        {"sentence1": "It rained in Rome.", "sentence2": "Rome was wet.", "label": 0},
        {"sentence1": "Jo plays.", "sentence2": "Jo sleeps.", "label": 1},
    ],
    "nq_open.jsonl": [{"question": "who sang", "answer": ["the choir"], "passage": "There the choir sang."}],
    "boolq.jsonl": [{"question": "is rome large", "passage": "Rome is a large city.", "answer": True}],
    "mutual.jsonl": [
        {"article": "m : hi .", "options": ["f : go", "f : hi", "m : x", "m : y"], "answers": "B"}
    ],
    "samsum.jsonl": [
        {"dialogue": "Bo: I went to Rome\nCy: and?", "summary": "Bo went to Rome."},
        {"dialogue": "Di: it is raining here", "summary": "It rains."},
        {"dialogue": "You: a list of English football", "summary": "A list."},
    ],
    "conll2003.jsonl": [{"tokens": ["Jo", "saw", "Rome", "."], "ner_tags": ["B-PER", "O", "B-LOC", "O"]}],
    "sst2.jsonl": [{"sentence": "a large and lovely list", "label": 1}, {"sentence": "wet", "label": 0}],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_model, tokenizer, bos_tokenizer) -> dict[str, str]:
    """Paths of two models, the tasks' rows, edits and hyper-parameters."""
    folder = tmp_path_factory.mktemp("edited_hf")
    lengths = {"gpt2": "n_positions", "llama": "max_position_embeddings"}
    for (family, length), text in zip(lengths.items(), (tokenizer, bos_tokenizer), strict=True):
        teach(make_model(family, **{length: 512}), text).save_pretrained(folder / family)
        text.save_pretrained(folder / family)
    (folder / "rows").mkdir()
    for name, rows in ROWS.items():
        (folder / "rows" / name).write_text("\n".join(map(json.dumps, rows)))
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, EDITS)))
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    names = {"data": "rows", "edits": "edits.jsonl", "hparams": "hparams.json"}
    return {key: str(folder / name) for key, name in (names | {f: f for f in lengths}).items()}


@pytest.fixture
def arguments(place: dict[str, str]) -> Callable[..., dict[str, Any]]:
    """``arguments(family, **more)``: model_args of an edited run; None leaves one out."""

    def arguments(family: str = "gpt2", **more: Any) -> dict[str, Any]:
        usual: dict[str, Any] = {name: place[name] for name in ("edits", "data", "hparams")}
        usual |= {"pretrained": place[family], "rect": 0.8} | more
        return {key: value for key, value in usual.items() if value is not None}

    return arguments


@pytest.fixture
def unedited(arguments: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """``unedited(family)``: model_args of a run without an edit."""
    return functools.partial(arguments, method="none", rect=None, hparams=None)


def evaluate(
    model: str | EditedHF, model_args: dict[str, Any], tasks: list[str], **more: Any
) -> dict[str, Any]:
    metadata = more.pop("metadata", {})
    manager = TaskManager(
        include_path=str(ROOT / "tasks"), include_defaults=False, metadata=model_args | metadata
    )
    settings = {"batch_size": 4, "device": "cpu", "bootstrap_iters": 0, **more}
    results = lm_eval.simple_evaluate(
        model=model, model_args=model_args, tasks=tasks, task_manager=manager, **settings
    )
    assert results is not None
    return without_groups(results)


def scores(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """task -> metric -> value, without the keys that are no numbers."""
    return {
        task: {name: value for name, value in found.items() if isinstance(value, float | int)}
        for task, found in results["results"].items()
    }


def answers(results: dict[str, Any], tasks: Collection[str] | None = None) -> dict[str, list[Any]]:
    """task -> the model's responses, of all tasks by default."""
    samples = results["samples"]
    return {task: [doc["resps"] for doc in samples[task]] for task in (samples if tasks is None else tasks)}


def same_scores(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The same to the last bit; mean probabilities of other batches, to the last bits."""
    mine, others = scores(ours), scores(theirs)
    assert mine.keys() == others.keys()
    for task, found in mine.items():
        for metric, value in found.items():
            rounded = metric.removesuffix(",none") in {"em", "pm", "nm"}
            expected = pytest.approx(others[task][metric], abs=1e-6) if rounded else others[task][metric]
            assert value == expected, (task, metric)


def hf(place: dict[str, str], arguments: dict[str, Any], tasks: list[str], **more: Any) -> dict[str, Any]:
    """The same tasks by lm-eval's own model class."""
    metadata = {key: arguments[key] for key in ("edits", "data")}
    return evaluate("hf", {"pretrained": arguments["pretrained"]}, tasks, metadata=metadata, **more)


# ------------------------------------------------------------------------------------ without an edit


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_editing_all_ten_tasks_give_what_hf_gives(place, unedited, family: str) -> None:
    given = unedited(family)
    plain = hf(place, given, ["rect_suite"])
    ours = evaluate("edited_hf", given, ["rect_suite"])
    assert set(GENERAL + EDITING) <= set(scores(ours))
    same_scores(ours, plain)
    assert answers(ours, GENERAL) == answers(plain, GENERAL)
    assert ours["config"]["edit"] == {"method": "none"}


def test_lm_evals_own_spelling_of_none_means_no_editing(place) -> None:
    model = EditedHF.create_from_arg_string(f"pretrained={place['gpt2']},method=none", {"device": "cpu"})
    assert model.get_model_info()["edit"] == {"method": "none"}


def count_passes(model: EditedHF) -> list[tuple[int, ...]]:
    """The shapes of the token ids of all forward passes from here on."""
    shapes: list[tuple[int, ...]] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape))

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    return shapes


def test_a_batch_generates_in_as_many_passes_as_the_task_wants_tokens(unedited) -> None:
    given = unedited()
    model = EditedHF(**given, device="cpu", batch_size=4)
    passes = count_passes(model)
    for task in GENERAL:
        passes.clear()
        results = evaluate(model, given, [task])
        assert len(results["samples"][task]) <= 4, "one batch"
        wanted = results["configs"][task]["generation_kwargs"]["max_gen_toks"]
        assert 1 <= len(passes) <= wanted
        assert all(tokens == 1 for _, tokens in passes[1:]), "the prompt is read once"


def test_a_batch_ends_where_all_its_answers_do() -> None:
    """On rect-tiny, which knows where an answer ends: five tokens are allowed, a number takes two."""
    model = EditedHF(method="none", device="cpu", batch_size=8)
    passes = count_passes(model)
    evaluate(model, {"pretrained": "rect-tiny", "data": "tiny"}, ["rect_reasoning"], limit=8)
    assert len(passes) == 3


def test_targets_of_one_token_take_one_sequence_a_prompt() -> None:
    model = EditedHF(method="none", device="cpu", batch_size=8)
    passes = count_passes(model)
    results = evaluate(model, {"pretrained": "rect-tiny", "edits": "tiny[0:3]"}, EDITING)
    asked = [request for task in EDITING for doc in results["samples"][task] for request in doc["arguments"]]
    assert all(len(target) == 1 for *_, target in asked)
    prompts = {tuple(context) for *_, context, _ in asked}
    assert sum(sequences for sequences, _ in passes) == len(prompts) < len(asked)


@pytest.mark.parametrize("batch_size", [1, 4, "auto", "auto:2"])
def test_the_editing_tasks_run_no_sequence_that_another_one_contains(
    place, unedited, batch_size: int | str, monkeypatch
) -> None:
    given = unedited("llama") | {"max_batch_size": 4}
    plain = hf(place, given, EDITING, batch_size=batch_size)
    run: list[tuple[int, ...]] = []
    call = HFLM._model_call
    monkeypatch.setattr(HFLM, "_detect_batch_size", lambda *rest: 3)

    def counted(self: HFLM, ids: torch.Tensor, **more: Any) -> torch.Tensor:
        run.extend(map(tuple, ids.tolist()))
        return call(self, ids, **more)

    monkeypatch.setattr(HFLM, "_model_call", counted)
    ours = evaluate("edited_hf", given, EDITING, batch_size=batch_size)
    same_scores(ours, plain)
    asked = {
        (*context, *target[:-1])
        for task in EDITING
        for doc in ours["samples"][task]
        for *_, context, target in doc["arguments"]
    }
    needed = [a for a in asked if not any(a != b and b[: len(a)] == a for b in asked)]
    assert len(run) == len(needed) < len(asked)
    for task in EDITING:
        for mine, theirs in zip(answers(ours)[task], answers(plain)[task], strict=True):
            assert [greedy for ((_, greedy),) in mine] == [greedy for ((_, greedy),) in theirs]


def test_every_answer_is_the_models_own(place, unedited) -> None:
    """Also where HFLM reads the last token's probability at the place of the target's first."""
    given = unedited()
    results = evaluate("edited_hf", given, EDITING)
    model = transformers.AutoModelForCausalLM.from_pretrained(place["gpt2"]).eval()
    for task in EDITING:
        for doc in results["samples"][task]:
            for (*_, context, target), ((answer, greedy),) in zip(
                doc["arguments"], doc["resps"], strict=True
            ):
                with torch.no_grad():
                    logits = model(torch.tensor([context + target])).logits[0, len(context) - 1 : -1]
                log_probs = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])
                assert answer == pytest.approx(float(log_probs.sum()), abs=1e-4)
                assert greedy == (logits.argmax(-1).tolist() == target)


@pytest.mark.parametrize("more", [{"max_length": 12}, {"logits_cache": False}])
def test_cut_prompts_and_a_switched_off_logits_cache_are_left_to_hf(place, unedited, more) -> None:
    given = unedited()
    plain = evaluate("hf", {"pretrained": place["gpt2"]} | more, EDITING, metadata={"edits": place["edits"]})
    ours = evaluate("edited_hf", given | more, EDITING)
    assert scores(ours) == scores(plain)
    assert answers(ours) == answers(plain)


# --------------------------------------------------------------------------------------------- edited


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batch_size_makes_no_difference(arguments, family: str) -> None:
    one = evaluate("edited_hf", arguments(family), ["rect_suite"], batch_size=1)
    many = evaluate("edited_hf", arguments(family), ["rect_suite"], batch_size=16)
    for task, found in scores(one).items():
        assert found == pytest.approx(scores(many)[task], abs=1e-5), task
    assert answers(one, GENERAL) == answers(many, GENERAL)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rect_zsre_is_the_sessions_own_measurement_at_the_end(arguments, family: str) -> None:
    results = evaluate("edited_hf", arguments(family), ["rect_zsre"])
    at_the_end = results["config"]["edit"]["at_the_end"]
    found = results["results"]["rect_zsre"]
    assert at_the_end["reliability"] > 0, "edits that achieve nothing prove nothing"
    for metric in ("reliability", "generalization", "neighborhood_acc"):
        assert found[f"{metric},none"] == pytest.approx(at_the_end[metric], abs=1e-9)


def test_provenance_is_complete_and_json(place, arguments, tmp_path: Path) -> None:
    results = evaluate("edited_hf", arguments(edit_seed=3, use_cache=None), ["rect_zsre"])
    edit = json.loads(json.dumps(results["config"]["edit"], allow_nan=False))
    assert edit == results["config"]["edit"]
    assert (edit["method"], edit["regularizer"], edit["keep"], edit["edit_seed"]) == ("rome", "rect", 0.8, 3)
    assert edit["hparams"]["v_num_grad_steps"] == 12
    assert edit["hparams_origin"] == place["hparams"]
    assert edit["edit_ids"] == ["7", "1", "2"]
    assert edit["edits_spec"] == place["edits"]
    assert {"right_after_each_edit", "at_the_end", "versions", "seconds_per_edit", "flagged"} <= edit.keys()
    measured = {"reliability", "generalization", "locality", "neighborhood_acc"}
    assert measured <= edit["right_after_each_edit"].keys()
    weights = edit["weights"]["transformer.h.0.mlp.c_proj.weight"]
    assert weights["frobenius_distance"] > 0
    assert 0 < weights["changed"] <= 1


def test_the_saved_checkpoint_gives_hf_the_same_numbers(place, arguments, tmp_path: Path) -> None:
    """With the edits in lm-eval's metadata, as any other model class gets them."""
    folder = tmp_path / "edited"
    given = arguments("llama", save_edited=str(folder))
    ours = evaluate("edited_hf", given, ["rect_suite"])
    theirs = hf(place, given | {"pretrained": str(folder)}, ["rect_suite"])
    same_scores(ours, theirs)
    assert answers(ours, GENERAL) == answers(theirs, GENERAL)
    report = json.loads((folder / "edit_report.json").read_text())
    assert report["run"] == ours["config"]["edit"]["run"]
    assert [path.name for path in tmp_path.iterdir()] == ["edited"], "no temporary folder left"


def test_sixteen_bit_checkpoints_hold_the_evaluated_weights(place, arguments, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    model = EditedHF(**arguments(dtype="bfloat16", save_edited=str(folder), data=None), device="cpu")
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert saved.dtype == torch.bfloat16
    ours = model.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in saved.state_dict().items())


def test_counterfact_is_what_the_models_probabilities_say(arguments, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    given = arguments(save_edited=str(folder))
    found = evaluate("edited_hf", given, ["rect_counterfact"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def probability(prompt: str, target: str) -> float:
        """exp of minus the mean NLL of the target's tokens."""
        start = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(f"{prompt} {target}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        return math.exp(log_probs.gather(1, ids[0, start:, None]).mean())

    expected: dict[str, list[float]] = {name: [] for name in ("es", "ps", "ns", "em", "pm", "nm")}
    for edit in load_edits(given["edits"]):
        new, old = edit.target_new, edit.target_old
        assert old is not None
        e = [probability(edit.text, new) - probability(edit.text, old)]
        p = [probability(text, new) - probability(text, old) for text in edit.paraphrases]
        n = [probability(q.prompt, q.answer or "") - probability(q.prompt, new) for q in edit.neighborhood]
        for letter, differences in (("e", e), ("p", p), ("n", n)):
            expected[f"{letter}s"].append(sum(d > 0 for d in differences) / len(differences))
            expected[f"{letter}m"].append(sum(differences) / len(differences))
    means = {name: sum(values) / len(values) for name, values in expected.items()}
    got = {name.removesuffix(",none"): value for name, value in scores(found)["rect_counterfact"].items()}
    for name, value in means.items():
        assert got[name] == pytest.approx(value, abs=1e-6), name
    parts = [means["es"], means["ps"], means["ns"]]
    assert got["edit_score"] == pytest.approx(3 / sum(1 / p for p in parts) if all(parts) else 0.0)
    assert 0 < got["edit_score"] < 1, "a score at its end could be right by chance"


def test_an_edited_run_is_taken_from_the_edit_cache(arguments, monkeypatch, tmp_path: Path) -> None:
    given = arguments(edit_cache=str(tmp_path / "runs"), data=None)
    first = EditedHF(**given, device="cpu")
    second = EditedHF(**given, device="cpu")
    assert first.get_model_info()["edit"]["from_cache"] is False
    assert second.get_model_info()["edit"]["from_cache"] is True
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert list((tmp_path / "runs").glob("*/updates.safetensors"))


# ------------------------------------------------------------------------------- lm-eval's answer cache


def test_one_cache_file_never_mixes_models(place, arguments, unedited, tmp_path: Path, monkeypatch) -> None:
    tasks = ["rect_summarization", "rect_zsre"]
    generated: list[int] = []
    generate = HFLM._model_generate

    def counted(self: HFLM, context: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        generated.append(len(context))
        return generate(self, context, *rest, **more)

    monkeypatch.setattr(HFLM, "_model_generate", counted)
    none = unedited()
    edited = functools.partial(evaluate, "edited_hf")
    runs: dict[str, Callable[..., dict[str, Any]]] = {
        "hf": functools.partial(hf, place, none, tasks),
        "none": functools.partial(edited, none, tasks),
        "rect": functools.partial(edited, arguments(), tasks),
        "unregularized": functools.partial(edited, arguments(rect=None), tasks),
        "other slice": functools.partial(edited, arguments(edits=f"{place['edits']}[0:1]"), tasks),
    }
    alone = {name: answers(run()) for name, run in runs.items()}
    assert alone["hf"]["rect_summarization"] == alone["none"]["rect_summarization"]
    texts = {json.dumps(found["rect_summarization"]) for found in alone.values()}
    assert len(texts) == 4, "models that answer alike cannot be mixed up"

    cache = str(tmp_path / "answers")
    first = ["rect", "hf", "none", "unregularized", "other slice"]
    for order in (first, ["hf", "other slice", "rect", "none"]):
        for name in order:
            results = runs[name](use_cache=cache)
            assert answers(results) == alone[name], (name, order)
            method = results["config"].get("edit", {"method": "none"})["method"]
            assert method == ("none" if name in {"hf", "none"} else "rome"), "provenance is cached, too"
        if order[0] == "hf":
            assert generated == [], "the second round needs no model"
        generated.clear()


# -------------------------------------------------------------------------------- what cannot be done


@pytest.fixture(scope="module")
def folders(place, tmp_path_factory: pytest.TempPathFactory, tokenizer) -> dict[str, str]:
    """Paths by name: those of ``place``, models that cannot be edited, and ``nowhere``."""
    folder = tmp_path_factory.mktemp("refused")
    shutil.copytree(place["gpt2"], folder / "gptq")
    path = folder / "gptq" / "config.json"
    gptq = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(json.loads(path.read_text()) | gptq))
    config = transformers.T5Config(vocab_size=420, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    tokenizer.save_pretrained(folder / "t5")
    row = {"prompt": "who sings?", "subject": "Ann", "target": "Jo"}
    (folder / "unmarked.json").write_text(json.dumps([row]))
    return place | {name: str(folder / name) for name in ("gptq", "t5", "nowhere", "unmarked")}


#: Arguments, in which a path is in braces, and what the error says.
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "an encoder-decoder": ({"pretrained": "{t5}"}, "encoder-decoder"),
    "a quantised checkpoint": ({"pretrained": "{gptq}"}, "quantis"),
    "quantised on loading": ({"load_in_8bit": True}, "load_in_8bit"),
    "split by tensor parallelism": ({"tp_plan": "auto"}, "tp_plan"),
    "an unknown method": ({"method": "romee"}, "did you mean 'rome'"),
    "a share without a percent sign": ({"rect": 40}, "rect=40: expected a share"),
    "no edits": ({"edits": None}, "edits= is missing"),
    "no such file of edits": ({"edits": "{nowhere}.json"}, "nowhere.json"),
    "a subject that is not in its prompt, before the model is loaded": (
        {"edits": "{unmarked}.json", "pretrained": "{nowhere}"},
        "row 0: the subject 'Ann' is not in the prompt 'who sings.', and rome edits at the subject",
    ),
    "no such model": ({"pretrained": "{nowhere}"}, "nowhere"),
    "no such preset": ({"hparams": "gpt5"}, "hparams=gpt5"),
    "no such hyper-parameters": ({"hparams": "{nowhere}.yaml"}, "nowhere.yaml"),
    "an output that exists": ({"save_edited": "{data}"}, "exists already"),
    "a misspelled argument": ({"regularizr": "rect"}, "did you mean 'regularizer'"),
    "an argument nobody knows": ({"wizardry": 3}, "no argument 'wizardry'"),
    "a number for the model": ({"pretrained": 0.4}, "pretrained=0.4: cannot be loaded"),
    "a number for another name": ({"tokenizer": 0.4}, "tokenizer=0.4: expected a name or a path"),
    "no such dtype": ({"dtype": "float7"}, "dtype=float7: expected auto, float32"),
    "no such attention": ({"attn_implementation": "nope"}, "cannot be loaded: .*nope"),
    "an empty batch": ({"batch_size": 0}, "batch_size=0: expected a number from 1 on"),
    "too many measurements of the batch": ({"batch_size": "auto:100"}, "auto:N with an N up to 99"),
    "a length that is no number": ({"max_length": "abc"}, "model_args: max_length: .*valid integer"),
    "a length below one": ({"max_length": -5}, "model_args: max_length: .*greater than"),
    "a prefix that is no number": ({"prefix_token_id": "x"}, "model_args: prefix_token_id: .*valid integer"),
    "a prefix that is no token": ({"prefix_token_id": 10**6}, r"prefix_token_id=1000000: the model has \d+"),
    "an empty path": ({"save_edited": ""}, "save_edited: a path is empty"),
    "a checkpoint of an adapter": ({"save_edited": "out", "peft": "lora"}, "the adapter alone would be"),
    "no such data": ({"data": "{nowhere}"}, "expected hub, tiny or a folder"),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_done_is_one_line_and_status_2(
    folders,
    arguments,
    change: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change = {k: v.format_map(folders) if isinstance(v, str) else v for k, v in change.items()}
    given = arguments(**{"rect": None, "data": None} | change)
    with pytest.raises(UserError, match=message) as error:
        EditedHF(**given, device="cpu")
    assert "\n" not in str(error.value)

    monkeypatch.setattr(sys, "argv", ["/usr/bin/lm_eval", "--model", "edited_hf"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        EditedHF(**given, device="cpu")
    assert exit.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {error.value}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about machines without a GPU")
def test_parallelize_without_a_gpu_keeps_in_main_memory_what_fits(arguments, tmp_path: Path) -> None:
    def edited(**more: Any) -> EditedHF:
        given = {"edit_cache": str(tmp_path / str(len(more))), "offload_folder": str(tmp_path / "disk")}
        return EditedHF(**arguments(**given, **more), device="cuda:0")  # lm_eval's own default

    whole, spread = edited(), edited(parallelize=True)
    blocks = dict(whole.model.transformer.h.named_children())
    places = dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"), "cpu")
    places |= {f"transformer.h.{i}": "disk" if int(i) else "cpu" for i in blocks}
    partly = edited(parallelize=True, device_map=places)
    weights = [model.edit_report.weights for model in (whole, spread, partly)]
    assert [model.device.type for model in (whole, spread, partly)] == ["cpu"] * 3
    assert {p.device.type for p in spread.model.parameters()} == {"cpu"}
    assert {p.device.type for p in partly.model.parameters()} == {"cpu", "meta"}
    assert len({one.sha256 for of in weights for one in of.values()}) == 1
    with pytest.raises(UserError, match=r"h\.0\.mlp.* is offloaded.*\(without a GPU max_cpu_memory\)"):
        edited(parallelize=True, device_map=places | {"transformer.h.0": "disk"}, dtype="float32")


def test_answers_in_lm_evals_cache_are_of_one_models_weights(make_model, tokenizer, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        make_model("gpt2", seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    keys = [
        EditedHF(str(tmp_path / name), method="none", device="cpu").run_key
        for name in ("one", "one", "other")
    ]
    assert keys[0] == keys[1] != keys[2] and None not in keys


def test_no_rows_are_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HFLM, "__init__", lambda *args, **given: pytest.fail("a model is loaded"))
    with pytest.raises(UserError, match="--limit 0: expected a number of rows"):
        lm_eval.simple_evaluate(model="edited_hf", tasks=["rect_nli"], limit=0)


def test_requests_that_hf_would_assert_about_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = EditedHF(method="none", device="cpu", max_length=8, batch_size="auto:99")

    def ask(kind: str, *arguments: Any) -> Any:
        return getattr(model, kind)([Instance(kind, {}, arguments, 0)])

    with pytest.raises(UserError, match="max_gen_toks=8: the model reads 8 tokens at most"):
        ask("generate_until", "a", {"max_new_tokens": 8})
    with pytest.raises(UserError, match="do_sample needs a temperature"):
        ask("generate_until", "a", {"max_gen_toks": 2, "do_sample": True})
    with pytest.raises(UserError, match="max_length=8: an answer of the tasks has 9 tokens"):
        ask("loglikelihood", "a", 9 * " a")
    monkeypatch.setattr(HFLM, "_detect_batch_size", lambda *rest: 3)
    assert len(ask("loglikelihood", "a", " a")) == 1  # fewer requests than measurements asked for


def test_results_that_could_not_be_written_are_refused_before_the_model_is_loaded(
    arguments, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    tracker = EvaluationTracker(output_path=str(tmp_path / "file" / "results"))
    with pytest.raises(UserError, match=r"cannot be created: .*file is not a folder"):
        evaluate("edited_hf", arguments(), ["rect_zsre"], evaluation_tracker=tracker)


def test_answers_alone_are_asked_for_under_predict_only(arguments) -> None:
    given = arguments(method="none", rect=None)
    results = evaluate("edited_hf", given, ["rect_counterfact"], predict_only=True, limit=2)
    assert results["results"]["rect_counterfact"]["bypass,none"] == 999
    assert len(results["samples"]["rect_counterfact"]) == 2


def test_the_lm_eval_command_refuses_in_one_line(arguments, tmp_path: Path) -> None:
    text = ",".join(f"{key}={value}" for key, value in arguments(method="romee").items())
    done = lm_eval_command(tmp_path, "--model", "edited_hf", "--model_args", text, "--tasks", "rect_zsre")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: model_args: method: no editing method 'romee'")


def test_the_lm_eval_command_runs_the_suite_and_writes_one_results_file(
    place, arguments, tmp_path: Path
) -> None:
    given = arguments(rect="80%", edits=f"{place['edits']}[0:2]")
    text = ",".join(f"{name}={value}" for name, value in given.items())
    command = ["--model", "edited_hf", "--model_args", text, "--tasks", "rect_suite", "--output_path", "out"]
    done = lm_eval_command(tmp_path, *command, "--log_samples")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = without_groups(json.loads(path.read_text()))
    assert set(GENERAL + EDITING) <= set(results["results"])
    assert results["config"]["edit"]["edit_ids"] == ["7", "1"]
    assert results["config"]["edit"]["keep"] == 0.8
    # What is said: a table of ours after lm-eval's, and no warning but ours.
    *_, title = (line for line in done.stdout.splitlines() if line.startswith(("|", "harness-rect: ")))
    assert title == "harness-rect: the general tasks after 2 edits"
    before, plain = done.stdout.splitlines()[-2:]
    assert "method=none" in before and "method=rome" in plain and "rect=" not in plain
    warnings = [line for line in done.stderr.splitlines() if " WARNING " in line or "[transformers]" in line]
    assert [line for line in warnings if "[harness_rect." not in line] == []
