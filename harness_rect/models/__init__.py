"""Where a causal LM keeps its blocks and down projections, and how to run it on prompts."""

from harness_rect.models.architecture import Architecture, locate
from harness_rect.models.lm import EditableLM

__all__ = ["Architecture", "EditableLM", "locate"]
