"""Conditional defences: published rules of when to steer, and how strongly, as interventions with gates.

guard = fg.cast(model, tokenizer, harmful, harmless, refusal, coefficient=1.5)
fg.generate(model, tokenizer, prompts, steering=guard); print(guard.held_out)

recipe.py         what a rule gives: interventions, with how well their gate told held-out prompts apart
prompts.py        activations of prompts, and statistics of two classes of them
statistics.py     what rules that are built of two statistics need of both
cast.py           one gate on the prompt, before the blocks that steer (arXiv 2409.05907)
scans.py          the sign of steering by where an appended word moves the stream (arXiv 2408.11491)
adasteer.py       strengths that are bounded linear functions of the prompt's place on a line (arXiv 2504.09466)
infer_aligner.py  vectors of an aligned model, gated in every layer by the model's own (arXiv 2401.11206)
"""
