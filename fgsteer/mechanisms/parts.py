"""The parts of a block that a steering vector can act through: heads, the MLP, and where each reads the stream.

Norms are found in a forward pass, by which module's output a sublayer reads, so that no name is needed.

    parts = block_parts(model, first=6)
    parts[0].written(z)           what each head writes to the stream, (…, tokens, heads, d_model)
    parts[0].norm_gain            the gain of the norm before attention
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.errors import HookpointError
from fgsteer.errors.wording import a
from fgsteer.models.hookpoints import Hookpoint, blocks_of, decoder_of, resolve, uncompiled
from fgsteer.models.properties import input_device
from fgsteer.steering.splicing import splice_modules

PROBE_TOKENS = 4  # of the pass in which norms are found
PROBE_SCALE = 1e4  # of the vector by which a norm's gain is read: its epsilon then does not count
KINDS = ("q", "k", "v")


class Reader(NamedTuple):
    """A part of a projection's output: the module, and the entries of its output that are one head's."""

    module: nn.Module
    entries: slice


class Port(NamedTuple):
    """Where a sublayer takes what it reads from the stream: the norm before it, or itself, whose input counts."""

    module: nn.Module
    norm: nn.Module | None


@dataclass(frozen=True, eq=False)
class BlockParts:
    """A block, taken apart.

    Args:
        layer: The number of the block.
        block: The block itself.
        heads: The number of attention heads.
        output: The projection whose input is the heads' outputs side by side.
        attention_added: The module whose output is added to the stream after attention.
        post_norm: The norm between attention's output and the stream, where there is one.
        mlp_added: The module whose output is added to the stream after the MLP.
        readers: The queries, keys and values of each head, where the projections are known; else nothing.
        attention: The attention module.
        mlp: The MLP, whose input is read; None where it is not known.
        attention_port: Where attention reads the stream; None where that is not known.
        mlp_port: Where the MLP reads it.
        parallel: Whether the MLP reads what attention reads, so that it does not see this block's heads.
    """

    layer: int
    block: nn.Module
    heads: int
    output: nn.Module
    attention_added: nn.Module
    post_norm: nn.Module | None
    mlp_added: nn.Module
    attention: nn.Module
    readers: dict[str, list[Reader]]
    mlp: nn.Module | None = None
    attention_port: Port | None = None
    mlp_port: Port | None = None
    parallel: bool = False

    @property
    def group(self) -> int:
        """How many heads share a key and a value."""
        return self.heads // len(self.readers["k"])

    def projected(self, z: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows heads d_model"]:
        """What the output projection makes of each head's output: ``W_O^h z_h``, without its bias."""
        weight = _matrix(self.output)  # (d_model, heads · d_head)
        by_head = weight.reshape(len(weight), self.heads, -1)
        apart = z.to(weight.device).reshape(*z.shape[:-1], self.heads, -1)
        return torch.einsum("...hk,dhk->...hd", apart, by_head)

    def written(self, z: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows heads d_model"]:
        """What each head writes to the stream: ``W_O^h z_h``, scaled as the norm after attention scales their sum."""
        parts = self.projected(z)
        if self.post_norm is None:
            return parts
        bias: Any = self.output.bias
        summed = parts.sum(-2) if bias is None else parts.sum(-2) + bias
        gain = norm_gain(self.post_norm, summed.shape[-1]).to(summed)
        plain = summed * gain  # the norm gives this times one number a token
        scale = (self.post_norm(summed) * plain).sum(-1, keepdim=True) / plain.square().sum(-1, keepdim=True)
        scaled: Tensor = parts * (scale * gain)[..., None, :]
        return scaled

    def values(self, output: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens kv_heads d_head"]:
        """The values of each key-value head in the output of the module that makes them."""
        return torch.stack([output[..., reader.entries] for reader in self.readers["v"]], 2)


def _matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (outputs, inputs)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight if isinstance(module, nn.Linear) else weight.T


def is_linear(module: object) -> bool:
    """Whether a module is a plain linear layer, torch's or GPT-2's."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def project_weight(reader: Reader) -> Float[Tensor, "d_head d_model"]:
    """One head's part of a projection's weight."""
    return _matrix(reader.module)[reader.entries]


def project(reader: Reader, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_head"]:
    """What one head's part of a projection makes of what it reads."""
    bias: Any = reader.module.bias
    own = None if bias is None else bias[reader.entries]
    return nn.functional.linear(x, project_weight(reader), own)


@torch.no_grad()
def norm_gain(norm: nn.Module | None, width: int) -> Float[Tensor, " d_model"]:
    """The gain by which a norm multiplies what it has scaled: γ, or 1 + γ where the family stores it so; 1 for none."""
    if norm is None:
        return torch.ones(width)
    parameter = next(norm.parameters(), torch.zeros(1))
    probe = torch.ones(width, dtype=torch.float64)
    probe[: width // 2] = -(width - width // 2) / (width // 2)  # mean 0, so that norms that subtract it change nothing
    probe = (probe * PROBE_SCALE).to(parameter.device, parameter.dtype)
    read = norm(probe[None])[0] - norm(torch.zeros_like(probe)[None])[0]
    gain: Tensor = read.double() / probe.double() * probe.double().square().mean().sqrt()
    return gain


@torch.no_grad()
def norm_linear(norm: nn.Module | None, v: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """The linear part of a norm: ``γ ⊙ v``, of ``v − mean(v)`` where the norm subtracts the mean."""
    if norm is None:
        return v
    gain = norm_gain(norm, len(v)).to(v.device)
    parameter = next(norm.parameters(), torch.zeros(1))
    ones = torch.full((1, len(v)), PROBE_SCALE, dtype=parameter.dtype, device=parameter.device)
    centres = bool((norm(ones) - norm(torch.zeros_like(ones))).abs().max() < gain.abs().max() / 2)
    return gain.to(v.dtype) * (v - v.mean() if centres else v)


def block_parts(model: nn.Module, first: int, *, readers: bool = True) -> list[BlockParts]:
    """The blocks from ``first`` on, taken apart; with ``readers`` also queries, keys, values and the norms before.

    Raises HookpointError for a family whose attention or MLP is not known.
    """
    parts = [_parts(model, layer) for layer in range(first, len(blocks_of(model)))]
    return _with_ports(model, parts) if readers and parts else parts


def _parts(model: nn.Module, layer: int) -> BlockParts:
    """One block without its readers. Raises HookpointError."""
    block = uncompiled(blocks_of(model)[layer])
    output, _ = resolve(model, Hookpoint(layer, "z"))
    attention_added, _ = resolve(model, Hookpoint(layer, "attn_out"))
    mlp_added, _ = resolve(model, Hookpoint(layer, "mlp_out"))
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    heads = int(config.num_attention_heads)
    if not is_linear(output) or _matrix(output).shape[1] % heads:
        raise _unknown(block, f"attention that ends in {a(type(output).__name__)}", "plain linear projections")
    inside = any(part is output for part in attention_added.modules())
    attention = next(
        module for module in block.children() if any(part is output for part in module.modules())
    )  # GPT-Neo's is one level further in, and is hooked at the outer one
    post = None if inside else attention_added
    return BlockParts(layer, block, heads, output, attention_added, post, mlp_added, attention, _readers(block, output))


def _readers(block: nn.Module, output: nn.Module) -> dict[str, list[Reader]]:
    """The queries, keys and values of each head; nothing where the projections are of an unknown form."""
    holder = next(m for m in block.modules() if any(child is output for child in m.children()))
    config: Any = getattr(holder, "config", None)
    named = {name: getattr(holder, f"{name}_proj", None) for name in KINDS}
    width = _matrix(output).shape[1]
    heads = int(getattr(config, "num_attention_heads", 0) or getattr(holder, "num_heads", 0))
    if not heads:
        return {}
    size = width // heads
    if all(is_linear(module) for module in named.values()):
        return {name: _slices(module, 0, len(_matrix(module)) // size, size) for name, module in named.items()}  # type: ignore[arg-type]
    fused: Any = getattr(holder, "c_attn", None)
    if is_linear(fused) and len(_matrix(fused)) == 3 * width:  # GPT-2
        return {name: _slices(fused, n * width, heads, size) for n, name in enumerate(KINDS)}
    fused = getattr(holder, "query_key_value", None)
    if is_linear(fused) and len(_matrix(fused)) == 3 * width and type(holder).__name__ == "GPTNeoXAttention":
        return {name: _slices(fused, n * size, heads, size, 3 * size) for n, name in enumerate(KINDS)}
    fused = getattr(holder, "qkv_proj", None)
    kv = int(getattr(config, "num_key_value_heads", 0) or heads)
    if is_linear(fused) and len(_matrix(fused)) == (heads + 2 * kv) * size:  # Phi-3
        starts = {"q": (0, heads), "k": (heads, kv), "v": (heads + kv, kv)}
        return {name: _slices(fused, start * size, n, size) for name, (start, n) in starts.items()}
    return {}


def _slices(module: nn.Module, start: int, heads: int, size: int, step: int = 0) -> list[Reader]:
    step = step or size
    return [Reader(module, slice(start + h * step, start + h * step + size)) for h in range(heads)]


def _unknown(block: nn.Module, what: str, expected: str) -> HookpointError:
    return HookpointError(
        f"{a(type(block).__name__)} with {what}",
        expected,
        "merge adapters and load weights unquantised; of a family whose attention is not known, heads and MLPs can be "
        "attributed with edges=False, where the model has attn_out and mlp_out",
    )


def _with_ports(model: nn.Module, parts: Sequence[BlockParts]) -> list[BlockParts]:
    """The blocks with where each sublayer reads the stream, seen in a pass over a few tokens."""
    for part in parts:
        if not part.readers:
            raise _unknown(part.block, "queries, keys and values of an unknown form", "q_proj, k_proj and v_proj")
    seen: dict[tuple[int, bool], Tensor] = {}  # by module and side, kept alive so that no two are one by chance

    def keep(module: nn.Module, is_input: bool) -> tuple[nn.Module, bool, Callable[[Tensor], Tensor]]:
        def note(h: Tensor) -> Tensor:
            seen[id(module), is_input] = h
            return h

        return module, is_input, note

    mlps = [resolve(model, Hookpoint(part.layer, "mlp_in"))[0] for part in parts]
    watched = {}
    for part, mlp in zip(parts, mlps, strict=True):
        norms = [m for m in part.block.children() if m not in (part.attention, mlp)]
        watched.update({(id(m), i): keep(m, i) for m in norms for i in (True, False)})
        watched.update({(id(m), True): keep(m, True) for m in (part.block, part.attention, mlp)})
    ids = torch.arange(PROBE_TOKENS, device=input_device(model))[None]
    with torch.no_grad(), splice_modules(watched.values()):
        decoder_of(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    found = []
    for part, mlp in zip(parts, mlps, strict=True):
        norms = [m for m in part.block.children() if (id(m), False) in seen]
        ports = []
        for module in (part.attention, mlp):
            read = seen.get((id(module), True))
            before = [m for m in norms if seen[id(m), False] is read]
            ports.append(Port(before[0], before[0]) if before else Port(module, None))
        streams = [seen[id(port.module), True] for port in ports]
        same = streams[1] is streams[0]
        found.append(replace(part, mlp=mlp, attention_port=ports[0], mlp_port=ports[1], parallel=same))
    return found
