"""Measures of a steered model: answers, coherence, steerability, and intervals over prompts."""
