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
WEIGHTS = {"full": "all weights", "lora": "LoRA"}
"""What is trained, by ``--train_mode``."""
TUNING_SEED = 100
SEEDS = (0, 1, 2)
RATES = {
    ("full", "plain"): (5e-5, 1e-4, 2e-4),
    ("full", "iet"): (1e-4, 2e-4, 4e-4),
    ("full", "iet_agc_plus"): (1e-4, 2e-4, 4e-4),
    ("lora", "plain"): (5e-4, 1e-3, 2e-3),
    ("lora", "iet"): (5e-4, 1e-3, 2e-3),
}
LOWER_RATES = {("full", "plain"): 2.5e-5, ("full", "iet"): 5e-5, ("lora", "plain"): 2.5e-4}
"""Half the lowest of `RATES`, tried since these were chosen, by the same seed: what it would have
changed. They are not chosen from: plain fine-tuning is to memorize within the updates of a run."""
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


def tuned_as(method: str, shards: int, times: int = 1) -> str:
    """The method whose tuning says a cell's rate.

    With as many updates for each proxy, a proxy trains as plain does; so does K = 1.
    """
    return "plain" if shards in (1, times) else METHODS[method].tuned_as


def make(rate: Rate, setting: str, mode: str, method: str, seed: int, **more: Any) -> Cell:
    """A cell with the method's own K and rate, unless given."""
    shards = more.pop("num_shards", METHODS[method].num_shards)
    learning_rate = rate(mode, tuned_as(method, shards, more.get("times", 1)))
    return Cell(setting, mode, method, learning_rate, seed, shards, **more)


def tuning_cell(mode: str, method: str, rate: float) -> Cell:
    """What a rate comes to, on the tuning seed."""
    return Cell("fluent", mode, method, rate, TUNING_SEED, METHODS[method].num_shards)


def tuning(mode: str, method: str) -> list[Cell]:
    """The cells that choose a rate, the middle one first."""
    low, middle, high = RATES[mode, method]
    return [tuning_cell(mode, method, rate) for rate in (middle, high, low)]


AT_LOWER_RATE = replace(
    tuning_cell("full", "plain", LOWER_RATES["full", "plain"]),
    method="agc_taa_gentle_ema",
    flags=(("agc_threshold", 0.9),),
)
"""What the winner adds where plain has the lower rate."""

MAIN = (
    *("plain", "iet_agc_plus", "iet", "iet_agc", "iet_agc_plus_colour"),
    *("agc", "ema", "agc_taa", "iet_agc_plus_paper"),
)

GOAL = ("plain", "agc_taa_gentle")
FULL_METHOD = "iet_agc_plus_gentle"
WHY_NOT = ("agc_taa_whole_pixel", "agc")
OFTEN = ("plain", "agc", "agc_taa_gentle")
CONTROLS = ("agc_calibrated", "constant_gentle", "iet_agc_plus_gentle", "agc_random_skip", "iet")
WITHOUT = (
    *("iet", "iet_agc_plus_gentle", "taa_gentle", "agc_random_skip"),
    *("iet_agc", "iet_agc_taa_gentle", "agc_taa_gentle_ema", "ema"),
    *("shuffled_gentle", "dropout", "random_exchange_gentle", "random_skip", "weight_decay"),
    "iet_agc_msr",
)
TRIED = ("agc_calibrated", "constant_gentle", "agc_calibrated_taa_gentle", "agc_taa_told")


def first(rate: Rate) -> Iterator[Cell]:
    """``fluent``, all weights: rates, then the main methods, as the paper has them and less."""
    # In turns, so that there is a first comparison, on the tuning seed, after two cells.
    plain, iet, plus = (tuning("full", method) for method in ("plain", "iet", "iet_agc_plus"))
    yield from (plain[0], plus[0], plus[1], plain[1], plain[2], *iet, plus[2])
    yield from (make(rate, "fluent", "full", method, SEEDS[0]) for method in MAIN)


def beyond(rate: Rate) -> Iterator[Cell]:
    """Beyond the paper: where some images are often, where none is, and what was tried once."""
    cell = lambda setting, method, seed: make(rate, setting, "full", method, seed)  # noqa: E731
    for seed in SEEDS:
        yield from (cell("duplicated", method, seed) for method in OFTEN)
    yield from (cell("duplicated", method, SEEDS[0]) for method in CONTROLS)
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
    for seed, setting in product(SEEDS, SETTINGS):
        yield make(rate, setting, "full", "agc", seed)


def stricter(rate: Rate) -> Iterator[Cell]:
    """The winner with a threshold that skips more, on all data, all weights: best of the sweeps.

    And with a moving average of the weights, which helps by itself.
    """
    flags = (("agc_threshold", 0.9),)
    for method in ("agc_taa_gentle", "agc_taa_gentle_ema"):
        for seed, setting in product(SEEDS, SETTINGS):
            yield make(rate, setting, "full", method, seed, flags=flags)
    # Where KID is worse than plain's after as many updates: what twice as many give.
    yield make(rate, "twemoji", "full", method, SEEDS[0], flags=flags, times=2)


def parts(rate: Rate) -> Iterator[Cell]:
    """What each part does, where memorization is most: on ``duplicated``, all weights.

    Augmenting by what leaves no marks: with RandAugment's the marks hide everything else.
    """
    cell = lambda method, **more: make(rate, "duplicated", "full", method, SEEDS[0], **more)  # noqa: E731
    yield from (cell(method) for method in WITHOUT[:4])
    for cheaper in (("taa_variants", 2), ("taa_min_strength", 0.3)):
        yield cell("agc_taa_gentle", flags=(cheaper,))
    yield from (cell(method) for method in WITHOUT[4:])


def lora(rate: Rate) -> Iterator[Cell]:
    """The winner with the higher threshold and the whole method, as LoRA on all data."""
    yield from tuning("lora", "iet")
    flags = (("agc_threshold", 0.9),)
    for setting in SETTINGS:
        yield make(rate, setting, "lora", "agc_taa_gentle", SEEDS[0], flags=flags)
        yield make(rate, setting, "lora", FULL_METHOD, SEEDS[0])


def sweeps(rate: Rate) -> Iterator[Cell]:
    """Settings one at a time, on ``fluent``, all weights: K of the whole method, and how proxies
    are averaged; threshold, bins and augmentation of the winner. And lower rates."""
    cell = lambda *given, **more: make(rate, "fluent", "full", *given, SEEDS[0], **more)  # noqa: E731
    yield from (cell(FULL_METHOD, num_shards=shards) for shards in (8, 2))
    settings = (("bank_bins", 10), ("agc_threshold", 0.5), ("bank_bins", 1000))
    yield from (cell("agc_taa_gentle", flags=(each,)) for each in settings)
    yield cell(FULL_METHOD, flags=(("outer_momentum", 0.5),))
    settings = (("taa_magnitude", 10.0), ("agc_threshold", 0.65), ("agc_threshold", 0.9))
    yield from (cell("agc_taa_gentle", flags=(each,)) for each in settings)
    yield from (tuning_cell(*of, rate) for of, rate in LOWER_RATES.items())
    yield AT_LOWER_RATE
    yield cell(FULL_METHOD, times=4)


STUDIES: dict[str, Callable[[Rate], Iterator[Cell]]] = {
    "first": first,
    "beyond": beyond,
    "goal": goal,
    "stricter": stricter,
    "parts": parts,
    "sweeps": sweeps,
    "lora": lora,
}


def cells(study: str, rate: Rate) -> list[Cell]:
    """The cells of a study, each once, in order."""
    return list(dict.fromkeys(STUDIES[study](rate)))
