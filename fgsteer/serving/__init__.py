"""Serving with vLLM: each request of a batch is steered in its own way, offline or over HTTP.

    from fgsteer.serving import steered_llm, steering
    llm = steered_llm("default", vectors={"love": "love.safetensors"}, dtype="float32")
    params = SamplingParams(max_tokens=32, extra_args=steering("love", scale=200.0, scope="generated"))
    llm.generate(["The next day"], params)

vLLM is needed to run it (``pip install 'fgsteer[vllm]'``), and not to import it.
"""

from fgsteer.serving.offline import steered_llm
from fgsteer.serving.request import steering
from fgsteer.serving.rows import save_clamp
from fgsteer.serving.writer import VllmWriter

__all__ = ["VllmWriter", "save_clamp", "steered_llm", "steering"]
