"""No pretraining: the initialisation itself is exported (random, ImageNet or a given file, by `pretrain.init`).

The floor every method has to beat under the same fine-tuning recipe.
"""

from __future__ import annotations

from pipeline.methods.base import Method, MethodParams
from pipeline.registry import METHODS

__all__ = ["Initialisation", "InitialisationParams"]


class InitialisationParams(MethodParams):
    """Nothing to choose."""


@METHODS.register("random")
class Initialisation(Method):
    """Trains nothing; the loop exports the backbone as it was built."""

    Params = InitialisationParams
    trains = False
