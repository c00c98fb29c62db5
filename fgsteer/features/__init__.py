"""Features of an SAE: how often and where they fire, which of them a word is about, and what is known of each.

In the order in which data flows:

    density.py        the share of tokens on which each feature fires, measured on a corpus
    examples.py       the excerpts of a corpus in which each feature fires most
    output_scores.py  how far each feature moves the next token towards the tokens it stands for
    active.py         the features that fire most on one text
    search.py         the features that have to do with a word
    description.py    what is known of each feature of a vector, or of some ids
    cards.py          descriptions as one HTML page, and in the terminal

The data that density.py and examples.py measure (``FeatureDensity``, ``FeatureExamples``) belong to ``fgsteer.saes``.
"""
