"""Every kind of SAE, beside sae-lens or the loop, or refused with its reason."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer.saes.formats import table
from fgsteer.saes.formats.base import SAEFormat, Source
from fgsteer.saes.registry import RegistryRow
from tests.helpers.sae_files import D, K, config_of, folder_of, inputs, naive, sparsify_files, state_of
from tests.helpers.saes import make_sae

AVERAGE = {"normalize_activations": "expected_average_only_in"}
HOOK_Z = {"metadata": {"hook_name": "blocks.1.attn.hook_z"}}
READ_MLP = {"metadata": {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}}


def hook(name, **kwargs):
    return {"metadata": {**READ_MLP["metadata"], "hook_name": name, "model_from_pretrained_kwargs": kwargs}}


CENTRE = hook("blocks.1.hook_resid_pre", center_writing_weights=True)
CENTRE_LLAMA = {"metadata": {**CENTRE["metadata"], "model_name": "meta-llama/Llama-3.1-8B"}}
RESCALED = {"normalize_activations": "constant_norm_rescale"}
# (kind, sae-lens architecture, config): read, and equal to sae-lens
READ = [
    ("standard", "standard", {}),
    ("JumpReLU; BatchTopK and Matryoshka as sae-lens saves them", "jumprelu", {}),
    ("TopK", "topk", {"k": 4}),
    ("TopK rescaled by decoder norms", "topk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    ("Gated", "gated", {}),
    ("layer_norm", "standard", {"normalize_activations": "layer_norm"}),
    ("constant_norm_rescale", "jumprelu", {"normalize_activations": "constant_norm_rescale"}),
    ("expected_average_only_in, factor known: standard", "standard", AVERAGE),
    ("expected_average_only_in, factor known: jumprelu", "jumprelu", AVERAGE),
    ("expected_average_only_in, factor known: topk", "topk", {"k": 4, "rescale_acts_by_decoder_norm": True, **AVERAGE}),
    ("expected_average_only_in, factor known: gated", "gated", AVERAGE),
    ("trained on mean-centred residuals", "standard", hook("blocks.1.hook_resid_pre", center_writing_weights=True)),
    ("centring asked of an RMSNorm model", "standard", CENTRE_LLAMA),
    ("hook_z", "standard", HOOK_Z),
    ("transcoder", "transcoder", READ_MLP),
    ("skip transcoder", "skip_transcoder", READ_MLP),
    ("JumpReLU transcoder", "jumprelu_transcoder", READ_MLP),
    ("JumpReLU skip transcoder", "jumprelu_skip_transcoder", READ_MLP),
]
# (kind, sae-lens architecture, config, words of the reason)
REFUSED = [
    ("expected_average_only_in, factor unknown", "standard", AVERAGE, "norm_scaling_factor="),
    ("covariance_whitening, not folded", "standard", {"normalize_activations": "covariance_whitening"}, "whitening"),
    ("transcoder, normalised", "transcoder", {"normalize_activations": "layer_norm", **READ_MLP}, "of a transcoder"),
    ("rescaled after centring", "standard", {**CENTRE, **RESCALED}, "mean-centred"),
    ("k no whole number", "topk", {"k": 4.0}, r"k = 4\.0"),
    ("k true", "topk", {"k": True}, "k = True"),
    ("temporal", "temporal", {}, "all the tokens before it"),
    ("matching pursuit", "matching_pursuit", {}, "search"),
    ("AbsTopK", "abstopk", {}, "negative activations"),
    ("BatchTopK, training form", "batchtopk", {}, "save_inference_model"),
    ("Matryoshka, training form", "matryoshka_batchtopk", {}, "save_inference_model"),
    ("unknown architecture", "crosscoder", {}, "one of the architectures standard"),
    ("resid_mid", "standard", hook("blocks.1.hook_resid_mid"), "between attention and MLP"),
    ("before the norm's gain", "jumprelu_transcoder", hook("blocks.1.ln2.hook_normalized"), "before its gain"),
    ("before the norm", "transcoder", hook("blocks.1.hook_mlp_in"), "before the MLP's norm"),
    ("folded gain", "transcoder", hook("blocks.1.mlp.hook_in", fold_ln=True), "before its gain"),
    ("token embedding", "standard", hook("hook_embed"), "token embedding"),
    ("tanh-relu", "standard", {"activation_fn": "tanh-relu"}, "activation function 'tanh-relu'"),
    ("topk without its k", "standard", {"activation_fn_str": "topk"}, "activation function 'topk'"),
    (
        "topk of another function",
        "topk",
        {"k": 4, "activation_fn": "topk", "activation_fn_kwargs": {"k": 4, "postact_fn": "tanh"}},
        "postact_fn",
    ),
    ("one head", "standard", {"hook_head_index": 3, **HOOK_Z}, "hook_head_index 3"),
    ("reshaped otherwise", "standard", {"reshape_activations": "hook_q"}, "reshape_activations 'hook_q'"),
    (
        "z in another basis",
        "standard",
        hook("blocks.1.attn.hook_z", refactor_factored_attn_matrices=True),
        "refactored attention",
    ),
    ("z without value biases", "standard", hook("blocks.1.attn.hook_z", fold_value_biases=True), "value biases"),
]
FACTOR = 0.37


@pytest.mark.parametrize(("kind", "architecture", "options"), READ, ids=[row[0] for row in READ])
def test_read_as_sae_lens_reads_it(kind, architecture, options, tmp_path):
    import sae_lens

    folder_of(tmp_path, config_of(architecture, options), state_of(architecture))
    factor = FACTOR if "factor known" in kind else None
    ours = fg.load_sae(tmp_path, norm_scaling_factor=factor)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    theirs.turn_off_forward_pass_hook_z_reshaping()  # heads side by side, as in Hugging Face models
    x = inputs()
    seen = x - x.mean(-1, keepdim=True) if "centred" in kind else x
    if factor is not None:
        unfolded = theirs.encode(x * factor).detach()
        theirs.fold_activation_norm_scaling_factor(factor)
        if architecture != "topk":  # whose fold rescales the activations with the decoder norms
            assert torch.allclose(ours.encode(x), unfolded, atol=1e-5)
    expected = theirs.encode(seen).detach()
    assert (expected > 0).any(0).sum() > 3
    # float32, with biases and factors folded in another order
    assert torch.allclose(ours.encode(x), expected, atol=1e-5)
    assert torch.allclose(fg.load_sae(theirs).encode(x), expected, atol=1e-5)
    assert torch.allclose(ours.encode_selected(x, [7, 0, 3]), expected[:, [7, 0, 3]], atol=1e-5)
    if "centred" not in kind:
        assert torch.allclose(ours.reconstruct(x), theirs(x).detach(), atol=3e-5)
    assert torch.allclose(ours.direction(3), decoded(theirs, 3), atol=1e-5)


def decoded(sae, feature):
    """What a unit of a feature adds to sae-lens's reconstruction, in the normalised input's units."""
    sae.run_time_activation_norm_fn_out = lambda x: x
    unit = torch.zeros(K)
    unit[feature] = 1.0
    return (sae.decode(unit) - sae.decode(0 * unit)).detach()


@pytest.mark.parametrize(("kind", "architecture", "options", "reason"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused_with_the_reason(kind, architecture, options, reason, tmp_path):
    folder_of(tmp_path, config_of(architecture, options), state_of(architecture))
    with pytest.raises((fg.PairingError, fg.HookpointError), match=reason):
        fg.load_sae(tmp_path)


LEGACY = {"d_in": D, "d_sae": K, "dtype": "float32", "hook_point": "blocks.1.hook_resid_post", "model_name": "tiny"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation function 'tanh-relu'"),
        ({"activation_fn": "gelu"}, "activation function 'gelu'"),
        ({"hook_point_head_index": 2}, "hook_point_head_index 2"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4, "use_abs": True}}, "use_abs True"),
    ],
)
def test_configs_of_older_sae_lens_that_change_the_function_are_refused(options, reason, tmp_path):
    """sae-lens 6 drops these fields when it reads such a config, and computes a relu of the whole activation."""
    folder_of(tmp_path, {**LEGACY, **options}, state_of("standard"))
    with pytest.raises(fg.PairingError, match=reason):
        fg.load_sae(tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"activation_fn_str": "relu"}, {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}]
)
def test_configs_of_older_sae_lens_are_read_as_it_does(options, tmp_path):
    import sae_lens

    folder_of(tmp_path, {**LEGACY, **options}, state_of("standard"))
    expected = sae_lens.SAE.load_from_disk(tmp_path).encode(inputs()).detach()
    assert torch.allclose(fg.load_sae(tmp_path).encode(inputs()), expected, atol=1e-5)  # float32, biases folded


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_small_inputs_are_reconstructed_in_sae_lens_units(norm, scale, tmp_path):
    """It divides by std + 1e-5 and multiplies by std: a tenth apart at a std of 1e-4."""
    import sae_lens

    folder_of(tmp_path, config_of("standard", {"normalize_activations": norm}), state_of("standard"))
    ours, theirs = fg.load_sae(tmp_path), sae_lens.SAE.load_from_disk(tmp_path)
    x = inputs() * scale
    expected = theirs(x).detach()
    # float32 sums in another order, relative to the largest entry
    tolerance: dict[str, Any] = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}
    assert torch.allclose(ours.reconstruct(x), expected, **tolerance)
    # what a feature's activation adds to the reconstruction: input_scale, which ClampFeature multiplies by
    acts = ours.encode(x)
    more = acts + torch.eye(K)[5]
    theirs.encode(x)
    moved = theirs.decode(more).detach() - expected
    assert torch.allclose(moved, ours.direction(5) * ours.input_scale(x), **tolerance)


def test_weights_that_a_config_does_not_use_are_refused(tmp_path):
    """As sae-lens does: a config that says standard beside jumprelu's weights would lose the threshold."""
    folder_of(tmp_path / "a", config_of("standard", {}), state_of("jumprelu"))
    with pytest.raises(fg.PairingError, match="a standard SAE with the weights threshold"):
        fg.load_sae(tmp_path / "a")
    sparsify_files(tmp_path / "layers.1", skip_connection=True)
    config = json.loads((tmp_path / "layers.1" / "cfg.json").read_text())
    (tmp_path / "layers.1" / "cfg.json").write_text(json.dumps({**config, "skip_connection": False}))
    with pytest.raises(fg.PairingError, match="a sparsify SAE with the weights W_skip"):
        fg.load_sae(tmp_path / "layers.1")
    for field, value in (("normalize_io", True), ("n_targets", 3), ("coalesce_topk", "concat"), ("signed", True)):
        sparsify_files(tmp_path / "layers.2", **{field: value})
        with pytest.raises(fg.PairingError, match=field):
            fg.load_sae(tmp_path / "layers.2")
    sparsify_files(tmp_path / "layers.2", normalize_io=False, n_targets=0, coalesce_topk="none")
    assert fg.load_sae(tmp_path / "layers.2").k == 4


@pytest.mark.parametrize(("field", "value"), [("activation", "tanh-relu"), ("input_norm", "batch_norm")])
def test_an_unknown_function_is_not_relu(field, value):
    sae = fg.SAE(torch.ones(2, 3), torch.ones(3, 2), torch.zeros(3), torch.zeros(2), fg.Hookpoint(0))
    with pytest.raises(fg.PairingError, match=f"{field} = '{value}'"):
        replace(sae, **{field: value})


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_that_scales_nothing_is_refused(factor, tmp_path):
    folder_of(tmp_path, config_of("standard", AVERAGE), state_of("standard"))
    with pytest.raises(fg.PairingError, match="norm_scaling_factor"):
        fg.load_sae(tmp_path, norm_scaling_factor=factor)


def test_places_of_z_and_of_transcoders(tmp_path):
    sae = fg.load_sae(folder_of(tmp_path / "z", config_of("standard", HOOK_Z), state_of("standard")))
    assert (str(sae.hookpoint), sae.reads, sae.input_hookpoint) == ("blocks.1.attn.hook_z", None, fg.Hookpoint(1, "z"))
    coder = fg.load_sae(folder_of(tmp_path / "t", config_of("transcoder", READ_MLP), state_of("transcoder")))
    assert (str(coder.hookpoint), str(coder.reads)) == ("blocks.1.hook_mlp_out", "blocks.1.mlp.hook_in")
    hf = {"hf_hook_name": "model.layers.1.pre_feedforward_layernorm.output", "hook_name": "blocks.1.hook_mlp_in"}
    config = config_of("transcoder", {"metadata": {**READ_MLP["metadata"], **hf}})
    assert fg.load_sae(folder_of(tmp_path / "h", config, state_of("transcoder"))).reads == fg.Hookpoint(1, "mlp_in")
    for place in (fg.Hookpoint(3, "z"), fg.Hookpoint(3, "mlp_in")):
        assert fg.Hookpoint.parse(str(place)) == place
    with pytest.raises(fg.HookpointError):
        fg.Hookpoint.parse("blocks.3.hook_mlp_in")  # TransformerLens's, before the norm


def test_given_hookpoint_fills_a_gap_and_never_contradicts(tmp_path):
    nameless = config_of("standard", {"metadata": {"hook_name": None}})
    folder_of(tmp_path, nameless, state_of("standard"))
    with pytest.raises(fg.HookpointError, match="hookpoint="):
        fg.load_sae(tmp_path)
    assert fg.load_sae(tmp_path, hookpoint="model.layers.4").hookpoint == fg.Hookpoint(4)
    folder_of(tmp_path, config_of("standard", {}), state_of("standard"))
    with pytest.raises(fg.PairingError, match="Leave hookpoint out"):
        fg.load_sae(tmp_path, hookpoint="model.layers.4")
    folder_of(tmp_path, config_of("standard", hook("blocks.1.hook_resid_mid")), state_of("standard"))
    with pytest.raises(fg.HookpointError, match="between attention and MLP"):
        fg.load_sae(tmp_path, hookpoint="model.layers.1")
    sparsify_files(tmp_path / "layers.3")
    with pytest.raises(fg.PairingError, match="Leave hookpoint out"):
        fg.load_sae(tmp_path / "layers.3", hookpoint="model.layers.4")


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_folders(transcode, skip, tmp_path):
    state = sparsify_files(tmp_path / "layers.3.mlp", transcode=transcode, skip_connection=skip)
    sae = fg.load_sae(tmp_path / "layers.3.mlp")
    x = inputs()
    acts = naive(x, state, activation="topk", k=4, apply_b_dec_to_input=not transcode)
    assert np.allclose(sae.encode(x), acts, atol=1e-5)  # float32
    assert torch.equal(sae.direction(5), state["W_dec"][5])
    rebuilt = acts @ state["W_dec"].double().numpy() + state["b_dec"].numpy()
    if skip:
        rebuilt = rebuilt + x.double().numpy() @ state["W_skip"].double().numpy().T
    assert np.allclose(sae.reconstruct(x), rebuilt, atol=3e-5)
    assert sae.hookpoint == fg.Hookpoint(3, "mlp_out")
    assert sae.reads == (fg.Hookpoint(3, "mlp_in") if transcode else None)


def test_sparsify_places_and_refusals(tmp_path):
    places = {"layers.12": (12, "resid_post"), "h.5.attn": (5, "attn_out"), "gpt_neox.layers.2": (2, "resid_post")}
    for folder, (layer, site) in places.items():
        sparsify_files(tmp_path / "run" / folder)
        assert fg.load_sae(tmp_path / "run" / folder).hookpoint == fg.Hookpoint(layer, site)
    assert fg.load_sae(tmp_path / "run", "layers.12").hookpoint == fg.Hookpoint(12)
    with pytest.raises(fg.FormatError, match=r"gpt_neox.layers.2, h.5.attn, layers.12"):
        fg.load_sae(tmp_path / "run")
    sparsify_files(tmp_path / "best")
    with pytest.raises(fg.HookpointError, match="hookpoint="):
        fg.load_sae(tmp_path / "best")
    assert fg.load_sae(tmp_path / "best", hookpoint="model.layers.4.input").hookpoint == fg.Hookpoint(4, "resid_pre")
    sparsify_files(tmp_path / "groups" / "layers.1", activation="groupmax")
    with pytest.raises(fg.PairingError, match="groupmax"):
        fg.load_sae(tmp_path / "groups" / "layers.1")
    sparsify_files(tmp_path / "gemma" / "layers.1.mlp")
    (tmp_path / "gemma" / "config.json").write_text('{"model": "google/gemma-2-2b"}')
    with pytest.raises(fg.PairingError, match="post-norm"):
        fg.load_sae(tmp_path / "gemma" / "layers.1.mlp")


def test_a_format_from_outside_is_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_registered", {})
    (tmp_path / "cfg.json").write_text(json.dumps({"toy_seed": 3}))
    with pytest.raises(fg.FormatError, match="toy_seed"):
        fg.load_sae(tmp_path)
    table.register(SAEFormat("toy", "a toy", lambda source: "toy_seed" in source.config, load_toy))
    assert fg.load_sae(tmp_path).sha256 == make_sae(seed=3).sha256
    assert table.specs()[0].name == "toy"
    with pytest.raises(fg.PluginError, match="named 'sparsify'"):
        table.register(SAEFormat("sparsify", "another", lambda source: True, load_toy))


def load_toy(source, options):
    return make_sae(seed=source.config["toy_seed"])


def test_every_kind_of_source_has_its_format(tmp_path):
    sae_lens = config_of("standard", {})
    early = {name: value for name, value in sae_lens.items() if name != "metadata"}
    row = RegistryRow("r", "s", "m", repo_id="me/r", path="s")
    for name, source in {
        "live object": Source(live=object()),
        "Gemma Scope 2": Source(row=replace(row, conversion="gemma_3")),
        "sparsify": Source(folder=tmp_path, config={"d_in": 2, "k": 1}),
        "sae-lens": Source(folder=tmp_path, config={**sae_lens, "metadata": {"sae_lens_version": "6"}}),
        "sae-lens before 6": Source(folder=tmp_path, config=early),
        "sae-lens release": Source(folder=tmp_path, config=sae_lens, row=row),
    }.items():
        assert table.find_format(source).name == name
    of_revision = Source(folder=tmp_path, config=early, row=row, revision="v2")  # which sae-lens cannot ask for
    assert table.find_format(of_revision).name == "sae-lens before 6"
