"""Line charts by Pillow: curves of one study in one frame, a dot a reading."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from iet_sd.evaluation.drawing import Axis, Sheet

_WIDTH, _HEIGHT = 960, 560
_NAME = 13  # size of the lines' names
_ROOM = 0.06  # beyond the dots, a share of their range
_LEFT, _TOP, _RIGHT, _BOTTOM = 84, 96, 330, 64
_INK, _PALE, _GRID = "#1f2933", "#7b8794", "#e6eaee"
COLORS = (
    *("#1f2933", "#d1495b", "#2f6f9f", "#3a9d5d", "#e08e0b", "#7b52ab", "#12a5a5", "#a0522d"),
    *("#c2185b", "#5c6b73", "#8bc34a", "#ff7f50"),
)
"""Of the lines, in order: the first is the one that others are compared with."""


@dataclass(frozen=True)
class Line:
    """A curve and its name."""

    name: str
    x_R: Sequence[float]
    y_R: Sequence[float]


def draw_lines(
    lines: Sequence[Line], title: str, x_title: str, y_title: str, note: str = ""
) -> Image.Image:
    """Curves whose points are joined in order; the first point, common to all, is hollow.

    The page is wider where a name would not fit on it.
    """
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    font = ImageFont.load_default(_NAME)
    names_end = right + 46 + max(font.getlength(line.name) for line in lines)
    sheet = Sheet(max(_WIDTH, math.ceil(names_end) + 8), _HEIGHT)
    across = Axis.over([x for line in lines for x in line.x_R], _LEFT, right, _ROOM)
    up = Axis.over([y for line in lines for y in line.y_R], bottom, _TOP, _ROOM)
    for value, text in across.ticks():
        x = across.place(value)
        sheet.line([(x, _TOP), (x, bottom)], _GRID, 1)
        sheet.text((x, bottom + 8), text, _INK, 13, "ma")
    for value, text in up.ticks():
        y = up.place(value)
        sheet.line([(_LEFT, y), (right, y)], _GRID, 1)
        sheet.text((_LEFT - 8, y), text, _INK, 13, "rm")
    sheet.line([(_LEFT, _TOP), (_LEFT, bottom), (right, bottom)], _INK, 1.5)
    sheet.text((20, 14), title, _INK, 18, "la")
    sheet.text((20, 40), note, _PALE, 13, "la")
    sheet.text(((_LEFT + right) / 2, _HEIGHT - 30), x_title, _INK, 14, "ma")
    sheet.text((20, _TOP - 26), y_title, _INK, 14, "la")
    for number, line in reversed(list(enumerate(lines))):
        color = COLORS[number % len(COLORS)]
        places = [(across.place(x), up.place(y)) for x, y in zip(line.x_R, line.y_R, strict=True)]
        sheet.line(places, color, 2.4 if number == 0 else 1.6)
        for at in places[1:]:
            sheet.dot(at, 4, color, hollow=False)
        sheet.dot(places[0], 4, _INK, hollow=True)
        y = _TOP + 8 + 22 * number
        sheet.line([(right + 16, y), (right + 38, y)], color, 2.4 if number == 0 else 1.6)
        sheet.dot((right + 27, y), 4, color, hollow=False)
        sheet.text((right + 46, y), line.name, _INK, _NAME, "lm")
    return sheet.finished()


def gallery(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], side: int = 80
) -> Image.Image:
    """Rows of pictures with their names at the left, and a title above each column."""
    left, top, gap, line = 250, 34, 4, 15
    width = left + len(columns) * (side + gap)
    page = Image.new("RGB", (width, top + len(rows) * (side + gap)), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(12)
    for c, text in enumerate(columns):
        at = (left + c * (side + gap), 2)
        draw.multiline_text(at, _wrapped(text, side // 7), fill=_INK, font=font, spacing=1)
    for r, (name, pictures) in enumerate(rows):
        y = top + r * (side + gap)
        for i, text in enumerate(name.split("\n")):
            draw.text((6, y + 8 + i * line), text, fill=_INK if i == 0 else _PALE, font=font)
        for c, picture in enumerate(pictures):
            scaled = picture.resize((side, side), Image.Resampling.BICUBIC)
            page.paste(scaled, (left + c * (side + gap), y))
    return page


def _wrapped(text: str, letters: int) -> str:
    """The first two lines of it."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= letters:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()[:letters]
    return "\n".join(lines[:2])
