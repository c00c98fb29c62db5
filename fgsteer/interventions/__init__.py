"""Interventions: how a vector acts on an activation, all of them one equation.

    h' = h + Σⱼ clip(αⱼ − λⱼ · (readⱼ(h) − μⱼ), loⱼ, hiⱼ) · wⱼ

with ``read`` a projection or a feature activation. Add has λ = 0; Ablate, Clamp, Affine and ClampFeature have λ = 1
and replace what they read, as far as bounds say.

    table.py     one row for each kind of intervention: its name, its argument, its sentence of help
    scopes.py    the tokens that an intervention is for
    token_scopes.py  scopes that count tokens, and how scopes are parsed
    base.py      what every kind is
    adding.py    those that add a direction
    projecting.py  those that set or bound projections
    rotating.py  rotation in a plane
    remapping.py  replacement by what a map between two models gives
    scaling.py   multiplication by a number
    gates.py     the conditions under which one acts
    readings.py  what conditions and strengths go by
    features.py  those that change the activations of SAE features
    cached.py    steering of cached keys and values, which is no such equation
    values.py    their numbers and vectors, checked and turned into tensors
    kernel.py    the one update that all of them become, and how it is applied to activations
    files.py     interventions with scopes and gates in a file
    stacking.py  one intervention for each row of a batch, as few updates

The names below are loaded when they are first used, so that the table can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fgsteer.interventions.adding import AdaptiveAdd as AdaptiveAdd
    from fgsteer.interventions.adding import Add as Add
    from fgsteer.interventions.adding import AddByPrompt as AddByPrompt
    from fgsteer.interventions.adding import AddKeepingNorm as AddKeepingNorm
    from fgsteer.interventions.adding import AddRelative as AddRelative
    from fgsteer.interventions.base import DirectionIntervention as DirectionIntervention
    from fgsteer.interventions.base import Intervention as Intervention
    from fgsteer.interventions.features import ClampFeature as ClampFeature
    from fgsteer.interventions.features import edit as edit
    from fgsteer.interventions.gates import Gate as Gate
    from fgsteer.interventions.kernel import Update as Update
    from fgsteer.interventions.kernel import apply as apply
    from fgsteer.interventions.projecting import Ablate as Ablate
    from fgsteer.interventions.projecting import Affine as Affine
    from fgsteer.interventions.projecting import Clamp as Clamp
    from fgsteer.interventions.projecting import ClampSubspace as ClampSubspace
    from fgsteer.interventions.remapping import Remap as Remap
    from fgsteer.interventions.rotating import Rotate as Rotate
    from fgsteer.interventions.scaling import Scale as Scale
    from fgsteer.interventions.stacking import stack as stack
    from fgsteer.interventions.values import Scalar as Scalar
    from fgsteer.interventions.values import finite_number as finite_number
    from fgsteer.interventions.values import finite_vector as finite_vector
    from fgsteer.interventions.values import unit_and_norm as unit_and_norm

from fgsteer.interventions.scopes import SCOPES as SCOPES
from fgsteer.interventions.scopes import Scope as Scope

_MODULES = (
    "base",
    "adding",
    "features",
    "gates",
    "readings",
    "kernel",
    "projecting",
    "remapping",
    "rotating",
    "scaling",
    "stacking",
    "values",
)

if not TYPE_CHECKING:  # with it, type checkers would take any name

    def __getattr__(name: str) -> Any:
        if not name.startswith("_"):
            for module in _MODULES:
                home = import_module(f"fgsteer.interventions.{module}")
                if name in vars(home):
                    return vars(home)[name]
        raise AttributeError(f"module 'fgsteer.interventions' has no attribute {name!r}")
