"""The names of rankings; a module without imports, so that help texts can show them at once."""

from __future__ import annotations

SCORE_NAMES = (
    "mean_difference",
    "amplitude",
    "frequency",
    "welch_t",
    "f_statistic",
    "pearson",
    "mutual_information",
)
RANKINGS = ("max_auc", "calibrated_f1", "confidence_change", "causal_effect", *SCORE_NAMES)
