"""Sparse autoencoders: the type, the formats and releases that it is loaded from, and what lies beside one."""
