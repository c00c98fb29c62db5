"""The forms in which SAEs are stored: one module and one row of ``table.FORMATS`` for each.

table.py          the rows, and which of them recognises a source
base.py           what the formats share: sources, options, and reading weights
places.py         the hookpoints that configs name, and those that cannot be steered
sae_lens.py       sae-lens: live objects, folders of all versions, and releases
sparsify.py       EleutherAI's sparsify
gemma_scope_2.py  Gemma Scope 2
"""
