"""The page of ``fgsteer play`` in a browser; ``make test-play`` runs it."""
