"""Train steering vectors by gradient descent through a model that stays as it is.

    vector = fg.train(model, tokenizer, "cheerful", hookpoint=12)
    vector = fg.train(model, tokenizer, pairs, space="sae", sae=sae, features=256)      weights of features
    fg.generate(model, tokenizer, prompts, steering=vector.add(8.0))

In the order in which data flows:

    settings.py    ``VectorTraining``: objectives with their constants, fgsteer's own and published ones
    examples.py    what is learned from: winning and losing answers
    checkpointing.py  blocks that are computed again for gradients
    response_passes.py  log-probabilities of answers under steering, with gradients, above the steered block alone
    losses.py      the losses, as functions of log-probabilities
    selections.py  which of an SAE's features are trained
    spaces.py      what is trained: a vector of the residual stream, or weights of an SAE's features
    objectives.py  which answers are read under which steering, and the loss of each
    learner.py     one vector in training: its order of examples, optimizer, early stopping and state
    run.py         vectors that are trained in common batches, and their checkpoint
    running_cost.py  what is shown of a training while it runs
    train.py       ``train`` and ``train_many``
    masks.py       ``learned_mask``: which features a vector needs
    changes.py     what an instruction changes: activations of an answer with it and without it
    adaptive.py    ``train_adaptive``: a strength that depends on the token, at one layer or several
    scaling.py     ``train_scaling``: factors that activations are multiplied by
    kl_then_steer.py  ``kl_then_steer``: a model that stays as it is under steering
    bench.py       both spaces as methods of the benchmark
"""
