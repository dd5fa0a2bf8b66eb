"""Visits to samples become batches of pixels and tokens.

Letters in shapes: B batch, H height, W width, L tokens of a caption.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iet_sd.config import DataConfig
from iet_sd.data.captions import draw, texts
from iet_sd.data.images import decode
from iet_sd.data.shards import Visit
from iet_sd.data.sources import Source
from iet_sd.data.transforms import view
from iet_sd.errors import UserError


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of examples of one size: each entry of theirs, stacked."""
    return {
        name: torch.stack([torch.as_tensor(example[name]) for example in examples])
        for name in examples[0]
    }


def loader(
    dataset: "TrainingImages",
    batches: Iterator[list[Visit]],
    num_workers: int,
    pin_memory: bool,
) -> Iterator[dict[str, Tensor]]:
    """The batches of these visits.

    Workers read ahead, so ``batches`` may be further on than what was handed out. They start with
    the first batch, whatever the start method of `multiprocessing`, and end when the iterator is
    closed or dropped.
    Errors: `UserError` for an image that cannot be read.
    """
    made = DataLoader(
        _Batches(dataset),
        sampler=batches,
        batch_size=None,  # the sampler gives whole batches
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it draws from torch's global one
    )
    for batch in made:
        if isinstance(batch, UserError):
            raise batch
        yield batch


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
        """What the visit sees: pixel_values (3, H, W) in [-1, 1], input_ids (L,), index, seed.

        And what SDXL is told of the pixels, (height, width) each: original_size of the stored
        image, rotated upright; crop_top_left in the resized one; target_size (H, W).

        magnitude: of RandAugment with ``num_ops`` operations; None for the plain image. Caption,
        crop and flip are the same either way.
        Errors: `UserError` for an image that cannot be read, or is gone or has changed since the
        source was loaded.
        """
        name = self.source.sample_ids[visit.index]
        row = self.source.dataset[visit.index]
        size = self.source.sizes[visit.index]
        seen = view(
            self._picture(row[self.source.image_column], name, self.source.digests[visit.index]),
            size=size,
            center_crop=self.config.center_crop,
            random_flip=self.config.random_flip,
            interpolation=self.config.image_interpolation_mode,
            generator=visit.generator("view"),
            magnitude=magnitude,
            num_ops=num_ops,
        )
        # A sample may have none only if the settings allow for it.
        captions = texts(row[self.source.caption_column], name)
        return {
            **seen._asdict(),
            "target_size": size,
            **self.tokenize(draw(captions, self.config, visit)),
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
