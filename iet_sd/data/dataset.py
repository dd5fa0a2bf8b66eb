"""Visits to samples become batches of pixels and tokens.

Letters in shapes: B batch, H height, W width, L tokens of a caption.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iet_sd.config import DataConfig
from iet_sd.data.augmentation import Augmentation, draw_variant, variant
from iet_sd.data.captions import draw, texts
from iet_sd.data.latents import Latents
from iet_sd.data.shards import Visit
from iet_sd.data.sources import Source
from iet_sd.data.transforms import CPU, View, draw_placing
from iet_sd.data.views import view_of
from iet_sd.errors import UserError


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of examples of one size: each entry of theirs, stacked."""
    return {
        name: torch.stack([torch.as_tensor(example[name]) for example in examples])
        for name in examples[0]
    }


class Loader:
    """Makes batches of visits, one stream of them after the other, by workers that outlive these.

    Workers start with the first batch, whatever the start method of `multiprocessing`, and end at
    `close`, or with the loader.
    """

    def __init__(self, dataset: "TrainingImages", num_workers: int, pin_memory: bool) -> None:
        """``num_workers`` 0: this process does it."""
        self._order = _Order(iter(()))
        self._settings = {
            "dataset": _Batches(dataset),
            "sampler": self._order,
            "batch_size": None,  # the sampler gives whole batches
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "persistent_workers": num_workers > 0,
        }
        self.close()

    def batches(self, visits: Iterator[list[Visit]]) -> Iterator[dict[str, Tensor]]:
        """The batches of these visits; the stream before is over.

        Workers read ahead, so ``visits`` may be further on than what was handed out. What they have
        read of a stream that ends early is dropped, errors too.
        Errors: `UserError` for an image that cannot be read.
        """
        self._order.visits = visits
        for batch in self._made:
            if isinstance(batch, UserError):
                self.close()  # else the workers live as long as the error
                raise batch
            yield batch

    def close(self) -> None:
        """End the workers, if there are any; another stream starts new ones."""
        # With a generator, else it draws from torch's global one.
        self._made = DataLoader(**self._settings, generator=torch.Generator())


@dataclass(eq=False)
class TrainingImages(Dataset):
    """The samples of a source, each looked up by a `Visit`, which settles all that is random."""

    source: Source
    read: Callable[[str], dict[str, Tensor]]
    """Of a caption its tokens, or from a cache what text encoders make of them, by names."""
    config: DataConfig
    latents: Latents | None = None
    """A cache of what the VAE makes of images that are not augmented."""
    augmented: Latents | None = None
    """A cache of what it makes of those that are."""
    threads: int = 0
    """That make several `examples` at the same time; 0: this one makes them."""
    device: torch.device = CPU
    """Where images are augmented."""

    def __post_init__(self) -> None:
        # Without the images, which would be read along with each row.
        self._captions = self.source.dataset.select_columns([self.source.caption_column])

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.source.dataset)

    def __getitem__(self, visit: Visit) -> dict[str, Any]:
        """The example of a visit, not augmented."""
        return self.example(visit)

    def example(self, visit: Visit, augmentation: Augmentation | None = None) -> dict[str, Any]:
        """What the visit sees: pixel_values (3, H, W) in [-1, 1], input_ids (L,), index, seed.

        And what SDXL is told of the pixels, (height, width) each: original_size of the stored
        image, rotated upright; crop_top_left in the resized one; target_size (H, W). From caches
        come latent_mean and latent_std (C, h, w) in place of pixels, and embeddings of tokens.

        Caption, crop and flip are the same with and without augmentation.
        Errors: `UserError` for an image that cannot be read, or is gone or has changed since the
        source was loaded.
        """
        if (kept := self.kept(augmentation is not None)) is not None:
            seen = kept(visit, augmentation)
        else:
            seen = self._view(visit, augmentation)._asdict()
        # A sample may have none only if the settings allow for it.
        name = self.source.sample_ids[visit.index]
        captions = texts(self._captions[visit.index][self.source.caption_column], name)
        return {
            **seen,
            "target_size": self.source.sizes[visit.index],
            **self.read(draw(captions, self.config, visit)),
            "index": visit.index,
            "seed": visit.seed,
        }

    def kept(self, augmented: bool) -> Latents | None:
        """The cache of images that are augmented, or of those that are not, if there is one."""
        return self.augmented if augmented else self.latents

    def examples(self, looks: Sequence[tuple[Visit, Augmentation | None]]) -> list[dict[str, Any]]:
        """`example` of each visit and augmentation."""
        if not self.threads:
            return [self.example(*look) for look in looks]
        # Pillow lets go of Python's lock while it reads and resizes, torch while it augments.
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(lambda look: self.example(*look), looks))

    def _view(self, visit: Visit, augmentation: Augmentation | None) -> View:
        name, digest = self.source.sample_ids[visit.index], self.source.digests[visit.index]
        generator = visit.generator("view")
        # First, so that a visit has the same crop and flip with and without augmentation.
        placing, augmented, device = draw_placing(generator), None, CPU
        if augmentation is not None:
            if augmentation.variants:
                number = draw_variant(augmentation, generator)
                generator = variant(augmentation, digest or name, number)
            augmented, device = (augmentation, generator), self.device
        try:
            return view_of(self.source, self.config, visit.index, placing, augmented, device)
        except UserError as error:
            if digest is None:
                raise
            raise UserError(
                f"{error}. It could be read when this run started. Put it back as it was, then go "
                "on with --resume_from_checkpoint latest; other images need a new run."
            ) from error


@dataclass(eq=False)
class _Order:
    """A sampler that can be given other visits."""

    visits: Iterator[list[Visit]]

    def __iter__(self) -> Iterator[list[Visit]]:
        return self.visits


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
