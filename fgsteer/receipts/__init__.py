"""Receipts: what a vector at a strength does besides what it is for, measured and handed over with it.

    slip = fg.receipt(model, tokenizer, vec, 8.0, contrast=fg.load_contrast("love"))
    slip.stored_in(vec).save_pretrained("love")         its model card shows the receipt

receipt.py      composes them, and says what was left out and why
record.py       the ``Receipt``, as plain JSON and back
dose.py         how large the change is beside the activations, at the length at which a model is used
inputs.py       the share of inputs that move the wrong way
retention.py    what is kept: perplexity, questions with one right answer, tasks of lm-eval
refusals.py     requests that are refused, and that should not be
drift.py        where a conversation goes on the vector's axis, turn by turn
rerouting.py    how much the vector can move attention between what heads read and what they do not
"""
