"""Evaluation: what steering did to a model and its texts, and what could be known before.

metrics             perplexity and cross-entropy by text, A/B answer probability, steerability
coherence           how coherent generated texts are, in [0, 1]
diagnose            how reliable a vector will be, from contrast statistics alone
judges, endpoint    how much of a behavior texts show, in [0, 1]
arms, bench         methods × concepts × layers × strengths, to records
records, tables     a run read back: settings chosen on one half, scores on the other
intervals           t intervals over prompts, paired by prompt and seed
plots, report       pictures, one HTML page, Markdown
"""
