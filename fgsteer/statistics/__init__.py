"""Contrast statistics: moments of both sides of a contrast, collected in one streaming pass over its texts."""
