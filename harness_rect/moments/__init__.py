"""Second moments C = E[k k^T] of MLP keys: read from the public cache layout, or computed from text."""

from harness_rect.moments.layout import read_moment, write_moment
from harness_rect.moments.provider import MomentProvider
from harness_rect.moments.second_moment import SecondMoment, solve_moment

__all__ = ["MomentProvider", "SecondMoment", "read_moment", "solve_moment", "write_moment"]
