"""The data of each setting: folders of parquet made once under the work folder.

Every image is of a near-duplicate group of its own, in training and held out, so that the two are
alike, and the nearest training image of a picture is one image and not one of its kind.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Value, load_dataset
from filelock import FileLock

from benchmarks.efficacy.protocol import ROOT, Protocol
from iet_sd.evaluation.prompts import choose
from iet_sd.files import atomic_folder

READ_SEED = 0
"""Of the choice of images, prompts and noise, whatever the seed of training is."""
TWEMOJI = "emoji-datasource-twitter@16.0.0"
_COPY = " copy "
_FEATURES = Features(
    {
        "image": Image(),
        "text": Value("string"),
        "sample_id": Value("string"),
        "copies": Value("int64"),
    }
)


def prepare(setting: str, protocol: Protocol, work_dir: Path) -> tuple[Path, Path]:
    """The folder to train on (splits train and test), and that of its training images, each once.

    Twemoji are fetched by npm from the registry, once.
    """
    folder = work_dir / "data" / f"{setting}-{protocol.fingerprint}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Cells of a setting may start together.
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _make(setting, protocol, work_dir, folder)
    return folder / "rows", folder / "once"


def _make(setting: str, protocol: Protocol, work_dir: Path, folder: Path) -> None:
    train, test = (
        _twemoji(work_dir) if setting == "twemoji" else tuple(map(_fluent, ("train", "test")))
    )
    train = _some(train, protocol.images, "train")
    test = _some(test, protocol.heldout, "test")
    often = _often(train, protocol) if setting == "duplicated" else set()
    once = [row | {"copies": protocol.copies if row["sample_id"] in often else 1} for row in train]
    rows = [
        row | {"sample_id": f"{row['sample_id']}{f'{_COPY}{n}' if n else ''}"}
        for row in once
        for n in range(row["copies"])
    ]
    with atomic_folder(folder) as staging:
        _write(rows, staging / "rows" / "train-00000-of-00001.parquet")
        _write(test, staging / "rows" / "test-00000-of-00001.parquet")
        _write(once, staging / "once" / "train-00000-of-00001.parquet")


def copies_of(once: Path) -> dict[str, int]:
    """How many rows each training image has, by its ``sample_id``."""
    table = load_dataset("parquet", data_files=str(once / "*.parquet"), split="train")
    return dict(zip(table["sample_id"], table["copies"], strict=True))


def skips_of(rows: Path, skips_N: Sequence[int]) -> dict[str, int]:
    """Skips of each training image, by its ``sample_id``, of those of each row."""
    table = load_dataset("parquet", data_files=str(rows / "train-*.parquet"), split="train")
    found: Counter[str] = Counter()
    for name, skips in zip(table["sample_id"], skips_N, strict=True):
        found[name.partition(_COPY)[0]] += skips
    return dict(found)


def _often(train: list[dict[str, Any]], protocol: Protocol) -> set[str]:
    """Names of the images that are duplicated: some of those that are drawn."""
    drawn = choose(len(train), protocol.prompts, READ_SEED)
    step = len(drawn) // protocol.duplicated
    return {train[i]["sample_id"] for i in drawn[::step][: protocol.duplicated].tolist()}


def _some(rows: list[dict[str, Any]], count: int, split: str) -> list[dict[str, Any]]:
    """``count`` of the rows that no other resembles, chosen by seed."""
    sizes = Counter(row["group"] for row in rows)
    alone = [row for row in rows if sizes[row["group"]] == 1]
    if len(alone) < count:
        raise ValueError(f"{split}: {count} images wanted, {len(alone)} are of no group")
    order = np.sort(np.random.default_rng(READ_SEED).choice(len(alone), count, replace=False))
    return [
        {name: alone[i][name] for name in ("image", "text", "sample_id")} | {"copies": 1}
        for i in order
    ]


def _fluent(split: str) -> list[dict[str, Any]]:
    file = ROOT / "demo" / "data" / f"{split}-00000-of-00001.parquet"
    table = load_dataset("parquet", data_files=str(file), split="train")
    return table.cast_column("image", Image(decode=False)).to_list()


def _twemoji(work_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Grouped and split as ``demo/data`` is."""
    from demo import emoji, make_data

    cache = work_dir / "npm"
    emoji.PACKAGES["twemoji"] = TWEMOJI
    emoji._PICTURES["twemoji"] = ("emoji-datasource-twitter/img/twitter/64", ".png")
    emoji.fetch(cache, "names", "twemoji")
    items = [item for item in emoji.load(cache, "twemoji") if make_data.wanted(item)]
    pictures = make_data.without_copies(items)
    items = [item for item in items if item.code in pictures]
    groups = make_data.group_near_duplicates(items, list(pictures.values()))
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for item, group in zip(items, groups, strict=True):
        row = {"text": item.text, "sample_id": item.code, "group": group}
        image = {"bytes": make_data.encode(pictures[item.code]), "path": None}
        splits[make_data.split_of(group)].append(row | {"image": image})
    return splits["train"], splits["test"]


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=_FEATURES).to_parquet(path)
