"""Tables of methods and regularizers by name: those of this package and those that other packages add.

Another package adds one by an entry point of the table's group, e.g. in its ``pyproject.toml``

    [project.entry-points."harness_rect.regularizers"]
    clip = "my_package:Clip"

where ``clip`` is the name that users type and the object's own ``name``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, Protocol, TypeVar

from harness_rect.errors import UserError, did_you_mean


class Named(Protocol):
    """Anything with a name of its own."""

    @property
    def name(self) -> str: ...


T = TypeVar("T")


class Registry(MutableMapping[str, T], Generic[T]):
    """Name -> object. Entry points of other packages are loaded when they are looked up.

    ``registry[name] = object`` adds one in this process.

    Args:
        what: what the objects are, for messages: "method".
        group: the entry-point group of other packages.
        builtin: the objects of this package, by name.
    """

    def __init__(self, what: str, group: str, builtin: Mapping[str, T]) -> None:
        self.what, self.group = what, group
        self._objects: dict[str, T] = dict(builtin)
        self._builtin = frozenset(builtin)
        self._plugins: dict[str, EntryPoint] | None = None

    @property
    def plugins(self) -> Mapping[str, EntryPoint]:
        """The entry points of other packages, by name; a name of this package is not replaced by them."""
        if self._plugins is None:
            found = {point.name: point for point in entry_points(group=self.group)}
            self._plugins = {name: point for name, point in found.items() if name not in self._builtin}
        return self._plugins

    def __getitem__(self, name: str) -> T:
        if name not in self._objects and name in self.plugins:
            point = self.plugins[name]
            try:
                loaded = point.load()
            except Exception as error:  # foreign code: anything can go wrong in it
                problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise UserError(
                    f"{self.what} {name}: {point.value} cannot be loaded from its package: {problem}"
                ) from None
            if getattr(loaded, "name", None) != name:
                raise UserError(
                    f"{self.what} {name}: {point.value} must have the attribute name = {name!r},"
                    f" found {getattr(loaded, 'name', None)!r}"
                )
            self._objects[name] = loaded
        return self._objects[name]

    def __setitem__(self, name: str, entry: T) -> None:
        self._objects[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._objects[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._objects
        yield from (name for name in self.plugins if name not in self._objects)

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
