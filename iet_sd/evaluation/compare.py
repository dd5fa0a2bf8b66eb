"""Two evaluated models, paired by prompt and seed: does the second memorize less, at what price?

Letters in shapes: G generations of each model, H held-out images, D dimensions.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from iet_sd.config.evaluation import ComparisonConfig
from iet_sd.errors import UserError
from iet_sd.evaluation.kid import kid_difference
from iet_sd.evaluation.report import SCHEMA_VERSION
from iet_sd.evaluation.statistics import (
    Estimate,
    PairedResult,
    difference_of_shares,
    exact_share,
    paired_difference,
)
from iet_sd.evaluation.verdict import with_minus
from iet_sd.files import write_text_atomic

FILE = "comparison.json"
# What must be equal for two evaluations to be compared, as paths into report.json.
_SHARED = (
    ("data", "train", "fingerprint"),
    ("data", "heldout", "fingerprint"),
    ("settings", "preprocessing"),
    ("settings", "num_inference_steps"),
    ("settings", "guidance_scale"),
    ("settings", "resolution"),
    ("seed",),
)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` wrote into a folder, with the rows in an order of their own."""

    folder: Path
    report: dict[str, Any]
    pairs: dict[str, list]
    images: dict[str, list]

    @classmethod
    def read(cls, folder: str) -> "Evaluation":
        """Errors: `UserError` if it is not there, damaged, or of another version."""
        path = Path(folder).expanduser()
        try:
            report = json.loads((path / "report.json").read_text(encoding="utf-8"))
            order = [("prompt_id", "ascending"), ("image", "ascending")]
            pairs = pyarrow.parquet.read_table(path / "pairs.parquet").sort_by(order)
            images = pyarrow.parquet.read_table(path / "images.parquet")
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise UserError(
                f"{folder} is not the folder of an evaluation ({error}). Expected the --output_dir "
                "of `python -m iet_sd evaluate`."
            ) from error
        if report.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"{folder} was made by another version (schema {report.get('schema_version')}, "
                f"here {SCHEMA_VERSION}). Evaluate again: drawn images and features are kept."
            )
        return cls(path, report, pairs.to_pydict(), images.to_pydict())

    @property
    def name(self) -> str:
        """The model."""
        return self.report["model"]["name"]

    @property
    def embedder(self) -> str:
        """What similarities are measured by."""
        return next(m for m in self.report["measures"] if m["headline"])["embedder"]

    def column(self, name: str, images: str) -> np.ndarray:
        """A column of the training or held-out images; NaN where nothing was measured."""
        values = zip(self.images["set"], self.images[name], strict=True)
        return np.array([np.nan if v is None else v for s, v in values if s == images])

    def features(self, images: str) -> np.ndarray | None:
        """Features for quality, mapped from the cache; None if they are no longer there."""
        path = self.report["quality_features"] and self.report["quality_features"][images]
        file = self.folder / path if path else None
        return np.load(file, mmap_mode="r") if file and file.is_file() else None


def compare(config: ComparisonConfig) -> str:
    """The comparison in words, also written to ``comparison.json`` if a folder is given.

    Errors: `UserError` for folders that are no evaluations, or of other data, prompts or seeds.
    """
    first, second = Evaluation.read(config.first), Evaluation.read(config.second)
    if first.folder.resolve() == second.folder.resolve():
        return f"{config.first} and {config.second} are the same evaluation: nothing differs."
    _require_pairs(first, second)
    results = _paired(first, second, config)
    kid = _kid(first, second, config.confidence_level)
    text = _words(first, second, results, kid)
    if config.output_dir is not None:
        content = {
            "schema_version": SCHEMA_VERSION,
            "first": first.name,
            "second": second.name,
            "embedder": first.embedder,
            "pairs": len(first.pairs["prompt"]),
            "results": {name: asdict(result) for name, result in results.items()},
            "kid_difference": kid and asdict(kid),
            "verdict": text,
        }
        folder = Path(config.output_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder / FILE, json.dumps(_plain(content), indent=2) + "\n")
    return text


def _require_pairs(first: Evaluation, second: Evaluation) -> None:
    differences = []
    for path in _SHARED:
        values = [_at(evaluation.report, path) for evaluation in (first, second)]
        if values[0] != values[1]:
            differences.append(f"{'.'.join(path)}: {values[0]!r:.60} and {values[1]!r:.60}")
    if first.embedder != second.embedder:
        differences.append(f"embedder: {first.embedder} and {second.embedder}")
    for name in ("prompt_id", "prompt", "image"):
        if first.pairs[name] != second.pairs[name]:
            differences.append(f"other generations ({name})")
            break
    if differences:
        raise UserError(
            f"{first.folder} and {second.folder} cannot be compared, for they differ in more than "
            f"the model: {'; '.join(differences)}. Evaluate both with the same settings."
        )


def _paired(
    first: Evaluation, second: Evaluation, config: ComparisonConfig
) -> dict[str, PairedResult]:
    """How much lower each number is for the second model."""
    group_H = np.unique(first.column("group", "heldout"), return_inverse=True)[1]

    def difference(statistic: Callable[..., float], name: str, shared=()) -> PairedResult:
        prompts = np.unique(first.pairs["prompt_id"], return_inverse=True)[1]
        return paired_difference(
            statistic,
            np.array(first.pairs[name], float),
            np.array(second.pairs[name], float),
            shared,
            clusters=[prompts, *[group_H for _ in shared]],
            resamples=config.bootstrap_resamples,
            level=config.confidence_level,
            seed=config.seed,
        )

    p95 = lambda value: np.percentile(value, 95)  # noqa: E731
    results = {"memorization_score": difference(p95, "similarity")}
    heldout_H = first.column("similarity", "heldout")
    if len(heldout_H):
        excess = lambda value, heldout: p95(value) - p95(heldout)  # noqa: E731
        results["excess_score"] = difference(excess, "similarity", [heldout_H])
    results["similarity_mean"] = difference(np.mean, "similarity")
    results["l2_copies"] = _with_exact_shares(
        difference(lambda value: np.mean(value < 1), "ratio"),
        [np.mean(np.array(e.pairs["ratio"], float) < 1) for e in (first, second)],
        len(set(first.pairs["prompt_id"])),
        config.confidence_level,
    )
    losses = [evaluation.column("loss", "heldout") for evaluation in (first, second)]
    measured = [np.isfinite(loss) for loss in losses]
    if measured[0].any() and (measured[0] == measured[1]).all():
        results["heldout_loss"] = paired_difference(
            np.mean,
            *(loss[measured[0]] for loss in losses),
            clusters=[group_H[measured[0]]],
            resamples=config.bootstrap_resamples,
            level=config.confidence_level,
            seed=config.seed,
        )
    return results


def _with_exact_shares(
    result: PairedResult, shares: Sequence[float], units: int, level: float
) -> PairedResult:
    """Where no image of either model is a copy, or all are, resampling changes nothing.

    The interval is then that of two samples drawn apart, which is no narrower than that of pairs.
    """
    if not set(shares) <= {0.0, 1.0}:
        return result
    exact = (exact_share(Estimate(float(s), float(s), float(s), level), units) for s in shares)
    return replace(result, difference=difference_of_shares(*exact))


def _kid(first: Evaluation, second: Evaluation, level: float) -> Estimate | None:
    """KID of the second minus that of the first, if both have features by the same embedder."""
    names = [e.report["settings"]["quality_embedder"] for e in (first, second)]
    features = [e.features("generated") for e in (first, second)]
    real = first.features("heldout")
    if names[0] != names[1] or real is None or any(f is None for f in features):
        return None
    # Features lie in the order of drawing: all images of a prompt together.
    prompt_G = np.arange(len(features[0])) // first.report["data"]["images_per_prompt"]
    return kid_difference(*features, real, prompt_G, first.column("group", "heldout"), level)


def _words(
    first: Evaluation,
    second: Evaluation,
    results: dict[str, PairedResult],
    kid: Estimate | None,
) -> str:
    """The verdict, then a line a number."""
    key = "excess_score" if "excess_score" in results else "memorization_score"
    labels = {
        "memorization_score": "memorization score",
        "excess_score": "excess similarity",
        "similarity_mean": "mean similarity",
        "l2_copies": "share of l2-ratio copies",
        "heldout_loss": "held-out loss",
    }
    reduction = results[key].relative_reduction
    if np.isfinite(reduction.value):
        shown = [f"{-x:+z.1%}" for x in (reduction.value, reduction.high, reduction.low)]
    else:
        shown = [f"{x:+z.4f}" for x in _change(results[key])]
    found = f"{labels[key]} {shown[0]} [{shown[1]}, {shown[2]}]"
    if kid is not None:
        found += f", KID {kid.value:+z.5f} [{kid.low:+z.5f}, {kid.high:+z.5f}]"
    names = f"{second.name} against {first.name}"
    lines = [f"{names}: {with_minus(found)}, by {first.embedder}."]
    for name, result in results.items():
        value, low, high = _change(result)
        numbers = with_minus(f"{value:+z.4f} [{low:+z.4f}, {high:+z.4f}]")
        lines.append(f"  {labels[name]}: {numbers}, p = {result.p_value:.3g}")
    return "\n".join(lines)


def _change(result: PairedResult) -> tuple[float, float, float]:
    """The second model's number minus the first's, and its interval."""
    lower_by = result.difference
    return -lower_by.value, -lower_by.high, -lower_by.low


def _at(content: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        content = None if content is None else content.get(key)
    return content


def _plain(value: Any) -> Any:
    """NaN as None, which JSON can say."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value
