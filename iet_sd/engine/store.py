"""Where proxies wait for their turn: in memory, or in memory-mapped files (``--proxy_store``).

A store holds the tensors of each shard's proxy, by name. The one in memory is a plain dict.
"""

import contextlib
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from iet_sd.errors import UserError

Tensors = dict[str, Tensor]
Store = MutableMapping[int, Tensors]
FOLDER = "waiting-proxies"


class DiskStore(MutableMapping[int, Tensors]):
    """A safetensors file a shard, read as a mapping: it takes memory only where it is in use.

    The files are worth nothing without the process that wrote them, so no write waits for the disk.
    """

    def __init__(self, folder: Path) -> None:
        """``folder`` is made when it is first needed."""
        self.folder = folder

    def __setitem__(self, shard: int, tensors: Tensors) -> None:
        path = self._path(shard)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Another file takes the place of the old one, so what is mapped of that stays as it is.
            save_file({name: t.contiguous() for name, t in tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            size = sum(t.nbytes for t in tensors.values()) / 2**30
            raise UserError(
                f"--proxy_store disk: {path} cannot be written ({error}). It takes {size:.2f} GiB, "
                "as does every other shard's. Make room, then go on with "
                "--resume_from_checkpoint latest."
            ) from error

    def __getitem__(self, shard: int) -> Tensors:
        path = self._path(shard)
        if not path.is_file():
            raise KeyError(shard)
        # Private to whoever asks: what is written into these tensors does not reach the file.
        return load_file(path)

    def __delitem__(self, shard: int) -> None:
        self._path(shard).unlink()

    def __iter__(self) -> Iterator[int]:
        return (int(path.stem) for path in sorted(self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard}.safetensors"


@contextlib.contextmanager
def open_store(
    kind: Literal["memory", "disk"], output_dir: Path, process_index: int, num_processes: int
) -> Iterator[Store]:
    """The store of a process's shards (k mod P); what is on disk goes away at the end.

    What a killed run left there must be gone before.
    """
    if kind == "memory":
        yield {}
        return
    store = DiskStore(output_dir / FOLDER)
    try:
        yield store
    finally:
        for shard in [shard for shard in store if shard % num_processes == process_index]:
            del store[shard]
        with contextlib.suppress(OSError):  # the files of other processes may still be there
            store.folder.rmdir()
