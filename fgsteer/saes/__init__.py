"""Sparse autoencoders: the type, the formats and releases that it is loaded from, and the data kept beside one."""
