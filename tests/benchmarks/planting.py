"""Results of the efficacy study whose memorization and quality are planted."""

import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.efficacy import results
from benchmarks.efficacy.cell import flags_of
from benchmarks.efficacy.methods import METHODS
from benchmarks.efficacy.protocol import Protocol
from benchmarks.efficacy.study import DEFAULT_RATE, Cell


def planted(protocol, method, seed, shards, factor, setting="fluent", flags=(), **counts):
    """A result whose memorization is ``factor`` times that of plain, at the same losses.

    ``counts``: what a reading adds to a count, in place of 128.
    """
    rng = np.random.default_rng(seed)
    R, P = 5, 20
    heldout = np.array([0.08, 0.06, 0.05, 0.055, 0.07])
    gap = factor * np.array([0.0, 0.005, 0.01, 0.02, 0.04])
    memory = factor * np.array([0.0, 0.05, 0.1, 0.2, 0.4])
    around = rng.standard_normal(P) / 1000
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "green").save(picture, "WEBP")
    rows = [
        {
            "round": 2 * r,
            **{name: counts.get(name, 128) * r for name in results.COUNTS},
            "moved": 0,
            "strength_sum": 0.0,
            "train_seconds": 100.0 * r,
            "heldout_loss": (heldout[r] + around).tolist(),
            "train_loss": (heldout[r] - gap[r] + around).tolist(),
            "l2_ratio": (1.2 - memory[r] + around).tolist(),
            "pictures": [picture.getvalue()] * 2,
            "closest_pictures": [picture.getvalue()] * 2 if r == R - 1 else [],
            "read_seconds": 10.0,
        }
        | {
            f"{key}_{embedder}": value
            for embedder in ("pixels", "edges")
            for key, value in {
                "similarity": (0.5 + memory[r] + around).tolist(),
                "own_similarity": (0.4 + memory[r] + around).tolist(),
                "is_own": (np.arange(P) < 20 * memory[r]).tolist(),
                "authentic": (np.arange(P) > 20 * memory[r]).tolist(),
                "kid": (heldout[r] + around).tolist(),
                "nearest": [p % 3 for p in range(P)],
            }.items()
        }
        for r in range(R)
    ]
    rate = DEFAULT_RATE["full", METHODS[method].tuned_as]
    cell = Cell(setting, "full", method, rate, seed, shards, flags=flags)
    about = {
        "prompts": [f"prompt {p}" for p in range(P)],
        "prompt_ids": ["1f600"] * P,
        "train_ids": ["1f600", "1f601", "1f602"],
        "copies": [10] * 5 + [1] * 15,
        "flags": json.loads(json.dumps(flags_of(cell, Protocol()))),
        "heldout_similarity": {"pixels": [0.5] * 8, "edges": [0.5] * 8},
    }
    return results.Result(cell, protocol.as_dict(), about, rows)


def spoilt(result, since=0):
    """The same with pictures that look like nothing, of all readings or since one."""
    for row in result.rows[since:]:
        row["kid_edges"] = [value + 0.1 for value in row["kid_edges"]]
    return result


def with_unseen(result, kid_R, misfit_R=(0.0,) * 5):
    """The same with pictures of captions of held-out images, of some KID and misfit (R,)."""
    around = np.random.default_rng(result.cell.seed + 100).standard_normal(20) / 1000
    for row, kid, misfit in zip(result.rows, kid_R, misfit_R, strict=True):
        for embedder in ("pixels", "edges"):
            row[f"kid_unseen_{embedder}"] = (kid + around).tolist()
            row[f"misfit_{embedder}"] = (misfit + around).tolist()
    return result


def with_frechet(result, distance_R):
    """The same with a Fréchet distance (R,) of pictures for captions trained on, and not (more)."""
    around = np.random.default_rng(result.cell.seed + 200).standard_normal(20) / 1000
    for row, distance in zip(result.rows, distance_R, strict=True):
        for embedder in ("pixels", "edges"):
            row[f"frechet_{embedder}"] = (distance + around).tolist()
            row[f"frechet_unseen_{embedder}"] = (distance + 1 + around).tolist()
    return result


class Report(NamedTuple):
    text: str
    """Of RESULTS.md."""
    folder: Path

    def section(self, title):
        return self.text.partition(f"## {title}\n")[2].partition("\n## ")[0]

    def page(self, name):
        return (self.folder / "tables" / f"{name}.md").read_text()
