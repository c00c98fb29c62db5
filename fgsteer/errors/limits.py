"""Limits of numbers that are asked for; a module without imports, so that help texts can show them at once."""

from __future__ import annotations

MAX_COUNT = 2**31 - 1
"""The largest number of tokens, texts, rows or anything else that is counted."""
