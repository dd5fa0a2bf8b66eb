"""From two runs of different length to a rate, and from repetitions to ratios with their spread.

The time of a run is start + updates / rate. Two lengths give both, without a change to any script;
what does not depend on the length (imports, loading, saving) is the start. Ours say how long their
rounds took, the first of which are cheaper, as the bank is empty: there the rest is the start.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Work:
    """FLOP of one image, as `torch.utils.flop_counter` counts them: products and convolutions."""

    vae: int
    """Encoding the image."""
    text: int
    """Encoding the caption."""
    unet: int
    """Forward pass of the UNet."""
    backward: int
    """Backward pass of the UNet, to what is trained."""


@dataclass(frozen=True)
class Counts:
    """What a run did; all plain sums, by names of metrics.jsonl."""

    updates: int = 0
    scored: int = 0
    skipped: int = 0
    trained: int = 0
    augmented: int = 0
    dropped: int = 0
    forward: int = 0
    backward: int = 0
    encoded: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Run:
    """One process: wall time, time of its threads, peak resident memory in bytes, what it did."""

    seconds: float
    cpu: float
    peak: int
    counts: Counts
    loop: float | None = None
    """Seconds from the first step to the last average, if the process has told."""

    def start(self, per_scored: float) -> float:
        """Seconds beside those of the loop, which may take ``per_scored`` for each sample."""
        loop = self.counts.scored * per_scored if self.loop is None else self.loop
        return self.seconds - loop


@dataclass(frozen=True)
class Steady:
    """What two runs of different length say."""

    images_per_second: float
    """Trained."""
    updates_per_second: float
    cpu_per_image: float
    """Seconds of all threads: as the others, but for waiting, as on a machine that others use."""
    start: float
    """Seconds that do not depend on the length."""
    peak: int
    """Bytes, of the longer run."""
    counts: Counts
    """By how much more the longer run did."""


def steady(short: Run, long: Run) -> Steady:
    """Rates of the longer run beyond the shorter one.

    Errors: `SystemExit` if the longer one did not take longer, or trained nothing more.
    """
    seconds, counts = long.seconds - short.seconds, long.counts - short.counts
    if seconds <= 0 or counts.updates <= 0 or counts.trained <= 0:
        raise SystemExit(
            f"{counts.updates} more updates on {counts.trained} images took {seconds:.1f} s more: "
            "too short to measure. Use more --steps or rounds further apart."
        )
    return Steady(
        images_per_second=counts.trained / seconds,
        updates_per_second=counts.updates / seconds,
        cpu_per_image=(long.cpu - short.cpu) / counts.trained,
        start=short.start(seconds / counts.scored),
        peak=long.peak,
        counts=counts,
    )


@dataclass(frozen=True)
class Spread:
    """Median, least and most of repetitions."""

    median: float
    least: float
    most: float

    def __format__(self, spec: str) -> str:
        middle, least, most = (format(v, spec) for v in (self.median, self.least, self.most))
        return middle if least == most else f"{middle} ({least}..{most})"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """Each value over that of the same repetition."""
    return spread([value / other for value, other in zip(values, reference, strict=True)])


def work_per_image(counts: Counts, work: Work, cached: bool) -> Mapping[str, float]:
    """FLOP per trained image, by network. Captions are encoded with each pass, unless cached."""
    texts = 0 if cached else counts.scored + counts.augmented
    total = {
        "vae": counts.encoded * work.vae,
        "text": texts * work.text,
        "unet": counts.forward * work.unet,
        "backward": counts.backward * work.backward,
    }
    return {name: flop / counts.trained for name, flop in total.items()}
