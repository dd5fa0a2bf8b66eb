"""Settings of the training images and captions."""

from dataclasses import dataclass
from typing import Literal

from iet_sd.config.buckets import Size, parse_buckets
from iet_sd.config.checks import not_negative, positive
from iet_sd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training images and captions, and how an image becomes pixels."""

    dataset_name: str | None = None
    """A data set on the Hub, or a local folder that `datasets.load_dataset` reads."""
    dataset_config_name: str | None = None
    """Configuration of the data set, if it has several."""
    train_data_dir: str | None = None
    """Local data: images with metadata.jsonl, metadata.csv or .txt / .caption files; parquet;
    WebDataset archives (.tar); or a data set saved to disk."""
    dataset_split: str | None = "train"
    """Split of the data set to train on; null in a file: the only one there is."""
    heldout_split: str | None = None
    """Split of the same data set that is never trained on: what evaluation compares with."""
    heldout_data_dir: str | None = None
    """Held-out images of the same kind in a place of their own, read as --train_data_dir is; of a
    single split, whatever its name."""
    image_column: str = "image"
    """Column with the image."""
    caption_column: str = "text"
    """Column with the caption, or a list of captions of which each visit draws one."""
    sample_id_column: str | None = None
    """Column with a stable name per sample. Default: sample_id if it names each by its own, or file
    name, else position."""
    group_column: str | None = None
    """Column whose equal values mark near-duplicates, kept in one shard by the seeded split."""
    repeats_column: str | None = None
    """Column with how many times an epoch visits each sample. It is still one sample for shards and
    skips. Beware: nothing is memorized as easily as what is shown more often."""
    cache_dir: str | None = None
    """Where downloaded models and data sets are kept."""
    max_train_samples: int | None = None
    """Use only the first so many samples."""
    on_bad_image: Literal["error", "skip"] = "error"
    """An unreadable image: stop and name it, or leave it out and name it."""
    on_missing_caption: Literal["error", "empty", "skip"] = "error"
    """An image without a caption: stop and name it, use an empty one, or leave the image out."""
    proportion_empty_prompts: float = 0.0
    """Share of visits that see an empty caption, for classifier-free guidance; 0.1 is usual."""
    caption_prefix: str = ""
    """Text before every caption that is not empty, and a space; also where one is a prompt."""
    shuffle_caption: bool = False
    """Shuffle the tags of a caption, which commas divide, anew in every visit."""
    keep_tokens: int = 0
    """Tags at the beginning of a caption that --shuffle_caption leaves in place."""
    resolution: int = 512
    """Images are resized (shorter edge) and cropped to this many pixels."""
    aspect_ratio_buckets: str | None = None
    """Sizes of batches, as "height,width;height,width;...", or auto: oblongs of the area of
    --resolution. An image goes to the size nearest in shape, is resized to cover it, and cropped.
    A batch has one size, so in each epoch the last batch of a size may be smaller."""
    bucket_reso_steps: int = 64
    """Sides of --aspect_ratio_buckets auto are multiples of this, which is one of 8."""
    center_crop: bool = False
    """Crop the centre of an image, and not a random place."""
    random_flip: bool = False
    """Flip images left to right at random."""
    image_interpolation_mode: Literal[
        "lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact"
    ] = "lanczos"
    """Interpolation of the resize."""
    check_images: Literal["all", "none"] = "all"
    """all: decode every image once before training, so a bad one is found now and not in an hour,
    equal images are kept in one shard, and an image that changes is noticed. none: open large data
    sets at once and read an image when it is met (with --aspect_ratio_buckets, its size before)."""

    def __post_init__(self) -> None:
        positive(self, "resolution", "max_train_samples")
        not_negative(self, "keep_tokens")
        share = self.proportion_empty_prompts
        if not 0 <= share <= 1:
            raise UserError(f"--proportion_empty_prompts must lie in 0 to 1; got {share}.")
        if self.keep_tokens and not self.shuffle_caption:
            raise UserError("--keep_tokens says what --shuffle_caption leaves in place: give both.")
        if self.dataset_name is not None and self.train_data_dir is not None:
            self.require()
        if self.heldout_split and self.heldout_data_dir:
            raise UserError(
                "--heldout_split and --heldout_data_dir both name the held-out images: give one."
            )
        if self.heldout_split and self.heldout_split == self.dataset_split:
            raise UserError(
                f"--heldout_split {self.heldout_split} is the split that is trained on; held-out "
                "images must be others."
            )
        if self.on_bad_image == "skip" and self.check_images == "none":
            raise UserError("--on_bad_image skip needs --check_images all, which finds them.")
        if self.resolution % 8:
            raise UserError(f"--resolution must be a multiple of 8; got {self.resolution}.")
        if self.bucket_reso_steps <= 0 or self.bucket_reso_steps % 8:
            raise UserError(
                f"--bucket_reso_steps must be a multiple of 8; got {self.bucket_reso_steps}."
            )
        assert self.buckets  # so that a mistake is found now

    def require(self) -> None:
        """`UserError` unless the training data are named, as all but drawing own prompts needs."""
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise UserError(
                "Name the training data once: --dataset_name for the Hub, or --train_data_dir "
                f"for local files; got {self.dataset_name!r} and {self.train_data_dir!r}."
            )

    @property
    def buckets(self) -> tuple[Size, ...]:
        """Sizes (height, width) that images are brought to, each to one of them."""
        if self.aspect_ratio_buckets is None:
            return ((self.resolution, self.resolution),)
        return parse_buckets(self.aspect_ratio_buckets, self.resolution, self.bucket_reso_steps)
