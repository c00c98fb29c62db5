"""Contrast sets, corpora and conversations: what texts are read, and how they become prompts and completions."""
