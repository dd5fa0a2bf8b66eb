"""What is encoded once: where it lies, whether the disk has room for it, and the encoding."""

import errno
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from iet_sd.config import Config
from iet_sd.data.cache import Row, Table, cache_root, fill, find_table
from iet_sd.data.dataset import Loader, TrainingImages
from iet_sd.data.latents import Latents, Texts, Variants, pieces
from iet_sd.data.sources import Source
from iet_sd.engine.beforehand import Beforehand, refused
from iet_sd.engine.collectives import from_main, together
from iet_sd.engine.objective import posterior
from iet_sd.engine.plan import gib, weight_dtype
from iet_sd.errors import UserError
from iet_sd.files import free_bytes
from iet_sd.models.fingerprint import fingerprint
from iet_sd.models.loading import Components

logger = logging.getLogger(__name__)
# Of both tables: changed when what a row holds comes to mean something else.
_VERSION = 2
# What one pass of the VAE may hold: 8 images of 512 x 512.
_PIXELS = 8 * 512 * 512
_CAPTIONS = 32
# The kind of the table of what is encoded.
_KINDS = {"captions": "texts", "images": "latents", "augmented images": "augmented"}
# What --cache auto takes of a disk's free space at most: the rest is for checkpoints.
_SHARE = 0.5


def fit(
    config: Config, components: Components, beforehand: Beforehand
) -> tuple[dict[str, tuple[Table, int]], dict[str, str]]:
    """What of ``beforehand`` the disk has room for, by what it is: the table, and the bytes that
    are yet to be written of it. And why the rest is not kept.

    Nothing is written, so a dry run may ask; its ``components`` may be without weights.
    Errors: `UserError` for a damaged table, and for ``--cache on`` where anything is not kept.
    """
    tables = _tables(config, components, beforehand)
    missing = {what: sum(len(r) for _, r in table.missing()) for what, table in tables.items()}
    whole = beforehand.sizes(config) if any(missing.values()) else dict.fromkeys(tables, 0)
    always, taken, kept, reasons = config.training.cache == "on", 0, {}, {}
    for what, table in tables.items():
        need = whole[what] * missing[what] // max(1, len(table))
        if need and (reason := _no_room(table.folder, need, taken, always)):
            reasons[what] = reason
        else:
            taken += need
            kept[what] = table, need
    if reasons and always:
        raise refused(
            reasons,
            "Give a --cache_dir that you may write to, on a disk with room, or use --cache auto, "
            "which keeps what can be kept, or --cache off.",
        )
    return kept, reasons


def _no_room(folder: Path, need: int, taken: int, always: bool) -> str:
    """Why ``need`` bytes cannot be kept in ``folder``, beside ``taken`` more; empty if they can."""
    try:
        free = free_bytes(folder)
    except OSError as error:
        return f"{folder} cannot be written to: {error.strerror}"
    room = (free if always else int(free * _SHARE)) - taken
    if need <= room:
        return ""
    rest = "" if always else f" ({gib(free)} are free, and half of that is left for checkpoints)"
    return f"{folder} has room for {gib(room)} and {gib(need)} are to be written{rest}"


def cached_images(
    config: Config,
    source: Source,
    components: Components,
    beforehand: Beforehand,
    process_index: int = 0,
    num_processes: int = 1,
) -> TrainingImages:
    """The samples for training, encoded as ``beforehand`` says, as far as the disk has room.

    Frozen networks that training needs no more are freed, or not even loaded; the others are loaded
    now. All processes take part, and share the work.
    Errors: `UserError` for a damaged file, an image that has changed, or a disk that is full before
    all is written; and as `fit`.
    """
    processes = process_index, num_processes
    # Settled by one process: another may look when the disk is fuller.
    fitting, reasons = from_main(lambda: fit(config, components, beforehand), *processes)
    beforehand = beforehand.without(reasons)
    captions, read = beforehand.captions, components.tokenize
    if captions is not None:
        encode = partial(_encode_captions, components, captions)
        read = Texts(captions, _filled(*fitting["captions"], encode, *processes))
    workers, kept = config.training.dataloader_num_workers, {}
    for what, variants in beforehand.views.items():
        loader = Loader(variants, workers, pin_memory=components.device.type == "cuda")
        with closing(loader) as pictures:
            encode = partial(_encode_images, components, variants, pictures)
            kept[_KINDS[what]] = Latents(variants, _filled(*fitting[what], encode, *processes))
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


def _filled(
    table: Table,
    need: int,
    make: Callable[[range], Iterator[Row]],
    process_index: int,
    num_processes: int,
) -> Table:
    """Make what is missing of a table, of ``need`` bytes, each process a share of the files."""
    missing = from_main(table.missing, process_index, num_processes)
    mine = missing[process_index::num_processes]
    bar = tqdm(
        total=sum(len(rows) for _, rows in mine),
        desc=f"Encoding {table.kind}",
        disable=not mine or process_index > 0,
    )
    with bar, torch.no_grad(), _full_disk_told(table.folder, need):
        together(lambda: fill(table, mine, make, bar.update), num_processes)
    return table


@contextmanager
def _full_disk_told(folder: Path, need: int) -> Iterator[None]:
    """Errors: `UserError` for a disk that others have filled while ``need`` bytes were written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{folder}, of what is encoded once, cannot be written to its end: {error.strerror}. "
            f"At the start {gib(need)} were missing. Give a --cache_dir on a disk with room, or "
            "use --cache off; or make room and start again: a build that was stopped goes on."
        ) from error


def _tables(config: Config, components: Components, beforehand: Beforehand) -> dict[str, Table]:
    """The tables of what is encoded beforehand, by what it is, in the order of their making."""
    table, found = partial(_table, config, components), {}
    if (captions := beforehand.captions) is not None:
        encoders = (*components.family.text_encoders, *components.family.tokenizers)
        found["captions"] = table(_KINDS["captions"], encoders, captions, [len(captions)])
    for what, variants in beforehand.views.items():
        found[what] = table(_KINDS[what], ("vae",), variants.describe(), variants.groups)
    return found


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
    if kind != _KINDS["captions"]:
        dtype = components.family.vae_dtype(components.vae_config, dtype)
    files = components.folder, components.variant, components.vae_folder
    try:
        weights = fingerprint(*files, parts)
    except FileNotFoundError:  # yet to be downloaded, so there is no table of theirs
        weights = None
    depends_on = {
        "version": _VERSION,
        "weights": weights,
        "dtype": str(dtype),
        "rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "number": sum(groups),
    }
    return find_table(cache_root(config.data.cache_dir), kind, depends_on, groups)


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
