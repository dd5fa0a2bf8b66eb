"""Make the bundled demo data set: captioned Fluent emoji with a fixed train / test split.

    python -m demo.make_data --cache DIR --output demo/data

Near-duplicates (skin tones and genders of one emoji, and pictures that look alike) form a group,
and a group lies wholly in one split. The same input gives the same bytes. About a minute.
"""

import argparse
import io
import logging
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from demo import emoji
from iet_sd.seeding import seed_for

logger = logging.getLogger("demo.make_data")
SIZE = 64
# Two pictures nearer than this are near-duplicates (see `distances`). Judged by eye: below it pairs
# differ in one detail (clock hands, a keycap's digit, a beard); above it different things begin to
# pair up (a coin and an orange ball), and chains of them soon make groups of unlike pictures.
SIMILAR = 0.20
TEST_ONE_IN = 5
# The two ends of the scale: all five tones would pass 10 MB and add little variety.
TONES = {"light skin tone", "dark skin tone"}
# In the npm package, but not in Microsoft's MIT-licensed release, or withheld from it as
# trademarks: flags of places, couples and families, video game, technologist.
FOREIGN_KINDS = {"country flag", "subdivision flag", "family"}
FOREIGN_CODES = {"1f46a", "1f3ae"}
FOREIGN_ROLES = "200d-1f4bb"
FEATURES = Features(
    {
        "image": Image(),
        "text": Value("string"),
        "sample_id": Value("string"),
        "group": Value("string"),
        "category": Value("string"),
    }
)


def wanted(item: emoji.Emoji) -> bool:
    """Whether ``item`` belongs to Microsoft's release and has no skin tone, or one of `TONES`."""
    foreign = (
        item.subcategory in FOREIGN_KINDS
        or item.code in FOREIGN_CODES
        or FOREIGN_ROLES in item.code
    )
    tones = set(item.tones)
    return not foreign and len(tones) <= 1 and tones <= TONES


def without_copies(items: list[emoji.Emoji]) -> dict[str, PILImage.Image]:
    """Pictures by code, without blank ones and second copies of a picture under another name."""
    seen, pictures = set(), {}
    for item in items:
        picture = item.picture(SIZE)
        pixels = picture.tobytes()
        if pixels in seen or min(pixels) == 255:
            logger.info("left out, blank or a copy: %s (%s)", item.code, item.text)
            continue
        seen.add(pixels)
        pictures[item.code] = picture
    return pictures


def distances(pictures: list[PILImage.Image]) -> np.ndarray:
    """Distance of every two pictures as drawn or mirrored, (N, N) in [0, 1].

    With a, b the ink (white minus pixel) of both at half size: ``|a - b| / sqrt(|a|² + |b|²)``,
    0 for equal pictures and 1 for ink in different places. Relative to the ink, because on a white
    page any two small or pale things differ by few grey levels.
    """
    pixels = np.stack([np.asarray(picture, np.float32) for picture in pictures])
    N = len(pixels)
    ink = 255 - pixels.reshape(N, SIZE // 2, 2, SIZE // 2, 2, 3).mean((2, 4))
    flat, mirrored = ink.reshape(N, -1), ink[:, :, ::-1].reshape(N, -1)
    square = (flat**2).sum(1)
    overlap = np.maximum(flat @ flat.T, flat @ mirrored.T)
    return np.sqrt(np.maximum(0, 1 - 2 * overlap / (square[:, None] + square[None])))


def connected(count: int, pairs: list[tuple[int, int]]) -> list[int]:
    """For each of ``count`` items the lowest item that chains of ``pairs`` join it to."""
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(item) for item in range(count)]


def group_near_duplicates(items: list[emoji.Emoji], pictures: list[PILImage.Image]) -> list[str]:
    """The group of each item, named by the lowest code in it: one family, or nearer than `SIMILAR`.

    ``items`` are ordered by code.
    """
    near = np.argwhere(np.triu(distances(pictures) < SIMILAR, 1))
    first: dict[str, int] = {}
    same = [(first.setdefault(item.family, i), i) for i, item in enumerate(items)]
    roots = connected(len(items), [*same, *map(tuple, near.tolist())])
    return [items[r].code for r in roots]


def split_of(group: str) -> str:
    """``test`` for one group in `TEST_ONE_IN`, by a hash of its name, else ``train``."""
    return "test" if seed_for(0, "demo split", group) % TEST_ONE_IN == 0 else "train"


def encode(picture: PILImage.Image) -> bytes:
    """Lossless WebP: every one measured was smaller than its best PNG, together by a fifth.

    ``quality`` is the effort here; 100 takes ten times as long and saves 1 %.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=80, method=6)
    return buffer.getvalue()


def main() -> None:
    """Fetch the pictures, group them, write both splits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="npm packages")
    parser.add_argument("--output", type=Path, default=Path("demo/data"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    emoji.fetch(args.cache, "names", "fluent")

    items = [item for item in emoji.load(args.cache, "fluent") if wanted(item)]
    pictures = without_copies(items)
    items = [item for item in items if item.code in pictures]
    groups = group_near_duplicates(items, list(pictures.values()))
    rows: dict[str, list[dict]] = {"train": [], "test": []}
    for item, group in zip(items, groups, strict=True):
        rows[split_of(group)].append(
            {
                "image": {"bytes": encode(pictures[item.code]), "path": f"{item.code}.webp"},
                "text": item.text,
                "sample_id": item.code,
                "group": group,
                "category": item.category,
            }
        )
    args.output.mkdir(parents=True, exist_ok=True)
    for split, part in rows.items():
        path = args.output / f"{split}-00000-of-00001.parquet"
        Dataset.from_list(part, features=FEATURES).to_parquet(path)
        logger.info(
            "%s: %d images, %d groups, %.2f MB",
            path,
            len(part),
            len({row["group"] for row in part}),
            path.stat().st_size / 1e6,
        )


if __name__ == "__main__":
    main()
