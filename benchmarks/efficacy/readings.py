"""What is measured of a model at a round boundary, with a number for each prompt and image.

It stands in for `iet_sd.evaluation.probe.Probe` in a cell's process, so that readings are taken
where those of ``--eval_every_rounds`` are, and again after a stop if need be. Prompts, images and
noise are the same in all cells of a setting. Letters in shapes: P prompts, N training images, H
held-out images, U of them whose captions are drawn too, D features.
"""

import io
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from benchmarks.efficacy.protocol import Protocol
from benchmarks.efficacy.results import closest
from benchmarks.efficacy.settings import READ_SEED
from iet_sd.config import DataConfig, ProbeConfig
from iet_sd.data.sources import load_source
from iet_sd.evaluation.closeness import RATIO_NEIGHBOURS, unit
from iet_sd.evaluation.copying import auth_pct
from iet_sd.evaluation.embedders import Embedder, build_embedder
from iet_sd.evaluation.features import embed
from iet_sd.evaluation.images import ImageSet
from iet_sd.evaluation.membership import membership_auc
from iet_sd.evaluation.neighbours import Neighbours, nearest
from iet_sd.evaluation.probe import Probe, Reading
from iet_sd.evaluation.prompts import choose
from iet_sd.evaluation.ratio import l2_ratio
from iet_sd.evaluation.statistics import Estimate
from iet_sd.files import write_text_atomic

EMBEDDERS = {"pixels": "pixels", "edges": "python=benchmarks.efficacy.edges:edges"}
DRAWN_AT_ONCE = 16
_WEBP_QUALITY = 80


@dataclass(frozen=True)
class Compared:
    """The training and held-out images, as one embedder has them."""

    embedder: Embedder
    train_ND: np.ndarray
    heldout_HD: np.ndarray
    heldout_H: np.ndarray
    """Similarity of each held-out image to the nearest training image."""
    spacing_N: np.ndarray
    """Distance of each training image to the nearest other one, features at length 1."""

    @classmethod
    def of(cls, spec: str, train: ImageSet, heldout: ImageSet, cache_dir: Path) -> "Compared":
        """Computed once for a folder."""
        embedder = build_embedder(spec, cache_dir=cache_dir)
        train_ND = embed(embedder, train, cache_dir)
        views = [embed(embedder, heldout, cache_dir, flip=flip) for flip in (False, True)]
        to_train = nearest(views[0], train_ND, flipped_QD=views[1]).value_QK[:, 0]
        others = nearest(train_ND, train_ND, exclude_Q=np.arange(len(train_ND)))
        return cls(embedder, train_ND, views[0], to_train, _chord(others.value_QK[:, 0]))

    def measure(self, pictures: list[Image.Image], own_P: np.ndarray) -> dict[str, Any]:
        """Of pictures drawn for the captions of the training images ``own_P``."""
        views = [self.embedder(pictures), self.embedder([ImageOps.mirror(p) for p in pictures])]
        near = nearest(views[0], self.train_ND, flipped_QD=views[1])
        own = np.max([(unit(v) * unit(self.train_ND[own_P])).sum(axis=1) for v in views], axis=0)
        apart = Neighbours(_chord(near.value_QK), near.index_QK, near.flipped_QK)
        return {
            "similarity": near.value_QK[:, 0],
            "own_similarity": own,
            "is_own": near.index_QK[:, 0] == own_P,
            "nearest": near.index_QK[:, 0],
            "authentic": auth_pct(apart, self.spacing_N),
            "kid": kid_of_each(views[0], self.heldout_HD),
            "frechet": frechet_of_each(views[0], self.heldout_HD),
        }

    def measure_unseen(self, pictures: list[Image.Image], own_U: np.ndarray) -> dict[str, Any]:
        """Of pictures drawn for the captions of the held-out images ``own_U``.

        A picture for a caption that was trained on is close to the data once it is copied; here no
        copy helps. ``misfit``: how much more a picture resembles other held-out images, as a mean,
        than that of its own caption.
        """
        features_UD = self.embedder(pictures)
        similar_UH = unit(features_UD) @ unit(self.heldout_HD).T
        own = similar_UH[np.arange(len(own_U)), own_U]
        others = (similar_UH.sum(axis=1) - own) / (similar_UH.shape[1] - 1)
        return {
            "kid_unseen": kid_of_each(features_UD, self.heldout_HD),
            "frechet_unseen": frechet_of_each(features_UD, self.heldout_HD),
            "misfit": others - own,
        }


def kid_of_each(gen_PD: np.ndarray, real_HD: np.ndarray) -> np.ndarray:
    """What each picture adds to KID: float64 (P,), whose mean is KID.

    Pairs of pictures count twice and their mean is taken off (Hoeffding 1948), so that a mean over
    pictures drawn anew varies as KID does, to first order.
    """
    own_PP, real_HH = _kernel(gen_PD, gen_PD), _kernel(real_HD, real_HD)
    for each in (own_PP, real_HH):
        np.fill_diagonal(each, 0)
    own_P = own_PP.sum(axis=1) / (len(gen_PD) - 1)
    real = real_HH.sum() / (len(real_HD) * (len(real_HD) - 1))
    cross_P = _kernel(gen_PD, real_HD).mean(axis=1)
    return 2 * own_P - own_P.mean() - 2 * cross_P + real


def _kernel(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    """KID's, (x.y / D + 1)^3, of features at length sqrt(D): the cosine takes the place of x.y / D.

    Else it would hardly differ from a linear one for features as small as ours.
    """
    a, b = (unit(np.asarray(each, np.float64)) for each in (a_ND, b_MD))
    return (a @ b.T + 1) ** 3


def frechet_of_each(gen_PD: np.ndarray, real_HD: np.ndarray) -> np.ndarray:
    """What each picture adds to the Fréchet distance: float64 (P,), whose mean is the distance.

    Around it by leaving each out (Tukey 1958), so that a mean over pictures drawn anew varies as
    the distance does, to first order; the held-out images stay as they are. Features are at length
    1. So few pictures make it too high, by less where they are smoother.
    """
    gen, real = (unit(np.asarray(each, np.float64)) for each in (gen_PD, real_HD))
    centre = real.mean(axis=0)
    spread_HD = (real - centre) / np.sqrt(len(real) - 1)
    own_PP, cross_PH = (gen - centre) @ (gen - centre).T, gen @ spread_HD.T

    def distance(chosen: np.ndarray) -> float:
        # As `frechet_distance` of `iet_sd.evaluation.quality`, and a thousand times as fast for
        # fewer pictures than features: the trace of the covariances' root is the sum of the
        # singular values of the centred features' products.
        own, count = own_PP[np.ix_(chosen, chosen)], len(chosen)
        cross = (cross_PH[chosen] - cross_PH[chosen].mean(axis=0)) / np.sqrt(count - 1)
        squared = np.linalg.eigvalsh(cross @ cross.T)
        variance = (own.trace() - count * own.mean()) / (count - 1)
        shared = np.sqrt(np.maximum(squared, 0)).sum()
        return own.mean() + variance + (spread_HD**2).sum() - 2 * shared

    everyone = np.arange(len(gen))
    without_P = np.array([distance(np.delete(everyone, p)) for p in everyone])
    return distance(everyone) + (len(gen) - 1) * (without_P.mean() - without_P)


class StudyProbe(Probe):
    """`Probe` with more to say: a JSON file a reading under ``folder``."""

    def __init__(
        self, protocol: Protocol, once: Path, folder: Path, base: Path, *given: Any
    ) -> None:
        """``once``: the training images, each once; ``base``: where round 0 is kept for all cells.

        ``given``: the arguments of `Probe`, of which source of training images and seed are
        replaced.
        """
        config, data, _, heldout, embedder, _, batch_size, cache_dir = given
        train = load_source(_each_once(data, once))
        super().__init__(config, data, train, heldout, embedder, READ_SEED, batch_size, cache_dir)
        self.batch_size = DRAWN_AT_ONCE
        self.protocol, self.folder, self.base = protocol, folder, base
        tables = self._scored["train"].images, self._scored["heldout"].images
        self.own_P = choose(len(train.sample_ids), config.eval_prompts, READ_SEED)
        self.compared = {
            name: Compared.of(spec, *tables, cache_dir) for name, spec in EMBEDDERS.items()
        }
        self.raw = build_embedder("raw_pixels")
        self.raw_ND = embed(self.raw, tables[0], cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "prompt_ids": list(self.prompt_ids),
            "prompts": list(self.prompts),
            "train_ids": list(train.sample_ids),
            "heldout_similarity": {k: _list(c.heldout_H) for k, c in self.compared.items()},
        }
        write_text_atomic(folder / "about.json", json.dumps(about))

    def read(
        self,
        round: int,
        pipeline: DiffusionPipeline,
        autocast: Callable[[], AbstractContextManager],
    ) -> Reading:
        """Measure, or take over what another cell has measured before training; see `Probe`."""
        file = self.folder / f"round-{round}.json"
        if round == 0 and self.base.is_file():
            text = self.base.read_text()
        else:
            text = json.dumps(self._measure(pipeline, autocast))
            if round == 0:
                self.base.parent.mkdir(parents=True, exist_ok=True)
                write_text_atomic(self.base, text)
        write_text_atomic(file, text)
        return _as_reading(round, json.loads(text), self.compared["pixels"].heldout_H)

    def _measure(
        self, pipeline: DiffusionPipeline, autocast: Callable[[], AbstractContextManager]
    ) -> dict[str, Any]:
        began = time.perf_counter()
        with autocast():
            pictures = self._draw(pipeline, self.prompts, self.prompt_ids)
            unseen = self._draw(pipeline, self._captions["heldout"], self._scored["heldout"].ids)
            losses = {f"{name}_loss": self._losses(pipeline, name) for name in self._scored}
        found: dict[str, Any] = {name: _list(loss) for name, loss in losses.items()}
        for name, compared in self.compared.items():
            measured = compared.measure(pictures, self.own_P)
            measured |= compared.measure_unseen(unseen, self._scored["heldout"].index)
            found |= {f"{key}_{name}": _list(value) for key, value in measured.items()}
        views = [self.raw(pictures), self.raw([ImageOps.mirror(p) for p in pictures])]
        k = min(RATIO_NEIGHBOURS, len(self.raw_ND))
        distances = nearest(views[0], self.raw_ND, k, "l2", flipped_QD=views[1]).value_QK
        found["l2_ratio"] = _list(l2_ratio(distances))
        shown = {"pictures": range(self.protocol.shown)}
        shown["closest_pictures"] = closest(
            np.array(found["similarity_pixels"]), self.protocol.shown
        )
        for name, chosen in shown.items():
            found[name] = [_webp(pictures[p]).hex() for p in chosen]
        return found | {"read_seconds": time.perf_counter() - began}


def _each_once(data: DataConfig, once: Path) -> DataConfig:
    """The training images, each once."""
    return replace(data, train_data_dir=str(once), heldout_split=None)


def _as_reading(round: int, found: dict[str, Any], heldout_H: np.ndarray) -> Reading:
    """What the checkpoint and metrics.jsonl get; intervals are left to the analysis."""
    heldout, train = np.array(found["heldout_loss"]), np.array(found["train_loss"])
    score = np.percentile(found["similarity_pixels"], 95)
    numbers = {
        "memorization_score": score,
        "excess_score": score - np.percentile(heldout_H, 95),
        "heldout_loss": heldout.mean(),
        "train_loss": train.mean(),
        "loss_gap": heldout.mean() - train.mean(),
        "membership_auc": membership_auc(train, heldout),
    }
    estimates = {name: Estimate(*3 * (float(value),)) for name, value in numbers.items()}
    return Reading(
        round, **estimates, heldout_loss_N=tuple(heldout.tolist()), seconds=found["read_seconds"]
    )


def _list(values: np.ndarray) -> list[Any]:
    return np.asarray(values).tolist()


def _webp(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=_WEBP_QUALITY)
    return buffer.getvalue()


def _chord(cosine: np.ndarray) -> np.ndarray:
    """Euclidean distance of vectors of length 1."""
    return np.sqrt(np.maximum(2 - 2 * cosine.astype(np.float64), 0))


def probe_config(protocol: Protocol) -> dict[str, Any]:
    """The flags of `ProbeConfig` for it."""
    flags = {
        "eval_every_rounds": protocol.aggregate_every,
        "eval_prompts": protocol.prompts,
        "eval_samples": protocol.samples,
        "eval_timesteps": protocol.timesteps,
        "eval_inference_steps": protocol.inference_steps,
        "eval_guidance_scale": protocol.guidance_scale,
        "eval_embedder": "pixels",
    }
    assert set(flags) <= set(ProbeConfig.__dataclass_fields__)
    return flags
