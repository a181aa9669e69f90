"""The readers: every row shape, slices, what is refused and how, what is only warned about."""

from __future__ import annotations

import http.server
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.edit_files import Row, edit_of, message, plain, read_one, write

from harness_rect.edits import (
    Consequence,
    Edit,
    MultiHop,
    Probe,
    Query,
    fingerprint,
    formats,
    load_edits,
    public,
)
from harness_rect.edits.fields import Fields
from harness_rect.edits.formats import FORMATS, Fact, Format
from harness_rect.errors import UserError

# --- Edit ---------------------------------------------------------------------------------------


def test_text_leaves_other_braces_alone() -> None:
    edit = edit_of("f{0} of {{}} is {x}", "a{}b")
    assert edit.text == "f{0} of {a{}b} is {x}"
    assert edit.text[slice(*edit.subject_span)] == "a{}b"


def test_an_edit_has_one_marker_at_most_and_a_target_that_begins_with_a_space() -> None:
    with pytest.raises(UserError, match="marker"):
        edit_of("{} and {}")
    for target, expected in (("x", " x"), (" x", " x"), ("  x", "  x")):
        assert edit_of("{} is", target=target).target == expected


def test_fingerprint_is_of_the_content_in_its_order() -> None:
    one, two = edit_of("{} is", "A"), edit_of("{} is", "B")
    assert re.fullmatch("[0-9a-f]{64}", fingerprint([one, two]))
    assert fingerprint([one, two]) != fingerprint([two, one])
    assert fingerprint([one]) == fingerprint([edit_of("{} is", "A", source="f.json row 9", id="9")])
    changes: list[Row] = [{"target_old": "o"}]
    changes += [{"neighborhood": (Probe("q", answer),)} for answer in (None, "a")]
    changes += [{name: ("p",)} for name in ("paraphrases", "attribute_prompts", "generation_prompts")]
    query = Query("q", (("a", "b"),))
    changes += [{"multi_hop": MultiHop(("q",), ("a",), hops)} for hops in ((), (query,))]
    changes += [{"consequences": (Consequence("reasoning", (query,), any),)} for any in (True, False)]
    changes += [{"reference_texts": ("t",)}, {"relation": "P1"}, {"target_id": "Q1"}]
    prints = {fingerprint([edit_of("{} is", "A", **change)]) for change in [{}, *changes]}
    assert len(prints) == 1 + len(changes)
    # Known value: a change to it makes every cached run unfindable.
    known = edit_of("{} \u00e9 is", "A", " t", paraphrases=("p",), neighborhood=(Probe("q", None),))
    assert fingerprint([known]) == "044a707e6d29a442085b4b5f1b780ef681069aaf7a0caad5719a2c9bccacff10"


# --- row shapes ---------------------------------------------------------------------------------

COUNTERFACT: Row = {
    "case_id": 41,
    "requested_rewrite": {
        "prompt": "{} is written in",
        "relation_id": "P1",
        "target_new": {"str": "Basque", "id": "Q1"},
        "target_true": {"str": " Welsh", "id": "Q2"},
        "subject": "The Blue Ledger",
    },
    "paraphrase_prompts": ["Noise. The Blue Ledger uses", "They read The Blue Ledger in"],
    "neighborhood_prompts": ["The Red Ledger is written in", "The Old Ledger is in"],
    "attribute_prompts": ["Some Song is in"],
    "generation_prompts": ["The Blue Ledger's readers", "The Blue Ledger's readers"],
    "attribute_snippets": ["A song of the north.", ""],
}


ZSRE: Row = {
    "subject": "Lake Orn",
    "src": "Which river does Lake Orn feed, if Lake Orn feeds any?",
    "pred": "Sill",
    "rephrase": "What river does Lake Orn feed?",
    "alt": "Tamm",
    "answers": ["Sill river"],
    "loc": "nq question: who painted the old barn",
    "loc_ans": "Ida Holm",
    "cond": "Sill >> Tamm || Which river?",
    "portability": {"New Question": "Which sea does it reach?", "New Answer": "The Black Sea"},
}


EASYEDIT: Row = {
    "case_id": "c7",
    "prompt": "Orn Castle stands in",
    "subject": "Orn Castle",
    "target_new": " Lund",
    "ground_truth": "Bern",
    "rephrase_prompt": "The place of Orn Castle is",
    "locality_prompt": "Sill Castle stands in",
    "locality_ground_truth": "Rome",
}

ROWS: dict[str, tuple[Row, Row]] = {
    "counterfact": (
        COUNTERFACT,
        {
            "id": "41",
            "prompt": "{} is written in",
            "subject": "The Blue Ledger",
            "target_new": "Basque",
            "target_old": " Welsh",
            "paraphrases": ("Noise. The Blue Ledger uses", "They read The Blue Ledger in"),
            "neighborhood": (
                Probe("The Red Ledger is written in", " Welsh"),
                Probe("The Old Ledger is in", " Welsh"),
            ),
            "attribute_prompts": ("Some Song is in",),
            "generation_prompts": ("The Blue Ledger's readers", "The Blue Ledger's readers"),
            "reference_texts": ("A song of the north.",),
            "relation": "P1",
            "target_id": "Q1",
        },
    ),
    "zsre": (
        ZSRE,
        {
            "prompt": "Which river does {} feed, if Lake Orn feeds any?",
            "subject": "Lake Orn",
            "target_new": "Tamm",
            "target_old": "Sill",
            "paraphrases": ("What river does Lake Orn feed?",),
            "neighborhood": (Probe("nq question: who painted the old barn", "Ida Holm"),),
            "consequences": (
                Consequence("reasoning", (Query("Which sea does it reach?", (("The Black Sea",),)),)),
            ),
        },
    ),
    "zsre without what is optional": (
        {key: ZSRE[key] for key in ("subject", "src", "alt")} | {"rephrase": " ", "loc": "nq question: why"},
        {
            "prompt": "Which river does {} feed, if Lake Orn feeds any?",
            "subject": "Lake Orn",
            "target_new": "Tamm",
            "neighborhood": (Probe("nq question: why", None),),
        },
    ),
    "easyedit, flat": (
        EASYEDIT,
        {
            "id": "c7",
            "prompt": "{} stands in",
            "subject": "Orn Castle",
            "target_new": " Lund",
            "target_old": "Bern",
            "paraphrases": ("The place of Orn Castle is",),
            "neighborhood": (Probe("Sill Castle stands in", "Rome"),),
        },
    ),
    "plain": (
        plain(
            target_new={"str": "cliffs", "id": None},
            target_true={"str": "sand"},
            rephrase_prompt=["One", "Two", "One"],
            neighborhood_prompts=["Near", {"prompt": "Far", "ground_truth": "away"}],
        ),
        {
            "prompt": "{} grows on",
            "subject": "Plant 0",
            "target_new": "cliffs",
            "target_old": "sand",
            "paraphrases": ("One", "Two"),
            "neighborhood": (Probe("Near", "sand"), Probe("Far", "away")),
        },
    ),
}


@pytest.mark.parametrize(("row", "expected"), ROWS.values(), ids=ROWS)
def test_a_row_of_each_format(tmp_path: Path, row: Row, expected: Row) -> None:
    usual: Row = {"id": "0", "target_old": None, "paraphrases": (), "source": "one.json, row 0"}
    assert read_one(tmp_path, row) == Edit(**usual | expected)


@pytest.mark.parametrize(
    ("locality", "expected"),
    [
        ({"neighborhood": {"prompt": "P", "ground_truth": "a"}}, [("P", "a")]),
        ({"neighborhood": {"prompt": ["P", "Q"], "ground_truth": ["a", "b"]}}, [("P", "a"), ("Q", "b")]),
        ({"neighborhood": {"prompt": ["P"], "ground_truth": ["a", "alias of a"]}}, [("P", "a")]),
        ({"G": [{"prompt": "P", "ground_truth": [["a", "x"]]}, {"prompt": "Q"}]}, [("P", "a"), ("Q", None)]),
        ({"G": [{"prompt": "P", "ground_truth": []}], "H": {"prompt": "Q"}}, [("P", None), ("Q", None)]),
        ({"G": [{"prompt": "", "ground_truth": "a"}], "H": None, "I": []}, []),
    ],
)
def test_easyedit_nested_locality(
    tmp_path: Path, locality: Row, expected: list[tuple[str, str | None]]
) -> None:
    edit = read_one(tmp_path, plain(ground_truth=[["old", "older"]], locality=locality))
    assert edit.neighborhood == tuple(Probe(*pair) for pair in expected)
    assert edit.target_old == "old"


def test_shapes_may_be_mixed_in_a_file(tmp_path: Path) -> None:
    edits = load_edits(write(tmp_path / "mixed.jsonl", [COUNTERFACT, ZSRE, plain()]))
    assert [edit.id for edit in edits] == ["41", "1", "2"]
    assert [edit.source for edit in edits][1] == "mixed.jsonl, row 1 (line 2)"


def test_another_format_is_one_entry_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def triple(row: Fields) -> list[Fact]:
        return [Fact("{} is", "fact", row.object("fact").text("s"), row.object("fact").target("o"), None)]

    monkeypatch.setattr(formats, "FORMATS", (Format("fact", lambda row: "fact" in row, triple), *FORMATS))
    row = {"fact": {"s": "Tin", "o": {"str": "a metal"}}, "rephrase": "Tin, which is"}
    edit = read_one(tmp_path, row)
    assert (edit.text, edit.target, edit.paraphrases) == ("Tin is", " a metal", ("Tin, which is",))
    assert "row 0: fact.s: missing" in message(write(tmp_path / "a.json", [{"fact": {}}]))
    assert read_one(tmp_path, ZSRE).target_new == "Tamm"
    assert "expected fact, or requested_rewrite, or edit, or src" in message(write(tmp_path / "a.json", [{}]))


def test_ids_are_made_unique_and_else_row_numbers_in_the_file(tmp_path: Path) -> None:
    ids: list[Any] = [1, None, 1, "1", "1#2", True, "", 0]
    path = write(tmp_path / "a.json", [plain(i, case_id=case_id) for i, case_id in enumerate(ids)])
    assert [edit.id for edit in load_edits(path)] == ["1", "1#2", "1#3", "1#4", "1#2#2", "5", "6", "0"]
    assert [edit.id for edit in load_edits(path + "[6:4:-1]")] == ["6", "5"]


# --- slices -------------------------------------------------------------------------------------

bound = st.none() | st.integers(-12, 12)


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("with[0:1]brackets")
    return write(folder / "ten[x].json", [plain(i) for i in range(10)])


@given(start=bound, stop=bound, step=bound.filter(lambda step: step != 0), short=st.booleans())
def test_slices_are_pythons(
    ten: str, start: int | None, stop: int | None, step: int | None, short: bool
) -> None:
    parts = ["" if part is None else str(part) for part in (start, stop, step)]
    if short and step is None:
        parts.pop()
    expected = [str(i) for i in range(10)[start:stop:step]]
    spec = f"{ten}[{':'.join(parts)}]"
    if expected:
        assert [edit.id for edit in load_edits(spec)] == expected
    else:
        assert "10 rows" in message(spec)


@pytest.mark.parametrize(("number", "expected"), [(0, "0"), (7, "7"), (-1, "9"), (-10, "0")])
def test_one_row(ten: str, number: int, expected: str) -> None:
    stream = load_edits(f"{ten}[{number}]")
    assert [edit.id for edit in stream] == [expected]
    assert (len(stream), stream[0].subject, stream[0:1]) == (1, f"Plant {expected}", stream.edits)


SLICES = dict.fromkeys(["10", "-11", "5:5", "20:"], "10 rows") | {
    "::-1][3:2": "ending in",  # only the last bracket is the slice; what stays is no path
    **dict.fromkeys(
        ["", " ", "a", "1:b", "1,2", "0:4:0", "1:2:3:4", "1.5", "1e3", "9" * 5000, "\u0661"],
        "[start:stop:step]",
    ),
}


@pytest.mark.parametrize(("inner", "expected"), SLICES.items())
def test_slices_that_are_refused(ten: str, inner: str, expected: str) -> None:
    assert expected in message(f"{ten}[{inner}]")


def test_rows_outside_the_slice_do_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [plain(0), {"odd": 1}, plain(2)])
    assert len(load_edits(path + "[::2]")) == 2
    assert "row 1 (line 2)" in message(path)


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert "the file has 0 rows" in message(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("gone.json[0:2]", "{}/gone.json"),
        ("zsree[0:5]", "mean zsre?"),
        *((s, "counterfact") for s in ("a.csv", "", "[0:5]")),
    ],
)
def test_a_name_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected.format(tmp_path) in message(spec)


def test_a_misspelled_key_is_warned_of_once_a_file(tmp_path: Path) -> None:
    rows = [plain(i, paraphrase_promts=["It lives on"], note="x") for i in range(3)]
    stream = load_edits(write(tmp_path / "e.json", [*rows, plain(3, case_id=9, pararel_idx=7)]))
    [line] = [one for one in stream.warnings if "key" in one]
    expected = "3 of 4 rows have a key 'paraphrase_promts', which is not read; did you mean"
    assert line == f"{expected} 'paraphrase_prompts'?"


NESTED = [
    ("requested_rewrite.target_ture", "requested_rewrite.target_true"),
    ("portability.Reasoning.grund_truth", "portability.Reasoning.ground_truth"),
    ("edit.original_fac", "edit.original_fact"),
    ("Forgetfulness.test_queries.answer_aliass", "Forgetfulness.test_queries.answer_alias"),
    ("consequences.test_conditions", "consequences.test_condition"),
    ("neighborhood", "neighborhood_prompts"),
]


@pytest.mark.parametrize(("key", "near"), NESTED)
def test_a_misspelled_key_within_an_object_is_warned_of_with_its_path(
    tmp_path: Path, key: str, near: str
) -> None:
    asked = {"prompt": "p", "answer": "a", "answer_aliass": ["b"]}
    sentence = {"prompt": "The gender of Ann is male.", "relation": "SEX_OR_GENDER", "original_fac": {}}
    tests = [{"test_queries": [asked], "test_condition": "OR"}]
    row: dict[str, Any] = {
        "requested_rewrite": {"requested_rewrite": plain(target_ture="x")},
        "neighborhood": plain(neighborhood=["The Louvre is in"]),
        "portability": plain(portability={"Reasoning": [{"prompt": "p", "grund_truth": "a"}]}),
        "edit": {"edit": sentence},
        "Forgetfulness": {"edit": sentence, "Forgetfulness": tests},
        "consequences": plain(consequences=[{"criterion": "forgetfulness", "test_conditions": "OR"}]),
    }[key.split(".")[0]]
    warnings = load_edits(write(tmp_path / "e.json", [row, row])).warnings
    assert f"2 of 2 rows have a key {key!r}, which is not read; did you mean {near!r}?" in warnings


def test_a_subject_in_another_unicode_form_is_found_and_said(tmp_path: Path) -> None:
    row = plain(prompt="Caf\u00e9 Zur\u00fcck lies in", subject="Cafe\u0301 Zuru\u0308ck")
    stream = load_edits(write(tmp_path / "e.json", [row]))
    assert stream[0].has_subject
    assert any("Unicode form" in line for line in stream.warnings)


# --- rows that are refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": 1, "answer": 2}, ["unknown row format", "'question', 'answer'"]),
        ({}, ["unknown row format", "none"]),
        ("text", ["expected a JSON object, found a string"]),
        (plain(subject=None), ["subject: missing"]),
        (plain(subject=" "), ["subject: empty"]),
        ({"promt": "{} is", "subject": "a", "target_new": "b"}, ["found 'promt': did you mean 'prompt'?"]),
        (
            {"prompt": "{} is", "subjekt": "a", "target_new": "b"},
            ["subject: missing", "found 'subjekt': did"],
        ),
        (
            {"prompt": "{} is", "subject": "a", "target_nwe": "b"},
            ["target_new: missing", "found 'target_nwe'"],
        ),
        ({"requested_rewrite": {"promt": "x"}}, ["requested_rewrite.prompt: missing", "found 'promt'"]),
        (plain(locality=[{"promt": "x"}]), ["locality: expected prompt", "found 'promt': did you mean"]),
        (plain(subject=3), ["subject: expected a string", "number (3)"]),
        (plain(prompt="{} or {}"), ["prompt: expected one {}", "found 2"]),
        (plain(prompt=""), ["prompt: empty"]),
        (plain(target_new="  "), ["target_new: empty"]),
        (plain(target_new=["a"]), ["target_new: expected a string", "a list"]),
        (plain(target_new={"id": "Q1"}), ["target_new.str: missing"]),
        (plain(target_new="\ud800"), ["target_new: half of a surrogate pair"]),
        ({**ZSRE, "alt": ""}, ["alt: empty"]),
        ({**ZSRE, "alt": 2006}, ["alt: expected a string", "2006"]),
        ({"src": "Which?", "subject": "Which"}, ["alt: missing"]),
        ({"requested_rewrite": []}, ["requested_rewrite: expected an object or a list", "empty"]),
        ({"requested_rewrite": "x"}, ["requested_rewrite: expected an object"]),
        ({"requested_rewrite": {"prompt": "{}"}}, ["requested_rewrite.subject: missing"]),
        (plain(rephrase_prompt=[1]), ["rephrase_prompt: expected a string"]),
        (plain(locality="x"), ["locality: expected an object of groups"]),
        (plain(locality=["x"]), ["locality: expected prompt and ground_truth, found a string"]),
        (plain(locality=[{"lok": "x"}]), ["locality: expected prompt and ground_truth, found 'lok'"]),
        (plain(locality={"G": ["x"]}), ["locality 'G': expected prompt and ground_truth"]),
        (plain(locality={"G": {"prompt": ["a", "b"], "ground_truth": ["c"]}}), ["2 prompts but 1 answers"]),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: Any, expected: list[str]) -> None:
    path = write(tmp_path / "bad.jsonl", [plain(0), plain(1), row])
    text = message(path + "[1:]")
    assert text.startswith(f"{path}, row 2 (line 3): ")
    for part in expected:
        assert part in text
    assert f"{tmp_path / 'bad.json'}, row 1: " in message(write(tmp_path / "bad.json", [plain(), row]))


def test_messages_stay_short_and_on_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [plain(prompt="{} line\n" * 500)])
    assert len(message(path)) < 400 + len(path)


# --- warnings -----------------------------------------------------------------------------------


def test_odd_streams_are_warned_about_with_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        plain(0),
        plain(0, target_new=" rocks"),  # the same once it has its space
        plain(0, target_new="moss"),
        plain(3, target_true=" rocks "),
        {"prompt": "what of plant 4?", "subject": "Plant 4", "target_new": "rocks"},
        plain(5, rephrase_prompt="Again", loc="nq question: why"),
        plain(6, prompt="who grows?"),
    ]
    with caplog.at_level(logging.INFO):
        stream = load_edits(write(tmp_path / "a.json", rows))
    repeated, conflicting, same, loose, absent = stream.warnings
    assert re.match(r"1 of 7 edits repeat .*: 1$", repeated)
    assert re.match(r"3 of 7 edits .* different targets: 0, 1, 2$", conflicting)
    assert re.match(r"1 of 7 edits .* equal to the old one: 3$", same)
    assert re.match(r"1 of 7 edits .* ignoring .*: 4$", loose)
    assert stream[4].subject == "plant 4"
    assert re.match(r"1 of 7 edits have a subject that is not in their prompt.*: 6$", absent)
    assert stream[6].text == "who grows?" and not stream[6].has_subject
    logged = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [text.split(": ", 1)[1] for level, text in logged if level == "WARNING"] == list(stream.warnings)
    infos = [text for level, text in logged if level == "INFO"]
    assert any("6 of 7 edits have no paraphrases" in text for text in infos)
    assert any("6 of 7 edits have no neighborhood" in text for text in infos)


def test_an_ordinary_stream_has_no_warnings(tmp_path: Path) -> None:
    assert load_edits(write(tmp_path / "a.json", [COUNTERFACT, ZSRE])).warnings == ()


# --- the public sets ----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # these tests serve files on this machine
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which it is served on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_public_sets_come_through_the_cache(
    cache: Path, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    # Rows whose fields differ in type: one schema for all would refuse or change them.
    mixed = plain(1, case_id="a", target_new={"str": "moss"}, unused=[1, "x", None])
    path = Path(write(folder / "counterfact.json", [COUNTERFACT, mixed]))
    monkeypatch.setitem(public.URLS, "counterfact", f"{address}/counterfact.json")
    stream = load_edits("counterfact[::-1]")
    assert [edit.id for edit in stream] == ["a", "41"]
    assert stream[1].source == "counterfact.json, row 0"
    assert any(cache.iterdir())
    path.unlink()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert load_edits("counterfact[::-1]").edits == stream.edits


def test_a_file_of_the_hub_is_found_in_its_cache_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert public.URLS["knowedit"] in message("knowedit[0:5]")
    folder = tmp_path / "datasets--zjunlp--KnowEdit"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (rows := folder / "snapshots" / ("a" * 40) / "benchmark" / "wiki_counterfact").mkdir(parents=True)
    write(rows / "test_cf.json", [plain(0), plain(1)])
    assert load_edits("knowedit[1]")[0].source == "test_cf.json, row 1"


def test_a_damaged_download_says_what_to_delete(
    cache: Path, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    (folder / "zsre.json").write_text("<html>please sign in</html>")
    monkeypatch.setitem(public.URLS, "zsre", f"{address}/zsre.json")
    text = message("zsre[0:5]")
    assert "zsre.json, line 1: malformed JSON" in text
    assert f"delete {cache}" in text


def test_no_network_is_one_line_that_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(public.URLS, "zsre", "http://127.0.0.1:9/zsre.json")
    text = message("zsre[0:5]")
    assert "download http://127.0.0.1:9/zsre.json" in text
    assert "edits=PATH" in text


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_variables_are_respected(tmp_path: Path, variable: str) -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): print('asked the network'); raise OSError('no')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
        "from harness_rect.edits import load_edits\n"
        "try: load_edits('zsre')\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {**os.environ, variable: "1", "HF_DATASETS_CACHE": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\n") == 1
    assert "asked the network" not in done.stdout
    assert "Offline" in done.stdout
    assert "https://rome.baulab.info/data/dsets/zsre_mend_eval.json" in done.stdout
