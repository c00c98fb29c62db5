"""Measuring what steering did: judges, coherence, perplexity, intervals."""
