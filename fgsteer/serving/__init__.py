"""Serving with vLLM: every request of a batch steered on its own, offline or over HTTP.

    from fgsteer.serving import steered_llm, steering
    llm = steered_llm("default", vectors={"love": "love.safetensors"}, dtype="float32")
    params = SamplingParams(max_tokens=32, extra_args=steering("love", scale=200.0, scope="generated"))
    llm.generate(["The next day"], params)

Needs vLLM to run (``pip install 'fgsteer[vllm]'``), not to be imported.
"""

from fgsteer.serving.offline import steered_llm
from fgsteer.serving.request import steering
from fgsteer.serving.served import save_clamp
from fgsteer.serving.writer import VllmWriter

__all__ = ["VllmWriter", "save_clamp", "steered_llm", "steering"]
