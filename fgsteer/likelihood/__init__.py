"""Likelihood: how likely a model finds given texts, and what steering costs them.

scoring.py      log-probabilities, cross-entropies and divergences under many interventions
passes.py       texts in batches, and the forward passes that entries share
lower_blocks.py the blocks below the first steered one, which are run once
calibration.py  the strength at which steering costs a text a given number of nats per token
cost_curves.py  which strengths to measure next, and where a cost is met
strengths.py    what strengths of a vector cost neutral text, and how large they are beside the activations
"""
