"""Choosing what the page shows, by model, method and regularizer: checkboxes and style rules, no script.

What belongs to a setting or a series carries tokens as its classes; in a drawing, where several lines share
an element, ids that hold a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from zlib import crc32

from matplotlib.axes import Axes

from harness_rect.experiments.report.series import Series, Setting
from harness_rect.experiments.report.study import Study


def _token(kind: str, name: str) -> str:
    """Letters and digits only, whatever a results file calls things."""
    return f"{kind}{crc32(name.encode('utf-8', 'surrogatepass')):08x}"


def regularizer_token(series: Series) -> str:
    return _token("r", series.regularizer.name)


def setting_tokens(setting: Setting) -> str:
    """The classes of what belongs to a setting."""
    return f"{_token('m', setting.model)} {_token('e', setting.method_label)}"


def series_tokens(series: Series) -> str:
    """The classes of what belongs to a series."""
    return f"{setting_tokens(series.setting)} {regularizer_token(series)}"


@contextmanager
def drawn_for(axes: Axes, series: Series, part: str = "mark") -> Iterator[None]:
    """What is drawn inside belongs to a series.

    Args:
        part: another one for each time that a series is drawn on the same axes.
    """
    before = set(axes.get_children())
    yield
    token = f"{regularizer_token(series)}-{_token('s', series.label)}"
    for i, artist in enumerate(each for each in axes.get_children() if each not in before):
        artist.set_gid(f"{token}-{part}{i}")


@dataclass(frozen=True)
class Filter:
    """A group of checkboxes. choices: token -> label."""

    title: str
    choices: dict[str, str]


def filters(study: Study) -> list[Filter]:
    """Those with more than one choice."""
    every = [series for setting in study.settings for series in study.series(setting)]
    found = [
        Filter("Models", {_token("m", s.setting.model): s.setting.model for s in every}),
        Filter("Methods", {_token("e", s.setting.method_label): s.setting.method_label for s in every}),
        Filter("Regularizers", {regularizer_token(s): s.regularizer.title for s in every}),
    ]
    return [each for each in found if len(each.choices) > 1]


def style(found: list[Filter]) -> str:
    """The rules that hide what belongs to an unchecked box."""
    tokens = [token for each in found for token in each.choices]
    return "\n".join(
        f'body:has(#show-{token}:not(:checked)) :is(.{token}, svg [id*="-{token}-"]) {{ display: none; }}'
        for token in tokens
    )
