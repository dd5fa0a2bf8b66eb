"""Tensors that cost much to make, in files that are mapped into memory and shared by processes.

A `Table` has rows of named tensors, cut into files of a few hundred rows. Its folder is named by a
hash of all that the rows depend on, so a change of any of it is another table and nothing there
can be stale. Files are written whole or not at all: a build that was stopped goes on where it was.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from iet_sd.errors import UserError
from iet_sd.files import atomic_file, write_text_atomic

# About 30 MB of text embeddings, or 15 MB of latents, of Stable Diffusion 1.5 in fp16.
ROWS = 256
_INDEX = "index.json"
Row = Mapping[str, Tensor]


def cache_root(cache_dir: str | None) -> Path:
    """The folder of all tables: under ``cache_dir``, by default beside what Hugging Face keeps."""
    return Path(cache_dir or huggingface_hub.constants.HF_HOME).expanduser() / "iet_sd"


@dataclass(eq=False)
class Table:
    """Rows of named tensors; those of one file have the same shapes."""

    kind: str
    folder: Path
    groups: Sequence[int]
    """Sizes of the groups of rows that have the same shapes, in the order of the rows."""
    index: str
    """What the rows depend on, as JSON."""
    _open: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        starts, first = [], 0
        for size in self.groups:
            starts += range(first, first + size, ROWS)
            first += size
        self._starts = torch.tensor(starts)
        self.files = [
            (self.folder / f"{number:05d}.safetensors", range(start, stop))
            for number, (start, stop) in enumerate(zip(starts, [*starts[1:], first], strict=True))
        ]
        """Each file, and the rows it holds."""

    def __len__(self) -> int:
        return sum(self.groups)

    def missing(self) -> list[tuple[Path, range]]:
        """The files that are yet to be made, as far as can be seen."""
        return [(path, rows) for path, rows in self.files if not os.path.isfile(path)]

    def __getitem__(self, row: int) -> Row:
        """The tensors of a row: views of the mapped file.

        Errors: `UserError` for a file that is gone or damaged.
        """
        number = int(torch.searchsorted(self._starts, row, right=True)) - 1
        if number not in self._open:
            self._open[number] = _mapped(*self.files[number])
        place = row - int(self._starts[number])
        return {name: tensor[place] for name, tensor in self._open[number].items()}

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: a worker makes its own, which share memory as these do."""
        return {**self.__dict__, "_open": {}}


def find_table(
    root: Path, kind: str, depends_on: Mapping[str, Any], groups: Sequence[int]
) -> Table:
    """The table of ``kind`` whose rows depend on ``depends_on`` (as JSON) and nothing else.

    It may have no files yet; nothing is written.
    Errors: `UserError` if the folder of this name says that it is of something else.
    """
    text = json.dumps(depends_on, indent=1, sort_keys=True)
    folder = root / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    index = folder / _INDEX
    if os.path.isfile(index) and index.read_text("utf-8") != text:
        raise UserError(
            f"{index} does not describe what its folder is named after: it is damaged, or was "
            f"edited. Delete {folder}; it will be made again."
        )
    return Table(kind, folder, groups, text)


def fill(
    table: Table,
    files: Sequence[tuple[Path, range]],
    make: Callable[[range], Iterator[Row]],
    advance: Callable[[int], None],
) -> None:
    """Write files of a table from what ``make`` gives for their rows, batch by batch, stacked.

    ``advance`` is told how many rows were made. Processes may fill one table together.
    """
    if files and not (table.folder / _INDEX).is_file():
        write_text_atomic(table.folder / _INDEX, table.index)
    for path, rows in files:
        batches = []
        for batch in make(rows):
            batches.append(batch)
            advance(len(next(iter(batch.values()))))
        whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        assert all(len(tensor) == len(rows) for tensor in whole.values())
        with atomic_file(path) as file:
            file.write(save({name: tensor.contiguous().cpu() for name, tensor in whole.items()}))


def _mapped(path: Path, rows: range) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if all(len(tensor) == len(rows) for tensor in found.values()):
            return found
        reason = "it holds another number of rows"
    except (OSError, SafetensorError) as error:
        reason = str(error)
    raise UserError(
        f"The cache file {path} cannot be used: {reason}. Delete it and start again: it will be "
        "made again. Or train with --cache off."
    )
