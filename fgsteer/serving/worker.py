"""vLLM's worker with steering: the only module that needs vLLM to be imported.

vLLM gets the class by name (``worker_cls``) and makes one in each process. The worker hooks the blocks before anything
is compiled or captured, and writes the plan of each batch before the batch runs.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms import current_platform

from fgsteer.errors import FgsteerError, HookpointError, SteeringError
from fgsteer.serving.request import PLAN
from fgsteer.serving.tables import Batch, Table, blocks_of, steer_block

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
elif current_platform.is_cuda_alike():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    raise SteeringError(f"vLLM on the platform {current_platform.device_name}", "CUDA, ROCm or the CPU")


def settings_of(config: Any) -> dict[str, Any]:
    """fgsteer's part of vLLM's ``additional_config``. Raises SteeringError where it is missing."""
    settings = (config.additional_config or {}).get("fgsteer")
    if not settings:  # vLLM would take graphs from its compile cache that were compiled without hooks
        raise SteeringError(
            "a steering worker without fgsteer's part of additional_config",
            "an engine that fgsteer has set up",
            "start it with fgsteer serve, or with fgsteer.serving.steered_llm",
        )
    return dict(settings)


def check_supported(config: Any) -> None:
    """Raises SteeringError for settings with which a block does not process every token, each at its position."""
    unsupported = {
        "micro-batches (--enable-dbo, --ubatch-size)": config.parallel_config.use_ubatching,
        "prefill context parallelism": config.parallel_config.prefill_context_parallel_size > 1,
        "--kv-sharing-fast-prefill": config.cache_config.kv_sharing_fast_prefill,
        "a model with M-RoPE positions": config.model_config.uses_mrope,
        "an encoder-decoder": config.model_config.is_encoder_decoder,
    }
    for setting, is_on in unsupported.items():
        if is_on:
            raise SteeringError(
                f"Steering does not work with {setting}.",
                change="every token must pass every block at its position: turn it off, or take another model",
            )


class SteeringWorker(PlatformWorker):  # type: ignore[misc]
    """The platform's worker, with a table at each block that can be steered."""

    def load_model(self, **options: Any) -> None:
        """Load the model, then hook its blocks; vLLM compiles and captures later."""
        check_supported(self.vllm_config)
        super().load_model(**options)
        settings = settings_of(self.vllm_config)
        text = self.model_config.hf_text_config
        width = self.model_config.get_hidden_size()
        runner = self.model_runner
        tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
        self.steering_batch = Batch(tokens, self.device, settings["slots"])
        self.steering_tables: dict[int, Table] = {}
        blocks = blocks_of(runner.get_model(), text.num_hidden_layers)
        for layer in settings["layers"]:
            if not 0 <= layer < len(blocks):
                raise HookpointError(f"layer {layer}", f"a layer from 0 to {len(blocks) - 1}, which this model has")
            block = blocks[layer]
            if isinstance(block, PPMissingLayer):  # this block is in another pipeline stage
                continue
            encoders = [(d_sae, k) for at, d_sae, k in settings["encoders"] if at == layer]
            table = Table(settings["rows"], width, self.steering_batch.tokens, encoders)
            self.steering_tables[layer] = block.steering = table
            block.register_forward_hook(steer_block)
        self._plan_before_forward()

    def _plan_before_forward(self) -> None:
        """Make the runner, of either version, write the plan after it lays out a batch and before it runs the batch."""
        runner, write_plan = self.model_runner, self.steering_batch.write_plan
        if self.use_v2_model_runner:
            state = runner.model_state
            prepare = state.prepare_inputs

            def prepare_inputs(batch: Any, states: Any) -> Any:
                write_plan(batch.req_ids, batch.query_start_loc_np, batch.positions)
                return prepare(batch, states)

            state.prepare_inputs = prepare_inputs
            return
        forward = runner._model_forward

        def model_forward(*args: Any, **kwargs: Any) -> Any:
            write_plan(runner.input_batch.req_ids, runner.query_start_loc.np, kwargs["positions"])
            return forward(*args, **kwargs)

        runner._model_forward = model_forward

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Note which requests have come and which have ended, then run the batch."""
        plans = self.steering_batch.plans
        for request in scheduler_output.finished_req_ids:
            plans.pop(request, None)
        for new in scheduler_output.scheduled_new_reqs:
            extra = new.sampling_params.extra_args if new.sampling_params else None
            if extra and PLAN in extra:
                plans[new.req_id] = extra[PLAN]
        return super().execute_model(scheduler_output, *args, **kwargs)

    @torch.inference_mode()
    def steering_load(self, tag: int, layer: int, tensors: bytes) -> str | None:
        """Fill rows of a layer, if this worker has the layer, and return the error as a sentence, if any."""
        try:
            if layer in self.steering_tables:
                self.steering_tables[layer].fill(float(tag), load(tensors))
        except FgsteerError as error:
            return str(error)
        return None

    @torch.inference_mode()
    def steering_encoder(self, layer: int, number: int, start: int, tensors: bytes) -> str | None:
        """Write columns of the encoder of a TopK SAE, if this worker has the layer; the error as a sentence, if any."""
        try:
            if layer in self.steering_tables:
                self.steering_tables[layer].fill_encoder(number, start, load(tensors))
        except FgsteerError as error:
            return str(error)
        return None

    @torch.inference_mode()
    def steering_clear(self, tag: int) -> None:
        """Free the rows that ``steering_load`` filled."""
        for table in self.steering_tables.values():
            table.clear(float(tag))
