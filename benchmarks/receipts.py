"""Behavior against KL on own text, and receipts: what FGAA, CAA and a trained vector cost on SmolLM2, and what else.

Strengths are set so that own texts cost the same, on the tuning half of the prompts; behavior, KL and the least KL that
the behavior could cost are of the reported half. Receipts are of each vector at one of these costs.

    python benchmarks/receipts.py
    python benchmarks/receipts.py --docs          only puts the tables into the guide
"""

from __future__ import annotations

from subject import ROOT

GUIDE = ROOT / "docs" / "guides" / "receipts.md"
