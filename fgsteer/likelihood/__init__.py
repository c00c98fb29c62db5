"""Log-probabilities, cross-entropies and divergences of given texts, and strengths calibrated by them."""
