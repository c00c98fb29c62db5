"""Top excerpts of one feature by a plain loop over documents and positions."""


def top_excerpts(documents, top, window):
    """The ``top`` largest (peak, document, ids around it, activations around it), one a document, position 0 left out.

    ``documents``: (ids, activations) of each text, whose position 0 is a special token.
    """
    found = []
    for number, (ids, acts) in enumerate(documents):
        best = None
        for position in range(1, len(ids)):
            if acts[position] > 0 and (best is None or acts[position] > acts[best]):
                best = position
        if best is None:
            continue
        around_ids, around_acts = [], []
        for position in range(best - window, best + window + 1):
            if 1 <= position < len(ids):
                around_ids.append(ids[position])
                around_acts.append(acts[position])
        found.append((acts[best], number, around_ids, around_acts))
    found.sort(key=lambda entry: -entry[0])
    return found[:top]
