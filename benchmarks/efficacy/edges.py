"""The second embedder: gradient orientations and colour by cell, as numbers of one image.

Histograms of oriented gradients (Dalal & Triggs 2005) forgive small shifts and changes of
brightness, which the first embedder, pixels, does not; nothing is learnt and nothing downloaded.
Given to the evaluator as ``python=benchmarks.efficacy.edges:edges``.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

SIDE, CELLS, BINS = 32, 4, 8
_COLOUR = 0.5
"""Weight of the colours, beside orientations of length 1."""


def edges(images: Sequence[Image.Image]) -> np.ndarray:
    """Features (B, 176), float32: 4 x 4 cells of 8 orientations and 3 colours.

    Less what a white page has, so that the cosine of two images is about what is drawn on them.
    """
    pixels = np.stack(
        [
            np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255
            for image in images
        ]
    )
    orientation = np.sqrt(_by_cell(_orientations(pixels.mean(axis=3))))
    colour = _by_cell(1 - pixels) / (SIDE // CELLS) ** 2
    parts = [_unit(orientation), _COLOUR * _unit(colour)]
    return np.concatenate([part.reshape(len(images), -1) for part in parts], axis=1)


def _orientations(grey_BHW: np.ndarray) -> np.ndarray:
    """The strength of each pixel's gradient, shared between the two nearest of 8 directions."""
    down, across = np.gradient(grey_BHW, axis=(1, 2))
    place = (np.arctan2(down, across) % np.pi) / np.pi * BINS
    low = np.floor(place)
    share, strength = place - low, np.hypot(down, across)
    index = low.astype(int) % BINS
    each = np.arange(BINS)
    weight = (index[..., None] == each) * (1 - share)[..., None]
    weight += ((index[..., None] + 1) % BINS == each) * share[..., None]
    return (weight * strength[..., None]).astype(np.float32)


def _by_cell(values_BHWC: np.ndarray) -> np.ndarray:
    """Sums over cells: (B, cells, cells, C)."""
    b, height, width, channels = values_BHWC.shape
    cells = b, CELLS, height // CELLS, CELLS, width // CELLS, channels
    return values_BHWC.reshape(cells).sum(axis=(2, 4))


def _unit(values: np.ndarray) -> np.ndarray:
    """Each image's values at length 1; zeros stay."""
    length = np.sqrt((values**2).sum(axis=(1, 2, 3), keepdims=True))
    return (values / np.where(length > 0, length, 1)).astype(np.float32)
