"""Settings of the training images and captions."""

from dataclasses import dataclass
from typing import Literal

from iet_sd.config.checks import positive
from iet_sd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training images and captions, and how an image becomes pixels."""

    dataset_name: str | None = None
    """A data set on the Hub, or a local folder that `datasets.load_dataset` reads."""
    dataset_config_name: str | None = None
    """Configuration of the data set, if it has several."""
    train_data_dir: str | None = None
    """Local data: images with metadata.jsonl, metadata.csv or .txt / .caption files; parquet; or a
    data set saved to disk."""
    dataset_split: str = "train"
    """Split of the data set to train on."""
    heldout_split: str | None = None
    """Split of the same data set that is never trained on: what evaluation compares with."""
    heldout_data_dir: str | None = None
    """Held-out images of the same kind in a place of their own, read as --train_data_dir is."""
    image_column: str = "image"
    """Column with the image."""
    caption_column: str = "text"
    """Column with the caption, or a list of captions of which each visit draws one."""
    sample_id_column: str | None = None
    """Column with a stable name per sample. Default: sample_id or file name, else position."""
    group_column: str | None = None
    """Column whose equal values mark near-duplicates, kept in one shard by the seeded split."""
    cache_dir: str | None = None
    """Where downloaded models and data sets are kept."""
    max_train_samples: int | None = None
    """Use only the first so many samples."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An unreadable image: stop and name it, or leave it out and name it."""
    on_missing_caption: Literal["error", "empty", "skip"] = "error"
    """An image without a caption: stop and name it, use an empty one, or leave the image out."""
    resolution: int = 512
    """Images are resized (shorter edge) and cropped to this many pixels."""
    center_crop: bool = False
    """Crop the centre. Default: a random place."""
    random_flip: bool = False
    """Flip images left to right at random."""
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear", "box", "nearest"] = (
        "lanczos"
    )
    """Interpolation of the resize."""
    check_images: Literal["all", "none"] = "all"
    """Decode every image once before training, so a bad one is found now and not in an hour."""

    def __post_init__(self) -> None:
        positive(self, "resolution", "max_train_samples")
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise UserError(
                "Name the training data once: --dataset_name for the Hub, or --train_data_dir "
                f"for local files; got {self.dataset_name!r} and {self.train_data_dir!r}."
            )
        if self.heldout_split and self.heldout_data_dir:
            raise UserError(
                "--heldout_split and --heldout_data_dir both name the held-out images: give one."
            )
        if self.heldout_split == self.dataset_split:
            raise UserError(
                f"--heldout_split {self.heldout_split} is the split that is trained on; held-out "
                "images must be others."
            )
        if self.on_bad_image == "skip" and self.check_images == "none":
            raise UserError("--on_bad_image skip needs --check_images all, which finds them.")
        if self.resolution % 8:
            raise UserError(f"--resolution must be a multiple of 8; got {self.resolution}.")
