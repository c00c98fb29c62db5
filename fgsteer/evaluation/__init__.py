"""Evaluation: what steering does to a model and its texts, and what can be known before.

judges      how much of a behavior texts show, and how coherent they are; the table of judges
metrics     coherence, cross-entropy and probabilities of answers, steerability, diagnosis, intervals over prompts
bench       making a benchmark's run: plan, conditions, generators, distributors, files
runs        a run loaded: records, settings chosen on one half, tables, pictures, the report
axbench     AxBench's files and protocol, for all methods
sweep       layers, strengths and signs compared without generating
patterns    where steering holds, how many texts it needs, what it costs, what undoes it
page_parts  the parts of an HTML page of results
drawing     the style and layouts that all pictures share
tasks       tasks of lm-evaluation-harness under steering
"""
