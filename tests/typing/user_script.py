"""What a user writes with fgsteer: type checkers find nothing to say of it."""

from pathlib import Path

import torch

import fgsteer as fg


def vectors(concept: str, folder: Path) -> dict[str, fg.SteeringVector]:
    model, tokenizer = fg.load_model("default", dtype=torch.float32)
    sae = fg.load_sae("default")
    stats = fg.collect(model, tokenizer, fg.load_contrast(concept), sae=sae, hookpoints=[2, "blocks.3.hook_resid_post"])
    effects: fg.EffectApproximator = fg.load_effects("default")
    made = {
        "caa": fg.caa(stats, hookpoint=2),
        "ace": fg.ace(stats, hookpoint="blocks.2.hook_resid_post"),
        "fgaa": fg.fgaa(stats, sae, effects, n_positive=8),
        "sta": fg.sta(stats, sae),
        "by id": fg.from_features(sae, {12: 1.5, 40: 1.0}),
        "by name": fg.build("caa", stats=stats),
        "bare": fg.SteeringVector(torch.randn(192), "blocks.2.hook_resid_post"),
        "at a layer": fg.SteeringVector(torch.randn(192), fg.Hookpoint(2)),
        "by number": fg.SteeringVector(torch.randn(192), 2),
    }
    for name, vector in made.items():
        vector.save(folder / f"{name}.safetensors")
    return made


def texts(vector: fg.SteeringVector) -> list[str]:
    model, tokenizer = fg.load_model()
    direction = torch.randn(192)
    by_hand: list[fg.Intervention] = [
        fg.Add(hookpoint=2, direction=direction, coefficient=8.0, scope="generated"),
        fg.AddRelative(hookpoint=2, direction=direction, coefficient=0.3, scope=fg.last(2)),
        fg.ClampSubspace(hookpoint=2, directions=torch.stack([direction, direction + 1])),
        fg.Remap(hookpoint=2, weight=torch.eye(192), bias=direction, strength=0.5),
        fg.Rotate(hookpoint=2, direction=direction, other=direction + 1, by=20.0, scope="last_prompt"),
        fg.Scale(hookpoint=2, width=192, coefficient=0.1),
        fg.Clamp(hookpoint="blocks.2.hook_resid_post", direction=direction, target=2.0, bos=True),
        fg.Affine(hookpoint=fg.Hookpoint(2), direction=direction, reference=direction, alpha=torch.tensor(1.0)),
    ]
    fg.generate(model, tokenizer, "I think", steering=[by_hand])
    entries: list[fg.Intervention | None] = [vector.add(8.0, scope="generated"), None, vector.clamp(at_most=2.0)]
    steered: list[str] = fg.generate(model, tokenizer, ["I think"] * 3, steering=entries, max_new_tokens=8)
    single: list[str] = fg.generate(model, tokenizer, ["I think"], steering=vector.ablate())
    cached: fg.CacheSteering = fg.cache_steering(
        model, tokenizer, {"positive": ["Yes"], "negative": ["No"]}, layers=[1]
    )
    fg.generate(model, tokenizer, "I think", steering=[cached, vector.add(8.0)])
    fg.generate(model, tokenizer, ["I think"] * 2, steering=[[cached, *by_hand], None])
    act: list[fg.Add] = fg.act_add(model, tokenizer, "Love", "Hate", "blocks.2.hook_resid_pre", 4.0, padding=" ")
    fg.save_steering("steering.safetensors", [cached, *act])
    fg.generate(model, tokenizer, "I think", steering=fg.load_steering("steering.safetensors"))
    with fg.steer(model, [vector.add(8.0), vector.affine(1.0)]):
        ids = tokenizer("I think", return_tensors="pt")
        model(**ids)
    return [*steered, *single, *fg.stream(model, tokenizer, "I think", steering=vector.add(1.0))]


def costs(vector: fg.SteeringVector) -> float:
    model, tokenizer = fg.load_model()
    strength: float = fg.calibrate(model, tokenizer, vector.unit().add, ["The day was warm."], target_ce_rise=0.5)
    rise: float = fg.cross_entropy(model, tokenizer, ["A text."], steering=vector.add(strength))
    weights: list[int] = [feature.id for feature in vector.top_features(5)]
    total = vector + 2 * vector - vector / 3
    try:
        total.check(model)
    except fg.PairingError as error:
        print(error, weights)
    fg.export.gguf.write([vector.add(8.0, bos=True)], "love.gguf")
    return rise + total.norm


def features() -> list[str]:
    model, tokenizer = fg.load_model()
    sae: fg.SAE = fg.load_sae("default", "layer_3")
    density = fg.measure_density(model, tokenizer, sae, ["A text.", "Another."])
    effects = fg.EffectApproximator.measure(model, tokenizer, sae, vectors=100, rollouts=2, rows=128)
    fg.EffectApproximator(effects.M, effects.b, "blocks.3.hook_resid_post", sae.sha256).check(sae)
    rows = fg.describe_features(model, tokenizer, sae, [1, 2], examples=fg.load_examples(sae))
    clamp = fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={1: 2.0})
    edits = fg.edit(sae, {1: 2.0, 2: "off", 3: ("at_most", 2.0)}, scope=fg.first(3))
    fg.generate(model, tokenizer, "A text", steering=[clamp, edits])
    fired: torch.Tensor = density.density
    return [row.label for row in rows] + [str(fired.shape), fg.__version__]
