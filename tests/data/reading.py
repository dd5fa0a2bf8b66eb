"""Small tables, and what a source has read."""

import io

import datasets
import pytest
from datasets import Dataset
from PIL import Image

from iet_sd.data.captions import texts
from iet_sd.data.images import decode
from iet_sd.data.sources import load_source
from iet_sd.errors import UserError


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def table(count=3, first=0, **columns):
    numbers = range(first, first + count)
    content = {"image": [png(i) for i in numbers], "text": [f"number {i}" for i in numbers]}
    return Dataset.from_dict(content | columns).cast_column("image", datasets.Image())


def captions(source):
    return [texts(cell, "") for cell in source.dataset[:][source.caption_column]]


def reds(source):
    """The red value of each image's first pixel: its number in `table`."""
    images = source.dataset[:][source.image_column]
    return [decode(record, "x").getpixel((0, 0))[0] for record in images]


def error_of(config):
    with pytest.raises(UserError) as error:
        load_source(config)
    return str(error.value)
