"""Judges, measurements, intervals and reports: what steering did, and whether to believe it."""
