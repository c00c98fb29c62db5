"""Weight orthogonalisation: a checkpoint whose blocks cannot write a direction to the residual stream.

orthogonalize(model, vector).save_pretrained("without-refusal")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.activations.recording import record
from fgsteer.errors import HookpointError, PairingError, SteeringError
from fgsteer.errors.changes import Changes, temporary_change
from fgsteer.errors.checks import checked
from fgsteer.errors.wording import a
from fgsteer.export.weights import check_weights, linear_writer
from fgsteer.interventions import unit_and_norm
from fgsteer.models.hookpoints import Hookpoint, Site, blocks_of, decoder_of, resolve
from fgsteer.models.properties import input_device
from fgsteer.storage.files import tensor_sha256
from fgsteer.storage.version import library_version
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SITES: tuple[Site, ...] = ("attn_out", "mlp_out")
PROBE_TOKENS = 16  # of the text on which the result is checked
Dims = dict[Any, int]  # {parameter: which of its dimensions is d_model}
LEFT, MOST_LEFT = 64, 0.05  # times the dtype's rounding, and at most: what may be left, of a stream of norm 1
SURPLUS = 1e-6  # of a unit vector beside the span of others, below which they make it up


@checked
def orthogonalize(
    model: PreTrainedModel, vector: SteeringVector | Sequence[SteeringVector], *, copy: bool = True
) -> PreTrainedModel:
    """A model of the same class whose weights do not write a direction: ``W ← W − r̂ r̂ᵀ W`` (arXiv 2406.11717).

    It computes what ``steer`` does with ``ablate_everywhere(model, vector)``, and saves as an ordinary checkpoint.
    Changed are the embeddings (of positions too), and the last layer of attention and MLP of each block, of every
    expert too, with their biases. Where embedding and unembedding are one matrix, the unembedding becomes a copy that
    stays as it is (``tie_word_embeddings = False``). ``config.fgsteer`` says what was removed.

    The result is checked by a pass over random tokens: the direction must be in no block's input or output.

    Args:
        model: A causal language model with plain floating-point weights on one device.
        vector: The direction r, (d_model,), whose norm and hookpoint do not count; or several, whose subspace is
            removed. Removing one after the other would put back what they have in common.
        copy: Whether to leave ``model`` as it is; False changes it, also where the check fails, and spares the memory
            of a second one.

    Returns:
        The orthogonalised model.

    Raises:
        SteeringError: Something else writes to the stream, such as a norm after a sublayer or after the
            embedding; a direction is zero or made up of the others; or the model is quantised, sharded,
            wrapped, being steered, or orthogonalised already.
        PairingError: The direction has another width than the model.
    """
    check_weights(model, "orthogonalise")
    vectors = [vector] if isinstance(vector, SteeringVector) else list(vector)
    basis = _basis(vectors)
    before: Mapping[str, Any] = getattr(model.config, "fgsteer", None) or {}
    if before.get("orthogonalised"):
        raise SteeringError(
            "a model that is orthogonalised already",
            "the original model",
            "pass all directions at once: to remove another one would put back a part of the first",
        )
    dims = {**_embeddings(model, basis.shape[1]), **_writers(model)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    target: PreTrainedModel = deepcopy(model) if copy else model
    _untie(target)
    with torch.no_grad():
        for parameter, dim in dims.items():
            own = target.get_parameter(names[id(parameter)])
            own.copy_(_without(own, basis, dim))
    _check_result(target, basis)
    records = [
        {"direction_sha256": tensor_sha256(one.direction), "method": str(one.provenance.get("method") or "")}
        for one in vectors
    ]
    target.config.fgsteer = {**before, "version": library_version(), "orthogonalised": records}
    return target


def _basis(vectors: Sequence[SteeringVector]) -> Float[Tensor, "n d_model"]:
    """An orthonormal basis in float64. Raises SteeringError for a zero vector, or one that others make up."""
    for one in vectors:
        unit_and_norm(one.direction)  # raises for a zero direction
    if not vectors:
        raise SteeringError("no vectors", "at least one direction", "pass a vector")
    units = torch.stack(
        [torch.nn.functional.normalize(one.direction.detach().double().cpu(), dim=0) for one in vectors]
    )
    q, r = torch.linalg.qr(units.T)
    if float(r.diagonal().abs().min()) < SURPLUS:
        raise SteeringError("a direction that the others make up", "independent directions", "leave it out")
    basis: Tensor = q.T
    return basis


def _embeddings(model: PreTrainedModel, width: int) -> Dims:
    """The tables of tokens and positions that the stream begins with, and which dimension is d_model.

    Raises PairingError for another width.
    """
    tokens: Any = model.get_input_embeddings()
    if tokens.weight.shape[1] != width:
        raise PairingError(
            f"a direction of width {width}",
            f"one of width {tokens.weight.shape[1]}, which the model's embedding writes",
            "take a vector of this model; where an embedding is projected to the stream, ablate with hooks instead: "
            "fgsteer.ablate_everywhere",
        )
    in_blocks = {id(module) for block in blocks_of(model) for module in block.modules()}
    tables = [
        module
        for module in decoder_of(model).modules()
        if isinstance(module, nn.Embedding) and id(module) not in in_blocks and module.weight.shape[1] == width
    ]
    return {tokens.weight: 1, **{table.weight: 1 for table in tables}}


def _writers(model: nn.Module) -> Dims:
    """What attention and MLP of every block write with, and which dimension is d_model. Raises SteeringError."""
    dims: Dims = {}
    for layer, block in enumerate(blocks_of(model)):
        for site in SITES:
            at = Hookpoint(layer, site)
            try:
                writer, reason = linear_writer(model, at)
                own = _experts(model, at) if writer is None else _linear(writer)
            except HookpointError as error:
                own, reason = {}, str(error)
            if not own:
                raise SteeringError(
                    f"{a(type(block).__name__)}, where no weight alone writes to the stream: {reason}",
                    "blocks whose sublayers end in a linear layer",
                    "ablate with hooks instead: fgsteer.ablate_everywhere",
                )
            dims |= own
    return dims


def _linear(writer: nn.Module) -> Dims:
    """Weight and bias of a linear layer; a Conv1D's weight is transposed."""
    found = {writer.weight: 0 if isinstance(writer, nn.Linear) else 1}
    return found if getattr(writer, "bias", None) is None else {**found, writer.bias: 0}


def _experts(model: nn.Module, at: Hookpoint) -> Dims:
    """What a mixture's experts write with, which a router only weighs; nothing where there are none."""
    sublayer, _ = resolve(model, at)
    experts = dict(sublayer.named_modules()).get("experts")
    if experts is None:
        return {}
    found: Dims = {}
    for name, parameter in sublayer.named_parameters():
        holder, _, last = name.rpartition(".")
        if holder == "experts" and last in ("down_proj", "down_proj_bias"):  # (experts, d_model, …), or transposed
            transposed = last == "down_proj" and getattr(experts, "is_transposed", False)
            found[parameter] = 2 if transposed else 1
        elif holder.endswith("down_proj"):  # of shared experts
            found[parameter] = 0
    return found


def _untie(model: PreTrainedModel) -> None:
    """Give the unembedding weights of its own, where it shares those of the embedding."""
    head: Any = model.get_output_embeddings()
    tokens: Any = model.get_input_embeddings()
    if head is not None and head.weight is tokens.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def _without(tensor: Tensor, basis: Float[Tensor, "n d_model"], dim: int) -> Tensor:
    """The tensor without its part in a subspace, in its dimension ``dim`` of width d_model, in float64."""
    wide = tensor.detach().double().movedim(dim, -1)
    r = basis.to(wide.device)
    return (wide - (wide @ r.T) @ r).movedim(-1, dim).to(tensor.dtype)


@temporary_change
def _in_eval_mode(changes: Changes, model: nn.Module) -> Iterator[None]:
    """A block without dropout, which would write to the stream what it likes; each module gets its own mode back."""
    for module in model.modules():
        changes.set_attribute(module, "training", False)
    yield


def _check_result(model: PreTrainedModel, basis: Float[Tensor, "n d_model"]) -> None:
    """Raises SteeringError where the direction is in the stream all the same, as what else writes to it has put it."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    blocks = len(blocks_of(model))
    places = [Hookpoint(0, "resid_pre"), *(Hookpoint(layer, "resid_post") for layer in range(blocks))]
    most = min(LEFT * torch.finfo(next(model.parameters()).dtype).eps, MOST_LEFT)
    with _in_eval_mode(model):
        acts = record(model, ids.to(input_device(model)), None, places)
    for place, h in acts.items():
        wide = h.double().cpu()
        share = float(((wide @ basis.T).norm(dim=-1) / wide.norm(dim=-1).clamp(min=1e-30)).amax())
        if not share <= most:
            raise SteeringError(
                f"{share:.2g} of the stream's norm along the direction at {place}, after every known weight that "
                "writes there was orthogonalised",
                "none of it",
                "something else writes to the stream of this architecture: ablate with hooks instead, "
                "fgsteer.ablate_everywhere",
            )
