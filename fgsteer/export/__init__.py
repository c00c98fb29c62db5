"""Interventions as the files of other engines, and vectors from the files of other libraries.

    from fgsteer.export import gguf
    gguf.write([vec.add(8.0, bos=True)], "love.gguf")        llama-cli --control-vector love.gguf …

Each module is one format. A writer refuses what its engine cannot say, and names what can say it;
a reader unpickles nothing.
"""

from fgsteer.export import checkpoint, easysteer, gguf, lm_eval, neuronpedia, steering_vectors

__all__ = ["checkpoint", "easysteer", "gguf", "lm_eval", "neuronpedia", "steering_vectors"]
