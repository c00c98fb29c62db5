"""Contrast statistics: moments of both sides of a contrast, collected in one streaming pass over its texts.

sinks.py       a warning of attention sinks, whose huge activations decide every mean
collecting.py  ``collect``: the pass over the texts
sums.py        what it keeps of the texts so far, in shards
contrast.py    ``ContrastStatistics``: what methods read, merged and stored
sample_size.py how near a vector of few texts is to that of all texts
moments.py     count, mean and squared deviations of examples
"""
