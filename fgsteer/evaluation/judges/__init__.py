"""Judges of behavior: keywords, sentence embeddings, and chat models behind an endpoint."""
