"""Embedders: what makes images comparable, named by a spec such as ``sscd_disc_mixup``.

Letters in shapes: B batch, C channels, H height, W width, D features.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from iet_sd.errors import UserError
from iet_sd.evaluation import networks
from iet_sd.evaluation.downloads import PUBLISHED, cached_path, fetch, sha256_of
from iet_sd.evaluation.networks import Network
from iet_sd.evaluation.preprocessing import LEGACY_DCR, SSCD, THUMBNAIL, thumbnail

Preprocessing = Literal["recommended", "legacy_dcr"]
# What comes after the = of a spec.
_FILE = "FILE"
_VALUES = {
    "pixels": None,
    "raw_pixels": None,
    "sscd_disc_mixup": _FILE,
    "sscd_disc_large": _FILE,
    "inception": _FILE,
    "torchscript": _FILE,
    "dinov2": "ID_OR_FOLDER",
    "clip": "ID_OR_FOLDER",
    "python": "MODULE:FUNCTION",
}
_SPECS = ", ".join(
    name + (f"[={value}]" if name in PUBLISHED else f"={value}" if value else "")
    for name, value in _VALUES.items()
)


@dataclass(frozen=True)
class Embedder:
    """Images to features, on one device."""

    name: str
    """The spec, without the folders of this machine."""
    fingerprint: str
    """Hash of weights and preprocessing: equal fingerprints give equal features."""
    preprocessing: str
    """In words, for a report."""
    preprocess: Callable[[Image.Image], Tensor]
    """Mode RGB to (C, H, W)."""
    forward: Callable[[Tensor], Tensor]
    """(B, C, H, W) on the device to (B, D)."""
    device: torch.device
    encode_text: Callable[[Sequence[str]], np.ndarray] | None = None
    """Texts to (B, D), comparable with images by cosine; CLIP only."""

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Features of ``images`` (mode RGB): (B, D) float32."""
        return self.features([self.preprocess(image) for image in images])

    def features(self, inputs: Sequence[Tensor]) -> np.ndarray:
        """Features of preprocessed images: (B, D) float32, one forward pass for each size.

        Errors: `UserError` if the network gives anything but D numbers an image.
        """
        by_shape: dict[torch.Size, list[int]] = {}
        for index, tensor in enumerate(inputs):
            by_shape.setdefault(tensor.shape, []).append(index)
        rows: dict[int, np.ndarray] = {}
        for indices in by_shape.values():
            rows |= zip(indices, self._forward([inputs[i] for i in indices]), strict=True)
        widths = sorted({len(row) for row in rows.values()})
        if len(widths) > 1:
            raise UserError(
                f"{self.name} gives {widths[0]} to {widths[-1]} numbers for images of unequal "
                "sizes: it needs images of one size."
            )
        return np.stack([rows[i] for i in range(len(inputs))])

    @torch.inference_mode()
    def _forward(self, inputs: list[Tensor]) -> np.ndarray:
        features = self.forward(torch.stack(inputs).to(self.device))
        if not isinstance(features, Tensor) or features.shape[:-1] != (len(inputs),):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise UserError(
                f"{self.name} must give features of the shape ({len(inputs)}, D) for "
                f"{len(inputs)} images; got {found}."
            )
        return features.float().cpu().numpy()


def build_embedder(
    spec: str,
    preprocessing: Preprocessing = "recommended",
    device: torch.device | str = "cpu",
    cache_dir: str | Path | None = None,
) -> Embedder:
    """The embedder of a spec, ready on ``device``.

    - ``pixels``: thumbnails of 32 x 32 less their mean, so that the cosine is the zero-mean
      normalised cross-correlation. ``raw_pixels``: all pixels in [0, 1], for Euclidean distances.
    - ``sscd_disc_mixup``, ``sscd_disc_large``: SSCD (Pizzi et al. 2022, arXiv 2202.10261);
      ``inception``: InceptionV3 of FID. Downloaded once, checked always; or ``NAME=FILE``.
    - ``torchscript=FILE``: any network. The code in the file is run, as that of SSCD is.
    - ``dinov2=ID_OR_FOLDER``, ``clip=ID_OR_FOLDER``: transformers, safetensors only.
    - ``python=MODULE:FUNCTION``: takes a list of images, returns an array (B, D). The module's
      file is part of the fingerprint; what it loads is not.

    preprocessing: ``recommended`` by the authors of the network (for TorchScript: SSCD's), or
    ``legacy_dcr`` for SSCD, TorchScript, DINOv2 and CLIP as in DCR; the others have their own only.
    cache_dir: of downloads; default: torch hub's and the Hub's.
    Errors: `UserError` as `check_embedder`, and for what cannot be downloaded or loaded.
    """
    check_embedder(spec, preprocessing, cache_dir)
    kind, value = _parse(spec)
    device = torch.device(device)
    # Functions get images, which lie in the memory of this machine.
    device = torch.device("cpu") if kind == "python" else device
    network = _load(kind, value, preprocessing, device, cache_dir)
    identity = json.dumps([network.digest, network.preprocessing])
    return Embedder(
        name=_shown(kind, value, network.digest),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        preprocessing=network.preprocessing,
        preprocess=network.preprocess,
        forward=network.forward,
        device=device,
        encode_text=network.encode_text,
    )


def check_embedder(
    spec: str,
    preprocessing: Preprocessing = "recommended",
    cache_dir: str | Path | None = None,
) -> None:
    """`UserError` for what can be known to fail before weights are loaded; asks no network."""
    if preprocessing not in ("recommended", "legacy_dcr"):
        raise UserError(f"Preprocessing must be recommended or legacy_dcr; got {preprocessing!r}.")
    kind, value = _parse(spec)
    if kind in networks.MODEL_TYPES:
        networks.check_transformer(kind, value, preprocessing == "recommended")
    elif kind == "python":
        _function(value)
    elif _VALUES[kind] is _FILE and (value or cached_path(kind, cache_dir).is_file()):
        path = Path(value).expanduser() if value else cached_path(kind, cache_dir)
        check = networks.check_file if kind == "inception" else networks.check_torchscript
        check(path)


def _parse(spec: str) -> tuple[str, str]:
    """The kind of a spec, and what follows the =, perhaps empty."""
    kind, equals, value = spec.partition("=")
    if kind not in _VALUES:
        raise UserError(f"{spec!r} is no embedder. Expected one of {_SPECS}.")
    if equals and (not value or _VALUES[kind] is None):
        raise UserError(f"{spec!r}: expected {_VALUES[kind] or 'nothing'} after {kind}=.")
    if not equals and _VALUES[kind] and kind not in PUBLISHED:
        raise UserError(f"{spec!r}: expected {kind}={_VALUES[kind]}.")
    return kind, value


def _shown(kind: str, value: str, digest: str) -> str:
    """The spec for a report: a file by its name, and one that is as published by its kind."""
    if not value or (kind in PUBLISHED and digest == PUBLISHED[kind].sha256):
        return kind
    is_local = kind != "python" and Path(value).expanduser().exists()
    return f"{kind}={Path(value).expanduser().resolve().name if is_local else value}"


def _load(
    kind: str,
    value: str,
    preprocessing: Preprocessing,
    device: torch.device,
    cache_dir: str | Path | None,
) -> Network:
    legacy = LEGACY_DCR if preprocessing == "legacy_dcr" else None
    if kind in networks.MODEL_TYPES:
        return networks.load_transformer(kind, value, legacy, device, cache_dir)
    if _VALUES[kind] is _FILE:
        path = Path(value).expanduser()
        path, digest = (path, sha256_of(path)) if value else fetch(kind, cache_dir)
        if kind == "inception":
            return networks.load_inception(path, digest, device)
        return networks.load_torchscript(path, digest, legacy or SSCD, device)
    if kind == "python":
        return _from_function(value)
    if kind == "pixels":
        words = f"averaged to {THUMBNAIL} x {THUMBNAIL}, mean removed"
        return Network(thumbnail, words, _centered, digest="")
    return Network(F.to_tensor, "none, pixels in [0, 1]", lambda x: x.flatten(1), digest="")


def _centered(images: Tensor) -> Tensor:
    rows = images.flatten(1)
    return rows - rows.mean(1, keepdim=True)


def _function(value: str) -> Callable[[list[Image.Image]], Any]:
    module, _, name = value.partition(":")
    try:
        function = getattr(import_module(module), name)
    except Exception as error:  # a user's module may fail in any way
        raise UserError(
            f"python={value} cannot be imported ({type(error).__name__}: {error}). Expected "
            "MODULE:FUNCTION of a module on the path of Python."
        ) from error
    if not callable(function):
        raise UserError(f"python={value} is {type(function).__name__}, not a function.")
    return function


def _from_function(value: str) -> Network:
    function = _function(value)
    file = getattr(import_module(value.partition(":")[0]), "__file__", None)
    source = sha256_of(Path(file)) if file else ""

    def forward(images: Tensor) -> Tensor:
        pictures = [F.to_pil_image(image) for image in images]
        return torch.from_numpy(np.asarray(function(pictures), dtype=np.float32))

    return Network(F.pil_to_tensor, "the function's own", forward, f"{value} {source}")
