"""The sweep over layers and methods on a short budget."""
