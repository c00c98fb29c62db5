"""Choosing features: rankings of an SAE's features for a behavior, by what they read and by what they do.

    activations = fg.max_activations(model, tokenizer, sae, "sea")
    ranking = fg.max_auc(activations)
    vector = fg.from_features(sae, ranking[:1])

In the order in which data flows:

    ranking.py      ``FeatureRanking``: ids, scores, how many were compared, and what chance would give
    correlation.py  Pearson's r of a stream, and the largest of many by chance
    pooled.py       ``max_activations``: the largest activation of every feature in every text
    separation.py   ``max_auc`` and ``calibrated_f1``: how well a feature tells the sides apart
    confidence.py   ``confidence_change``: how much an amplified feature changes the model's certainty
    effects.py      ``causal_effect`` and ``measured_effect``: what steering with a feature does to others
    names.py        the names of rankings, for help texts
    rank.py         ``rank_features``: any of these by its name
    outcomes.py     how answers change, and the ratio of side effects
    corrsteer.py    ``corrsteer``: features that go with good answers, at one layer or at several
"""
