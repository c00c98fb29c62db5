"""Transfer between models: a learned map from the activations of one to those of another (arXiv 2503.04429).

transfer = fg.fit_transfer(model_a, tokenizer_a, model_b, tokenizer_b, texts, "blocks.6.hook_resid_post", 12)
vector = fg.caa(transfer.collect(model_a, tokenizer_a, fg.load_contrast("love")))            a vector for model_b

pairs.py        which token of one model belongs to which of the other, and the activations of both
mapping.py      ``TransferMap``: the map, and what it makes of vectors, statistics and forward passes
fitting.py      ``fit_transfer``: ridge regression in closed form, or an autoencoder
autoencoder.py  training of a map with a hidden layer
quality.py      ``measure_transfer``: how well a map does on other texts, by dimension and in the model's loss
"""
