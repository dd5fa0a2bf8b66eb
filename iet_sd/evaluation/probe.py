"""A small evaluation of a model in training: the same prompts, images and noise every time.

What is measured is what `iet_sd.evaluation.run` measures, of fewer images, so that readings of two
rounds differ by the model alone. Letters in shapes: P prompts, N images of each kind, H held-out
images.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from iet_sd.config import DataConfig, ProbeConfig
from iet_sd.data.sources import Source
from iet_sd.errors import UserError
from iet_sd.evaluation.embedders import Embedder
from iet_sd.evaluation.features import embed
from iet_sd.evaluation.heldout import require_images
from iet_sd.evaluation.images import TableImages
from iet_sd.evaluation.measures import Resampling
from iet_sd.evaluation.membership import membership_auc, stratified_losses, stratified_timesteps
from iet_sd.evaluation.neighbours import nearest
from iet_sd.evaluation.prompts import choose, prompt_of
from iet_sd.evaluation.sets import Subset
from iet_sd.evaluation.statistics import Estimate, bootstrap
from iet_sd.sampling import draw, say_what_is_cut
from iet_sd.seeding import seed_for

RESAMPLES = 1000
# Images drawn at a time, and no more than are trained at a time, which takes more memory.
_BATCH_SIZE = 8


@dataclass(frozen=True)
class Reading:
    """What was measured of the model after a round; round 0 is before training."""

    round: int
    memorization_score: Estimate
    """95th percentile of the similarity to the nearest training image."""
    excess_score: Estimate
    """The same less that of held-out images."""
    heldout_loss: Estimate
    train_loss: Estimate
    loss_gap: Estimate
    membership_auc: Estimate
    heldout_loss_N: tuple[float, ...]
    """Of each held-out image, in the same order at every reading."""
    seconds: float

    def line(self) -> dict[str, Any]:
        """Its numbers, flat: ``excess_score``, ``excess_score_low``, ``excess_score_high``, ..."""
        line: dict[str, Any] = {"kind": "probe", "round": self.round}
        for name, value in vars(self).items():
            if isinstance(value, Estimate):
                ends = {f"{name}_low": value.low, f"{name}_high": value.high}
                line |= {name: value.value, **ends}
        return line | {"seconds": self.seconds}

    def as_json(self) -> dict[str, Any]:
        """All of it; the floats are read back to the bit."""
        return asdict(self) | {"heldout_loss_N": list(self.heldout_loss_N)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Reading":
        """What `as_json` gave."""
        values = {
            name: Estimate(**value) if isinstance(value, dict) else value
            for name, value in content.items()
        }
        return cls(**values | {"heldout_loss_N": tuple(content["heldout_loss_N"])})


class Probe:
    """Takes readings. Costs the features of all training and held-out images once."""

    def __init__(
        self,
        config: ProbeConfig,
        data: DataConfig,
        train: Source,
        heldout: Source,
        embedder: Embedder,
        seed: int,
        batch_size: int,
        cache_dir: Path,
    ) -> None:
        """``batch_size``: that of training. Features are kept in ``cache_dir``.

        Errors: as `require_images`, and `UserError` for an image that cannot be read.
        """
        require_images("--eval_every_rounds", train=train, heldout=heldout)
        self.config = config
        self.resolution = data.resolution
        self.embedder = embedder
        self.seed = seed
        self.batch_size = min(batch_size, _BATCH_SIZE)
        tables = {
            name: TableImages(source, data.resolution, data.image_interpolation_mode)
            for name, source in (("train", train), ("heldout", heldout))
        }
        drawn = choose(len(train.sample_ids), config.eval_prompts, seed)
        self.prompts = [prompt_of(train, i, seed, data) for i in drawn]
        self.prompt_ids = [train.sample_ids[i] for i in drawn]
        count = min(config.eval_samples, *map(len, tables.values()))
        self._scored = {
            name: Subset(table, choose(len(table), count, seed)) for name, table in tables.items()
        }
        self._captions = {
            name: [prompt_of(tables[name].source, i, seed, data) for i in scored.index]
            for name, scored in self._scored.items()
        }
        self.group_H = np.unique(heldout.groups, return_inverse=True)[1]
        """The near-duplicate group of each held-out image."""
        self.group_N = self.group_H[self._scored["heldout"].index]
        """Of those whose loss is taken."""
        self._train = embed(embedder, tables["train"], cache_dir)
        views = [embed(embedder, tables["heldout"], cache_dir, flip=flip) for flip in (False, True)]
        self.heldout_H = self._similarity(*views)
        self.fingerprint = self._fingerprint(tables)

    def read(
        self,
        round: int,
        pipeline: DiffusionPipeline,
        autocast: Callable[[], AbstractContextManager],
    ) -> Reading:
        """Measure the model in ``pipeline``, whose modules are left as they are.

        No global random numbers are drawn. Errors: `UserError` for images or losses that are not
        finite.
        """
        began = time.perf_counter()
        if round == 0:  # once is enough
            say_what_is_cut(pipeline, self.prompts)
        with autocast():
            pictures = self._draw(pipeline, self.prompts, self.prompt_ids)
            train_N, heldout_N = (self._losses(pipeline, name) for name in ("train", "heldout"))
        similarity_P = self._similarity(*self._features(pictures))
        by = Resampling(np.arange(len(pictures)), self.group_H, RESAMPLES, seed=self.seed)
        p95 = lambda value: {"p95": np.percentile(value, 95)}  # noqa: E731
        losses = bootstrap(
            _of_losses,
            train_N,
            heldout_N,
            clusters=[None, self.group_N],
            resamples=RESAMPLES,
            seed=self.seed,
        )
        return Reading(
            round,
            by.generated(p95, similarity_P)["p95"],
            by.excess(p95, similarity_P, self.heldout_H)["p95"],
            *losses,
            heldout_loss_N=tuple(heldout_N.tolist()),
            seconds=time.perf_counter() - began,
        )

    def _draw(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], names: Sequence[str]
    ) -> list[Image.Image]:
        """The pictures that `iet_sd.evaluation.generate` would draw, one a prompt.

        ``names``: of the image that has each prompt as its caption.
        """
        seeds = [seed_for(self.seed, "generate", name, 0) for name in names]
        pictures = []
        for start in range(0, len(seeds), self.batch_size):
            batch = slice(start, start + self.batch_size)
            drawn = draw(
                pipeline,
                prompts[batch],
                seeds[batch],
                self.resolution,
                self.config.eval_inference_steps,
                self.config.eval_guidance_scale,
            )
            if not np.isfinite(drawn).all():
                raise UserError("images drawn by the model are not numbers (NaN)")
            pictures += pipeline.numpy_to_pil(drawn)
        return pictures

    def _features(self, pictures: list[Image.Image]) -> list[np.ndarray]:
        """Features of pictures, and of the same mirrored; as many at a time as are drawn."""
        views = pictures, [ImageOps.mirror(picture) for picture in pictures]
        starts = range(0, len(pictures), self.batch_size)
        return [
            np.concatenate([self.embedder(view[s : s + self.batch_size]) for s in starts])
            for view in views
        ]

    def _losses(self, pipeline: DiffusionPipeline, name: str) -> np.ndarray:
        """The denoising loss of each image (N,), a mean over timesteps."""
        timesteps = stratified_timesteps(
            self.config.eval_timesteps, pipeline.scheduler.config.num_train_timesteps
        )
        return stratified_losses(
            pipeline,
            self._scored[name],
            self._captions[name],
            timesteps,
            self.seed,
            self.resolution,
            self.batch_size,
        ).mean(axis=1)

    def _similarity(self, features_QD: np.ndarray, flipped_QD: np.ndarray) -> np.ndarray:
        return nearest(features_QD, self._train, flipped_QD=flipped_QD).value_QK[:, 0]

    def _fingerprint(self, tables: dict[str, TableImages]) -> str:
        """Readings of one fingerprint can be compared."""
        settings = {k: v for k, v in asdict(self.config).items() if k.startswith("eval_")}
        del settings["eval_every_rounds"]
        content: Sequence[Any] = [
            settings,
            self.seed,
            self.embedder.fingerprint,
            *(table.fingerprint for table in tables.values()),
            self.prompts,
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _of_losses(train_N: np.ndarray, heldout_N: np.ndarray) -> tuple[float, float, float, float]:
    heldout, train = heldout_N.mean(), train_N.mean()
    return heldout, train, heldout - train, membership_auc(train_N, heldout_N)
