"""Naive float64 loop versions of the papers' equations (METHODS), written independently of fgsteer as test oracles."""
