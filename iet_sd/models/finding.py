"""Finding: from the name of a model to the folder with its files, here or on the Hub."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from iet_sd.config import ModelConfig
from iet_sd.errors import UserError
from iet_sd.models.family import PARTS
from iet_sd.models.layout import (
    SINGLE_FILE,
    check_channels,
    check_folder,
    check_vae,
    convert_hint,
    download_patterns,
    names_in,
    weights_file,
)


def check_model(config: ModelConfig, weights: bool = True) -> None:
    """`UserError` for what can be known to fail before weights are loaded; asks no network.

    Without ``weights`` they need not even be there.
    """
    name, vae = config.pretrained_model_name_or_path, config.pretrained_vae_model_name_or_path
    if folder := _local(name, "a pipeline folder", "StableDiffusionPipeline"):
        check_folder(folder, config, weights)
        for flag in ("revision", "non_ema_revision"):
            if getattr(config, flag) is not None:
                raise UserError(
                    f"--{flag} names a revision on the Hub, and {name} is a folder here."
                )
    if vae is not None and (folder := _local(vae, "the folder of a VAE", "AutoencoderKL")):
        check_vae(folder, vae, weights)


def find_folder(config: ModelConfig, cache_dir: str | None, weights: bool = True) -> Path:
    """Where the checked pipeline lies; fetched where it is on the Hub and not here yet.

    Without ``weights`` all but these.
    Errors: `UserError` for a model that isn't there, can't be reached, or is of no family of ours.
    """
    check_model(config, weights)
    name = config.pretrained_model_name_or_path
    folder = Path(name).expanduser()
    if not folder.is_dir():
        patterns = download_patterns(config.variant, weights)
        folder = _download(name, config.revision, cache_dir, patterns)
        check_folder(folder, config, weights, lambda: _names(name, config.revision, folder))
    return folder


def find_unet(config: ModelConfig, folder: Path, cache_dir: str | None) -> tuple[Path, str | None]:
    """Where the UNet lies that training starts from, and the variant of its weights.

    That of the pipeline in ``folder``, or of ``non_ema_revision``, which has no variant.
    Errors: `UserError` for a revision that isn't there, can't be reached, or holds no UNet.
    """
    revision = config.non_ema_revision
    if revision is None:
        return folder / "unet", config.variant
    name, part = config.pretrained_model_name_or_path, PARTS["unet"]
    weights = weights_file("unet", None)
    files = [f"unet/{part.config}", f"unet/{weights}"]
    unet = _download(name, revision, cache_dir, files) / "unet"
    if not (unet / weights).is_file():
        raise UserError(f"--non_ema_revision {revision}: {name} has no unet/{weights} there.")
    return unet, None


def find_vae(
    config: ModelConfig, folder: Path, cache_dir: str | None, weights: bool = True
) -> Path | None:
    """Where the checked VAE lies that replaces that of the pipeline in ``folder``, if any does.

    Errors: `UserError` for one that isn't there, can't be reached, or doesn't fit the UNet.
    """
    name = config.pretrained_vae_model_name_or_path
    if name is None:
        return None
    vae = Path(name).expanduser()
    if not vae.is_dir():
        files = [PARTS["vae"].config, *[weights_file("vae", None)] * weights]
        vae = _download(name, None, cache_dir, files)
        check_vae(vae, name, weights)
    check_channels(folder / "unet", vae, f"{config.pretrained_model_name_or_path} with {name}")
    return vae


def _local(name: str, what: str, single_file_class: str) -> Path | None:
    """The folder ``name``, None if that is an id on the Hub; `UserError` if it is neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file() or name.endswith(SINGLE_FILE):
        problem = "is a single file" if path.is_file() else "is no folder, and no such file exists"
        raise UserError(f"{name} {problem}. {convert_hint(name, single_file_class)}")
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise UserError(
            f"There is no folder {name}. Expected {what}, or a model id on the Hub such as "
            "name/model."
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name!r} is neither a folder here nor a valid model id on the Hub: {error}"
        ) from error
    return None


def _names(name: str, revision: str | None, folder: Path) -> list[str]:
    """The files of the Hub's model ``name``; without the Hub those in ``folder``, a part of it."""
    try:
        return sorted(HfApi().list_repo_files(name, revision=revision))
    except (OSError, HTTPError):
        return names_in(folder)


def _download(name: str, revision: str | None, cache_dir: str | None, patterns: list[str]) -> Path:
    """Files of the Hub's model ``name``, from the cache where they are there already."""
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=patterns,
        )
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its terms on its page on the Hub, then run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name} is neither a folder here nor a model on the Hub. Check the name; for a "
            "private model run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision!r} on the Hub.") from error
    except (OSError, HTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name} is not a folder here, and the Hub cannot be reached for it, nor is all of it "
            f"in the cache ({reason}). Check the connection, or give the path of a pipeline folder."
        ) from error
    return Path(folder)
