"""Tables of methods and regularizers by name: those of this package and those that other packages add.

Another package adds one by an entry point of the table's group, e.g. in its ``pyproject.toml``

    [project.entry-points."harness_rect.regularizers"]
    clip = "my_package:Clip"

where ``clip`` is the name that users type and the object's own ``name``. A package that cannot be loaded is
an error for those who ask for its objects, and one warning for all others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, Protocol, TypeVar

from harness_rect.errors import UserError, did_you_mean

log = logging.getLogger(__name__)


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


class Registry(MutableMapping[str, T], Generic[T]):
    """Name -> object. Iterating gives the names of all objects that can be loaded.

    ``registry[name] = object`` adds one in this process.

    Args:
        what: what the objects are, for messages: "editing method".
        group: the entry-point group of other packages.
        builtin: the objects of this package.
        accepts: whether an object of another package is of the right type.
    """

    def __init__(
        self, what: str, group: str, builtin: Iterable[T], accepts: Callable[[object], bool]
    ) -> None:
        self.what, self.group, self._accepts = what, group, accepts
        self._objects: dict[str, T] = {entry.name: entry for entry in builtin}
        self._plugins: dict[str, EntryPoint] | None = None
        self._problems: dict[str, UserError] = {}

    @property
    def plugins(self) -> dict[str, EntryPoint]:
        """The entry points of other packages, by name."""
        if self._plugins is None:
            self._plugins, self._problems = {}, {}
            for point in entry_points(group=self.group):
                if point.name in self._objects:
                    log.warning("%s %s of %s: the name is taken", self.what, point.name, point.value)
                else:
                    self._plugins[point.name] = point
        return self._plugins

    def __getitem__(self, name: str) -> T:
        if name not in self._objects and name in self.plugins:
            if name in self._problems:
                raise self._problems[name]
            self._objects[name] = self._load(self.plugins[name])
        return self._objects[name]

    def _load(self, point: EntryPoint) -> T:
        where = f"{self.what} {point.name}: {point.value}"
        try:
            loaded = point.load()
        except Exception as error:  # code of another package: anything can go wrong in it
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{where} cannot be loaded from its package: {problem}") from None
        if not self._accepts(loaded):
            raise UserError(f"{where} is of the wrong type for {self.group}: {type(loaded).__name__}")
        for attribute in ("name", "title", "paper", "summary"):
            if not isinstance(getattr(loaded, attribute, None), str):
                raise UserError(f"{where} must have a text as its attribute {attribute}")
        if loaded.name != point.name:
            raise UserError(f"{where} must have the name {point.name!r}, found {loaded.name!r}")
        return loaded

    def __setitem__(self, name: str, entry: T) -> None:
        self._objects[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._objects[name]

    def __iter__(self) -> Iterator[str]:
        yield from list(self._objects)
        for name in self.plugins:
            if name not in self._objects and name not in self._problems:
                try:
                    self[name]
                except UserError as error:
                    self._problems[name] = error
                    log.warning("%s", error)
                else:
                    yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._objects or name in self.plugins

    def find(self, name: str) -> T:
        """The object of a name that a user gave.

        Raises:
            UserError: there is none; the message has the closest name, or all of them.
        """
        if name not in self:
            raise UserError(f"no {self.what} {name!r}: {did_you_mean(name, self)}")
        return self[name]
