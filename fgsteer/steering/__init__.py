"""Steering: interventions applied to a model's forward passes, and generation under them.

In the order in which data flows:

    entries.py        what callers pass as ``steering``, as interventions for each row
    ranges.py         how large a strength may be before activations overflow
    masks.py          the tokens of a scope in a pass
    positions.py      which tokens of a pass belong to a scope
    gating.py         what gates read in a pass, and where they are open
    previews.py       prompts that are read ahead, in a pass that nothing steers
    watching.py       ``watch``: what updates were given in a pass, and what they gave
    groups.py         the updates of a block: what acts together, at which hookpoint, for which rows and tokens
    caching.py        steering of the cache: a prompt in two parts, and the change between them
    hooks.py          ``steer``: the hooks that apply updates, set and taken off
    blocks.py         what ``steer`` returns, a context manager or a decorator
    shadows.py        functions set on a module for a while, over its own
    recomputation.py  gradient checkpointing, which runs layers again
    generation.py     ``generate``: texts that a steered model writes
    answers.py        greedy answers with their tokens, in batches
    splicing.py       ``splice``: other hidden states in the place of a model's own
    streaming.py      ``stream``: one text, as it is written, or its tokens
    comparison.py     ``compare``: texts unsteered and steered, side by side
"""
