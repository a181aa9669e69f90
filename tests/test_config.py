"""One configuration from loose arguments; whatever is wrong is one line that names the argument."""

from __future__ import annotations

import pytest
from lm_eval.utils import simple_parse_args_string
from support.regularizers import settings_of

from harness_rect import cli
from harness_rect.cli.edit import described_by
from harness_rect.config import EditConfig
from harness_rect.errors import UserError
from harness_rect.experiments.sweep.plan import SweepConfig, make_plan
from harness_rect.methods import METHODS
from harness_rect.regularizers import REGULARIZERS, NoRegularizer, Rect, parse_share


def refused(**arguments) -> str:
    with pytest.raises(UserError) as error:
        EditConfig.from_args(**{"edits": "zsre[0:5]", **arguments})
    message = str(error.value)
    assert message and "\n" not in message
    return message


# -- shares -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, share",
    [(0.4, 0.4), ("0.4", 0.4), ("40%", 0.4), (" 40 % ", 0.4), (1, 1), (0, 0), ("100%", 1), ("1e-1", 0.1)],
)
def test_shares_are_numbers_or_percentages(given, share):
    assert parse_share(given, "rect") == pytest.approx(share)


@pytest.mark.parametrize("given", [40, "40", "101%", -0.1, "-1%", "nan", "", "%", "half", None, True, "inf"])
def test_anything_else_is_no_share(given):
    with pytest.raises(UserError, match="rect=") as error:
        parse_share(given, "rect")
    assert "\n" not in str(error.value)


# -- arguments ----------------------------------------------------------------------------------------


def test_rect_is_short_for_regularizer_and_keep():
    short = EditConfig.from_args(edits="zsre", rect="40%")
    assert short == EditConfig.from_args(edits="zsre", regularizer="rect", keep=0.4)
    assert short.regularizer == Rect(keep=0.4, rect_convention="paper")


@pytest.mark.parametrize(
    "other", [{"regularizer": "random"}, {"keep": 0.4}, {"regularizer": "rect", "keep": 0.4}]
)
def test_rect_and_its_long_form_exclude_each_other(other):
    assert "rect=" in refused(rect=0.4, **other)


def test_none_means_not_given():
    config = EditConfig.from_args(
        edits="zsre", method=None, rect=None, regularizer=None, keep=None, hparams=None, edit_seed=None
    )
    assert config == EditConfig(edits="zsre")
    assert (config.method, config.regularizer) == ("rome", NoRegularizer())
    assert (config.edit_batch_size, config.edit_seed) == (1, 0)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"method": "rom"}, ["method", "'rom'", "'rome'"]),
        ({"method": "zzz"}, ["method", "rome", "r_rome", "none"]),
        ({"regularizer": "rekt", "keep": 0.4}, ["regularizer", "'rekt'", "'rect'"]),
        ({"rect": 0.4, "rect_convention": "papr"}, ["rect_convention", "'paper'"]),
        ({"regularizer": "rect"}, ["keep"]),
        ({"regularizer": "random"}, ["keep"]),
        ({"keep": 0.4}, ["keep", "regularizer"]),
        ({"rect_convention": "alphaedit"}, ["rect_convention", "rect"]),
        ({"edit_seed": 2**64}, ["edit_seed"]),
        ({"regularizer": "rect", "keep": 40}, ["keep=40", "40%"]),
        ({"rect": "forty"}, ["rect=forty"]),
        ({"edit_batch_size": 0}, ["edit_batch_size"]),
        ({"edit_batch_size": "many"}, ["edit_batch_size", "many"]),
        ({"edit_batch_size": 2}, ["edit_batch_size", "rome"]),
        ({"edit_seed": 1.5}, ["edit_seed"]),
        ({"edits": None}, ["edits"]),
        ({"methd": "rome"}, ["methd"]),
    ],
)
def test_a_wrong_argument_is_named(arguments, words):
    message = refused(**arguments)
    for word in words:
        assert word in message


def test_the_place_of_the_mistake_is_named():
    assert refused(where="sweep.yaml", edit_seed="x").startswith("sweep.yaml: ")
    assert refused(edit_seed="x").startswith("model_args: ")


def test_a_configuration_made_directly_is_checked_too():
    for wrong in ({"keep": 40.0, "regularizer": "rect"}, {"keep": 0.4}, {"method": "x"}):
        with pytest.raises(ValueError):
            EditConfig(edits="zsre", **wrong)


def test_no_method_needs_no_edits():
    assert EditConfig.from_args(method="none").edits is None


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_every_method_and_regularizer_is_the_same_run_however_it_is_asked_for(regularizer, tmp_path):
    given = {"regularizer": regularizer, **settings_of(regularizer)}
    entries = [{"method": method, "hparams": "rect-tiny"} for method in METHODS]
    sweep = SweepConfig.model_validate(
        {
            "output": str(tmp_path),
            "models": ["gpt2"],
            "edits": "tiny[0:2]",
            "methods": entries,
            "regularizers": [given],
            "checkpoints": [2],
            "tasks": ["rect_nli"],
        }
    )
    for entry, trajectory in zip(entries, make_plan(sweep, "sweep.yaml").trajectories, strict=True):
        arguments = {"edits": "tiny[0:2]", **entry, **given}
        expected = EditConfig(**arguments)
        options = [word for name, value in arguments.items() for word in (option(name), str(value))]
        argv = ["edit", "--model", "gpt2", "--output", "out", *options]
        assert described_by(cli.make_parser(argv).parse_args(argv)) == expected
        typed = simple_parse_args_string(",".join(f"{name}={value}" for name, value in arguments.items()))
        assert EditConfig.from_args(**typed) == expected
        assert trajectory.config == expected
        assert expected.regularizer == REGULARIZERS[regularizer](**settings_of(regularizer))


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def test_paths_may_be_paths_or_numbers(tmp_path):
    config = EditConfig.from_args(edits=tmp_path / "e.json", stats=tmp_path, hparams=7, edit_cache=tmp_path)
    assert config.edits == str(tmp_path / "e.json") and config.hparams == "7"
    assert config.stats == config.edit_cache == str(tmp_path)
