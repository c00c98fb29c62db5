"""Measures of a steered model, and intervals over prompts.

answers      cross-entropy by text, probabilities of answers, steerability
coherence    how coherent texts are, by the unsteered model
diagnosis    how reliable a vector will be, from contrast statistics
gate_fit     on which reading and threshold an intervention should act
gate_scores  where a gate opens, how rightly, and what steering does there and elsewhere
propensity   how much more probable one side of a contrast is than the other
own_text     KL on the steered model's own text, and the least that a behavior can cost
intervals    t intervals over texts that come in clusters
"""
