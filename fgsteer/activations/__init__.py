"""From texts to activations: tokens and which of them are meant, batches, and forward passes that stop early.

In the order in which data flows:

    tokens.py       texts as token ids, and which of these are read; ``steering/positions.py`` finds those to steer
    token_rules.py  the names of the rules by which tokens are selected
    prompt_ends.py  where prompts end in the passes that run now, for the scopes of ``steer``
    batches.py      token rows padded into batches
    prefixes.py     what several texts begin with, run once
    recording.py    ``record``: activations of a batch at hookpoints
    outputs.py      the hidden states in what a module returns
    pooling.py      from the activations of tokens to one mean a text
    memory.py       a batch that does not fit in memory is read in halves
"""
