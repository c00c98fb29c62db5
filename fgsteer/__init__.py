"""fgsteer: steer language models with the features of sparse autoencoders.

    import fgsteer as fg
    model, tokenizer = fg.load_model("default")
    sae = fg.load_sae("default")
    stats = fg.collect(model, tokenizer, fg.load_contrast("wedding"), sae=sae)
    vec = fg.fgaa(stats, sae)
    print(fg.generate(model, tokenizer, ["I think"], steering=[vec.add(8.0)], max_new_tokens=32))

Names load on first use, so that importing fgsteer costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "errors": (
        "ArgumentError",
        "BusyError",
        "DataError",
        "FgsteerError",
        "FgsteerWarning",
        "FormatError",
        "HookpointError",
        "JudgeError",
        "MissingError",
        "PairingError",
        "PairingWarning",
        "SelectionError",
        "SelectionWarning",
        "SteeringError",
        "UntouchedWarning",
    ),
    "sae_registry": ("RegistryRow", "registry"),
    "hookpoints": ("Hookpoint",),
    "corpora": ("read_documents",),
    "data": ("ContrastPair", "ContrastSet", "load_contrast", "load_neutral", "shipped_contrasts"),
    "models": ("load_model", "logit_lens", "residual_direction"),
    "sae": ("SAE",),
    "density": ("FeatureDensity", "measure_density"),
    "examples": ("Excerpt", "FeatureExamples", "measure_examples"),
    "labels": ("load_labels",),
    "sae_loaders": ("load_examples", "load_sae"),
    "activations": ("record",),
    "statistics": ("Contrast", "ContrastStatistics", "Moments", "Pooled"),
    "collecting": ("collect",),
    "effects": ("EffectApproximator", "load_effects"),
    "interventions": ("Ablate", "Add", "Affine", "Clamp", "ClampFeature", "Intervention"),
    "vector": ("FeatureWeight", "SteeringVector"),
    "methods": (
        "METHODS",
        "SCORES",
        "ace",
        "build",
        "caa",
        "fgaa",
        "from_features",
        "pca",
        "sae_ts",
        "select_features",
        "sta",
    ),
    "steering": ("steer",),
    "generation": ("generate",),
    "streaming": ("stream",),
    "folding": ("fold",),
    "output_score": ("output_scores",),
    "scoring": ("LogProbabilities", "cross_entropies", "cross_entropy", "kl_divergences", "log_probabilities"),
    "calibration": ("calibrate", "calibrate_grid", "calibrate_many"),
    "reading": ("FeatureRow", "describe_features"),
    "search": ("FoundFeature", "find_features"),
    "evaluation.metrics": (
        "AnswerProbabilities",
        "Steerability",
        "answer_probabilities",
        "measure_steerability",
        "perplexities",
        "steerability",
        "text_cross_entropies",
    ),
    "evaluation.coherence": ("Coherence", "CoherenceScores"),
    "evaluation.bench": ("Bench", "BenchPlan"),
    "evaluation.diagnose": ("Diagnosis", "diagnose"),
    "evaluation.harness": ("run_tasks",),
    "evaluation.judges": ("EmbeddingJudge", "Judge", "KeywordJudge", "validation_auc"),
    "evaluation.endpoint": ("CostEstimate", "EndpointJudge"),
    "evaluation.records": ("EvalRecord", "Run", "load_run"),
    "evaluation.report": ("write_report",),
    "evaluation.seen": ("SeenFeature", "seen_features"),
    "evaluation.sweep": ("Sweep", "SweepCell", "sweep"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from fgsteer.methods.provenance import library_version

        return library_version()
    if name == "export":  # one module for each format: fgsteer.export.gguf.write
        return import_module("fgsteer.export")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fgsteer' has no attribute {name!r}")
    value = getattr(import_module(f"fgsteer.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__", "export"]
