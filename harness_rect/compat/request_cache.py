"""Make lm-eval's ``--use_cache`` safe for edited models."""

from __future__ import annotations

from typing import Any

from sqlitedict import SqliteDict


class _Prefixed(SqliteDict):
    """lm-eval's answer store with one run's key in front of every request key."""

    answers_of: str

    def __contains__(self, key: str) -> bool:
        return super().__contains__(f"{self.answers_of}:{key}")

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(f"{self.answers_of}:{key}")

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(f"{self.answers_of}:{key}", value)


def separate_answers(store: SqliteDict, run_key: str) -> None:
    """From now on ``store`` finds and keeps only the answers of the run ``run_key``.

    lm-eval creates the store itself and hands it over already in use; changing its class is the one way to
    reach its look-ups without changing lm-eval.
    """
    store.__class__ = _Prefixed
    store.answers_of = run_key
