"""A contrast set in the tiny tokenizer's words, and the activations of its texts run alone."""

from __future__ import annotations

import numpy as np

import fgsteer as fg
from fgsteer.models.hookpoints import resolve
from tests.helpers.tiny import D_MODEL

UP = ["the bride wore a ring", "the groom took the bride in the church", "wedding ring", "she said yes"]
DOWN = ["the dog sat on bread", "a cat ran", "the king of the old sea ship was sad and the man is good"]
SET = fg.ContrastSet("wedding", positives=UP, negatives=DOWN)


def naive_examples(model, tokenizer, texts, hookpoint, sae=None):
    """Mean activation, and mean encoding, of each text run alone without the first token."""
    module, is_input = resolve(model, hookpoint)
    rows = []
    for text in texts:
        kept = {}

        def before(_, args, kwargs, kept=kept):
            kept["h"] = args[0] if args else kwargs["hidden_states"]

        def after(_, __, out, kept=kept):
            kept["h"] = (out[0] if isinstance(out, tuple) else out).clone()  # a block may go on to change it

        handle = (
            module.register_forward_pre_hook(before, with_kwargs=True)
            if is_input
            else module.register_forward_hook(after)
        )
        model(tokenizer(text, return_tensors="pt")["input_ids"])
        handle.remove()
        h = kept["h"].reshape(-1, D_MODEL)[1:].detach()
        rows.append(h.mean(0).numpy() if sae is None else np.mean([sae.encode(t).numpy() for t in h], 0))
    return rows


LONG = "the old king and the new queen was in the church on the sea with the happy man ."
