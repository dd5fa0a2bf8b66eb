"""Visits to samples become batches of pixels and tokens.

Letters in shapes: B batch, R resolution, L tokens of a caption.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iet_sd.config import DataConfig
from iet_sd.data.captions import texts
from iet_sd.data.images import decode
from iet_sd.data.shards import Visit
from iet_sd.data.sources import Source
from iet_sd.data.transforms import view
from iet_sd.errors import UserError
from iet_sd.seeding import seed_for


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of examples: pixel_values (B, 3, R, R), input_ids (B, L), index (B,), seed (B,)."""
    return {
        name: torch.stack([torch.as_tensor(example[name]) for example in examples])
        for name in examples[0]
    }


def loader(
    dataset: "TrainingImages",
    visits: Iterator[Visit],
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[dict[str, Tensor]]:
    """Batches of the next ``batch_size`` visits each, for as long as there are visits.

    Workers read ahead, so ``visits`` may be further on than the batches handed out. They end when
    the iterator is closed or dropped.
    Errors: `UserError` for an image that cannot be read.
    """
    batches = DataLoader(
        _Batches(dataset),
        sampler=_Chunks(visits, batch_size),
        batch_size=None,  # the sampler gives whole batches
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it draws from torch's global one
    )
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _generator(visit: Visit, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_for(visit.seed, purpose))


@dataclass(eq=False)
class TrainingImages(Dataset):
    """The samples of a source, each looked up by a `Visit`, which settles all that is random."""

    source: Source
    tokenize: Callable[[str], dict[str, Tensor]]
    """The tokens of a caption, by their names in a batch."""
    config: DataConfig

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.source.dataset)

    def __getitem__(self, visit: Visit) -> dict[str, Any]:
        """The example of a visit, not augmented."""
        return self.example(visit)

    def example(
        self, visit: Visit, magnitude: float | None = None, num_ops: int = 2
    ) -> dict[str, Any]:
        """What the visit sees: pixel_values (3, R, R) in [-1, 1], input_ids (L,), index, seed.

        magnitude: of RandAugment with ``num_ops`` operations; None for the plain image. Caption,
        crop and flip are the same either way.
        Errors: `UserError` for an image that cannot be read, or is gone or has changed since the
        source was loaded.
        """
        name = self.source.sample_ids[visit.index]
        row = self.source.dataset[visit.index]
        pixel_values = view(
            self._picture(row[self.source.image_column], name, self.source.digests[visit.index]),
            resolution=self.config.resolution,
            center_crop=self.config.center_crop,
            random_flip=self.config.random_flip,
            interpolation=self.config.image_interpolation_mode,
            generator=_generator(visit, "view"),
            magnitude=magnitude,
            num_ops=num_ops,
        )
        caption = self._caption(row[self.source.caption_column], name, visit)
        return {
            "pixel_values": pixel_values,
            **self.tokenize(caption),
            "index": visit.index,
            "seed": visit.seed,
        }

    def _picture(self, record: Any, name: str, digest: str | None) -> Image.Image:
        try:
            return decode(record, name, digest)
        except UserError as error:
            if digest is None:
                raise
            raise UserError(
                f"{error}. It could be read when this run started. Put it back as it was, then go "
                "on with --resume_from_checkpoint latest; other images need a new run."
            ) from error

    def _caption(self, cell: Any, name: str, visit: Visit) -> str:
        """One of the sample's captions; an empty one if it has none, which the source allowed."""
        captions = texts(cell, name) or [""]
        return captions[torch.randint(len(captions), (), generator=_generator(visit, "caption"))]


class _Batches(Dataset):
    """Whole batches by their visits, made in a worker; a user's error as a value.

    Were it raised in a worker, torch would put the worker's traceback into its message.
    """

    def __init__(self, dataset: TrainingImages) -> None:
        self.dataset = dataset

    def __getitem__(self, visits: list[Visit]) -> dict[str, Tensor] | UserError:
        try:
            return collate([self.dataset[visit] for visit in visits])
        except UserError as error:
            return UserError(*error.args)  # without its traceback and cause, which may not pickle


class _Chunks(Iterable[list[Visit]]):
    """Lists of ``size`` visits; the last is shorter if the visits end."""

    def __init__(self, visits: Iterator[Visit], size: int) -> None:
        self.visits = visits
        self.size = size

    def __iter__(self) -> Iterator[list[Visit]]:
        while chunk := list(islice(self.visits, self.size)):
            yield chunk
