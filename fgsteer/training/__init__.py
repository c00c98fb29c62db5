"""Train sparse autoencoders on the activations of a model that has none, and measure them.

In the order in which data flows:

    activation_store.py  ``store_activations``: activations of texts, recorded once and kept on disk, or as needed
    shuffling.py         batches of them in random order
    settings.py          ``SAETraining``: kind, size and schedule
    sparse_topk.py       the TopK SAE of sae-lens with a training step that computes active features alone
    trainer.py           the loop around sae-lens's trainer, with checkpoints
    quality.py           ``measure_sae``: what an SAE explains, and what its reconstruction costs the model
    train.py             ``train_sae``: all of these one after another
"""
