"""Where in a model an activation lives: the only layer-index arithmetic of the package.

A hookpoint is a 0-based block and a site. Names of sae-lens and of Hugging Face
modules both parse, and ``resolve`` finds the module whose output (or input) it is.

    Hookpoint.parse("blocks.12.hook_resid_post") == Hookpoint.parse("model.layers.12")
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fgsteer.errors import HookpointError

Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "mlp_in"]
SITES: tuple[Site, ...] = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "mlp_in")

# TransformerLens's names; its hook_mlp_in is another place, before the norm
_HOOKS: dict[str, Site] = {f"hook_{site}": site for site in SITES[:4]} | {"attn.hook_z": "z", "mlp.hook_in": "mlp_in"}
_NAMES = {site: name for name, site in _HOOKS.items()}
_SAE_LENS = re.compile(rf"blocks\.(\d+)\.({'|'.join(map(re.escape, _HOOKS))})")
_HUGGING_FACE = re.compile(r"(?:\w+\.)*(?:layers|h)\.(\d+)(?:\.(input|output))?")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "block_sparse_moe")
_OUTPUT_PROJECTION = ("o_proj", "c_proj", "dense", "out_proj", "wo")
# Blocks with a norm between a sublayer and the residual stream: what is added
# to the stream is the norm's output, so that is attn_out and mlp_out there.
_POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),  # Gemma 2 and 3, OLMo 2
    ("post_self_attn_layernorm", "post_mlp_layernorm"),  # GLM 4
)


@dataclass(frozen=True, order=True)
class Hookpoint:
    """A 0-based block and a site in it: resid_pre, resid_post, attn_out, mlp_out, z or mlp_in.

    ``resid_post`` of block ℓ is the block's output (Hugging Face ``hidden_states[ℓ+1]``
    before any final norm); ``attn_out`` and ``mlp_out`` are what the sublayer adds to
    the residual stream, after a post-norm where the architecture has one. ``z`` is the
    input of attention's output projection, the heads' outputs side by side (n_heads·d_head
    wide); ``mlp_in`` is the input of the MLP, after its norm and the norm's gain.

    Raises HookpointError for a negative layer or an unknown site.
    """

    layer: int
    site: Site = "resid_post"

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise HookpointError(f"layer {self.layer}", "a 0-based block index")
        if self.site not in SITES:
            raise HookpointError(f"site {self.site!r}", f"one of {', '.join(SITES)}")

    @classmethod
    def parse(cls, name: str | Hookpoint) -> Hookpoint:
        """Hookpoint from a sae-lens name or a Hugging Face module name.

        Accepts ``blocks.12.hook_resid_post`` and the like, ``model.layers.12``,
        ``transformer.h.12.output``, ``model.layers.12.input``. Raises HookpointError.
        """
        if isinstance(name, Hookpoint):
            return name
        if match := _SAE_LENS.fullmatch(name):
            return cls(int(match[1]), _HOOKS[match[2]])
        if match := _HUGGING_FACE.fullmatch(name):
            return cls(int(match[1]), "resid_pre" if match[2] == "input" else "resid_post")
        raise HookpointError(
            f"hookpoint {name!r}",
            "a name like blocks.12.hook_resid_post, model.layers.12 or model.layers.12.input",
            f"sites are {', '.join(SITES)}",
        )

    def __str__(self) -> str:
        return f"blocks.{self.layer}.{_NAMES[self.site]}"


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder stack of a Hugging Face causal LM, without its head. Raises HookpointError."""
    get = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    if not isinstance(decoder, nn.Module):
        raise HookpointError(f"a {type(model).__name__}", "a Hugging Face causal LM with get_decoder()")
    return decoder


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder's one list of ``num_hidden_layers`` blocks, found by shape, not by name.

    Raises HookpointError when there is none or more than one.
    """
    decoder = decoder_of(model)
    config = getattr(decoder, "config", None) or getattr(model, "config", None)
    text_config = config.get_text_config() if config is not None else None
    count = getattr(text_config, "num_hidden_layers", None)
    lists = {name: m for name, m in decoder.named_children() if isinstance(m, nn.ModuleList)}
    found = [m for m in lists.values() if len(m) == count]
    if len(found) != 1:
        listed = ", ".join(f"{name} ({len(m)})" for name, m in lists.items()) or "no module list"
        raise HookpointError(
            f"decoder {type(decoder).__name__} has {listed}",
            f"one module list of num_hidden_layers = {count} blocks",
            "this architecture is not supported yet",
        )
    return found[0]


def _sublayer(block: nn.Module, site: Site) -> nn.Module:
    """The module of a block whose output is added to the residual stream at ``site``."""
    index = 0 if site == "attn_out" else 1
    for pair in _POST_NORMS:
        if all(hasattr(block, name) for name in pair):
            return getattr(block, pair[index])  # type: ignore[no-any-return]
    return _child(block, _ATTENTION if site == "attn_out" else _MLP, site)


def _child(block: nn.Module, names: tuple[str, ...], site: Site) -> nn.Module:
    """The first child of one of these names. Raises HookpointError."""
    for name in names:
        module = getattr(block, name, None)
        if isinstance(module, nn.Module):
            return module
    children = ", ".join(name for name, _ in block.named_children())
    raise HookpointError(
        f"site {site} on a {type(block).__name__} with children {children}",
        f"a child named {' or '.join(names)}",
        "use resid_pre or resid_post, which every block has",
    )


def resolve(model: nn.Module, hookpoint: Hookpoint) -> tuple[nn.Module, bool]:
    """The module of a hookpoint, and whether the activation is its input.

    Raises HookpointError naming the layers and sites that exist.
    """
    blocks = blocks_of(model)
    if hookpoint.layer >= len(blocks):
        raise HookpointError(
            f"layer {hookpoint.layer}",
            f"0 to {len(blocks) - 1} (this {type(model).__name__} has {len(blocks)} blocks)",
        )
    block = blocks[hookpoint.layer]
    if hookpoint.site in ("resid_pre", "resid_post"):
        return block, hookpoint.site == "resid_pre"
    if hookpoint.site == "z":
        return _child(_child(block, _ATTENTION, "z"), _OUTPUT_PROJECTION, "z"), True
    if hookpoint.site == "mlp_in":
        return _child(block, _MLP, "mlp_in"), True
    return _sublayer(block, hookpoint.site), False
