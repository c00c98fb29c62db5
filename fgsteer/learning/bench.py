"""Training as methods of the benchmark, which gives them the model and the contrast set.

vector = trained_features(model, tokenizer, fg.load_contrast("sea"), sae, objective="reps_relative")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fgsteer.data.contrasts import ContrastSet
from fgsteer.learning.settings import VectorTraining
from fgsteer.learning.train import FEATURES, train
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def trained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contrast: ContrastSet,
    hookpoint: Hookpoint,
    *,
    objective: str = "reps_relative",
    **settings: Any,
) -> SteeringVector:
    """``train`` in the residual stream, with the settings of an objective's recipe and changes. Raises as it does."""
    recipe = VectorTraining.recipe(objective, **settings)
    return train(model, tokenizer, contrast, objective=recipe, hookpoint=hookpoint)


def trained_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contrast: ContrastSet,
    sae: SAE,
    *,
    objective: str = "reps_relative",
    features: int | None = FEATURES,
    **settings: Any,
) -> SteeringVector:
    """``train`` in the space of an SAE, with the settings of an objective's recipe and changes. Raises as it does."""
    recipe = VectorTraining.recipe(objective, **settings)
    return train(model, tokenizer, contrast, objective=recipe, space="sae", sae=sae, features=features)
