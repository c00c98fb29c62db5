"""Hookpoints: the places in a model at which activations are read and steered.

A hookpoint is a 0-based block and a site. Names of sae-lens and of Hugging Face modules both parse, and ``resolve``
finds the module whose output (or input) the activation is. No other module counts layers.

    Hookpoint.parse("blocks.12.hook_resid_post") == Hookpoint.parse("model.layers.12")
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from torch import nn

from fgsteer.errors import HookpointError
from fgsteer.errors.checks import is_whole_number
from fgsteer.errors.wording import a

ModuleOrNone = TypeVar("ModuleOrNone", nn.Module, nn.Module | None)
Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "mlp_in"]
SITES: tuple[Site, ...] = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "mlp_in")

# names of TransformerLens; its hook_mlp_in is another place, before the norm
_ORDER: tuple[Site, ...] = ("resid_pre", "z", "attn_out", "mlp_in", "mlp_out", "resid_post")  # in a pass over a block
_HOOKS: dict[str, Site] = {f"hook_{site}": site for site in SITES[:4]} | {"attn.hook_z": "z", "mlp.hook_in": "mlp_in"}
_HOOK_OF_SITE = {site: name for name, site in _HOOKS.items()}
_SAE_LENS = re.compile(rf"blocks\.(\d{{1,9}})\.({'|'.join(map(re.escape, _HOOKS))})")
# any path to the blocks of the language model, but none to those of a vision or audio tower
_HUGGING_FACE = re.compile(
    r"(?!.*(?:vision|visual|audio|encoder))(?:\w+\.)*(?:layers|h)\.(\d{1,9})"
    r"(?:\.(?!input$|output$)(\w+))?(?:\.(input|output))?"
)
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_OUTPUT_PROJECTION = ("o_proj", "c_proj", "dense", "out_proj")
# modules whose names mean a site; resolve() refuses the name where a block adds another module's output
_MODULES: dict[str, Site] = {
    "self_attn": "attn_out",
    "attn": "attn_out",
    "attention": "attn_out",
    "self_attention": "attn_out",
    "post_self_attn_layernorm": "attn_out",
    "mlp": "mlp_out",
    "fc2": "mlp_out",
    "post_feedforward_layernorm": "mlp_out",
    "post_mlp_layernorm": "mlp_out",
}
# The modules whose outputs a block adds to the residual stream, at attn_out and mlp_out. Where a norm comes between
# a sublayer and the stream, it is the norm. Names do not tell what a block does with an output, so blocks that are
# not listed here are refused; tests/test_families.py checks each.
_PLAIN = (
    "LlamaDecoderLayer MistralDecoderLayer MixtralDecoderLayer Qwen2DecoderLayer Qwen2MoeDecoderLayer "
    "Qwen3DecoderLayer Qwen3MoeDecoderLayer GemmaDecoderLayer PhiDecoderLayer Phi3DecoderLayer "
    "PhimoeDecoderLayer OlmoDecoderLayer OlmoeDecoderLayer CohereDecoderLayer Cohere2DecoderLayer "
    "GlmDecoderLayer GptOssDecoderLayer DeepseekV2DecoderLayer DeepseekV3DecoderLayer SmolLM3DecoderLayer "
    "StableLmDecoderLayer Starcoder2DecoderLayer NemotronDecoderLayer"
)
_POST_NORM = "Gemma2DecoderLayer Gemma3DecoderLayer Olmo2DecoderLayer Olmo3DecoderLayer Exaone4DecoderLayer"
_GPT = "GPT2Block GPTNeoBlock GPTJBlock GPTBigCodeBlock CodeGenBlock"
_SUBLAYERS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(_PLAIN.split(), ("self_attn", "mlp")),
    **dict.fromkeys(_POST_NORM.split(), ("post_attention_layernorm", "post_feedforward_layernorm")),
    **dict.fromkeys(_GPT.split(), ("attn", "mlp")),
    "Glm4DecoderLayer": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "GPTNeoXLayer": ("attention", "mlp"),
    "FalconDecoderLayer": ("self_attention", "mlp"),
    "OPTDecoderLayer": ("self_attn", "fc2"),
}
# model types that have get_decoder() and generate, yet are not causal stacks of (batch, tokens, d_model)
_NOT_CAUSAL = {"xlnet": ", whose blocks keep tokens before rows and attend to later tokens"}
_NOT_ADDED = {
    "BloomBlock": "its sublayers return their output with the residual added",
    "GraniteDecoderLayer": "sublayer outputs are scaled by residual_multiplier",
    "Gemma4TextDecoderLayer": "the sum is scaled by layer_scalar",
}


@dataclass(frozen=True, order=True)
class Hookpoint:
    """A 0-based block and a site in it: resid_pre, resid_post, attn_out, mlp_out, z or mlp_in.

    ``resid_pre`` and ``resid_post`` of block ℓ are the block's input and output (the latter is Hugging Face's
    ``hidden_states[ℓ+1]`` before any final norm). ``attn_out`` and ``mlp_out`` are what the sublayer adds to the
    residual stream, after a post-norm where the architecture has one. ``z`` is the input of attention's output
    projection, the heads' outputs side by side (n_heads·d_head wide). ``mlp_in`` is the input of the MLP, after its
    norm and the norm's gain.

    Attributes:
        layer: The block, from 0.
        site: The site in the block.
        module: The sublayer's module name where the hookpoint was parsed from one; ``resolve`` checks it.

    Raises:
        HookpointError: The layer is no whole number ≥ 0, or the site is unknown.
    """

    layer: int
    site: Site = "resid_post"
    module: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if not is_whole_number(self.layer) or self.layer < 0:
            raise HookpointError(
                f"layer = {self.layer!r} ({type(self.layer).__name__})", "the number of a block, from 0, such as 12"
            )
        object.__setattr__(self, "layer", int(self.layer))  # numpy's integers too
        if self.site not in SITES:
            raise HookpointError(f"site = {self.site!r}", f"one of {', '.join(SITES)}")

    @classmethod
    def parse(cls, name: str | int | Hookpoint) -> Hookpoint:
        """Parse a hookpoint.

        Args:
            name: A sae-lens name, as ``blocks.12.hook_resid_post``; the name of a block, as ``model.layers.12``,
                ``transformer.h.12.output`` or ``model.language_model.layers.12.input``; the name of a sublayer, as
                ``model.layers.12.self_attn`` or ``model.layers.12.mlp.output``; or the number of a block, whose
                resid_post is meant.

        Raises:
            HookpointError: The name does not parse, or names a module that is different things in different families.
        """
        if isinstance(name, Hookpoint):
            return name
        if is_whole_number(name):
            return cls(int(name))
        if not isinstance(name, str):
            raise HookpointError(
                f"hookpoint = {name!r}", "a name like blocks.12.hook_resid_post, a Hookpoint, or a block's number"
            )
        if match := _SAE_LENS.fullmatch(name):
            return cls(int(match[1]), _HOOKS[match[2]])
        match = _HUGGING_FACE.fullmatch(name)
        if match and match[2] is None:
            return cls(int(match[1]), "resid_pre" if match[3] == "input" else "resid_post")
        if match and match[2] in _MODULES and match[3] != "input":
            return cls(int(match[1]), _MODULES[match[2]], match[2])
        change = f"the sites are {', '.join(SITES)}"
        if match and match[2] == "post_attention_layernorm":
            change = "name the site: this norm's output is attn_out in some families and the MLP's input in others"
        raise HookpointError(
            f"hookpoint = {name!r:.100}",
            "a name like blocks.12.hook_resid_post, model.layers.12, model.layers.12.input or model.layers.12.mlp",
            change,
        )

    @classmethod
    def from_name(cls, name: object) -> Hookpoint:
        """Parse the name that a file holds. Raises HookpointError for anything but a text that parses."""
        if not isinstance(name, str):
            raise HookpointError(f"hookpoint = {name!r}", "a name like blocks.12.hook_resid_post")
        return cls.parse(name)

    def precedes(self, other: Hookpoint) -> bool:
        """Whether a forward pass comes by this hookpoint before it comes by the other one."""
        return (self.layer, _ORDER.index(self.site)) < (other.layer, _ORDER.index(other.site))

    def __str__(self) -> str:
        return f"blocks.{self.layer}.{_HOOK_OF_SITE[self.site]}"


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the decoder stack of a Hugging Face causal LM, without its head.

    Raises HookpointError for anything else, such as an encoder–decoder model.
    """
    reason = _why_not_causal(model)
    get = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) and not reason else None
    if not isinstance(decoder, nn.Module):
        raise HookpointError(
            a(type(model).__name__) + reason,
            "a Hugging Face causal LM with get_decoder(), whose one stack reads both prompt and continuation",
            "load a decoder-only model",
        )
    # Llama 4 gives its wrapper with the head, ModernBERT's decoder gives the head
    for candidate in (decoder, getattr(decoder, "model", None), getattr(model, "model", None)):
        if isinstance(candidate, nn.Module) and _module_lists(uncompiled(candidate)):
            return uncompiled(candidate)
    return uncompiled(decoder)


def _why_not_causal(model: nn.Module) -> str:
    """Say what in the config shows that a model is no causal LM, or return ""."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return ", an encoder–decoder model, which generates a sequence apart from the prompt"
    return _NOT_CAUSAL.get(str(getattr(config, "model_type", "")), "")


def _module_lists(decoder: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the module lists of a decoder, by name."""
    return {name: m for name, m in decoder.named_children() if isinstance(m, nn.ModuleList)}


def uncompiled(module: ModuleOrNone) -> ModuleOrNone:
    """Return the module itself, or the one that ``torch.compile`` wrapped."""
    return getattr(module, "_orig_mod", module)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """Return the decoder's one list of ``num_hidden_layers`` blocks, found by its length, not by name.

    Raises HookpointError when there is none or more than one, or when their attention looks ahead, as in a masked LM.
    """
    decoder = decoder_of(model)
    config = getattr(decoder, "config", None) or getattr(model, "config", None)
    text_config = config.get_text_config() if config is not None else None
    count = getattr(text_config, "num_hidden_layers", None)
    lists = _module_lists(decoder)
    candidates = [m for m in lists.values() if len(m) == count]
    if len(candidates) != 1:
        listed = ", ".join(f"{name} ({len(m)})" for name, m in lists.items()) or "no module list"
        raise HookpointError(
            f"a decoder {type(decoder).__name__} with {listed}",
            f"a decoder with one module list of num_hidden_layers = {count} blocks",
            "this architecture is not supported yet",
        )
    attention = [m for m in candidates[0][:1].modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if attention and not any(m.is_causal or getattr(m, "is_decoder", False) for m in attention):
        raise HookpointError(
            f"{a(type(model).__name__)}, whose {type(candidates[0][0]).__name__} attends to later tokens",
            "a causal LM, whose activations depend on earlier tokens alone",
            "load a decoder-only model",
        )
    return candidates[0]


def why_not_added(block: nn.Module) -> str:
    """Say why a block does not add the outputs of its sublayers to the residual stream, or return "" where it does."""
    if getattr(block, "do_layer_norm_before", True) is False:
        return "a norm follows each sum, so no output is added to the residual stream"
    kind = type(block).__name__
    return "" if kind in _SUBLAYERS else _NOT_ADDED.get(kind, "what it adds to the residual stream is not known")


def _added_modules(block: nn.Module, site: Site) -> tuple[str, str]:
    """Name the two modules whose outputs a block adds to the residual stream. Raises HookpointError."""
    kind = type(block).__name__
    if reason := why_not_added(block):
        raise HookpointError(
            f"There is no {site} in {a(kind)}: {reason}.",
            "a block that adds the outputs of its attention and its MLP, each once",
            "use resid_pre or resid_post, which every block has",
        )
    return _SUBLAYERS[kind]


def _sublayer(block: nn.Module, hookpoint: Hookpoint) -> nn.Module:
    """Return the module whose output a block adds to the residual stream at ``hookpoint.site``.

    Raises HookpointError where there is none, or where it is not the module that the hookpoint names.
    """
    name = _added_modules(block, hookpoint.site)[0 if hookpoint.site == "attn_out" else 1]
    if hookpoint.module and hookpoint.module != name:
        raise HookpointError(
            f"module {hookpoint.module!r} of block {hookpoint.layer}",
            f"{name!r}, whose output {a(type(block).__name__)} adds to the residual stream",
            f"write {hookpoint} for that module",
        )
    return getattr(block, name)  # type: ignore[no-any-return]


def is_known(model: nn.Module) -> bool:
    """Tell whether the model's kind of block is known; of any other only its input and output are sites."""
    return type(blocks_of(model)[0]).__name__ in {*_SUBLAYERS, *_NOT_ADDED}


def _child(block: nn.Module, names: tuple[str, ...], site: Site) -> nn.Module:
    """Return the first child of one of these names. Raises HookpointError."""
    for name in names:
        module = getattr(block, name, None)
        if isinstance(module, nn.Module):
            return module
    children = ", ".join(name for name, _ in block.named_children())
    raise HookpointError(
        f"{a(type(block).__name__)} with the children {children}, where {site} was asked for",
        f"a child named {' or '.join(names)}",
        "use resid_pre or resid_post, which every block has",
    )


def resolve(model: nn.Module, hookpoint: Hookpoint) -> tuple[nn.Module, bool]:
    """Find the module of a hookpoint, and whether the activation is its input rather than its output.

    Raises HookpointError naming the layers and sites that exist.
    """
    blocks = blocks_of(model)
    if hookpoint.layer >= len(blocks):
        raise HookpointError(
            f"layer {hookpoint.layer}",
            f"a layer from 0 to {len(blocks) - 1}, as this {type(model).__name__} has {len(blocks)} blocks",
        )
    block = uncompiled(blocks[hookpoint.layer])
    if hookpoint.site in ("resid_pre", "resid_post"):
        return block, hookpoint.site == "resid_pre"
    if hookpoint.site in ("attn_out", "mlp_out"):
        return _sublayer(block, hookpoint), False
    _added_modules(block, hookpoint.site)  # z and mlp_in too are sites of known blocks only
    if hookpoint.site == "z":
        return _child(_child(block, _ATTENTION, "z"), _OUTPUT_PROJECTION, "z"), True
    return _child(block, ("mlp",), "mlp_in"), True
