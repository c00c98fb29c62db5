"""What commands that make a vector tell of it: its size, and what strengths of it cost neutral text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fgsteer.cli.loading import interventions
from fgsteer.cli.printing import say
from fgsteer.errors import FgsteerError
from fgsteer.errors.wording import count


def describe_vector(out: object, method: str, vector: Any) -> dict[str, Any]:
    """A vector and its file, as plain JSON."""
    return {
        "out": str(out),
        "method": method,
        "hookpoint": str(vector.hookpoint),
        "norm": vector.norm,
        "features": len(vector.features),
    }


def measure_strengths(vector: Any, operation: str, load: Callable[[], tuple[Any, Any]]) -> dict[str, Any]:
    """What strengths of a vector cost on a model; nothing where that cannot be measured, which a note says.

    ``load`` gives the model and its tokenizer.
    """
    from fgsteer.likelihood.strengths import StrengthMeter
    from fgsteer.models.chat import is_chat_model

    try:
        parts = load()
        chat = is_chat_model(*parts)
        scope = "reply" if chat else "all"
        meter = StrengthMeter(*parts, vector, lambda c: interventions([(vector, c)], operation, scope)[0], chat=chat)
        rows = [strength.as_dict() for strength in meter.useful()]
    except FgsteerError as error:
        say(f"note: What strengths cost is not measured. {error}", err=True)
        return {}
    return {
        "activation_norm": meter.activation_norm,
        "relative_norm": vector.norm / meter.activation_norm,
        "operation": operation,
        "scope": scope,
        "strengths": rows,
    }


def print_vector(v: dict[str, Any]) -> None:
    """Print what ``describe_vector`` and ``measure_strengths`` found."""
    say(f"{v['out']}: {v['method']} at {v['hookpoint']}, norm {v['norm']:.3f}, {count(v['features'], 'feature')}")
    if "strengths" not in v:
        return
    where = "replies in a chat" if v["scope"] == "reply" else "text"
    say(f"Activations there have a median norm of {v['activation_norm']:.3g}: ‖v‖/‖h‖ = {v['relative_norm']:.3g}.")
    say(f"What strengths cost neutral {where} (--op {v['operation']} --scope {v['scope']}), in nats a token:")
    say(f"{'-c':>10}{'cost':>8}{'‖c·v‖/‖h‖':>12}")
    for row in v["strengths"]:
        say(f"{row['coefficient']:>10g}{row['cost']:>8.2f}{row['relative_norm']:>12.2f}")
