"""Tests of fgsteer: tiny models from configs, naive oracles in reference/, no network."""
