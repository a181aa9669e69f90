"""Second moments C = E[k k^T] of MLP keys: read from the public cache layout, or computed from text."""

from harness_rect.statistics.moments import SecondMoment, read_moment, solve_moment, write_moment
from harness_rect.statistics.provider import MomentProvider

__all__ = ["MomentProvider", "SecondMoment", "read_moment", "solve_moment", "write_moment"]
