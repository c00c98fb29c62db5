"""What a user gets wrong: type checkers report the lines that end in ``# mistake``, and no other."""

import torch

import fgsteer as fg

model, tokenizer = fg.load_model("default")
sae = fg.load_sae("default")
stats = fg.collect(model, tokenizer, "love", sae=sae)
vector = fg.caa(stats)
print(fg.no_such_name)  # mistake
fg.collekt(model, tokenizer, "love")  # mistake
fg.collect(model, tokenizer, "love", saes=sae)  # mistake
fg.caa(stats, sae=sae)  # mistake
fg.fgaa(stats)  # mistake
fg.fgaa(stats, sae, n_positive="8")  # mistake
vector.add("8")  # mistake
vector.add(8.0, scope="generatd")  # mistake
print(vector.directoin)  # mistake
fg.steer(model, vector)  # mistake
number: int = fg.generate(model, tokenizer, ["a"])  # mistake
fg.SteeringVector(torch.zeros(3), 2.5)  # mistake
fg.Hookpoint("2")  # mistake
print(fg.export.gguff)  # mistake
vector.ablate(2.0)  # mistake
vector.clamp(2.0, scop="prompt")  # mistake
fg.Add(hookpoint=2.5, direction=vector.direction)  # mistake
fg.Clamp(hookpoint=2, direction=vector.direction, target="high")  # mistake
fg.edit(sae, {3: b"off"})  # mistake
vector.add(1.0, scope="last_promt")  # mistake
fg.Ablate(hookpoint=2, direction=vector.direction, target=1.0)  # mistake
fg.EffectApproximator.measure(model, tokenizer, sae, rollout=2)  # mistake
