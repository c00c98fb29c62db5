"""Hookpoints of stored SAEs, from the hook names in their configs; and the places that no module reads or writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fgsteer.errors import HookpointError, PairingError
from fgsteer.models.hookpoints import Hookpoint, Site

INSIDE_NORM = (
    "reads inside the MLP's norm, before its gain, which only the model's weights hold",
    "a transcoder that reads mlp.hook_in (Gemma Scope 2, mwhanna-qwen3), or an SAE on mlp_out",
)
# hook names of TransformerLens that are no input or output of a module: (why, what to use instead)
UNREACHABLE_HOOKS = {
    "hook_resid_mid": ("reads between attention and MLP, where no module ends", "an SAE on resid_pre or resid_post"),
    "hook_mlp_in": ("reads before the MLP's norm, where no module ends", "an SAE on resid_pre, or one on mlp.hook_in"),
    "ln2.hook_normalized": INSIDE_NORM,
    "hook_embed": ("reads the token embedding", "an SAE on resid_pre of layer 0"),
}
_HUGGING_FACE_HOOKS: tuple[tuple[str, Site], ...] = (  # names of places in Gemma Scope 2
    (r"layers\.(\d+)\.self_attn\.o_proj\.input", "z"),
    (r"layers\.(\d+)\.pre_feedforward_layernorm\.output", "mlp_in"),
    (r"layers\.(\d+)\.post_feedforward_layernorm\.output", "mlp_out"),
)


def refuse_unreachable(hook_name: str) -> None:
    """Raise HookpointError, with the reason, for a hook name that no module reads or writes."""
    reason, instead = UNREACHABLE_HOOKS.get(hook_name.split(".", 2)[-1], ("", ""))
    if reason:
        raise HookpointError(f"an SAE at {hook_name}, which {reason}", instead)


def find_hookpoint(configs: tuple[Mapping[str, Any], ...], keys: tuple[str, ...], given: Hookpoint | None) -> Hookpoint:
    """Return the hookpoint that a config names under the first key that parses, or else the one given.

    Raises HookpointError for names without a place, PairingError when both are there and differ.
    """
    names = [str(config[key]) for config in configs for key in keys if config.get(key)]
    for name in names:
        named = _parse(name)
        if named is not None:
            return check_given(named, given)
    for name in names:
        refuse_unreachable(name)
    if given is not None:
        return given
    raise HookpointError(
        f"an SAE with the hook names {', '.join(names)}" if names else "an SAE whose config names no hook",
        "a residual, attn_out, mlp_out, z or mlp_in hook",
        "pass hookpoint=, for example blocks.12.hook_resid_post",
    )


def check_given(named: Hookpoint, given: Hookpoint | None) -> Hookpoint:
    """Return the hookpoint that is named. Raises PairingError where another one is given."""
    if given is not None and given != named:
        raise PairingError(f"hookpoint = {given}", f"{named}, where this SAE was trained", "leave hookpoint out")
    return named


def _parse(name: str) -> Hookpoint | None:
    """Parse a hook name; None where it names no hookpoint."""
    for pattern, site in _HUGGING_FACE_HOOKS:
        if match := re.search(pattern + "$", name):
            return Hookpoint(int(match[1]), site)
    try:
        return Hookpoint.parse(name)
    except HookpointError:
        return None
