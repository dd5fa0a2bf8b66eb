"""Published weights: from their authors' address to the cache, once, and checked at every use."""

import hashlib
import logging
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import torch
from filelock import FileLock
from tqdm.auto import tqdm

from iet_sd.errors import UserError
from iet_sd.files import atomic_file, write_text_atomic

logger = logging.getLogger(__name__)
_CHUNK = 2**20
_TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class Published:
    """A file of weights at a public address.

    ``sha256`` is None where no checksum could be found: then the one of the first file that is
    met is kept beside it, and any later change is an error. This guards against damage, and
    against an exchange after the first download, not before it.
    """

    url: str
    sha256: str | None

    @property
    def filename(self) -> str:
        """The name of the file, in the cache as at its address."""
        return self.url.rsplit("/", 1)[1]


_SSCD = "https://dl.fbaipublicfiles.com/sscd-copy-detection/"
PUBLISHED = {
    # The checksum is not given by the authors, but by many projects that use the file.
    "sscd_disc_mixup": Published(
        _SSCD + "sscd_disc_mixup.torchscript.pt",
        "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56",
    ),
    "sscd_disc_large": Published(_SSCD + "sscd_disc_large.torchscript.pt", None),
    "inception": Published(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
}


def cached_path(name: str, cache_dir: str | Path | None) -> Path:
    """Where the weights of ``name`` lie once they are downloaded; default: with torch hub's."""
    folder = Path(cache_dir).expanduser() if cache_dir else Path(torch.hub.get_dir(), "checkpoints")
    return folder / PUBLISHED[name].filename


def fetch(name: str, cache_dir: str | Path | None) -> tuple[Path, str]:
    """The weights of ``name`` in the cache and their sha256, downloaded if they are not there.

    Errors: `UserError` for what cannot be downloaded, or is not the file that it should be.
    """
    published, path = PUBLISHED[name], cached_path(name, cache_dir)
    pin = path.with_name(f"{path.name}.sha256")
    trusting = published.sha256 is None and not pin.is_file()
    if trusting or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                _download(name, path)
            if trusting and not pin.is_file():
                write_text_atomic(pin, sha256_of(path) + "\n")
                logger.warning(
                    "No checksum of %s is published. The one of this file is kept in %s, and "
                    "checked from now on.",
                    path.name,
                    pin,
                )
    expected = published.sha256 or pin.read_text(encoding="utf-8").strip()
    found = sha256_of(path)
    if found != expected:
        source = "published for it" if published.sha256 else f"kept in {pin}"
        raise UserError(
            f"{path} is damaged or another file: its sha256 is {found}, and {expected} is {source}."
            " Delete it, and it will be downloaded again."
        )
    return path, found


def sha256_of(*paths: Path) -> str:
    """The sha256 of the content of files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def is_torchscript(path: Path) -> bool:
    """Whether a file is laid out as `torch.jit.save` does; nothing of it is run or unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile:
        return False
    return {"data.pkl", "constants.pkl"} <= names


def _download(name: str, path: Path) -> None:
    published, digest = PUBLISHED[name], hashlib.sha256()
    way_out = f"Try again; or get the file by other means and put it at {path}."
    logger.info("downloading %s", published.url)
    with atomic_file(path) as file:
        for chunk in _chunks(published.url, way_out):
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        found = digest.hexdigest()
        if published.sha256 is None and not is_torchscript(Path(file.name)):
            raise UserError(f"What {published.url} sent is not a TorchScript file. {way_out}")
        if published.sha256 not in (None, found):
            raise UserError(
                f"What {published.url} sent has the sha256 {found}, not {published.sha256} as "
                f"published: it is damaged or another file. {way_out}"
            )


def _chunks(url: str, way_out: str) -> Iterator[bytes]:
    try:
        with urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            with tqdm(total=response.length, unit="B", unit_scale=True, leave=False) as bar:
                while chunk := response.read(_CHUNK):
                    bar.update(len(chunk))
                    yield chunk
            if response.length:  # what the server announced and did not send
                raise OSError(f"the last {response.length} bytes did not come")
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{url} is not in the cache and could not be downloaded: {reason}. {way_out}"
        ) from error
