"""What the workers of Ray say, until the driver takes it."""

from __future__ import annotations


class Inbox:
    """Becomes an actor, a process of its own. It gets pickled bytes, so that it starts without torch."""

    def __init__(self) -> None:
        self._kept: list[bytes] = []

    def put(self, what: bytes) -> None:
        self._kept.append(what)

    def take(self) -> list[bytes]:
        taken, self._kept = self._kept, []
        return taken
