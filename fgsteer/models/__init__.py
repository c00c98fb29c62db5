"""Models: loading, where hookpoints are in each architecture, and whether a vector or an SAE fits."""
