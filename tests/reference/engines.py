"""What other engines make of the files written for them, by loops: their formats read byte by byte, token by token."""

import json
import struct

import torch


def blocks(model):
    """The decoder's blocks, by the two names that the test families give them."""
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def gguf_directions(path):
    """{block: float32 direction} of a control vector: GGUF's layout, nothing checked."""
    data = path.read_bytes()
    at = 0

    def number(code):
        nonlocal at
        at += struct.calcsize("<" + code)
        return struct.unpack_from("<" + code, data, at - struct.calcsize("<" + code))[0]

    def text():
        nonlocal at
        length = number("Q")
        at += length
        return data[at - length : at].decode()

    assert data[:4] == b"GGUF"
    at = 4
    assert number("I") == 3
    tensors, pairs = number("Q"), number("Q")
    metadata = {}
    for _ in range(pairs):
        key, kind = text(), number("I")
        metadata[key] = text() if kind == 8 else number({4: "I", 5: "i"}[kind])
    assert metadata["general.architecture"] == "controlvector"
    assert metadata["controlvector.layer_count"] == tensors
    places = []
    for _ in range(tensors):
        name, dimensions = text(), number("I")
        assert dimensions == 1
        length, kind, offset = number("Q"), number("I"), number("Q")
        assert kind == 0
        assert offset % 32 == 0
        places.append((int(name.removeprefix("direction.")), length, offset))
    start = at
    while start % 32:
        start += 1
    return metadata, {
        layer: torch.tensor(struct.unpack_from(f"<{length}f", data, start + offset)) for layer, length, offset in places
    }


def hooked_logits(model, ids, changes):
    """Logits (T, vocabulary) of one row, with {module: function of its output (T, d)}."""
    handles = []
    for module, change in changes.items():

        def hook(_, __, out, change=change):
            h = out[0] if isinstance(out, tuple) else out
            new = change(h.reshape(-1, h.shape[-1])).view_as(h)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def llama_cpp_logits(model, ids, directions):
    """llama.cpp: direction.N is added to what block N passes on, at every token; block 0 has none."""
    assert 0 not in directions
    changes = {blocks(model)[n]: lambda h, v=v: torch.stack([row + v for row in h]) for n, v in directions.items()}
    return hooked_logits(model, ids, changes)


def lm_eval_logits(model, ids, config):
    """lm-eval's steered model: one operation on the output of each named module of ``base_model``."""

    def operate(entry):
        def change(h):
            rows = []
            for row in h.double():
                vector, coefficient = entry["steering_vector"].double(), entry["steering_coefficient"]
                if entry["action"] == "add":
                    rows.append(row + coefficient * vector)
                    continue
                bias = torch.zeros_like(row) if entry["bias"] is None else entry["bias"].double()
                unit = vector / vector.norm()
                moved = row - bias
                rows.append(moved + (coefficient - moved @ unit) * unit + bias)
            return torch.stack(rows).float()

        return change

    modules = dict(model.base_model.named_modules())
    return hooked_logits(model, ids, {modules[name]: operate(entry) for name, entry in config.items()})


def easysteer_greedy(model, ids, spec_path, new):
    """EasySteer: greedy tokens under a spec; every step computed afresh, vectors applied in order."""
    spec = json.loads(spec_path.read_text())
    assert spec["conflict"] == "sequential"
    prompt, ids = len(ids), list(ids)
    for _ in range(new):
        changes = {}
        for entry in spec["vectors"]:
            [(layer, direction)] = gguf_directions(type(spec_path)(entry["source"]))[1].items()
            assert entry["layers"] == [layer]
            chosen = _chosen(entry["apply"], prompt, len(ids))
            before = changes.get(blocks(model)[layer])
            changes[blocks(model)[layer]] = _easysteer(entry, direction, chosen, before)
        ids.append(int(hooked_logits(model, ids, changes)[-1].argmax()))
    return ids[prompt:]


def _easysteer(entry, direction, chosen, before):
    def change(h):
        h = h.clone() if before is None else before(h)
        for token in chosen:
            if entry["algorithm"] == "direct":
                h[token] = h[token] + entry["scale"] * direction
            else:
                assert entry["algorithm"] == "erase"
                h[token] = h[token] - (h[token] @ direction) / (direction @ direction + 1e-8) * direction
        return h

    return change


def _chosen(select, prompt, length):
    """Token positions of an apply clause."""
    chosen = set()
    if select.get("prompt") == "all":
        chosen |= set(range(prompt))
    if select.get("generation") == "all":
        chosen |= set(range(prompt, length))
    chosen |= {position % prompt for position in select.get("prompt_positions", [])}
    return sorted(chosen - set(select.get("exclude_prompt_positions", [])))
