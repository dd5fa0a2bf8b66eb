"""An evaluation from beginning to end: draw, embed, search, measure, write.

Letters in shapes: G generations, T training images, H held-out images, P prompts, S timesteps.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from iet_sd.config import DataConfig, EvaluateSettings, GenerateSettings
from iet_sd.data.sources import Source, load_source
from iet_sd.errors import UserError
from iet_sd.evaluation import measures, membership, quality
from iet_sd.evaluation.closeness import Closeness, l2_ratios, unit
from iet_sd.evaluation.copying import c_t
from iet_sd.evaluation.embedders import Embedder, Preprocessing, build_embedder, check_embedder
from iet_sd.evaluation.generate import Generations, generate
from iet_sd.evaluation.heldout import heldout_of, load_heldout, require_images
from iet_sd.evaluation.images import TableImages
from iet_sd.evaluation.measures import Measure, Resampling, measure
from iet_sd.evaluation.pipelines import Model, check_pipeline
from iet_sd.evaluation.prompts import choose, prompt_of, request_for
from iet_sd.evaluation.report import write_report
from iet_sd.evaluation.rows import image_rows, pair_rows
from iet_sd.evaluation.search import check_engine
from iet_sd.evaluation.sets import Features, Images, Process, Subset, View
from iet_sd.evaluation.verdict import in_words

RAW = "raw_pixels"
_ALL = frozenset(product(("generated", "train", "heldout"), (False, True)))
_TO_TRAIN = _ALL - {("train", True)}
_AS_THEY_ARE = frozenset({("generated", False), ("heldout", False)})
_PACKAGES = ("torch", "diffusers", "transformers", "numpy", "scipy", "scikit-learn", "pillow")

Use = tuple[str, Preprocessing]


def check(settings: GenerateSettings | EvaluateSettings) -> None:
    """`UserError` for what can be known to fail before data or weights are loaded."""
    check_pipeline(settings.pipeline)
    if isinstance(settings, GenerateSettings):
        if not settings.generation.prompts:
            settings.data.require()
        return
    config, data = settings.evaluation, settings.data
    data.require()
    check_engine(config.neighbour_engine)
    for spec, preprocessing in _uses(settings):
        check_embedder(spec, preprocessing, data.cache_dir)
    prompts = settings.generation.prompts
    if (len(prompts) if prompts else settings.generation.num_prompts) < 2:
        raise UserError(
            "An evaluation needs at least 2 prompts, as its intervals are over prompts; got 1. "
            "Raise --num_prompts, or name more by --prompts; `generate` draws as few as you like."
        )
    if not (data.heldout_split or data.heldout_data_dir or config.without_heldout):
        raise UserError(
            "Similarity means little without held-out images to compare with. Give them with "
            "--heldout_split (of the same data set) or --heldout_data_dir; or leave out all that "
            "needs them with --without_heldout."
        )


def draw(
    settings: GenerateSettings | EvaluateSettings,
    model: Model,
    source: Source | None,
    cache_dir: Path,
    process: Process,
) -> tuple[Generations, np.ndarray]:
    """The images, and for each the training sample of its prompt, -1 for none: (G,).

    Only what is missing in ``cache_dir`` is drawn. All processes take part.
    """
    request, own_P = request_for(settings, source, model.dtype)
    generations = generate(
        request,
        model.fingerprint,
        lambda: model.pipeline,
        cache_dir,
        batch_size=settings.generation.generation_batch_size,
        process_index=process.index,
        num_processes=process.count,
        barrier=process.barrier,
    )
    return generations, own_P[generations.prompt_G]


def evaluate(
    settings: EvaluateSettings, model: Model, output_dir: Path, command: str, process: Process
) -> dict[str, Any] | None:
    """Measure, and write the report into ``output_dir``. All processes take part.

    Returns the report, on the main process.
    """
    config, data = settings.evaluation, settings.data
    sources = {"train": load_source(data)}
    if not config.without_heldout:
        sources["heldout"] = load_heldout(data, sources["train"])
    require_images("An evaluation", **sources)
    cache_dir = Path(config.evaluation_cache_dir or output_dir / "cache")
    # Before images are drawn, which may take hours: one that is missing must not be found after.
    uses = _uses(settings)
    embedders = {use: build_embedder(*use, model.device, data.cache_dir) for use in uses}
    generations, own_G = draw(settings, model, sources["train"], cache_dir, process)
    tables = {
        name: TableImages(source, data.resolution, data.image_interpolation_mode)
        for name, source in sources.items()
    }
    images = Images(generations, tables["train"], tables.get("heldout"))
    features = {
        use: Features(embedder, images, cache_dir, config.embedding_batch_size, process, uses[use])
        for use, embedder in embedders.items()
    }
    if process.index:
        return None

    engine, raw = config.neighbour_engine, features[_use(RAW)]
    similarity = [features[spec, config.preprocessing] for spec in config.embedders]
    near = [Closeness.of(each, own_G, engine) for each in similarity]
    ratios = {name: l2_ratios(raw, name, engine) for name in ("generated", *list(sources)[1:])}
    losses = _losses(settings, model, tables, sources) if "heldout" in sources else {}
    groups = sources["heldout"].groups if "heldout" in sources else ()
    by = Resampling(
        generations.prompt_G,
        np.unique(groups, return_inverse=True)[1],
        config.bootstrap_resamples,
        config.confidence_level,
        settings.generation.seed,
    )
    found: list[Measure] = []
    for of, each in zip(similarity, near, strict=True):
        found += _of(of, _similarity(each, own_G, config.thresholds, by))
    found += _of(similarity[0], _whole(similarity[0], near[0], by))
    found += _of(raw, measures.distances(ratios, by))
    if losses:
        found += measures.losses(losses["train"][1], losses["heldout"][1], losses["heldout"][0], by)
    found += _quality(settings, features, generations, by)
    found = _headlines(found, similarity[0].embedder.name)

    report = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "settings": settings.as_dict(),
        "seed": settings.generation.seed,
        "versions": {name: version(name) for name in _PACKAGES},
        "model": {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "dtype": generations.request.dtype,
        },
        "data": {
            "train": _described(tables["train"], data),
            "heldout": _described(tables["heldout"], heldout_of(data)) if images.heldout else None,
            "prompts": len(generations.request.prompts),
            "images_per_prompt": generations.request.images_per_prompt,
        },
        "embedders": [_named(f.embedder) for f in features.values()],  # that of the headline first
        # For compare: what losses depend on, and where the features of the quality measures lie.
        "losses": (
            _taken(settings, model, sources["heldout"], losses["heldout"][0]) if losses else None
        ),
        "quality_features": _quality_files(settings, features, output_dir),
        "measures": [asdict(m) for m in found],
        "verdict": in_words(found),
        "histograms": [
            each.histogram(of.embedder.name) for of, each in zip(similarity, near, strict=True)
        ],
    }
    pairs = pair_rows(generations, sources["train"], by.seed, near[0], ratios["generated"].ratio_Q)
    rows = []
    for name, source in sources.items():
        ratio = ratios[name].ratio_Q if name in ratios else None
        rows += image_rows(name, source, near[0].of_set(name), ratio, losses.get(name))
    write_report(output_dir, report, pairs, rows, generations, tables["train"], config.pairs_shown)
    return report


def _use(spec: str, preprocessing: Preprocessing = "recommended") -> Use:
    """An embedder, and how images are prepared for it: that of similarity alone can be chosen."""
    return spec, preprocessing


def _uses(settings: EvaluateSettings) -> dict[Use, set[View]]:
    """All embedders that the settings need, and what each is to see."""
    config = settings.evaluation
    wanted = [(_use(spec, config.preprocessing), _ALL) for spec in config.embedders]
    wanted.append((_use(RAW), _TO_TRAIN))
    if config.quality_embedder != "none" and not config.without_heldout:
        wanted.append((_use(config.quality_embedder), _AS_THEY_ARE))
    if config.clip_score is not None:
        wanted.append((_use(f"clip={config.clip_score}"), {("generated", False)}))
    uses: dict[Use, set[View]] = defaultdict(set)
    for use, views in wanted:
        uses[use] |= views
    return uses


def _of(features: Features, found: Sequence[Measure]) -> list[Measure]:
    """The same measures, with the name of the embedder."""
    return [replace(m, embedder=features.embedder.name) for m in found]


def _headlines(found: Sequence[Measure], embedder: str) -> list[Measure]:
    """The same measures, those marked that come first in a report; none that needs a warning."""
    of = {"excess_score": embedder, "memorization_score": embedder}
    names = {"l2_copies", "membership_auc", "heldout_loss", "kid"}
    first = (m.name in names or of.get(m.name, "") == m.embedder for m in found)
    return [replace(m, headline=f and not m.warning) for m, f in zip(found, first, strict=True)]


def _similarity(
    near: Closeness, own_G: np.ndarray, thresholds: Sequence[float], by: Resampling
) -> list[Measure]:
    return measures.copying(
        near.generated.value_QK[:, 0],
        None if (own_G < 0).any() else near.own_G,
        near.train.value_QK[:, 0],
        None if near.heldout is None else near.heldout.value_QK[:, 0],
        thresholds,
        by,
    )


def _whole(features: Features, near: Closeness, by: Resampling) -> list[Measure]:
    """What looks at the whole training set: authenticity, and C_T against held-out images."""
    found = [measures.authenticity(near.authentic(), near.train.value_QK[:, 0], by)]
    if "heldout" in features:
        sets = (unit(features[name]) for name in ("generated", "train", "heldout"))
        try:
            found.append(measure("Copying", "c_t", c_t(*sets, seed=by.seed).z))
        except UserError as error:  # too few images for this one measure
            found.append(replace(measure("Copying", "c_t", np.nan), warning=str(error)))
    return found


def _losses(
    settings: EvaluateSettings,
    model: Model,
    tables: dict[str, TableImages],
    sources: dict[str, Source],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Chosen images of both sets, equally many, and their stratified losses (N, S)."""
    config, seed = settings.evaluation, settings.generation.seed
    count = min(config.membership_samples, *map(len, tables.values()))
    if not count:
        return {}
    steps = model.pipeline.scheduler.config.num_train_timesteps
    timesteps = membership.stratified_timesteps(config.membership_timesteps, steps)
    losses = {}
    for name, table in tables.items():
        chosen = choose(len(table), count, seed)
        loss_NS = membership.stratified_losses(
            model.pipeline,
            Subset(table, chosen),
            [prompt_of(sources[name], i, seed, settings.data) for i in chosen],
            timesteps,
            seed,
            settings.data.resolution,
            progress=f"Losses, {name}",
        )
        losses[name] = chosen, loss_NS
    return losses


def _taken(
    settings: EvaluateSettings, model: Model, source: Source, chosen: np.ndarray
) -> dict[str, Any]:
    """What the losses of ``chosen`` images depend on beside the UNet, the images and the seed."""
    seed = settings.generation.seed
    captions = [prompt_of(source, i, seed, settings.data) for i in chosen]
    return {
        "samples": len(chosen),
        "timesteps": settings.evaluation.membership_timesteps,
        "names": _hashed([source.sample_ids[i] for i in chosen]),  # which settle the noise
        "captions": _hashed(captions),
        **membership.loss_terms(model.pipeline),
    }


def _hashed(texts: list[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _quality(
    settings: EvaluateSettings,
    features: dict[Use, Features],
    generations: Generations,
    by: Resampling,
) -> list[Measure]:
    config, found = settings.evaluation, []
    of = features.get(_use(config.quality_embedder))
    if of is not None and "heldout" in of:
        found += _of(of, measures.fidelity(of["generated"], of["heldout"], by))
    if config.clip_score is not None:
        clip = features[_use(f"clip={config.clip_score}")]
        prompts = clip.embedder.encode_text(generations.request.prompts)
        score_G = quality.clip_score(clip["generated"], prompts[generations.prompt_G])
        found += _of(clip, [measures.mean_of("Quality", "clip_score", score_G, by)])
    return found


def _quality_files(
    settings: EvaluateSettings, features: dict[Use, Features], output_dir: Path
) -> dict[str, Any] | None:
    """What the features of the quality measures are of; where they lie, seen from the report."""
    of = features.get(_use(settings.evaluation.quality_embedder))
    if of is None or "heldout" not in of:
        return None
    # Both without links: from where a link leads to, ".." does not lead back.
    folder = output_dir.resolve()
    files = {name: Path(of[name].filename).resolve() for name in ("generated", "heldout")}
    places = {name: Path(os.path.relpath(file, folder)) for name, file in files.items()}
    return {"embedder": _named(of.embedder)} | {n: path.as_posix() for n, path in places.items()}


def _named(embedder: Embedder) -> dict[str, str]:
    names = ("name", "preprocessing", "fingerprint")
    return {name: getattr(embedder, name) for name in names}


def _described(images: TableImages, data: DataConfig) -> dict[str, Any]:
    return {
        "name": data.dataset_name or data.train_data_dir,
        "split": data.dataset_split,
        "count": len(images),
        "fingerprint": images.fingerprint,
    }
