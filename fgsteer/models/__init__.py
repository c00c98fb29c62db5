"""Models: loading them, where their hookpoints are, and whether a vector or an SAE fits one."""
