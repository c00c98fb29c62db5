"""What steering does to each token of one text: two plain forward passes with a hook, and loops over numbers."""

import math

import numpy as np
import torch


def two_passes(model, ids, edits):
    """Each block's output (tokens, d) of an unedited and of an edited pass, and the logits of both, in float64.

    ``edits`` has (block, function) pairs; a function takes rows (tokens, d) in float64 and returns the changed rows.
    Of an edited block, the rows that came to the first of its edits are returned too.
    """
    passes = []
    for chosen in ([], edits):
        seen, came, handles = {}, {}, []
        for block in {id(block): block for block, _ in edits}.values():

            def hook(module, _, output, chosen=chosen, seen=seen, came=came):
                hidden = output if torch.is_tensor(output) else output[0]
                rows = hidden[0].double().numpy()
                came[id(module)] = rows.copy()
                for place, function in chosen:
                    if place is module:
                        rows = function(rows)
                changed = torch.as_tensor(rows).to(hidden.dtype)[None] if chosen else hidden
                seen[id(module)] = changed[0].double().numpy()
                if torch.is_tensor(output):
                    return changed
                return type(output)([changed, *output[1:]])

            handles.append(block.register_forward_hook(hook))
        try:
            with torch.no_grad():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()
        finally:
            for handle in handles:
                handle.remove()
        passes.append((seen, came, logits))
    return passes


def log_softmax(row):
    """log p of each token, from one row of logits."""
    largest = max(float(x) for x in row)
    total = math.log(math.fsum(math.exp(float(x) - largest) for x in row)) + largest
    return [float(x) - total for x in row]


def kl(log_p, log_q):
    """KL(p‖q) = Σ p (log p − log q)."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def likeliest(log_p, count):
    """The ids of the largest log-probabilities, largest first."""
    return sorted(range(len(log_p)), key=lambda token: -log_p[token])[:count]


def dose(before, after):
    """‖after − before‖/‖before‖ of one token."""
    moved = math.sqrt(math.fsum((float(b) - float(a)) ** 2 for a, b in zip(before, after, strict=True)))
    return moved / math.sqrt(math.fsum(float(a) ** 2 for a in before)) if moved else 0.0


def add_where(rows, direction, coefficient, where):
    """c v added to the rows at these places."""
    changed = np.array(rows)
    for token in where:
        changed[token] = changed[token] + coefficient * np.asarray(direction, dtype=np.float64)
    return changed
