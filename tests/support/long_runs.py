"""The options of the scripts that try inputs or faults for as long as asked."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable


def options(description: str | None, what: str, of: str, kinds: Iterable[str]) -> argparse.ArgumentParser:
    """A parser for them.

    Args:
        what: is tried, in plural. of: the option that chooses kinds.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(f"--{of}", choices=kinds, action="append", help="only this one; may be repeated")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long (default 3600)")
    parser.add_argument("--count", type=int, default=10**9, help=f"stop after so many {what} of each kind")
    parser.add_argument("--seed", default=str(int(time.time())), help=f"of the {what} (default: the time)")
    return parser
