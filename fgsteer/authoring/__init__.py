"""Contrast data: written from a description, completed by a model's own answers, and looked through for faults.

    pirate = fg.describe_contrast("speaks like a pirate", model=model, tokenizer=tokenizer)
    fg.losing_answers(model, tokenizer, [("How are you?", "Splendid, and you?")])
    for advice in fg.lint_contrast(pirate): print(advice)

In the order in which data flows:

    describing.py   ``describe_contrast``: answers with and without a described behavior
    endpoint.py     the same, written by a chat model behind an address
    work_file.py    pairs that were written so far, in a file from which a stopped run goes on
    losing.py       ``losing_answers``: what a model says by itself where another answer is to win
    similarity.py   texts that are the same, or nearly
    languages.py    in which script and language a text is
    checks.py       what may be wrong with contrast data, a function for each
    linting.py      ``lint_contrast``: all of these, as advice
"""
