"""An embedder of few dimensions, as users give their own; FID takes seconds on thousands."""

import numpy as np


def quadrants(images):
    """The mean colour of each quarter of an image: (B, 12)."""
    pixels = np.stack([np.asarray(image.resize((2, 2)), dtype=np.float32) for image in images])
    return pixels.reshape(len(images), -1) / 255
