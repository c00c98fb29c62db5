"""Likelihood: how likely a model finds given texts, and what steering costs them.

scoring.py      log-probabilities, cross-entropies and divergences under many interventions
calibration.py  the strength at which steering costs a text a given number of nats per token
strengths.py    what strengths of a vector cost neutral text, and how large they are beside the activations
"""
