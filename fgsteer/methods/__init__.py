"""Methods: activation statistics or feature ids in, a SteeringVector out, and the one table that lists them.

vec = build("fgaa", stats=stats, sae=sae)        # the same as fg.fgaa(stats, sae)
register(MethodSpec("mine", "Mine", "What it does.", function=my_method, needs="layer", offered=("build", "bench")))

table.py         the rows, ``build`` and ``register``
difference.py    from the residual stream alone: CAA, ACE, PCA
prompt_pairs.py  from one pair of prompts, a vector for each token: ActAdd
caching.py       steering of cached keys and values, from contrastive prompts
grains.py        from what the words of prompts that matter do: GrAInS
sae_methods.py   through an SAE: FGAA, SAE-TS, chosen features
denoising.py     CAA less what the features show to be noise, and what an SAE does not reconstruct
target_atoms.py  steering target atoms (STA)
separable.py     twice the difference of means, on the features that separate best (SAE-SSV)
selection.py     which features are chosen: filters, a score, and their weights
scores.py        the scores by which features are ranked
projection.py    from feature weights to a direction
controls.py      directions that the benchmark compares methods with
provenance.py    how a vector was made, as it is written down
"""

from fgsteer.methods.table import METHODS, MethodSpec, build, method_name, register, spec, specs

__all__ = ["METHODS", "MethodSpec", "build", "method_name", "register", "spec", "specs"]
