"""How near each image lies to the training set, by the features of one embedder.

Letters in shapes: G generations, T training images, H held-out images, Q queries, D dimensions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from iet_sd.evaluation.copying import auth_pct
from iet_sd.evaluation.neighbours import Neighbours, nearest
from iet_sd.evaluation.ratio import l2_ratio
from iet_sd.evaluation.search import Engine, Metric
from iet_sd.evaluation.sets import Features

# Neighbours of the l2-ratio (Carlini et al. 2023).
RATIO_NEIGHBOURS = 50
# Bars of a histogram.
BINS = 40


def unit(features_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros stay."""
    length = np.linalg.norm(features_ND, axis=1, keepdims=True)
    return features_ND / np.where(length == 0, 1, length)


def l2_ratios(features: Features, name: str, engine: Engine = "exact") -> "Ratios":
    """How near a set lies to the training images, in Euclidean distance."""
    k = min(RATIO_NEIGHBOURS, len(features["train"]))
    near = _to_train(features, name, engine, k, "l2")
    return Ratios(near.value_QK, l2_ratio(near.value_QK, RATIO_NEIGHBOURS))


@dataclass(frozen=True)
class Ratios:
    """Distances to the nearest training images, and what they say of copying."""

    distance_QK: np.ndarray
    """The 50 nearest, or all; ascending."""
    ratio_Q: np.ndarray
    """Of `l2_ratio`: below 1 is a copy."""


@dataclass(frozen=True)
class Closeness:
    """Cosine similarities to the nearest training image, mirror images counted too."""

    generated: Neighbours
    train: Neighbours
    """Of each training image to the nearest other one."""
    heldout: Neighbours | None
    own_G: np.ndarray
    """Of each generation to the training image whose caption it was drawn for; NaN for none."""

    @classmethod
    def of(cls, features: Features, own_G: np.ndarray, engine: Engine = "exact") -> "Closeness":
        """``own_G``: the training image of each generation's prompt, -1 for none."""
        return cls(
            generated=_to_train(features, "generated", engine),
            train=_to_train(features, "train", engine),
            heldout=_to_train(features, "heldout", engine) if "heldout" in features else None,
            own_G=_own(features, own_G),
        )

    def authentic(self) -> np.ndarray:
        """Of `auth_pct`, by the distances of features of length 1: bool (G,)."""
        near = self.generated
        distance = Neighbours(_chord(near.value_QK), near.index_QK, near.flipped_QK)
        return auth_pct(distance, _chord(self.train.value_QK)[:, 0])

    def of_set(self, name: str) -> Neighbours:
        """The neighbours of generated, train or heldout."""
        return {"generated": self.generated, "train": self.train, "heldout": self.heldout}[name]

    def histogram(self, embedder: str) -> dict[str, Any]:
        """Counts of the three sets in bars of equal width, for the report."""
        sets = {"generated": self.generated, "heldout": self.heldout, "train": self.train}
        values = {name: near.value_QK[:, 0] for name, near in sets.items() if near is not None}
        low, high = (f(np.concatenate(list(values.values()))) for f in (np.min, np.max))
        edges = np.linspace(low, max(high, low + 1e-3), BINS + 1)
        counts = {name: np.histogram(value, edges)[0].tolist() for name, value in values.items()}
        return {"embedder": embedder, "edges": edges.tolist(), "heldout": None} | counts


def _to_train(
    features: Features, name: str, engine: Engine, k: int = 1, metric: Metric = "cosine"
) -> Neighbours:
    train = features["train"]
    own = np.arange(len(train)) if name == "train" else None
    flipped = features.mirrored(name)
    what = f"Neighbours of {name}"
    return nearest(
        features[name],
        train,
        k,
        metric,
        flipped_QD=flipped,
        exclude_Q=own,
        progress=what,
        engine=engine,
    )


def _own(features: Features, own_G: np.ndarray) -> np.ndarray:
    similarity_G = np.full(len(own_G), np.nan)
    (has,) = np.nonzero(own_G >= 0)
    own = unit(features["train"][own_G[has]])
    views = (features["generated"][has], features.mirrored("generated")[has])
    similarity_G[has] = np.max([np.sum(unit(view) * own, axis=1) for view in views], axis=0)
    return similarity_G


def _chord(cosine: np.ndarray) -> np.ndarray:
    """Euclidean distance of vectors of length 1."""
    return np.sqrt(np.maximum(2 - 2 * cosine.astype(np.float64), 0))
