"""Evaluations side by side: ``compare(load(BASE), [load(OTHER)])``, and ``harness-rect compare``."""

from harness_rect.experiments.compare.comparison import Comparison, ComparisonTable, Gate, compare

__all__ = ["Comparison", "ComparisonTable", "Gate", "compare"]
