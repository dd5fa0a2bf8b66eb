"""The frontier as a picture: memorization against held-out loss, a dot a round, drawn by Pillow."""

import math
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image

from iet_sd.evaluation.drawing import Axis, Sheet
from iet_sd.evaluation.frontier import Recommendation
from iet_sd.evaluation.probe import Reading

_WIDTH, _HEIGHT = 960, 640
_LEFT, _TOP, _RIGHT, _BOTTOM = 84, 112, 32, 72
_ROOM = 0.12  # beyond the dots, a share of their range
_INK, _PALE, _BAND, _GRID = "#1f2933", "#7b8794", "#cbd2d9", "#eceff2"
_ROUND, _OUT, _BEST = "#2f6f9f", "#a9c6dc", "#d1495b"
_RADIUS = 7


def draw_frontier(
    readings: Sequence[Reading], recommendation: Recommendation | None, embedder: str
) -> Image.Image:
    """Excess similarity to the right, held-out loss upward, so that down left is better.

    Rounds are joined in order. The one to keep is marked, and those that the rule leaves. Excess
    has its interval; held-out loss has none, as the rounds share images and noise, so that an
    interval of one says little of how they differ.
    """
    sheet = Sheet(_WIDTH, _HEIGHT)
    excess = [x for r in readings for x in (r.excess_score.low, r.excess_score.high)]
    across = Axis.over(excess, _LEFT, _WIDTH - _RIGHT, _ROOM)
    up = Axis.over([r.heldout_loss.value for r in readings], _HEIGHT - _BOTTOM, _TOP, _ROOM)
    _draw_frame(sheet, across, up, embedder)
    dots = {
        r.round: (across.place(r.excess_score.value), up.place(r.heldout_loss.value))
        for r in readings
    }
    for reading in readings:
        ends = reading.excess_score.low, reading.excess_score.high
        y = up.place(reading.heldout_loss.value)
        sheet.line([(across.place(end), y) for end in ends], _BAND, 2)
    sheet.line(list(dots.values()), _PALE, 1.5)
    best, left = (recommendation.round, recommendation.left) if recommendation else (None, ())
    for number, place in dots.items():
        color = _BEST if number == best else _ROUND if number in left else _OUT
        sheet.dot(place, _RADIUS, color, hollow=number == 0)
    if best is not None:
        sheet.ring(dots[best], 2 * _RADIUS, _BEST)
    _draw_numbers(sheet, dots, best)
    return sheet.finished()


def _draw_frame(sheet: Sheet, across: Axis, up: Axis, embedder: str) -> None:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for value, text in across.ticks():
        x = across.place(value)
        sheet.line([(x, _TOP), (x, bottom)], _GRID, 1)
        sheet.text((x, bottom + 8), text, _INK, 14, "ma")
    for value, text in up.ticks():
        y = up.place(value)
        sheet.line([(_LEFT, y), (right, y)], _GRID, 1)
        sheet.text((_LEFT - 8, y), text, _INK, 14, "rm")
    if across.low < 0 < across.high:
        x = across.place(0)
        sheet.line([(x, _TOP), (x, bottom)], _PALE, 1)
        sheet.text((x + 5, _TOP + 4), "as held-out images", _PALE, 13, "la")
    sheet.line([(_LEFT, _TOP), (_LEFT, bottom), (right, bottom)], _INK, 1.5)
    sheet.text((24, 16), "Memorization and held-out loss, by round", _INK, 20, "la")
    legend = (
        "ring: the round to keep · pale: another round is better, by the rule · "
        "0: before training · lines: 95% intervals of the excess"
    )
    sheet.text((24, 46), legend, _PALE, 14, "la")
    what = f"Excess similarity to training images ({embedder})"
    sheet.text(((_LEFT + right) / 2, _HEIGHT - 36), what, _INK, 15, "ma")
    sheet.text((24, _TOP - 30), "Held-out loss", _INK, 15, "la")
    _draw_arrow(sheet, (_LEFT + 10, bottom - 10))


def _draw_arrow(sheet: Sheet, tip: tuple[float, float]) -> None:
    """What is better lies down left."""
    x, y = tip
    for end in ((x + 18, y - 18), (x + 8, y), (x, y - 8)):
        sheet.line([tip, end], _PALE, 1.5)
    sheet.text((x + 22, y - 10), "better", _PALE, 14, "ls")


def _draw_numbers(sheet: Sheet, dots: dict[int, tuple[float, float]], best: int | None) -> None:
    """The number of each round beside its dot, where there is room."""
    places = list(dots.values())
    taken = [*places, *(spot for a, b in pairwise(places) for spot in (_near(a, b), _near(b, a)))]
    for number, (x, y) in dots.items():
        away = (3.2 if number == best else 2.4) * _RADIUS
        # Not to the left and right, where the interval is.
        turns = [math.pi / 4 * turn for turn in (1, 2, 3, 5, 6, 7)]
        spots = [(x + away * math.cos(t), y - away * math.sin(t)) for t in turns]
        # The first of the freest: how far the next thing is, up to what is enough.
        free = [min([25, *(math.dist(s, o) for o in taken if o != (x, y))]) for s in spots]
        spot = spots[free.index(max(free))]
        taken.append(spot)
        sheet.text(spot, str(number), _BEST if number == best else _INK, 15, "mm")


def _near(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """Where the line to ``b`` passes the number of ``a``."""
    share = min(1.0, 2.4 * _RADIUS / max(math.dist(a, b), 1e-9))
    return a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])
