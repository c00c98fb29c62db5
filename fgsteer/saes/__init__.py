"""Sparse autoencoders: the type, the formats and releases that it is loaded from, and the data kept beside one.

sae.py           ``SAE``: weights in one canonical form, encoding and decoding
selected.py      some features of a TopK SAE, read without encoding all of them where that is plain
loading.py       ``load_sae``: from the package, folders, releases, repositories and live objects
formats/         the forms in which SAEs are stored, one row of a table for each
registry.py      ``registry``: the releases that sae-lens lists
density.py       ``FeatureDensity``: on which share of tokens each feature fires
examples.py      ``FeatureExamples``: the excerpts in which each feature fires most
labels.py        what features are said to mean
pairing.py       whether density, excerpts and effects were measured on this SAE
fingerprints.py  hashes of SAEs and densities, for the plans of resumable runs
"""
