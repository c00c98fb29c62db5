"""Gradients of steered passes: with gradient checkpointing, and through the values that steer."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

import fgsteer as fg
from fgsteer.interventions import SCOPES
from fgsteer.models.hookpoints import resolve
from tests.helpers.saes import make_sae
from tests.helpers.tiny import D_MODEL, tiny_model

AT = fg.Hookpoint(1)
IDS = torch.tensor([[1, 1, 0, 9, 12], [0, 7, 5, 30, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
OTHER_IDS, OTHER_MASK = IDS.flip(0)[:, 1:], MASK.flip(0)[:, 1:]
SITES = ["resid_pre", "resid_post", "attn_out", "mlp_out"]


def randn(seed=1, dtype=torch.float32):
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def training(family, dtype=torch.float32):
    """A model of a family in train mode, without dropout."""
    model = tiny_model(family, dtype=dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, rate in model.config.to_dict().items():
        if "drop" in name and isinstance(rate, float):
            setattr(model.config, name, 0.0)
    return model.train()


def loss(model, ids=IDS, mask=MASK):
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()[mask.bool()].logsumexp(-1).mean()


def gradients(model, steering, *passes):
    """Gradients of all parameters from one backward over several passes."""
    model.zero_grad()
    with fg.steer(model, steering):
        sum(loss(model, *inputs) for inputs in passes or [(IDS, MASK)]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpointed(model, reentrant):
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers renamed the method
        twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return twin


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # the same float32 operations; sums over passes and through the inner backward come in another order
        scale = float(gradient.abs().max())
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-9), name


# ---------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_checkpointing_changes_no_gradient(family, reentrant):
    model = training(family)
    twin = checkpointed(model, reentrant)
    passes = [(IDS, MASK), (OTHER_IDS, OTHER_MASK)]  # the positions of the last are not those of the first
    plain = gradients(model, None, *passes)
    for site in SITES:
        for scope in SCOPES:
            item = fg.Add(hookpoint=fg.Hookpoint(1, site), direction=3 * randn(), scope=scope)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", fg.UntouchedWarning)
                expected, found = (gradients(m, item, *passes) for m in (model, twin))
            assert_equal(found, expected)
            changed = any(not torch.equal(expected[name], gradient) for name, gradient in plain.items())
            assert changed == (scope != "generated")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_rows_compositions_and_features(reentrant):
    model = training("llama")
    twin = checkpointed(model, reentrant)
    sae = make_sae("jumprelu")
    clamp = fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets={3: 4.0})
    low = fg.Hookpoint(0, "attn_out")
    entries = [[fg.Ablate(hookpoint=low, direction=randn(2)), clamp], None]
    assert_equal(gradients(twin, entries), gradients(model, entries))
    outer, inner = fg.Add(hookpoint=low, direction=randn(3)), fg.Clamp(hookpoint=low, direction=randn(4), target=2.0)
    found = []
    for m in (twin, model):
        with fg.steer(m, outer):
            found.append(gradients(m, inner, (IDS, MASK), (OTHER_IDS, OTHER_MASK)))
    assert_equal(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_not_steered_again_is_refused(reentrant):
    model = checkpointed(training("llama"), reentrant)
    item = fg.Add(hookpoint=fg.Hookpoint(1, "attn_out"), direction=randn())
    with fg.steer(model, item):
        late = loss(model)
    with pytest.raises(fg.SteeringError, match="inside the block"):
        late.backward()
    early = loss(model)
    with fg.steer(model, item), pytest.raises(fg.SteeringError, match="outside this steer block"):
        early.backward()
    with fg.steer(model, item):
        between = loss(model)
        with fg.steer(model, item), pytest.raises(fg.SteeringError, match="outside this steer block"):
            between.backward()
    assert not any(name in vars(m) for m in model.modules() for name in ("forward", "generate", "__getstate__"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_equal(gradients(model, None), gradients(training("llama"), None))


def test_checkpoints_that_others_make_are_refused_or_right():
    """By hand around a block, whose positions nobody keeps; around the whole model, which notes them again."""
    model = training("llama")
    item = fg.Add(hookpoint=fg.Hookpoint(1, "attn_out"), direction=randn())
    expected = gradients(model, item)
    model.zero_grad()
    with fg.steer(model, item):
        torch.utils.checkpoint.checkpoint(loss, model, use_reentrant=False).backward()
    assert_equal({n: p.grad for n, p in model.named_parameters()}, expected)
    block = model.model.layers[1]
    forward = block.forward
    block.forward = lambda *args, **kwargs: torch.utils.checkpoint.checkpoint(
        forward, *args, use_reentrant=False, **kwargs
    )
    with fg.steer(model, item), pytest.raises(fg.SteeringError, match="by code other than transformers"):
        loss(model).backward()


def test_a_backward_pass_in_another_thread_is_refused():
    model = checkpointed(training("llama"), False)
    with fg.steer(model, fg.Add(hookpoint=fg.Hookpoint(1, "attn_out"), direction=randn())):
        value, found = loss(model), []

        def work():
            try:
                value.backward()
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
    assert isinstance(found[0], fg.SteeringError)


def test_a_thread_that_computes_for_a_backward_pass_is_let_in():
    """As autograd's threads are, each for a device, while the thread of the block waits for them."""
    model = training("llama")
    twin = checkpointed(model, False)
    item = fg.Add(hookpoint=fg.Hookpoint(1, "attn_out"), direction=randn())
    expected = gradients(model, item, (IDS, MASK))
    with fg.steer(twin, item):
        value = loss(twin)
        loss(twin, OTHER_IDS, OTHER_MASK)

        def meanwhile(_):
            thread = threading.Thread(target=value.backward)
            thread.start()
            thread.join(60)

        waits = torch.ones(1, requires_grad=True)
        waits.register_hook(meanwhile)
        waits.sum().backward()
    assert_equal({n: p.grad for n, p in twin.named_parameters() if p.grad is not None}, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", [False, True])
def test_gpu_twin_of_checkpointing(reentrant):
    """On a GPU autograd computes in a thread of its own."""
    model = training("llama").cuda()
    twin = checkpointed(model, reentrant)
    item = fg.Add(hookpoint=fg.Hookpoint(1, "attn_out"), direction=3 * randn())
    passes = [(i.cuda(), m.cuda()) for i, m in ((IDS, MASK), (OTHER_IDS, OTHER_MASK))]
    assert_equal(gradients(twin, item, *passes), gradients(model, item, *passes))


# ---------------------------------------------------------------- values that are trained


def make(kind, direction, number, reference):
    if kind == "add":
        return fg.Add(hookpoint=AT, direction=direction, coefficient=number)
    if kind == "clamp":
        return fg.Clamp(hookpoint=AT, direction=direction, target=number)
    if kind == "ablate":
        return fg.Ablate(hookpoint=AT, direction=direction)
    return fg.Affine(hookpoint=AT, direction=direction, reference=reference, alpha=number)


def formula(kind, h, v, number, reference):
    """The equations of docs/guides/interventions.md, by hand."""
    unit = v / v.pow(2).sum().sqrt()
    along = (h * unit).sum(-1, keepdim=True)
    if kind == "add":
        return h + number * v
    if kind == "clamp":
        return h + (number - along) * unit
    if kind == "ablate":
        return h - along * unit
    return h - along * unit + (unit * reference).sum() * unit + number * v


def naive(model, kind, values):
    """The loss under a hook that changes every real token but each row's first."""
    first = MASK.cumsum(1) == 1
    where = (MASK.bool() & ~first)[..., None]
    module, _ = resolve(model, AT)

    def hook(_, __, output):
        h = output[0] if isinstance(output, tuple) else output
        wide = formula(kind, h.float(), *values).to(h.dtype)
        changed = torch.where(where, wide, h)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        return loss(model)
    finally:
        handle.remove()


def values(seed=5):
    """A direction, a number and a reference that are trained."""
    return [nn.Parameter(randn(seed)), nn.Parameter(torch.tensor(1.5)), nn.Parameter(randn(seed + 1))]


def step(parameters):
    """The gradients, and a step of gradient descent."""
    found = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in parameters]
    torch.optim.SGD(parameters, lr=0.5).step()
    for parameter in parameters:
        parameter.grad = None
    return found


KINDS = ["add", "clamp", "ablate", "affine"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_values_are_those_of_the_equation(family, kind):
    """Two passes in one block: each has its own graph, and sees the step between them."""
    model = training(family).requires_grad_(False)
    ours, theirs = values(), values()
    expected = []
    for _ in range(2):
        naive(model, kind, theirs).backward()
        expected.append(step(theirs))
    with fg.steer(model, make(kind, *ours)):
        for gradients_then in expected:
            loss(model).backward()
            for found, gradient in zip(step(ours), gradients_then, strict=True):
                # float32 projections against naive sums of products
                assert torch.allclose(found, gradient, rtol=1e-3, atol=1e-6)
    assert float(expected[0][0].abs().max()) > 1e-4  # far above the tolerance
    assert not torch.equal(expected[0][0], expected[1][0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_values_are_those_of_differences(kind):
    """Central differences of a float64 model. Steering computes in float32: a relative error of 1e-7 of the loss
    over a difference of 2e-2 is 1e-5, and the third derivative adds about 1e-4."""
    model = training("llama", torch.float64).requires_grad_(False)
    parameters = values()
    with fg.steer(model, make(kind, *parameters)):
        loss(model).backward()
        for parameter in parameters[: {"ablate": 1, "affine": 3}.get(kind, 2)]:
            flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
            for place in range(0, len(flat), 7):
                sides = []
                for change in (1e-2, -2e-2):
                    flat[place] += change
                    with torch.no_grad():
                        sides.append(float(loss(model)))
                flat[place] += 1e-2
                assert float(gradient[place]) == pytest.approx((sides[0] - sides[1]) / 2e-2, rel=2e-3, abs=2e-4)


def test_values_in_half_precision_and_by_row():
    """A float32 vector in a bfloat16 model; each row's gradient is that of the row alone."""
    model = training("llama", torch.bfloat16).requires_grad_(False)
    rows = [nn.Parameter(randn(seed)) for seed in (5, 6)]
    with fg.steer(model, [fg.Add(hookpoint=AT, direction=v) for v in rows], per_row=True):
        loss(model).backward()
    for number, row in enumerate(rows):
        alone = nn.Parameter(row.detach().clone())
        with fg.steer(model, [fg.Add(hookpoint=AT, direction=alone) if n == number else None for n in range(2)]):
            loss(model).backward()
        assert row.grad.dtype == torch.float32
        # the other row is steered here and not there, which changes nothing of this row; bfloat16 keeps 8 bits
        assert torch.allclose(row.grad, alone.grad, rtol=0.02, atol=0.01 * float(alone.grad.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_values_under_checkpointing(reentrant):
    model = training("llama")
    twin = checkpointed(model, reentrant)
    at = fg.Hookpoint(1, "attn_out")
    found = []
    for m in (model, twin):
        direction, target = nn.Parameter(randn(5)), nn.Parameter(torch.tensor(2.0))
        items = [fg.Clamp(hookpoint=at, direction=direction, target=target), fg.Add(hookpoint=AT, direction=direction)]
        parameters = gradients(m, items, (IDS, MASK), (OTHER_IDS, OTHER_MASK))
        found.append({**parameters, "direction": direction.grad, "target": target.grad})
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "gated"])
def test_targets_of_features(activation):
    """With t the target and f the activation, h' = h + (t − f) w: the gradient of t is w · the gradient of h'."""
    model = training("llama").requires_grad_(False)
    sae = make_sae(activation)
    targets = {3: nn.Parameter(torch.tensor(4.0)), 7: nn.Parameter(torch.tensor(0.5))}
    seen = []
    handle = model.model.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with fg.steer(model, fg.ClampFeature(hookpoint=sae.hookpoint, sae=sae, targets=targets)):
        value = loss(model)
        seen[0].retain_grad()
        value.backward()
    handle.remove()
    where = MASK.bool() & (MASK.cumsum(1) > 1)
    for feature, target in targets.items():
        expected = (seen[0].grad[where] @ sae.W_dec[feature]).sum()
        assert torch.allclose(target.grad, expected, rtol=1e-4, atol=1e-7)  # float32 sums of 32 terms


def test_vectors_pass_values_on_and_files_hold_them_as_they_were(tmp_path, llama):
    direction, number = nn.Parameter(randn(5)), nn.Parameter(torch.tensor(2.0))
    vector = fg.SteeringVector(direction, AT, reference=randn(6))
    assert vector.add().direction is direction
    for item in (vector.add(number), vector.clamp(number), vector.affine(number), vector.ablate()):
        assert item.trained
        assert not item.detach().trained
    assert vector.add(number).coefficient is number
    assert vector.add(number).detach().coefficient == 2.0
    vector.save(tmp_path / "v.safetensors")
    direction.data += 1
    assert torch.equal(fg.SteeringVector.load(tmp_path / "v.safetensors").direction, randn(5))
    assert "norm" in repr(vector)
    folded = fg.fold(llama, fg.Add(hookpoint=AT, direction=direction, coefficient=number, bos=True))
    assert folded.config.fgsteer["folded"][0]["coefficient"] == 2.0


def test_values_that_do_not_require_grad_are_copied_and_detached(llama):
    direction, number = randn(5), torch.tensor(2.0)
    item = fg.Add(hookpoint=AT, direction=direction, coefficient=number)
    direction += 1
    assert torch.equal(item.direction, randn(5))
    assert item.coefficient == 2.0
    assert isinstance(item.coefficient, float)
    assert not item.trained
    assert item.detach() is item
    with torch.no_grad():
        with fg.steer(llama, item):
            expected = llama(IDS, attention_mask=MASK).logits
        with fg.steer(llama, fg.Add(hookpoint=AT, direction=nn.Parameter(randn(5)), coefficient=2.0)):
            assert torch.equal(llama(IDS, attention_mask=MASK).logits, expected)
    with pytest.raises(fg.SteeringError, match="single number"):
        fg.Add(hookpoint=AT, direction=direction, coefficient=nn.Parameter(torch.ones(1)))
    with pytest.raises(fg.SteeringError, match="finite"):
        fg.Add(hookpoint=AT, direction=direction, coefficient=nn.Parameter(torch.tensor(torch.inf)))


@pytest.mark.slow
def test_a_compiled_model_has_the_same_gradients():
    torch._dynamo.reset()
    model = training("llama").requires_grad_(False)
    compiled = torch.compile(model, backend="aot_eager")
    found = []
    for m in (model, compiled):
        parameters = values()
        with fg.steer(m, make("affine", *parameters)):
            for _ in range(2):
                loss(m).backward()
                found.append(step(parameters))
    torch._dynamo.reset()
    for eager, graph in zip(found[:2], found[2:], strict=True):
        for a, b in zip(eager, graph, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)  # float32 in another order


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "block"])
def test_a_compiled_model_with_checkpointing_has_the_same_gradients(part):
    torch._dynamo.reset()
    model = training("llama")
    twin = checkpointed(model, False)
    if part == "block":
        twin.model.layers[1].compile(backend="aot_eager")
    else:
        twin.compile(backend="aot_eager")
    item = fg.Add(hookpoint=fg.Hookpoint(1, "attn_out"), direction=3 * randn())
    passes = [(IDS, MASK), (OTHER_IDS, OTHER_MASK)]
    assert_equal(gradients(twin, item, *passes), gradients(model, item, *passes))
    torch._dynamo.reset()
