"""What is encoded once: which of images and captions can be, and the encoding.

The latent of a cached image is drawn anew in every visit, from the same posterior, and a caption's
embedding is what its encoder gives: training with caches equals training without, to rounding,
wherever `why_not` finds nothing to say.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from iet_sd.config import Config
from iet_sd.data.cache import Row, Table, cache_root, fill, open_table
from iet_sd.data.captions import readable, texts
from iet_sd.data.checks import cells
from iet_sd.data.dataset import Loader, TrainingImages
from iet_sd.data.latents import Latents, Texts, Variants, crops_drawn, pieces
from iet_sd.data.sources import Source
from iet_sd.engine import sizes
from iet_sd.engine.collectives import from_main, together
from iet_sd.engine.objective import posterior
from iet_sd.engine.plan import weight_dtype
from iet_sd.engine.second_pass import augmentation
from iet_sd.errors import UserError
from iet_sd.method import taa
from iet_sd.models.fingerprint import fingerprint
from iet_sd.models.loading import Components

logger = logging.getLogger(__name__)
# Of both tables: changed when what a row holds comes to mean something else.
_VERSION = 2
# What one pass of the VAE may hold: 8 images of 512 x 512.
_PIXELS = 8 * 512 * 512
_CAPTIONS = 32
# Bytes of what is kept of an image beside its latent: the original size, and where it is cropped.
_TOLD = 2 * 2 * torch.int64.itemsize


def why_not(config: Config, source: Source) -> dict[str, str]:
    """Why images, or captions, cannot be encoded once; nothing of what can be.

    Errors: `UserError` for ``--cache on`` where anything cannot.
    """
    data, training, reasons = config.data, config.training, {}
    if training.cache == "off":
        return dict.fromkeys(("images", "captions"), "--cache off")
    if None in source.digests:
        reasons["images"] = "--check_images none leaves unknown what they hold"
    elif crops_drawn(source, data) and training.cache_crops is None:
        reasons["images"] = (
            "a random crop is cut from them: choose how many are kept of each by --cache_crops, or "
            "use --center_crop"
        )
    if config.model.train_text_encoder:
        reasons["captions"] = "--train_text_encoder changes what they are encoded to"
    elif data.shuffle_caption:
        reasons["captions"] = "--shuffle_caption makes new ones in every visit"
    if reasons and training.cache == "on":
        listed = "; ".join(f"{what}, as {reason}" for what, reason in reasons.items())
        raise UserError(
            f"--cache on: cannot encode once and for all {listed}. Use --cache auto, which keeps "
            "what can be kept."
        )
    return reasons


@dataclass(frozen=True)
class Beforehand:
    """What is encoded before training; known without weights."""

    variants: Variants | None
    """The views of images, if images are."""
    augmented: Variants | None
    """Those of augmented images, if these are."""
    captions: list[str] | None
    """The captions, if these are; sorted."""
    reasons: dict[str, str]
    """Why the others are not."""

    def describe(self) -> str:
        """For people."""
        counts = {
            "views of images": self.variants,
            "views of augmented images": self.augmented,
            "captions": self.captions,
        }
        kept = " and ".join(f"{len(c)} {name}" for name, c in counts.items() if c is not None)
        lines = [f"{kept} are encoded once"] if kept else []
        lines += [f"{what} are encoded in every visit: {why}" for what, why in self.reasons.items()]
        return "; ".join(lines)

    def size(self, config: Config) -> int:
        """Bytes of the files with all of it, but for their headers; counted without weights."""
        parts = sizes.meta_components(config.model, config.data.cache_dir)
        dtype = weight_dtype(config.training.mixed_precision)
        texts = len(self.captions or ()) * sizes.encoded_caption(parts) * dtype.itemsize // 4
        images, vae_dtype = 0, parts.family.vae_dtype(parts.vae_config, dtype)
        for variants in filter(None, (self.variants, self.augmented)):
            row = 0
            for count in variants.groups:
                height, width = map(parts.latent_size, variants.size_of(row))
                numbers = 2 * parts.vae.config.latent_channels * height * width
                images += count * (numbers * vae_dtype.itemsize + _TOLD)
                row += count
        return texts + images


def choose(config: Config, source: Source, visits: int) -> Beforehand:
    """What to encode beforehand: what can be and pays, or with ``--cache on`` all.

    visits: looks at samples in the whole run; to encode more than that would not pay.
    Errors: `UserError` for ``--cache on`` where anything cannot be.
    """
    reasons, always = why_not(config, source), config.training.cache == "on"
    views = partial(Variants, source, config.data, config.training.cache_crops)
    variants = None if "images" in reasons else views()
    captions = None if "captions" in reasons else _captions(source, config)
    if variants is not None and len(variants) > visits and not always:
        variants, reasons["images"] = None, "there are more views of them than visits"
    method, augmented = config.method, None
    if variants is not None and method.taa and method.taa_variants:
        rule = method.taa_min_strength, method.taa_magnitude, method.taa_strength
        augmented = views([augmentation(m, method) for m in taa.whole_magnitudes(*rule)])
        if len(augmented) > visits and not always:
            reasons["augmented images"] = "there are more variants of them than visits"
            augmented = None
    if captions is not None and len(captions) > visits and not always:
        captions, reasons["captions"] = None, "there are more of them than visits"
    return Beforehand(variants, augmented, captions, reasons)


def cached_images(
    config: Config,
    source: Source,
    components: Components,
    beforehand: Beforehand,
    process_index: int = 0,
    num_processes: int = 1,
) -> TrainingImages:
    """The samples for training, encoded as ``beforehand`` says.

    Frozen networks that training needs no more are freed, or not even loaded; the others are loaded
    now. All processes take part, and share the work.
    Errors: `UserError` for a damaged file, or an image that has changed.
    """
    captions, read = beforehand.captions, components.tokenize
    table = partial(_table, config, components)
    if captions is not None:
        encoders = (*components.family.text_encoders, *components.family.tokenizers)
        texts_table = from_main(
            lambda: table("texts", encoders, captions, [len(captions)]),
            process_index,
            num_processes,
        )
        encode = partial(_encode_captions, components, captions)
        _fill(texts_table, encode, process_index, num_processes)
        read = Texts(captions, texts_table)
    workers, kept = config.training.dataloader_num_workers, {}
    for kind, variants in (("latents", beforehand.variants), ("augmented", beforehand.augmented)):
        if variants is None:
            continue
        latents_table = from_main(
            lambda kind=kind, v=variants: table(kind, ("vae",), v.describe(), v.groups),
            process_index,
            num_processes,
        )
        loader = Loader(variants, workers, pin_memory=components.device.type == "cuda")
        with closing(loader) as pictures:
            encode = partial(_encode_images, components, variants, pictures)
            _fill(latents_table, encode, process_index, num_processes)
        kept[kind] = Latents(variants, latents_table)
    logger.info("%s", beforehand.describe())
    encodes = "latents" not in kept or (config.method.taa and "augmented" not in kept)
    _keep(components, "vae", encodes)
    for name in components.family.text_encoders:
        _keep(components, name, captions is None)
    return TrainingImages(
        source, read, config.data, **kept, threads=workers, device=components.device
    )


def _keep(components: Components, part: str, needed: bool) -> None:
    """Load what training needs now, not in its midst; free what it doesn't."""
    if needed:
        getattr(components, part)
    else:
        components.release(part)


def _fill(
    table: Table, make: Callable[[range], Iterator[Row]], process_index: int, num_processes: int
) -> None:
    """Make what is missing of a table, each process a share of the files."""
    missing = from_main(table.missing, process_index, num_processes)
    mine = missing[process_index::num_processes]
    bar = tqdm(
        total=sum(len(rows) for _, rows in mine),
        desc=f"Encoding {table.kind}",
        disable=not mine or process_index > 0,
    )
    with bar, torch.no_grad():
        together(lambda: fill(mine, make, bar.update), num_processes)


def _table(
    config: Config,
    components: Components,
    kind: str,
    parts: Sequence[str],
    rows: Any,
    groups: Sequence[int],
) -> Table:
    """The table of rows that ``rows`` describes, made by ``parts`` of the model."""
    dtype = weight_dtype(config.training.mixed_precision)
    if kind != "texts":
        dtype = components.family.vae_dtype(components.vae_config, dtype)
    files = components.folder, components.variant, components.vae_folder
    depends_on = {
        "version": _VERSION,
        "weights": fingerprint(*files, parts),
        "dtype": str(dtype),
        "rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "number": sum(groups),
    }
    return open_table(cache_root(config.data.cache_dir), kind, depends_on, groups)


def _captions(source: Source, config: Config) -> list[str]:
    """All captions that a visit may read, sorted."""
    found = set()
    columns = source.sample_ids, cells(source.dataset, source.caption_column)
    for name, value in zip(*columns, strict=True):
        found |= readable(texts(value, name), config.data)
    return sorted(found)


def _encode_captions(components: Components, captions: Sequence[str], rows: range) -> Iterator[Row]:
    for piece in pieces(rows, _CAPTIONS):
        tokens = components.tokenize.batch([captions[row] for row in piece])
        on_device = {name: t.to(components.device) for name, t in tokens.items()}
        yield components.family.encode(components, on_device)


def _encode_images(
    components: Components, variants: Variants, pictures: Loader, rows: range
) -> Iterator[Row]:
    height, width = variants.size_of(rows[0])
    batches = pieces(rows, max(1, _PIXELS // (height * width)))
    for batch in pictures.batches(batches):
        mean, std = posterior(components.vae, batch.pop("pixel_values"), components.device)
        yield {"latent_mean": mean, "latent_std": std, **batch}
