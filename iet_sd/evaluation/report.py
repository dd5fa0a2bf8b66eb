"""The report of an evaluation: report.json and pairs.parquet for tools, report.html for people."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from iet_sd.files import atomic_folder

SCHEMA_VERSION = 2
PAIRS = pa.schema(
    [
        ("generation", pa.string()),
        ("prompt", pa.string()),
        ("prompt_id", pa.string()),
        ("image", pa.int64()),
        ("path", pa.string()),
        ("similarity", pa.float64()),
        ("own_similarity", pa.float64()),
        ("nearest_id", pa.string()),
        ("nearest_caption", pa.string()),
        ("nearest_index", pa.int64()),
        ("flipped", pa.bool_()),
        ("ratio", pa.float64()),
        ("authentic", pa.bool_()),
    ]
)
IMAGES = pa.schema(
    [
        ("set", pa.string()),  # train or heldout
        ("id", pa.string()),
        ("group", pa.string()),
        ("similarity", pa.float64()),
        ("ratio", pa.float64()),
        ("loss", pa.float64()),
    ]
)
_SHOWN = set(PAIRS.names) - {"prompt_id", "image", "path"}  # a path tells of this machine
_THUMBNAIL = 256  # px of the longer side
_SAME = 1e-5  # two float32 cosines of the same images differ by less
# The sets of a histogram, bottom first, and the measure that is the 95th percentile of each.
_SERIES = {"train": "Train–train", "heldout": "Held-out", "generated": "Generated"}
_P95 = {"train": "background_p95", "heldout": "heldout_p95", "generated": "memorization_score"}
_BELOW = 103  # the foot of a histogram's outline, out of its frame of 100: no line along the axis


class Images(Protocol):
    """The part of an `ImageSet` that is drawn."""

    ids: Sequence[str]

    def __getitem__(self, index: int) -> Image.Image: ...


def write_report(
    folder: Path,
    report: Mapping[str, Any],
    pairs: Sequence[Mapping[str, Any]],
    images: Sequence[Mapping[str, Any]],
    generated: Images,
    train: Images,
    shown: int = 200,
) -> None:
    """Write ``report.json``, ``report.html``, ``pairs.parquet`` and ``images.parquet`` to a folder.

    The page stands alone: it opens from disk and loads nothing from elsewhere. Beside it lies
    ``report_public.html``, the same without training images and captions. The same input gives the
    same files.

    report: measures, histograms, verdict, settings; NaN and infinities become null.
    pairs: one row of `PAIRS` a generation; written by similarity, descending.
    images: one row of `IMAGES` for each training and held-out image: similarity to the nearest
    (other) training image, l2-ratio and denoising loss, None where not measured.
    shown: how many of the closest pairs are on the page.
    """
    report = _plain({"schema_version": SCHEMA_VERSION, **report})
    pairs = sorted(_plain(pairs), key=lambda pair: -pair["similarity"])
    gallery = _gallery(pairs[:shown], generated, train)
    pages = {
        "report": _page(report, gallery, len(pairs)),
        "report_public": _page(report, None, len(pairs)),
    }
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_folder(folder) as staging:
        (staging / "report.json").write_text(text + "\n", encoding="utf-8")
        for name, page in pages.items():
            (staging / f"{name}.html").write_text(page, encoding="utf-8")
        for name, rows, schema in (("pairs", pairs, PAIRS), ("images", _plain(images), IMAGES)):
            table = pa.Table.from_pylist(rows, schema=schema)
            pyarrow.parquet.write_table(table, staging / f"{name}.parquet")


def _page(report: dict[str, Any], gallery: dict[str, Any] | None, num_pairs: int) -> str:
    """``gallery``: the pairs of `_gallery`, of ``num_pairs`` in all; None leaves them out."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = resources.files("iet_sd.evaluation").joinpath("report.html.j2")
    return environment.from_string(template.read_text("utf-8")).render(
        report=report,
        gallery=gallery,
        num_pairs=num_pairs,
        created=f"{datetime.fromisoformat(report['created']):%Y-%m-%d %H:%M %Z}".strip(),
        interval_bar=interval_bar,
        format_measure=format_measure,
        histogram_plot=histogram_plot,
        setting=_setting,
    )


def _gallery(
    pairs: Sequence[Mapping[str, Any]], generated: Images, train: Images
) -> dict[str, Any]:
    """What the script of the page draws: pairs, and each image once."""
    row = {name: index for index, name in enumerate(generated.ids)}
    nearest = sorted({pair["nearest_index"] for pair in pairs})
    return {
        "pairs": [_shown_pair(pair) for pair in pairs],
        "generated": [_data_uri(generated[row[pair["generation"]]]) for pair in pairs],
        "train": {index: _data_uri(train[index]) for index in nearest},
    }


def _shown_pair(pair: Mapping[str, Any]) -> dict[str, Any]:
    own = pair["own_similarity"]
    is_own = own is not None and own >= pair["similarity"] - _SAME
    return {name: pair[name] for name in _SHOWN} | {"is_own": is_own}


def _data_uri(image: Image.Image) -> str:
    """The image as a thumbnail inside an address."""
    image = image.copy()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    return "–" if value in (None, "") else str(value)


_MOST_DIGITS = 6


def format_measure(measure: Mapping[str, Any]) -> tuple[str, str]:
    """Value and interval as text: to two significant digits of the interval's half width.

    Without an interval three digits of the value; a count has no decimals.
    """
    value, low, high = measure["value"], measure["low"], measure["high"]
    if value is None:
        return "–", ""
    if low is None or high is None:
        digits = 0 if float(value).is_integer() else 2 - _magnitude(value)
        return _fixed(value, digits), ""
    digits = 1 - _magnitude((high - low) / 2) if low < high else 2 - _magnitude(value)
    return _fixed(value, digits), f"{_fixed(low, digits)} to {_fixed(high, digits)}"


def _magnitude(value: float) -> int:
    """The power of ten of the first digit: -2 for 0.05. Zero is taken for 1."""
    return math.floor(math.log10(abs(value or 1)))


def _fixed(value: float, digits: int) -> str:
    if value and abs(value) < 5e-5:  # would read as zero
        text = f"{value:.1e}"
    else:
        text = f"{value:,.{min(max(digits, 0), _MOST_DIGITS)}f}"
    return text.replace("-", "−")


def interval_bar(measure: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where value and interval lie on a scale, in percent of its width; None: no bar helps.

    From 0 to 1 where all is within, so that rows compare; around zero where zero is best or some
    of it is negative. Quality, counts and the loss of one set have no common scale.
    """
    value, low, high = measure["value"], measure["low"], measure["high"]
    is_alone = measure["section"] == "Quality" or measure["name"] == "heldout_loss"
    if is_alone or None in (value, low, high):
        return None
    largest = max(map(abs, (value, low, high)))
    if measure["better"] == "zero" or low < 0:
        end = _round_up(largest)
        ticks = (-end, 0, end)
    elif largest <= 1:
        ticks = (0, 0.5, 1)
    else:
        return None

    def x(at: float) -> float:
        return 100 * (at - ticks[0]) / (ticks[-1] - ticks[0])

    labels = [(x(tick), _short(tick)) for tick in ticks]
    return {"low": x(low), "value": x(value), "high": x(high), "ticks": labels}


def histogram_plot(
    histogram: Mapping[str, Any], measures: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Geometry of a histogram in a square of 100 x 100, y downward: shares of each set's images."""
    edges = histogram["edges"]
    counts = {name: histogram[name] for name in _SERIES if histogram[name]}
    shares = {name: [n / max(sum(ns), 1) for n in ns] for name, ns in counts.items()}
    top = max(map(max, shares.values())) or 1.0
    of_embedder = {m["name"]: m for m in measures if m["embedder"] == histogram["embedder"]}

    def x(similarity: float) -> float:
        return 100 * (similarity - edges[0]) / (edges[-1] - edges[0])

    def y(share: float) -> float:
        return 100 - 96 * share / top  # the highest bar ends a little below the frame

    def series(name: str) -> dict[str, Any]:
        p95 = of_embedder.get(_P95[name], {"value": None})
        heights = [y(share) if share else _BELOW for share in shares[name]]
        return {
            "name": name,
            "label": _SERIES[name],
            "images": sum(counts[name]),
            "path": _outline([x(edge) for edge in edges], heights),
            "p95": None if p95["value"] is None else (x(p95["value"]), format_measure(p95)[0]),
        }

    def hover(index: int) -> dict[str, Any]:
        low, high = edges[index : index + 2]
        lines = [f"{_short(low)} to {_short(high)}"]
        for name in reversed(counts):
            lines += [f"{_SERIES[name]}: {counts[name][index]:,} ({shares[name][index]:.1%})"]
        return {"x": x(low), "width": x(high) - x(low), "text": "\n".join(lines)}

    return {
        "series": [series(name) for name in counts],
        "bins": [hover(index) for index in range(len(edges) - 1)],
        "x_ticks": [(x(tick), _short(tick)) for tick in _ticks(edges[0], edges[-1], 5)],
        "y_ticks": [(y(tick), f"{100 * tick:.3g}%") for tick in _ticks(0, top, 4)],
    }


def _outline(x: Sequence[float], y: Sequence[float]) -> str:
    """The contour of bars between ``x``, as the path of an SVG."""
    bars = (f"V{top:.2f}H{right:.2f}" for top, right in zip(y, x[1:], strict=True))
    return f"M{x[0]:.2f} {_BELOW}{''.join(bars)}V{_BELOW}"


def _ticks(start: float, end: float, count: int) -> list[float]:
    """Round numbers from ``start`` to ``end``, at most ``count`` steps."""
    step = _round_up((end - start) / count)
    first, last = math.ceil(start / step - 1e-9), math.floor(end / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def _round_up(value: float) -> float:
    """The next of 1, 2 or 5 times a power of ten; 1 for zero."""
    power = 10.0 ** _magnitude(value)
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value * (1 - 1e-9))


def _short(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def _plain(value: Any) -> Any:
    """``value`` as JSON can say it: None for NaN and infinities, lists and numbers for arrays."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
