"""Evaluation: what steering did to a model and its texts, and what could be known before.

metrics      perplexity and cross-entropy by text, A/B answer probability, steerability
coherence    how coherent generated texts are, in [0, 1]
diagnose     how reliable a vector will be, from contrast statistics alone
"""
