"""What is compared with what: the runs of a place, which is data and a training mode."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.efficacy import results as files
from benchmarks.efficacy.analysis import AtBudget, Comparison, at_budget, compare
from benchmarks.efficacy.methods import METHODS
from benchmarks.efficacy.results import Result
from benchmarks.efficacy.study import DEFAULT_RATE, SEEDS, SETTINGS, WEIGHTS, Cell, tuned_as
from benchmarks.efficacy.tables import Seeds, curves_of, having, scalar

Methods = dict[str, Seeds]
Results = Mapping[Cell, Result]


@dataclass(frozen=True, eq=False)
class Place:
    """Methods, and plain fine-tuning of the same data; each comparison is made once."""

    setting: str
    mode: str
    plain: Seeds
    others: Methods
    """By label."""
    _found: dict[tuple[str, ...], Comparison | None] = field(default_factory=dict)
    _spent: dict[tuple[str, ...], AtBudget] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.setting}-{self.mode}"

    @property
    def title(self) -> str:
        """For readers."""
        return f"{SETTINGS[self.setting]}, {WEIGHTS[self.mode]}"

    @property
    def methods(self) -> Methods:
        """All of them, plain first."""
        return {"plain": self.plain, **self.others}

    @property
    def paired(self) -> Methods:
        """Those that have a seed in common with plain."""
        return {label: runs for label, runs in self.others.items() if self.seeds(label)}

    def compare(
        self, label: str, measure: str = "excess", quality: str = "heldout_loss"
    ) -> Comparison | None:
        """At equal quality; see `analysis.compare`."""
        key = label, measure, quality
        if key not in self._found:
            pair = (having(runs, quality) for runs in (self.plain, self.others[label]))
            self._found[key] = compare(*(curves_of(runs, measure, quality) for runs in pair))
        return self._found[key]

    def at_budget(
        self,
        label: str,
        measure: str = "excess",
        quality: str = "heldout_loss",
        budget: str = "updates",
    ) -> AtBudget:
        """Where as much is spent, of one of `tables.BUDGETS`; see `analysis.at_budget`."""
        key = label, measure, quality, budget
        if key not in self._spent:
            pair = [having(runs, quality) for runs in (self.plain, self.others[label])]
            seeds = self.seeds(label, quality)
            spent = [scalar({seed: runs[seed] for seed in seeds}, budget) for runs in pair]
            curves = (curves_of(runs, measure, quality) for runs in pair)
            self._spent[key] = at_budget(*curves, spent)
        return self._spent[key]

    def having(self, name: str) -> "Place":
        """The runs of which a number of each image is known: readings have come to say more."""
        others = {label: having(runs, name) for label, runs in self.others.items()}
        return Place(self.setting, self.mode, having(self.plain, name), others)

    def seeds(self, label: str, quality: str = "heldout_loss") -> list[int]:
        """Those of which a method's and plain's quality are known."""
        return sorted(set(having(self.plain, quality)) & set(having(self.others[label], quality)))


def places(known: Results) -> list[Place]:
    """All that have a run of plain fine-tuning."""
    found = []
    for setting in SETTINGS:
        for mode in ("full", "lora"):
            methods = by_method(known, setting, mode)
            if plain := methods.pop("plain", None):
                found.append(Place(setting, mode, plain, methods))
    return found


def rate_of(known: Results, mode: str, method: str) -> float:
    """The tuned rate, or the default until it is known."""
    return files.tuned_rate(known, mode, method) or DEFAULT_RATE[mode, method]


def by_method(known: Results, setting: str, mode: str) -> Methods:
    """Of all cells at the rates known now: runs by label, then seed."""
    found: dict[str, dict[int, Result]] = defaultdict(dict)
    for cell, result in known.items():
        is_here = (cell.setting, cell.train_mode) == (setting, mode) and cell.seed in SEEDS
        of = tuned_as(cell.method, cell.num_shards, cell.times)
        if is_here and cell.learning_rate == rate_of(known, mode, of):
            found[cell.label + age(result)][cell.seed] = result
    order = {name: number for number, name in enumerate(METHODS)}
    return dict(sorted(found.items(), key=lambda item: (order[item[0].split(",")[0]], item[0])))


def age(result: Result) -> str:
    """What is added to a label where a cell has been run by other settings than today's."""
    return "" if files.is_current(result) else ", to be run again"
