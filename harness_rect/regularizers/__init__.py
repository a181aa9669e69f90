"""Regularizers: each trims the proposed update of one weight before the session applies it.

A regularizer is one file with a :class:`~harness_rect.regularizers.base.Regularizer`, whose fields are its
settings, and the pure function it is made of. Other packages add theirs by the entry-point group
``harness_rect.regularizers``.
"""

from __future__ import annotations

from harness_rect.registry import Registry
from harness_rect.regularizers.base import NoRegularizer, Regularizer, WeightState, parse_share
from harness_rect.regularizers.magnitude import Magnitude, magnitude
from harness_rect.regularizers.norm_matched import NormMatched
from harness_rect.regularizers.pca import Pca, pca
from harness_rect.regularizers.prune import Prune, largest_singular_value, prune, prune_factors
from harness_rect.regularizers.random import Random, random_keep
from harness_rect.regularizers.rect import Rect, rect, rect_alphaedit
from harness_rect.regularizers.revive import Revive, dominant_directions
from harness_rect.regularizers.scale import Scale
from harness_rect.regularizers.sphere import Sphere, sphere, sphere_factors

#: Name -> class of regularizer.
REGULARIZERS: Registry[type[Regularizer]] = Registry(
    "regularizer",
    "harness_rect.regularizers",
    (NoRegularizer, Rect, Random, Pca, Scale, NormMatched, Magnitude, Prune, Sphere, Revive),
    lambda entry: isinstance(entry, type) and issubclass(entry, Regularizer),
)

__all__ = [
    "REGULARIZERS",
    "Magnitude",
    "NoRegularizer",
    "NormMatched",
    "Pca",
    "Prune",
    "Random",
    "Rect",
    "Regularizer",
    "Revive",
    "Scale",
    "Sphere",
    "WeightState",
    "dominant_directions",
    "largest_singular_value",
    "magnitude",
    "parse_share",
    "pca",
    "prune",
    "prune_factors",
    "random_keep",
    "rect",
    "rect_alphaedit",
    "sphere",
    "sphere_factors",
]
