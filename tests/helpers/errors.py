"""What an error says."""

from __future__ import annotations

import traceback


def chain(error):
    """All that an error carries along: of itself, its causes and contexts, what str, repr and a traceback show."""
    seen = []
    while error is not None:
        seen += [str(error), repr(error), *map(repr, error.args)]
        seen += traceback.format_exception(error)
        error = error.__cause__ or error.__context__
    return "\n".join(seen)
