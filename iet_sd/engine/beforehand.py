"""Which of images and captions are encoded once: what can be, and pays.

The latent of a cached image is drawn anew in every visit, from the same posterior, and a caption's
embedding is what its encoder gives: training with caches equals training without, to rounding,
wherever `why_not` finds nothing to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from iet_sd.config import Config
from iet_sd.data.captions import readable, texts
from iet_sd.data.checks import cells
from iet_sd.data.latents import Variants, crops_drawn
from iet_sd.data.sources import Source
from iet_sd.engine import sizes
from iet_sd.engine.plan import weight_dtype
from iet_sd.engine.second_pass import augmentation
from iet_sd.errors import UserError
from iet_sd.method import taa

# Bytes of what is kept of an image beside its latent: the original size, and where it is cropped.
_TOLD = 2 * 2 * torch.int64.itemsize
# What may be encoded, and where `Beforehand` has it.
_FIELDS = {"images": "variants", "augmented images": "augmented", "captions": "captions"}


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
        raise refused(reasons, "Use --cache auto, which keeps what can be kept.")
    return reasons


def refused(reasons: Mapping[str, str], way_on: str) -> UserError:
    """Of ``--cache on``."""
    listed = "; ".join(f"{what}, as {reason}" for what, reason in reasons.items())
    return UserError(f"--cache on: cannot encode once and for all {listed}. {way_on}")


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

    @property
    def views(self) -> dict[str, Variants]:
        """Those that are encoded, by what they are of."""
        return {what: part for what, part in self._parts().items() if isinstance(part, Variants)}

    def describe(self) -> str:
        """For people."""
        views = self.views
        kept = " and ".join(
            f"{len(part)} {'views of ' if what in views else ''}{what}"
            for what, part in self._parts().items()
        )
        lines = [f"{kept} are encoded once"] if kept else []
        lines += [f"{what} are encoded in every visit: {why}" for what, why in self.reasons.items()]
        return "; ".join(lines)

    def without(self, reasons: Mapping[str, str]) -> "Beforehand":
        """The same but for what these reasons speak of."""
        left = {_FIELDS[what]: None for what in reasons}
        return replace(self, reasons={**self.reasons, **reasons}, **left)

    def _parts(self) -> dict[str, Variants | list[str]]:
        """What is encoded, by what it is of."""
        parts = {what: getattr(self, field) for what, field in _FIELDS.items()}
        return {what: part for what, part in parts.items() if part is not None}

    def sizes(self, config: Config) -> dict[str, int]:
        """Bytes of the files with each part, but for their headers; counted without weights."""
        parts = sizes.meta_components(config.model, config.data.cache_dir)
        dtype, found = weight_dtype(config.training.mixed_precision), {}
        if self.captions is not None:
            each = sizes.encoded_caption(parts) * dtype.itemsize // 4
            found["captions"] = len(self.captions) * each
        vae_dtype = parts.family.vae_dtype(parts.vae_config, dtype)
        for what, variants in self.views.items():
            found[what] = row = 0
            for count in variants.groups:
                height, width = map(parts.latent_size, variants.size_of(row))
                numbers = 2 * parts.vae.config.latent_channels * height * width
                found[what] += count * (numbers * vae_dtype.itemsize + _TOLD)
                row += count
        return found


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


def _captions(source: Source, config: Config) -> list[str]:
    """All captions that a visit may read, sorted."""
    found = set()
    columns = source.sample_ids, cells(source.dataset, source.caption_column)
    for name, value in zip(*columns, strict=True):
        found |= readable(texts(value, name), config.data)
    return sorted(found)
