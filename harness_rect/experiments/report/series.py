"""The keys that group runs into figures and lines, with their labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness_rect.methods import METHODS
from harness_rect.regularizers import REGULARIZERS

NO_REGULARIZER = "no regularizer"


@dataclass(frozen=True)
class Setting:
    """The runs of one figure: one model, one method, one arrangement of the edits.

    batch: edits made in one step of a stream; None if all edits are made in one step.
    """

    model: str
    method: str
    batch: int | None = 1

    @property
    def method_label(self) -> str:
        title = getattr(METHODS.get(self.method), "title", self.method)
        arrangement = "one batch" if self.batch is None else f"batches of {self.batch}"
        return title if self.batch == 1 else f"{title}, {arrangement}"

    @property
    def label(self) -> str:
        return f"{self.model}: {self.method_label}"

    @property
    def order(self) -> tuple[Any, ...]:
        methods = [*METHODS, self.method]
        return methods.index(self.method), self.method, self.batch is None, self.batch or 0


@dataclass(frozen=True)
class Regularization:
    """A regularizer: its name, and the settings that differ from their defaults."""

    name: str = "none"
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, name: str, settings: Mapping[str, Any]) -> Regularization:
        fields = getattr(REGULARIZERS.get(name), "model_fields", {})
        given = {
            setting: value if isinstance(value, str | int | float) else json.dumps(value)
            for setting, value in settings.items()
            if value is not None and not (setting in fields and value == fields[setting].default)
        }
        return cls(name, tuple(sorted(given.items())))

    @property
    def title(self) -> str:
        """Without settings: ``RECT``."""
        if self.name == "none":
            return NO_REGULARIZER
        return getattr(REGULARIZERS.get(self.name), "title", self.name)

    @property
    def label(self) -> str:
        """``RECT 40%``, ``RECT 40% (alphaedit)``, ``PRUNE``."""
        if self.name == "none":
            return NO_REGULARIZER
        parts = [self.title]
        if self.kept is not None:
            parts.append(f"{100 * self.kept:g}%")
        others = [(name, value) for name, value in self.settings if name != "keep" or self.kept is None]
        if others:
            texts = (value if isinstance(value, str) else f"{name} {value:g}" for name, value in others)
            parts.append(f"({', '.join(texts)})")
        return " ".join(parts)

    @property
    def order(self) -> tuple[Any, ...]:
        """No regularizer first, then as they are registered; of one, the largest share kept first."""
        names = [*REGULARIZERS, self.name]
        return names.index(self.name), -(self.kept or 0), self.label

    @property
    def kept(self) -> float | None:
        """The setting ``keep``, where it is a number."""
        value = dict(self.settings).get("keep")
        return value if isinstance(value, int | float) else None


@dataclass(frozen=True)
class Series:
    """A line of a figure.

    hparams: a name for the hyper-parameters, if other series differ from this one only in them.
    """

    setting: Setting
    regularizer: Regularization
    hparams: str = ""

    @property
    def label(self) -> str:
        return self.regularizer.label + (f" [{self.hparams}]" if self.hparams else "")

    @property
    def order(self) -> tuple[Any, ...]:
        return *self.regularizer.order, self.hparams

    @property
    def is_plain(self) -> bool:
        """Whether there is no regularizer, and only one set of hyper-parameters."""
        return self.regularizer == Regularization() and not self.hparams
