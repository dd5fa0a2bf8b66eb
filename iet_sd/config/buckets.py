"""Sizes that images of different shapes are brought to. Sizes are (height, width)."""

import re
from functools import lru_cache

from iet_sd.errors import UserError

Size = tuple[int, int]
_FLAG = "--aspect_ratio_buckets"


def parse_buckets(text: str, resolution: int, step: int) -> tuple[Size, ...]:
    """The sizes that ``--aspect_ratio_buckets`` stands for, none of the shape of another.

    Errors: `UserError` for anything but `auto` or "height,width;height,width;...", in multiples of
    8.
    """
    if text == "auto":
        return auto_buckets(resolution, step)
    sizes = []
    for part in text.split(";"):
        found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", part)
        if not found:
            raise UserError(
                f'{_FLAG} must be auto, or sizes like "512,768;768,512" (height,width); got '
                f"{part!r}."
            )
        size = int(found[1]), int(found[2])
        if 0 in size or size[0] % 8 or size[1] % 8:
            raise UserError(f"{_FLAG}: height and width must be multiples of 8; got {part!r}.")
        sizes.append(size)
    for number, (h, w) in enumerate(sizes):
        for height, width in sizes[:number]:
            if h * width == w * height:
                raise UserError(
                    f"{_FLAG}: {height},{width} and {h},{w} are of one shape, so no image could "
                    "tell which to go to. Leave one out."
                )
    return tuple(sizes)


def auto_buckets(resolution: int, step: int) -> tuple[Size, ...]:
    """The square of ``resolution``, and oblongs of no larger area, up to 4 : 1.

    Their sides are multiples of ``step``; for every shorter side down to half the resolution the
    longest that the area allows.
    Errors: `UserError` if there are none.
    """
    sizes = [(resolution, resolution)]
    highest = (resolution - 1) // step * step
    for short in range(highest, (resolution + 1) // 2 - 1, -step):
        long = resolution**2 // short // step * step
        if long > short:
            sizes += [(short, long), (long, short)]
    if len(sizes) == 1:
        raise UserError(
            f"{_FLAG} auto: no oblong of {resolution} x {resolution} pixels has sides in multiples "
            f"of {step}. Lower --bucket_reso_steps."
        )
    return tuple(sizes)


@lru_cache(maxsize=4096)
def nearest(size: Size | None, buckets: tuple[Size, ...]) -> Size:
    """The bucket whose ratio of height to width differs by the least factor; the first, if several.

    ``size`` may be unknown if there is only one bucket.
    """
    if len(buckets) == 1:
        return buckets[0]
    h, w = size

    def factor(bucket: Size) -> float:
        ratios = h * bucket[1], w * bucket[0]
        return max(ratios) / min(ratios)

    return min(buckets, key=factor)
