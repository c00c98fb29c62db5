"""Refusal directions: which single direction, removed or added, decides whether a model refuses (arXiv 2406.11717).

found = fg.select_direction(model, tokenizer, refused, answered, refusal_tokens=["I"], held_out=held_out)
fg.generate(model, tokenizer, prompts, steering=fg.ablate_everywhere(model, found.vector))

prompts.py     prompts as batches of tokens, and the log-odds that a reply begins as a refusal
candidates.py  differences of means at every layer and every token after the instruction
selection.py   the scores of each candidate, and the rule that chooses among them
removal.py     ablation wherever blocks read from or write to the residual stream
shift.py       the directions along which tuning moved a model (arXiv 2502.09674)
components.py  its components read through tokens and features, and interventions on them
relevance.py   what a projection comes from, by token and by component of a lower layer
triggers.py    the words of requests that it comes from, and requests without them
targets.py     what a model writes with a direction removed and added, which others are trained on
cones.py       orthonormal directions, every positive mixture of which acts as each does (arXiv 2502.17420)
cone_training.py  their training by gradient
independence.py   whether ablating one direction changes what another reads
auditing.py    whether a direction was added to a checkpoint, or taken out of it, by comparison with a reference
"""
