"""SAE: hand-set weights, the naive encoder, live sae-lens objects, folders and refusals."""

from __future__ import annotations

import json

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError

import fgsteer as fg
from tests.helpers.sae_files import config_of, folder_of, sparsify_files, state_of
from tests.helpers.saes import make_sae
from tests.reference import sparse as reference

D, K = 8, 12


def test_hand_set_weights():
    sae = fg.SAE(
        W_enc=torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]]),
        W_dec=torch.tensor([[1.0, 0.0], [0.0, 0.5], [-1.0, 0.0]]),
        b_enc=torch.tensor([0.0, -1.0, 0.0]),
        b_dec=torch.tensor([0.5, 0.0]),
        hookpoint="blocks.0.hook_resid_post",
    )
    x = torch.tensor([3.0, 2.0])
    assert sae.encode(x).tolist() == [3.0, 3.0, 0.0]
    assert sae.decode(sae.encode(x)).tolist() == [3.5, 1.5]
    assert sae.encode_selected(x, [1]).tolist() == [3.0]
    assert sae.direction(2).tolist() == [-1.0, 0.0]


def live(architecture, seed=0, **options):
    """A random sae-lens SAE of an architecture."""
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    name = {"standard": "Standard", "jumprelu": "JumpReLU", "topk": "TopK", "gated": "Gated"}[architecture]
    config = getattr(sae_lens, f"{name}SAEConfig")(
        d_in=D,
        d_sae=K,
        metadata=SAEMetadata(model_name="tiny", hook_name="blocks.1.hook_resid_post", **options.pop("metadata", {})),
        **({"k": 4} if architecture == "topk" else {}),
        **options,
    )
    sae = getattr(sae_lens, f"{name}SAE")(config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.7)
        if architecture == "jumprelu":
            sae.threshold.abs_()
    return sae


CASES = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("standard", {"normalize_activations": "layer_norm"}),
    ("standard", {"normalize_activations": "constant_norm_rescale"}),
    ("jumprelu", {}),
    ("gated", {}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("topk", {"rescale_acts_by_decoder_norm": False}),
]


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_agrees_with_sae_lens_and_with_the_loop(architecture, options, tmp_path):
    theirs = live(architecture, **options)
    theirs.save_model(tmp_path)
    x = torch.randn(6, D, generator=torch.Generator().manual_seed(1)) * 2 + 0.5
    expected = theirs.encode(x).detach()
    saes = [fg.load_sae(theirs), fg.load_sae(tmp_path)]
    assert saes[0].sha256 == saes[1].sha256
    state = {n: p.detach().double().numpy() for n, p in theirs.named_parameters()}
    gate = tuple(state[n] for n in ("b_gate", "r_mag", "b_mag")) if architecture == "gated" else None
    loop = [
        reference.encode(
            row.double().numpy(),
            state["W_enc"],
            state.get("b_enc"),
            state["W_dec"],
            state["b_dec"],
            activation={"standard": "relu"}.get(architecture, architecture),
            threshold=state.get("threshold"),
            k=4 if architecture == "topk" else None,
            gate=gate,
            apply_b_dec_to_input=options.get("apply_b_dec_to_input", True),
            rescale_acts_by_decoder_norm=options.get("rescale_acts_by_decoder_norm", False),
            input_norm=options.get("normalize_activations", "none"),
        )
        for row in x
    ]
    for ours in saes:
        # float32 with the biases folded in another order
        assert torch.allclose(ours.encode(x), expected, atol=1e-5)
        assert np.allclose(ours.encode(x).numpy(), loop, atol=1e-5)
        assert torch.allclose(ours.reconstruct(x), theirs(x).detach(), atol=2e-5)
        assert torch.allclose(ours.encode_selected(x, [5, 2]), expected[:, [5, 2]], atol=1e-5)
        assert str(ours.hookpoint) == "blocks.1.hook_resid_post"


def test_centred_training_is_folded():
    theirs = live("standard", metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}})
    x = torch.randn(6, D, generator=torch.Generator().manual_seed(1)) + 3
    expected = theirs.encode(x - x.mean(-1, keepdim=True)).detach()
    assert torch.allclose(fg.load_sae(theirs).encode(x), expected, atol=1e-5)


def test_density_and_labels_load_with_a_folder(tmp_path):
    live("standard").save_model(tmp_path)
    sae = fg.load_sae(tmp_path)
    counts = torch.ones(K, dtype=torch.float64)
    fg.FeatureDensity(counts, counts, counts, 10, sae.sha256).save(tmp_path / "density.safetensors")
    (tmp_path / "labels.json").write_text('{"3": "weddings"}')
    sae = fg.load_sae(tmp_path)
    assert sae.density.density.tolist() == [0.1] * K
    assert sae.labels == {3: "weddings"}
    fg.FeatureDensity(counts, counts, counts, 10, "another").save(tmp_path / "density.safetensors")
    with pytest.raises(fg.PairingError, match="density measured"):
        fg.load_sae(tmp_path)
    (tmp_path / "density.safetensors").unlink()
    (tmp_path / "labels.json").write_text("[]")
    with pytest.raises(fg.FormatError, match="label"):
        fg.load_sae(tmp_path)


def test_jumprelu_in_pieces_is_the_formula_and_its_gradient(monkeypatch):
    monkeypatch.setattr("fgsteer.saes.sae.PIECE_ELEMENTS", 24 * 3)  # three rows at once
    sae, x = make_sae("jumprelu"), torch.randn(5, 7, 32, requires_grad=True)
    acts = sae.encode(x)
    acts.sum().backward()
    pre = x.detach() @ sae.W_enc + sae.b_enc
    active = (pre > 0) & (pre > sae.threshold)
    assert torch.allclose(acts, pre * active, atol=1e-5)  # float32, the bias added before or after
    assert torch.allclose(x.grad, active.float() @ sae.W_enc.T, atol=1e-5)
    assert sae.encode(torch.zeros(0, 32)).shape == (0, 24)
    assert sae.encode_selected(torch.zeros(2, 32), []).shape == (2, 0)


def test_restrict_and_casts_keep_values_and_hash():
    sae = make_sae("gated")
    x = torch.randn(3, 32)
    assert torch.allclose(sae.restrict([4, 1]).encode(x), sae.encode(x)[:, [4, 1]], atol=1e-6)
    assert sae.to(dtype=torch.bfloat16).sha256 == sae.sha256
    assert sae.restrict([1]).sha256 != sae.sha256
    assert make_sae("gated", seed=1).sha256 != sae.sha256


def test_weights_that_are_not_finite_are_refused(tmp_path):
    theirs = live("standard")
    with torch.no_grad():
        theirs.W_dec[2, 1] = float("nan")
    theirs.save_model(tmp_path)
    for source in (theirs, tmp_path):
        with pytest.raises(fg.FormatError, match=r"W_dec of .* nan"):
            fg.load_sae(source)
    with pytest.raises(fg.ArgumentError, match=r"got 5 \(int\) for sae_id"):
        fg.load_sae("gpt2-small-res-jb", 5)
    with pytest.raises(fg.HookpointError, match=r"hookpoint = 3\.5"):
        fg.Hookpoint.parse(3.5)


def test_refusals(tmp_path):
    with pytest.raises(fg.PairingError, match="expected_average_only_in"):
        fg.load_sae(live("standard", normalize_activations="expected_average_only_in"))
    with pytest.raises(fg.PairingError, match="width 5"):
        make_sae().encode(torch.ones(2, 5))
    with pytest.raises(fg.SelectionError, match="0 to 23"):
        make_sae().direction(24)
    with pytest.raises(fg.PairingError, match="threshold"):
        fg.SAE(torch.ones(2, 3), torch.ones(3, 2), torch.ones(3), torch.ones(2), fg.Hookpoint(0), "jumprelu")
    with pytest.raises(fg.FormatError, match="no SAE"):
        fg.load_sae(tmp_path)
    live("standard").save_model(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"short")
    with pytest.raises(fg.FormatError, match="Cannot read"):
        fg.load_sae(tmp_path)
    live("topk").save_model(tmp_path)
    good = json.loads((tmp_path / "cfg.json").read_text())
    for wrong in ({"metadata": "text"}, {"k": "four"}, {"metadata": {**good["metadata"], "hook_name": 3}}):
        (tmp_path / "cfg.json").write_text(json.dumps({**good, **wrong}))
        with pytest.raises(fg.FgsteerError):
            fg.load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(fg.FormatError, match="config of a sae-lens"):
        fg.load_sae(tmp_path)
    config = dict(good)
    config["architecture"] = "temporal"
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(fg.FgsteerError):
        fg.load_sae(tmp_path)


@pytest.mark.parametrize("layout", ["sae-lens", "sparsify"])
def test_a_revision_of_a_repository(layout, tmp_path, monkeypatch):
    """Every file of the SAE comes from the revision that stands behind the repository's name."""
    for number, revision in enumerate(("main", "v2")):
        if layout == "sparsify":
            sparsify_files(tmp_path / revision / "layers.5", seed=number)
        else:
            folder_of(tmp_path / revision / "layers.5", config_of("standard", {}), state_of("standard", number))
    asked = []

    def download(repo_id, name, revision=None, **_):
        asked.append((repo_id, revision))
        path = tmp_path / (revision or "main") / name
        if not path.exists():
            raise EntryNotFoundError(name)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr("fgsteer.saes.loading.hub_is_reachable", lambda: True)
    pinned = fg.load_sae("me/saes@v2", "layers.5")
    assert pinned.source == "me/saes@v2/layers.5"
    assert set(asked) == {("me/saes", "v2")}
    assert pinned.sha256 == fg.load_sae(tmp_path / "v2" / "layers.5").sha256
    assert pinned.sha256 != fg.load_sae(tmp_path / "main" / "layers.5").sha256
    for release in ("me/saes@", "gemma-scope-2b-pt-res-canonical@v2"):
        with pytest.raises(fg.FormatError, match="a repository and its revision"):
            fg.load_sae(release, "layer_12/width_16k/canonical")
