"""Methods: activation statistics or feature ids in, a SteeringVector out, and the one table that lists them.

vec = build("fgaa", stats=stats, sae=sae)        # the same as fg.fgaa(stats, sae)
register(MethodSpec("mine", "Mine", "What it does.", function=my_method, needs="layer", offered=("build", "bench")))
"""

from fgsteer.methods.table import METHODS, MethodSpec, build, method_name, register, spec, specs

__all__ = ["METHODS", "MethodSpec", "build", "method_name", "register", "spec", "specs"]
