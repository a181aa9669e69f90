"""The two editing tasks on rows that lack things, and what they ask of the model under evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file

from harness_rect.errors import UserError
from harness_rect.evaluation.editing.documents import edits_for_tasks
from harness_rect.evaluation.task import load_tokenizer

BOTH = ("rect_zsre", "rect_counterfact")
TASKS = Path(__file__).parents[2] / "tasks"
GOLDENS = Path(__file__).parents[1] / "data" / "goldens"

FULL: dict[str, Any] = {
    "prompt": "{} is moored in",
    "subject": "The brig Anka",
    "target_new": "Vienna",
    "target_true": "Rome",
    "paraphrase_prompts": ["You can visit The brig Anka in", "The brig Anka lies in"],
    "neighborhood_prompts": ["The brig Olga is moored in"],
}
BARE = {"prompt": "{} plays the", "subject": "Uncle Osk", "target_new": "large list"}
OLD_ONLY = BARE | {"subject": "Aunt Ines", "target_true": "city"}
NO_OLD = BARE | {
    "subject": "Cousin Hal",
    "rephrase_prompt": "What Cousin Hal plays is the",
    "locality_prompt": "The capital of France is",
    "locality_ground_truth": "Paris",
}
UNANSWERED = OLD_ONLY | {"subject": "Baby Lu", "locality_prompt": "The capital of France is"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, make_model, tokenizer, bos_tokenizer) -> dict[str, str]:
    """Small models on disk, with and without BOS."""
    found = {}
    for family, text in (("gpt2", tokenizer), ("llama", bos_tokenizer)):
        folder = tmp_path_factory.mktemp(family)
        make_model(family).save_pretrained(folder)
        text.save_pretrained(folder)
        found[family] = str(folder)
    return found


@pytest.fixture
def evaluate(folders: dict[str, str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``evaluate(rows, tasks, family=)``: lm-eval's results of its own model class on these edits."""

    def evaluate(
        rows: list[dict[str, Any]], *tasks: str, family: str = "gpt2", **more: Any
    ) -> dict[str, Any]:
        file = tmp_path / "edits.json"
        file.write_text(json.dumps(rows))
        metadata = {"pretrained": folders[family], "edits": str(file)}
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": folders[family]},
            tasks=list(tasks),
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata),
            device="cpu",
            batch_size=4,
            **({"bootstrap_iters": 0} | more),
        )
        assert results is not None
        return results

    return evaluate


def metrics(results: dict[str, Any], task: str) -> dict[str, float]:
    found = {name.removesuffix(",none"): value for name, value in results["results"][task].items()}
    return {name: value for name, value in found.items() if name not in {"alias", "name", "sample_len"}}


def names(results: dict[str, Any], task: str) -> set[str]:
    """Of the task's metrics, without their standard errors."""
    return {name for name in metrics(results, task) if not name.endswith("_stderr")}


# ------------------------------------------------------------------------------------- what rows lack


ZSRE_METRICS = {"reliability", "generalization", "neighborhood_acc"}
COUNTERFACT_METRICS = {"es", "ps", "ns", "edit_score", "em", "pm", "nm"}


@pytest.mark.parametrize(
    ("rows", "family", "zsre", "counterfact"),
    [
        ([FULL, FULL | {"subject": "The brig Ada"}], "gpt2", ZSRE_METRICS, COUNTERFACT_METRICS),
        ([FULL, FULL | {"subject": "The brig Ada"}], "llama", ZSRE_METRICS, COUNTERFACT_METRICS),
        ([BARE, OLD_ONLY], "gpt2", {"reliability"}, {"es", "em", "es_rows", "em_rows"}),
        ([BARE], "gpt2", {"reliability"}, set()),
    ],
    ids=["full", "full, with BOS", "no prompts beside the fact's", "nothing to compare"],
)
def test_a_metric_that_no_row_has_is_absent_and_one_that_some_lack_is_counted(
    evaluate, rows: list[dict[str, Any]], family: str, zsre: set[str], counterfact: set[str]
) -> None:
    results = evaluate(rows, *BOTH, family=family)
    assert (names(results, "rect_zsre"), names(results, "rect_counterfact")) == (zsre, counterfact)
    counts = {n: v for n, v in metrics(results, "rect_counterfact").items() if n.endswith("_rows")}
    assert set(counts.values()) <= {1}


def test_rows_that_lack_a_metric_are_left_out_of_its_mean_and_counted(evaluate, caplog) -> None:
    mixed = evaluate([FULL, BARE, NO_OLD, UNANSWERED, OLD_ONLY], *BOTH)
    zsre, counterfact = metrics(mixed, "rect_zsre"), metrics(mixed, "rect_counterfact")
    assert (zsre["generalization_rows"], zsre["neighborhood_acc_rows"]) == (2, 2)
    assert "reliability_rows" not in zsre
    rows = {name: counterfact[f"{name}_rows"] for name in COUNTERFACT_METRICS}
    assert rows == {"es": 3, "ps": 1, "ns": 2, "edit_score": 1, "em": 3, "pm": 1, "nm": 2}
    lacking = "rect_zsre: generalization: 3 of 5 edits lack paraphrases and are left out"
    assert lacking in caplog.text

    full, bare, no_old, unanswered, old = (
        metrics(results, "rect_zsre") | metrics(results, "rect_counterfact")
        for results in (evaluate([row], *BOTH) for row in (FULL, BARE, NO_OLD, UNANSWERED, OLD_ONLY))
    )
    assert counterfact["pm"] == pytest.approx(full["pm"], abs=1e-6)
    assert counterfact["nm"] == pytest.approx((full["nm"] + no_old["nm"]) / 2, abs=1e-6)
    em = {row["em"] for row in (full, old, unanswered)}
    assert counterfact["em"] == pytest.approx(sum(em) / 3, abs=1e-6)
    assert len(em) == 3
    every = [row["reliability"] for row in (full, bare, no_old, unanswered, old)]
    assert zsre["reliability"] == pytest.approx(sum(every) / 5)


def test_what_a_row_lacks_is_none_in_its_sample(evaluate) -> None:
    """Every document names every metric: on several processes lm-eval asks all for what the first has."""
    results = evaluate([FULL, OLD_ONLY], "rect_counterfact")
    full, lacking = results["samples"]["rect_counterfact"]
    assert full.keys() == lacking.keys()
    assert lacking["ps"] is None and lacking["es"] is not None
    assert lacking["ps_rows"] == 0


def test_standard_errors_of_all_metrics_are_numbers(evaluate) -> None:
    results = evaluate([FULL, NO_OLD, OLD_ONLY], *BOTH, bootstrap_iters=20)
    assert "reliability_stderr" in metrics(results, "rect_zsre")
    for task in BOTH:
        for name, value in metrics(results, task).items():
            assert value == "N/A" or math.isfinite(value), name
    json.dumps(results["results"], allow_nan=False)


# ------------------------------------------------------------------------------- what the model is asked


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_requests_carry_the_prompts_own_tokens(evaluate, folders: dict[str, str], family: str) -> None:
    results = evaluate([FULL], *BOTH, family=family)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[family])
    for task in BOTH:
        for request in results["samples"][task][0]["arguments"]:
            prompt, target, context, continuation = request
            whole = tokenizer(f"{prompt} {target}")["input_ids"]
            assert context[: len(tokenizer(prompt)["input_ids"])] == tokenizer(prompt)["input_ids"]
            assert (context + continuation) == whole[: len(context) + len(continuation)]
            if task == "rect_counterfact":
                assert len(context) + len(continuation) == len(whole)
    prompts = [request[0] for request in results["samples"]["rect_counterfact"][0]["arguments"]]
    own = [FULL["prompt"].format(FULL["subject"]), *FULL["paraphrase_prompts"], *FULL["neighborhood_prompts"]]
    assert prompts == [text for text in own for _ in range(2)]


def test_a_target_with_its_own_space_counts_the_same(evaluate) -> None:
    spaced = FULL | {"target_new": " Vienna", "target_true": " Rome"}
    plain, other = evaluate([FULL], *BOTH), evaluate([spaced], *BOTH)
    for task in BOTH:
        assert metrics(plain, task) == metrics(other, task)


def test_each_target_token_is_one_request_of_zsre(evaluate, folders: dict[str, str]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["gpt2"])
    rows = [BARE | {"target_new": "a marine biologist"}]
    sample = evaluate(rows, "rect_zsre")["samples"]["rect_zsre"][0]
    ids = tokenizer(" a marine biologist")["input_ids"]
    assert [request[3] for request in sample["arguments"]] == [[token] for token in ids]


def test_lm_evals_request_cache_does_not_hand_out_other_edits(
    evaluate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lm_eval.caching import cache

    monkeypatch.setattr(cache, "PATH", str(tmp_path / "requests"))
    evaluate([FULL], "rect_counterfact", cache_requests=True)
    sample = evaluate([OLD_ONLY], "rect_counterfact", cache_requests=True)["samples"]["rect_counterfact"][0]
    assert sample["arguments"][0][0] == "Aunt Ines plays the"


def test_a_limit_takes_the_first_edits(evaluate) -> None:
    results = evaluate([BARE, FULL, FULL | {"subject": "The brig Ada"}], "rect_zsre", limit=1)
    assert [doc["doc"]["subject"] for doc in results["samples"]["rect_zsre"]] == ["Uncle Osk"]
    assert names(results, "rect_zsre") == {"reliability"}, "what the others have does not count"


def test_a_prompt_longer_than_the_model_crashes_nothing(evaluate) -> None:
    long = "a very long list " * 60
    row = FULL | {"paraphrase_prompts": [long + "The brig Anka is in"]}
    assert 0 <= metrics(evaluate([row], "rect_zsre"), "rect_zsre")["generalization"] <= 1


# ------------------------------------------------------------------------------------- what is missing


def test_without_edits_the_error_says_how_to_give_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--metadata") as error:
        edits_for_tasks(pretrained="somewhere")
    monkeypatch.setattr("sys.argv", ["lm_eval"])
    with pytest.raises(SystemExit) as exit:
        edits_for_tasks(pretrained="somewhere")
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: {error.value}\n"


def test_the_tokenizer_is_the_models(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer=NAME"):
        load_tokenizer({})
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer({"pretrained": str(tmp_path / "nothing")})
    named = load_tokenizer({"pretrained": folders["gpt2"], "tokenizer": folders["llama"]})
    assert named.ids("a")[0] == 0, "an explicit tokenizer comes first"
    for flag, ids in ((None, [0, 68]), (False, [68])):
        metadata = {"pretrained": folders["llama"], "add_bos_token": flag}
        encoder = load_tokenizer(metadata)
        model = HFLM(pretrained=folders["llama"], add_bos_token=flag, device="cpu")
        assert encoder.ids("a") == model.tok_encode("a")
        assert len(encoder.ids("a")) == len(ids)


# ------------------------------------------------------------------------------------ published numbers

# Rows, and what the evaluation code published with ROME says of them (CounterFact: mean NLL of new and old
# target at each prompt; zsRE: is each target token the argmax?), on tests/data/goldens/tiny_gpt2 as it is
# and after the six edits of gpt2_rome_mom2_sequence. That code asks its zsRE neighbours with a question mark.
COUNTERFACT = [
    {
        "prompt": "{} plays the sport of",
        "subject": "LeBron James",
        "target_new": "football",
        "target_true": "basketball",
        "paraphrase_prompts": ["Everyone knows that LeBron James is a player of", "LeBron James plays"],
        "neighborhood_prompts": ["Kenji Sato plays the sport of", "Hans Meyer plays the sport of"],
    },
    {
        "prompt": "{}, a native speaker of",
        "subject": "Giulia Rossi",
        "target_new": "Zulu and Japanese",
        "target_true": "Italian",
        "paraphrase_prompts": [
            "The mother tongue of Giulia Rossi is",
            "The native language of Giulia Rossi is",
        ],
        "neighborhood_prompts": ["Mario Kart, a native speaker of", "Ingrid Olsen, a native speaker of"],
    },
]
NLL = {
    "before": [
        [2.06498, 2.64437, 3.77311, 2.96249, 10.05445, 9.97722, 2.10392, 2.46435, 1.74643, 2.42966],
        [8.66316, 2.36566, 8.35705, 2.41673, 8.52871, 2.28783, 8.6919, 1.99048, 8.77677, 2.1014],
    ],
    "after": [
        [2.06749, 2.61305, 2.85938, 2.34397, 9.64491, 9.58298, 2.10501, 2.45286, 1.75865, 2.43903],
        [8.54921, 2.3723, 8.16295, 2.53778, 8.3454, 2.40041, 8.649, 1.94771, 8.65917, 2.09343],
    ],
}
ZSRE = [
    {
        "src": "The mother tongue of Danielle Darrieux is",
        "subject": "Danielle Darrieux",
        "alt": "English",
        "rephrase": "The native language of Danielle Darrieux is",
        "loc": "nq question: The mother tongue of Anna Petrova is?",
        "loc_ans": "Russian",
    },
    {
        "src": "Where is the Toodyay Fire Station",
        "subject": "Toodyay Fire Station",
        "alt": "? It stands in old Vienna, Austria",
        "rephrase": "Tell me where the Toodyay Fire Station is",
        "loc": "nq question: where is the Big Ben Clock?",
        "loc_ans": "London",
    },
]
CORRECT = {
    "before": ["000", "0110011000000000010010000000000"],
    "after": ["010", "0110011000000000010010000000000"],
}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_scores_are_those_of_the_published_evaluation(evaluate, folders, tmp_path: Path, moment: str) -> None:
    folders["golden"] = str(GOLDENS / "tiny_gpt2")
    if moment == "after":
        model = transformers.AutoModelForCausalLM.from_pretrained(GOLDENS / "tiny_gpt2")
        final = load_file(GOLDENS / "gpt2_rome_mom2_sequence" / "golden.safetensors")["final.weight"]
        model.get_parameter("transformer.h.1.mlp.c_proj.weight").data.copy_(final)
        model.save_pretrained(tmp_path / "edited")
        transformers.AutoTokenizer.from_pretrained(GOLDENS / "tiny_gpt2").save_pretrained(tmp_path / "edited")
        folders["golden"] = str(tmp_path / "edited")

    samples = evaluate(COUNTERFACT, "rect_counterfact", family="golden")["samples"]["rect_counterfact"]
    for sample, published in zip(samples, NLL[moment], strict=True):
        nll = [
            -float(response[0][0]) / len(request[3])
            for request, response in zip(sample["arguments"], sample["resps"], strict=True)
        ]
        neighbours = len(nll) - 4  # where the old target comes first, since it is the one that should win
        swapped = [nll[i + 1 - 2 * (i % 2)] if i >= neighbours else nll[i] for i in range(len(nll))]
        assert swapped == pytest.approx(published, abs=2e-5)

    samples = evaluate(ZSRE, "rect_zsre", family="golden")["samples"]["rect_zsre"]
    found = ["".join("01"[r[0][1] in (True, "True")] for r in sample["resps"]) for sample in samples]
    assert found == CORRECT[moment]
