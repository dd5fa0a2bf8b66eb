"""Rows of the tables that go with a report: see `report.PAIRS` and `report.IMAGES`.

Letters in shapes: G generations, N images of a set.
"""

from typing import Any

import numpy as np

from iet_sd.data.sources import Source
from iet_sd.evaluation.closeness import Closeness
from iet_sd.evaluation.generate import Generations
from iet_sd.evaluation.neighbours import Neighbours
from iet_sd.evaluation.prompts import caption_of


def pair_rows(
    generations: Generations,
    source: Source,
    seed: int,
    near: Closeness,
    ratio_G: np.ndarray,
) -> list[dict[str, Any]]:
    """A row for each generation."""
    request, authentic_G, rows = generations.request, near.authentic(), []
    for g, name in enumerate(generations.ids):
        prompt, index = generations.prompt_G[g], near.generated.index_QK[g, 0]
        rows.append(
            {
                "generation": name,
                "prompt": request.prompts[prompt],
                "prompt_id": request.prompt_ids[prompt],
                "image": int(generations.image_G[g]),
                "path": str(generations.paths[g]),
                "similarity": float(near.generated.value_QK[g, 0]),
                "own_similarity": None if np.isnan(near.own_G[g]) else float(near.own_G[g]),
                "nearest_id": source.sample_ids[index],
                "nearest_caption": caption_of(source, index, seed),
                "nearest_index": int(index),
                "flipped": bool(near.generated.flipped_QK[g, 0]),
                "ratio": float(ratio_G[g]),
                "authentic": bool(authentic_G[g]),
            }
        )
    return rows


def image_rows(
    name: str,
    source: Source,
    near: Neighbours,
    ratio_N: np.ndarray | None,
    losses: tuple[np.ndarray, np.ndarray] | None,
) -> list[dict[str, Any]]:
    """A row for each image of the set ``name``.

    ``losses``: indices of the images whose loss was taken, and the losses by timestep.
    """
    loss_N = np.full(len(source.sample_ids), np.nan)
    if losses is not None:
        loss_N[losses[0]] = losses[1].mean(axis=1)
    return [
        {
            "set": name,
            "id": source.sample_ids[n],
            "group": source.groups[n],
            "similarity": float(near.value_QK[n, 0]),
            "ratio": None if ratio_N is None else float(ratio_N[n]),
            "loss": float(loss_N[n]),
        }
        for n in range(len(source.sample_ids))
    ]
