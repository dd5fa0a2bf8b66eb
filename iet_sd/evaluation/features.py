"""Features of image sets, computed once: in parts, by all processes, kept on disk.

Letters in shapes: N images, D features.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from iet_sd.errors import UserError
from iet_sd.evaluation.embedders import Embedder
from iet_sd.evaluation.images import ImageSet
from iet_sd.files import atomic_file

PART_ROWS = 1024
# Of a file, while it is looked through for NaN.
_CHUNK_BYTES = 2**26


def embed(
    embedder: Embedder,
    images: ImageSet,
    cache_dir: Path | str,
    *,
    flip: bool = False,
    batch_size: int = 64,
    process_index: int = 0,
    num_processes: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: str = "",
) -> np.ndarray:
    """Features of all ``images``: (N, D) float32, mapped from a file in ``cache_dir``.

    They are computed in parts of 1,024 rows, each of which is written as a whole or not at all, so
    a run that was broken off goes on where it stopped, with any number of processes. All processes
    make this call together and see one ``cache_dir``. The batches, and so the features, are the
    same for any number of processes.

    flip: of the mirrored images. progress: title of the progress bar; none if empty.
    Errors: `UserError` for no images, an image that cannot be read or gives NaN, a damaged file;
    `OSError` for a full disk.
    """
    if not len(images):
        raise UserError("There are no images to embed.")
    key = json.dumps([embedder.fingerprint, images.fingerprint, flip])
    folder = Path(cache_dir, "features", hashlib.sha256(key.encode()).hexdigest()[:32])
    joined = folder / "features.npy"
    parts = [
        (folder / f"part-{number:05d}.npy", range(start, min(start + PART_ROWS, len(images))))
        for number, start in enumerate(range(0, len(images), PART_ROWS))
    ]
    if not joined.is_file():
        mine = parts[process_index::num_processes]
        total = sum(len(rows) for _, rows in mine)
        quiet = not progress or process_index > 0
        with tqdm(total=total, desc=progress, disable=quiet) as bar, ThreadPoolExecutor() as pool:
            for path, rows in mine:
                if not path.is_file():
                    batches = _batches(embedder, images, rows, flip, batch_size, pool)
                    _write(path, len(rows), batches)
                bar.update(len(rows))
    barrier()
    if process_index == 0:
        if not joined.is_file():
            _write(joined, len(images), _read(parts))
        for path, _ in parts:
            path.unlink(missing_ok=True)
    barrier()
    _require_finite(joined, len(images))
    return _open(joined, len(images))


def _batches(
    embedder: Embedder,
    images: ImageSet,
    rows: range,
    flip: bool,
    batch_size: int,
    pool: ThreadPoolExecutor,
) -> Iterator[np.ndarray]:
    def prepared(index: int) -> Tensor:
        image = images[index]
        return embedder.preprocess(ImageOps.mirror(image) if flip else image)

    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        features = embedder.features(list(pool.map(prepared, batch)))
        for index, row in zip(batch, features, strict=True):
            if not np.isfinite(row).all():
                raise UserError(
                    f"{embedder.name} gives NaN or infinity for image {images.ids[index]}."
                )
        yield features


def _write(path: Path, rows: int, chunks: Iterable[np.ndarray]) -> None:
    """Write (rows, D) float32 from chunks of its rows, as an .npy file."""
    width = None
    with atomic_file(path) as file:
        for chunk in chunks:
            if width is None:
                width = chunk.shape[1]
                header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
                np.lib.format.write_array_header_1_0(file, header)
            if chunk.shape[1] != width:
                raise UserError(
                    f"Some images give {width} features and some {chunk.shape[1]}: for this "
                    f"embedder all must be of one size. If they are, delete {path.parent}."
                )
            # Not np.save, whose way of writing does not tell why it failed.
            file.write(chunk.astype("<f4").tobytes())


def _read(parts: list[tuple[Path, range]]) -> Iterator[np.ndarray]:
    for path, rows in parts:
        if not path.is_file():
            raise UserError(
                f"{path} is not there. All processes must see the same folder; if they do, "
                "another run has removed it: run again."
            )
        _require_finite(path, len(rows))
        yield _open(path, len(rows))


def _open(path: Path, rows: int) -> np.memmap:
    """The array of a file, mapped. Errors: `UserError` unless it is (rows, D) float32."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(array, np.memmap) or array.dtype != np.float32 or array.ndim != 2:
        raise _damaged(path, "not a matrix of float32")
    if len(array) != rows:
        raise _damaged(path, f"{len(array)} rows for {rows} images")
    return array


def _require_finite(path: Path, rows: int) -> None:
    step = max(1, _CHUNK_BYTES // (_open(path, rows).itemsize * _open(path, rows).shape[1]))
    for start in range(0, rows, step):
        # Mapped anew each time, or the whole of the file would stay in memory.
        if not np.isfinite(_open(path, rows)[start : start + step]).all():
            raise _damaged(path, "NaN or infinity among its numbers")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged ({what}). Delete it, and it will be made again.")
