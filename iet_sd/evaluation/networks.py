"""The networks that turn images into features, each loaded from files on this machine."""

import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torchvision.transforms import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from iet_sd.errors import UserError
from iet_sd.evaluation.downloads import is_torchscript, sha256_of
from iet_sd.evaluation.preprocessing import ResizeCropNormalize

# Kind of embedder: what config.json of a folder of transformers may say.
MODEL_TYPES = {"dinov2": ("dinov2", "dinov2_with_registers"), "clip": ("clip",)}
_CONFIGS = ("preprocessor_config.json", "processor_config.json")
_TOKENIZERS = ("tokenizer.json", "vocab.json")
_PATTERNS = ("*.json", "merges.txt", "*.safetensors")
_TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class Network:
    """How an image is prepared, in code and in words; the forward pass; a hash of the weights."""

    preprocess: Callable[[Image.Image], Tensor]
    preprocessing: str
    forward: Callable[[Tensor], Tensor]
    digest: str
    encode_text: Callable[[Sequence[str]], np.ndarray] | None = None


def check_torchscript(path: Path) -> None:
    """`UserError` for what `torch.jit.load` cannot load, as far as the layout of the file tells."""
    check_file(path)
    if not is_torchscript(path):
        raise UserError(
            f"{path} is not a TorchScript file, as torch.jit.save makes them. A file of torch.save "
            "(a pickle) holds weights without their network."
        )


def check_file(path: Path) -> None:
    """`UserError` unless ``path`` is a file."""
    if not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'not there'}: give a file.")


def load_torchscript(
    path: Path, digest: str, preprocessing: ResizeCropNormalize, device: torch.device
) -> Network:
    """A network in TorchScript: (B, 3, H, W) to (B, D).

    Loading and calling it runs code that the file holds, so use files of known origin only.
    """
    try:
        with warnings.catch_warnings():
            # torch calls TorchScript deprecated; SSCD comes in no other form.
            warnings.simplefilter("ignore", FutureWarning)
            network = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} cannot be loaded as TorchScript: {_first_line(error)}") from error
    return Network(preprocessing, preprocessing.words, network, digest)


def load_inception(path: Path, digest: str, device: torch.device) -> Network:
    """InceptionV3 of FID (torch-fidelity's inception-v3-compat): bytes of any size to (B, 2048).

    Errors: `UserError` for weights that are not those of this network, or hold more than tensors.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        # torch-fidelity unpickles whatever its file holds, so it gets a copy of what is safe.
        safe = io.BytesIO()
        torch.save(weights, safe)
        safe.seek(0)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=safe
        )
    except Exception as error:  # torch's reader raises anything on a broken file
        # What it says of pickles is an advice to run whatever code the file holds.
        unsafe = isinstance(error, UnpicklingError)
        why = "it is damaged, or holds more than tensors" if unsafe else _first_line(error)
        raise UserError(
            f"{path} does not hold the weights of torch-fidelity's InceptionV3: {why}"
        ) from error
    network = network.to(device)
    words = "torch-fidelity's own resize to 299 x 299"
    return Network(F.pil_to_tensor, words, lambda images: network(images)[0], digest)


def check_transformer(kind: str, source: str, needs_processor: bool) -> None:
    """`UserError` for a folder that cannot be loaded, or a name that is none on the Hub."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        _check_folder(kind, folder, needs_processor)
        return
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise UserError(
            f"{kind}={source}: there is no such folder, nor can a model on the Hub have this name."
        ) from error


def load_transformer(
    kind: str,
    source: str,
    preprocessing: ResizeCropNormalize | None,
    device: torch.device,
    cache_dir: str | Path | None,
) -> Network:
    """DINOv2 (class token after the last norm) or CLIP (projected), from safetensors alone.

    source: folder, or id on the Hub. preprocessing: None for the model's own.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _snapshot(kind, source, cache_dir)
    _check_folder(kind, folder, preprocessing is None)
    try:
        model, report = AutoModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded: {_first_line(error)}") from error
    if report["missing_keys"]:
        raise UserError(
            f"{folder} lacks {len(report['missing_keys'])} of the weights of its model, such as "
            f"{min(report['missing_keys'])}."
        )
    model = model.requires_grad_(False).eval().to(device)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if preprocessing is None:
        files.append(_first_there(folder, _CONFIGS))
        prepare, words = _own_preprocessing(folder)
    else:
        prepare, words = preprocessing, preprocessing.words
    forward = model.get_image_features if kind == "clip" else model
    return Network(
        preprocess=prepare,
        preprocessing=words,
        forward=lambda images: forward(pixel_values=images).pooler_output,
        digest=sha256_of(*files),
        encode_text=_text_tower(model, folder) if kind == "clip" else None,
    )


def _own_preprocessing(folder: Path) -> tuple[Callable[[Image.Image], Tensor], str]:
    # By Pillow and not torchvision, whose resize differs in the last bit: as the models were made.
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    size = ", ".join(f"{edge} {pixels}" for edge, pixels in dict(processor.size).items() if pixels)
    return (
        lambda image: processor(images=image, return_tensors="pt").pixel_values[0],
        f"the model's own {processor.image_processor_type}, {size}".replace("_", " "),
    )


def _text_tower(model: torch.nn.Module, folder: Path) -> Callable[[Sequence[str]], np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def encode_text(texts: Sequence[str]) -> np.ndarray:
        rows = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            tokens = tokenizer(
                list(texts[start : start + _TEXTS_AT_ONCE]),
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(model.device)
            rows.append(model.get_text_features(**tokens).pooler_output.cpu().numpy())
        return np.concatenate(rows)

    return encode_text


def _check_folder(kind: str, folder: Path, needs_processor: bool) -> None:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} has no readable config.json: {error}") from error
    if found not in MODEL_TYPES[kind]:
        raise UserError(
            f"{kind}={folder}: expected a model of type {' or '.join(MODEL_TYPES[kind])}; its "
            f"config.json says {found!r}."
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} holds no .safetensors file, and other weights (pickles) are not loaded. "
            "Take a model that has them, or save it again with save_pretrained."
        )
    needed = [_CONFIGS] * needs_processor + [_TOKENIZERS] * (kind == "clip")
    for names in needed:
        if _first_there(folder, names) is None:
            raise UserError(f"{folder} lacks {' or '.join(names)}, which comes with such a model.")


def _first_there(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _snapshot(kind: str, source: str, cache_dir: str | Path | None) -> Path:
    """The Hub's files of the model, from the cache where they are there already."""
    try:
        return Path(snapshot_download(source, cache_dir=cache_dir, allow_patterns=_PATTERNS))
    except GatedRepoError as error:
        raise UserError(
            f"{source} is gated: accept its terms on its page on the Hub, then run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{kind}={source}: neither a folder here nor a model on the Hub. Check the name; for a "
            "private model run `hf auth login`."
        ) from error
    except (OSError, HTTPError) as error:
        raise UserError(
            f"{kind}={source}: not a folder here, and the Hub cannot be reached for it, nor is all "
            f"of it in the cache ({_first_line(error)}). Check the connection, or give the path of "
            "a folder with the model."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
