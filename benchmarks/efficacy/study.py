"""Which cells there are, in the order of what they teach, and how learning rates are chosen.

Rates are tuned on a seed of its own, on ``fluent``, for each training mode and for each method that
another is `tuned_as`: the rate with the lowest held-out loss that any reading reaches. It is chosen
by quality alone, so that it cannot be chosen by what the study is about. Until a method's tuning
is complete, its rate is that of `DEFAULT_RATE`; its cells then count as long as that turns out to
be the rate.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from benchmarks.efficacy.methods import METHODS

SETTINGS = {
    "fluent": "256 Fluent emoji",
    "duplicated": "the same, 13 of them as 10 rows each",
    "twemoji": "256 Twemoji, another style (graphics by Twitter, CC-BY 4.0)",
}
"""Data, made by `benchmarks.efficacy.settings`, which takes long to import."""
TUNING_SEED = 100
SEEDS = (0, 1, 2)
RATES = {
    ("full", "plain"): (5e-5, 1e-4, 2e-4),
    ("full", "iet"): (1e-4, 2e-4, 4e-4),
    ("full", "iet_agc_plus"): (1e-4, 2e-4, 4e-4),
    ("lora", "plain"): (5e-4, 1e-3, 2e-3),
    ("lora", "iet"): (5e-4, 1e-3, 2e-3),
    ("lora", "iet_agc_plus"): (5e-4, 1e-3, 2e-3),
}
DEFAULT_RATE = {key: rates[1] for key, rates in RATES.items()}


@dataclass(frozen=True)
class Cell:
    """One training run."""

    setting: str
    train_mode: str
    method: str
    learning_rate: float
    seed: int
    num_shards: int
    times: int = 1
    """Updates, as a multiple of the protocol's. Equal to ``num_shards``: as many for each proxy as
    plain training has."""
    flags: tuple[tuple[str, Any], ...] = ()
    """Further flags, for what is varied beside the method."""

    @property
    def name(self) -> str:
        """Of its file."""
        more = "".join(f"-{name}={value}" for name, value in self.flags)
        times = f"-x{self.times}" if self.times > 1 else ""
        return (
            f"{self.setting}-{self.train_mode}-{self.method}{more}-k{self.num_shards}"
            f"-lr{self.learning_rate:g}{times}-s{self.seed}"
        )

    @property
    def curve(self) -> "Cell":
        """What all seeds of it share."""
        return replace(self, seed=-1)

    @property
    def label(self) -> str:
        """For a table: what differs from the method as it is."""
        parts = [self.method]
        if self.num_shards != METHODS[self.method].num_shards:
            parts.append(f"K = {self.num_shards}")
        if self.times > 1:
            parts.append(f"{self.times} x updates")
        return ", ".join([*parts, *(f"{name} {value}" for name, value in self.flags)])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Cell":
        """What `as_dict` gave, also after JSON."""
        return cls(**values | {"flags": tuple(map(tuple, values["flags"]))})


Rate = Callable[[str, str], float]
"""The learning rate of a training mode and method, from what is known so far."""


def make(rate: Rate, setting: str, mode: str, method: str, seed: int, **more: Any) -> Cell:
    """A cell with the method's own K and rate, unless given."""
    shards = more.pop("num_shards", METHODS[method].num_shards)
    # With as many updates for each proxy, a proxy trains as plain does; so does K = 1.
    tuned_as = METHODS[method].tuned_as
    if shards == 1 or more.get("times", 1) == shards:
        tuned_as = "plain"
    return Cell(setting, mode, method, rate(mode, tuned_as), seed, shards, **more)


def tuning(mode: str, method: str) -> list[Cell]:
    """The cells that choose a rate, the middle one first."""
    low, middle, high = RATES[mode, method]
    shards = METHODS[method].num_shards
    return [Cell("fluent", mode, method, rate, TUNING_SEED, shards) for rate in (middle, high, low)]


MAIN = (
    *("plain", "iet_agc_plus", "iet", "iet_agc", "iet_agc_plus_colour"),
    *("agc", "ema", "agc_taa"),
)
PARTS = (
    "iet_agc_taa",
    "iet_agc_msr",
    "iet_agc_plus_paper",
    "weight_decay",
    "random_skip",
    "agc_random_skip",
    "shuffled_taa",
    "constant_taa",
    "random_exchange",
    "iet_agc_plus_outer",
)

GOAL = ("plain", "agc_taa_gentle")
FULL_METHOD = "iet_agc_plus_gentle"
WHY_NOT = ("agc_taa_whole_pixel", "agc")
OFTEN = ("plain", "agc", "agc_taa_gentle", "agc_calibrated")
BEYOND = ("plain", "agc_taa_gentle", "iet", "iet_agc_plus_gentle", "ema", "agc")
CONTROLS = ("constant_gentle", "iet_agc_plus_gentle", "agc_random_skip", "iet")
WITHOUT = (
    *("iet", "iet_agc_plus_gentle", "taa_gentle", "agc_random_skip"),
    *("iet_agc", "iet_agc_taa_gentle", "agc_taa_gentle_ema", "ema"),
    *("shuffled_gentle", "dropout", "random_exchange_gentle", "random_skip", "weight_decay"),
    "iet_agc_msr",
)
TRIED = ("agc_calibrated", "constant_gentle", "agc_calibrated_taa_gentle", "agc_taa_told")


def first(rate: Rate) -> Iterator[Cell]:
    """``fluent``, all weights: rates, then the main methods, their parts, and controls."""
    # In turns, so that there is a first comparison, on the tuning seed, after two cells.
    plain, iet, plus = (tuning("full", method) for method in ("plain", "iet", "iet_agc_plus"))
    yield from (plain[0], plus[0], plus[1], plain[1], plain[2], iet[0], iet[1])
    cell = lambda method, seed, **more: make(rate, "fluent", "full", method, seed, **more)  # noqa: E731
    yield from (cell(method, 0) for method in MAIN)
    yield from (iet[2], plus[2])
    yield from (cell(method, seed) for seed in SEEDS for method in MAIN)
    yield from (cell(method, 0) for method in PARTS)
    for method in ("iet", "iet_agc_plus"):
        yield cell(method, 0, times=4)
    yield from (cell(method, seed) for seed in SEEDS for method in PARTS)
    yield from (cell(method, seed, times=4) for seed in SEEDS for method in ("iet", "iet_agc_plus"))


def beyond(rate: Rate) -> Iterator[Cell]:
    """Beyond the paper: where some images are often, where none is, and what was tried once."""
    cell = lambda setting, method, seed: make(rate, setting, "full", method, seed)  # noqa: E731
    yield from (cell("duplicated", method, SEEDS[0]) for method in OFTEN)
    yield from (cell("duplicated", method, seed) for seed in SEEDS for method in OFTEN[:3])
    yield cell("fluent", "agc_taa_gentle", SEEDS[0])
    yield from (cell("duplicated", method, SEEDS[0]) for method in CONTROLS)
    yield from (cell("fluent", method, SEEDS[0]) for method in BEYOND)
    for seed in SEEDS:
        yield from (cell("duplicated", method, seed) for method in OFTEN)
        yield from (cell("fluent", method, seed) for method in BEYOND)
    yield from (cell("fluent", method, SEEDS[0]) for method in TRIED)


def goal(rate: Rate) -> Iterator[Cell]:
    """The winners against plain: on all data, all weights and as LoRA, by seeds.

    And where one does not win, Twemoji, what of it is the reason.
    """
    yield from tuning("lora", "plain")
    yield from (make(rate, setting, "lora", m, SEEDS[0]) for setting in SETTINGS for m in GOAL)
    for seed, setting in product(SEEDS, SETTINGS):
        yield from (make(rate, setting, "full", method, seed) for method in (*GOAL, FULL_METHOD))
    yield from (make(rate, "twemoji", "full", method, SEEDS[0]) for method in WHY_NOT)
    for seed, setting in product(SEEDS, SETTINGS):
        yield from (make(rate, setting, "lora", method, seed) for method in GOAL)


def stricter(rate: Rate) -> Iterator[Cell]:
    """The winner with a threshold that skips more, on all data, all weights: best of the sweeps."""
    flags = (("agc_threshold", 0.9),)
    for seed, setting in product(SEEDS, SETTINGS):
        yield make(rate, setting, "full", "agc_taa_gentle", seed, flags=flags)


def parts(rate: Rate) -> Iterator[Cell]:
    """What each part does, where memorization is most: on ``duplicated``, all weights.

    Augmenting by what leaves no marks: with RandAugment's the marks hide everything else.
    """
    cell = lambda method, **more: make(rate, "duplicated", "full", method, SEEDS[0], **more)  # noqa: E731
    yield from (cell(method) for method in WITHOUT[:4])
    for cheaper in (("taa_variants", 2), ("taa_min_strength", 0.3)):
        yield cell("agc_taa_gentle", flags=(cheaper,))
    yield from (cell(method) for method in WITHOUT[4:])


def settings(rate: Rate) -> Iterator[Cell]:
    """The main methods on the other data, and as LoRA, by seeds."""
    places = [("duplicated", "full"), ("twemoji", "full"), ("fluent", "lora")]
    for seed in SEEDS:
        for setting, mode in places:
            if mode == "lora" and seed == SEEDS[0]:
                yield from tuning(mode, "iet_agc_plus")
                yield from tuning(mode, "iet")
            yield from (make(rate, setting, mode, method, seed) for method in MAIN)


def sweeps(rate: Rate) -> Iterator[Cell]:
    """Settings of the winner, on ``fluent``, all weights: K, threshold, bins, augmentation."""
    cell = lambda *given, **more: make(rate, "fluent", "full", *given, **more)  # noqa: E731
    settings = [("agc_threshold", each) for each in (0.9, 0.65, 0.5)]
    settings += [("taa_magnitude", 10.0), ("taa_min_strength", 0.3)]
    settings += [("bank_bins", each) for each in (10, 1000)]
    for seed in SEEDS:
        yield from (cell("agc_taa_gentle", seed, flags=(each,)) for each in settings)
        yield from (cell("iet_agc_plus_gentle", seed, num_shards=shards) for shards in (2, 4, 8))


STUDIES: dict[str, Callable[[Rate], Iterator[Cell]]] = {
    "first": first,
    "beyond": beyond,
    "goal": goal,
    "stricter": stricter,
    "parts": parts,
    "settings": settings,
    "sweeps": sweeps,
}


def cells(study: str, rate: Rate) -> list[Cell]:
    """The cells of a study, each once, in order."""
    return list(dict.fromkeys(STUDIES[study](rate)))
