"""An image of a source as it is seen, by the settings of the data."""

import torch

from iet_sd.config import DataConfig
from iet_sd.data.augmentation import Augmentation
from iet_sd.data.images import decode
from iet_sd.data.sources import Source
from iet_sd.data.transforms import CPU, Placing, View, view


def view_of(
    source: Source,
    config: DataConfig,
    index: int,
    placing: Placing,
    augmented: tuple[Augmentation, torch.Generator] | None = None,
    device: torch.device = CPU,
) -> View:
    """`view` of the image at ``index``. Errors: as `decode`."""
    record = source.dataset[index][source.image_column]
    return view(
        decode(record, source.sample_ids[index], source.digests[index]),
        size=source.sizes[index],
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        interpolation=config.image_interpolation_mode,
        placing=placing,
        augmented=augmented,
        device=device,
    )
