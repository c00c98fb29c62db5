"""Traces: what steering did to each token of a text, and to the features of the texts that a model writes.

    found = fg.trace(model, tokenizer, ["I think that"], vec.add(8.0), sae=sae, top=6, max_new_tokens=32)
    found.write("trace.html")

In the order in which data flows:

    parts.py     the parts of a trace: texts, tokens, what each intervention did
    tokens.py    the texts that are traced, as token ids: given ones, or those that the model writes
    passes.py    the unsteered and the steered pass over one text, and what is read of both
    page.py      a trace as one HTML page
    results.py   ``Trace``
    trace.py     ``trace``: all of it for prompts
    changes.py   ``feature_changes``: which features rose and fell in generated text, observed and predicted
"""
