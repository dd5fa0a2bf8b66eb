"""What charts are drawn with, by Pillow: axes with round ticks, and a sheet of smooth lines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_SCALE = 2  # drawn so much larger, then made smaller: smooth lines


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high``, at pixels ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, room: float) -> "Axis":
        """With ``room``, a share of the range of ``values``, at both ends."""
        low, high = min(values), max(values)
        room = room * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - room, high + room, start, end)

    def place(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """About five round values, with their texts."""
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [(n * step, f"{n * step:.{digits}f}") for n in range(first, last + 1)]


class Sheet:
    """A white page to draw on, in pixels of the finished picture."""

    def __init__(self, width: int, height: int) -> None:
        self._size = width, height
        self._image = Image.new("RGB", (width * _SCALE, height * _SCALE), "white")
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Sequence[tuple[float, float]], color: str, width: float) -> None:
        """Points joined in order."""
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self._draw.line(scaled, fill=color, width=round(width * _SCALE), joint="curve")

    def dot(self, at: tuple[float, float], radius: float, color: str, hollow: bool) -> None:
        """A disc, or its edge around white."""
        fill = "white" if hollow else color
        self._draw.ellipse(_box(at, radius), fill=fill, outline=color, width=2 * _SCALE)

    def ring(self, at: tuple[float, float], radius: float, color: str) -> None:
        """A circle around what is there."""
        self._draw.ellipse(_box(at, radius), outline=color, width=2 * _SCALE)

    def text(self, at: tuple[float, float], text: str, color: str, size: int, anchor: str) -> None:
        """A text, anchored as Pillow says."""
        font = ImageFont.load_default(size * _SCALE)
        place = at[0] * _SCALE, at[1] * _SCALE
        self._draw.text(place, text, fill=color, font=font, anchor=anchor)

    def finished(self) -> Image.Image:
        """The picture."""
        return self._image.resize(self._size, Image.Resampling.LANCZOS)


def _box(at: tuple[float, float], radius: float) -> list[float]:
    (x, y), r = at, radius
    return [side * _SCALE for side in (x - r, y - r, x + r, y + r)]
