"""Which layers a sweep visits: every few of them first, then those around the best.

thinned(30) == [1, 5, 9, 13, 17, 21, 25, 29]
around(13, visited=[9, 13, 17], layers=30) == [11, 15]
"""

from __future__ import annotations

from collections.abc import Collection

FEW_LAYERS = 10  # of a model: all of them are visited
COARSE_LAYERS = 8  # that are visited first, about


def thinned(layers: int) -> list[int]:
    """Some layers of so many at equal distances, the last one among them; all of them where they are few."""
    stride = 1 if layers <= FEW_LAYERS else -(-layers // COARSE_LAYERS)
    return list(range((layers - 1) % stride, layers, stride))


def around(best: int, visited: Collection[int], layers: int) -> list[int]:
    """The layers halfway between the best one and its neighbors among those visited; none where these are next to it.

    Args:
        best: The best layer so far.
        visited: The layers that have been visited.
        layers: The number of layers of the model.
    """
    below = max((layer for layer in visited if layer < best), default=-1)
    above = min((layer for layer in visited if layer > best), default=layers)
    halfway = {(best + below) // 2 + (best + below) % 2, (best + above) // 2}
    return sorted(layer for layer in halfway - set(visited) if 0 <= layer < layers)
