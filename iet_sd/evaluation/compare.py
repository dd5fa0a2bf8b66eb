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
    ("settings", "negative_prompt"),
    ("settings", "resolution"),
    ("model", "dtype"),
    ("seed",),
)
# The same for one measure alone, which is left out where they differ.
_SHARED_BY_LOSSES = tuple(
    ("losses", name)
    for name in (
        *("samples", "timesteps", "names", "captions"),
        *("prediction_type", "noise_levels", "vae"),
    )
)
_SHARED_BY_KID = tuple(("quality_features", "embedder", name) for name in ("name", "fingerprint"))
_LABELS = {
    "memorization_score": "memorization score",
    "excess_score": "excess similarity",
    "similarity_mean": "mean similarity",
    "l2_copies": "share of l2-ratio copies",
    "heldout_loss": "held-out loss",
    "kid": "KID",
}


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
    def embedder(self) -> dict[str, str]:
        """What similarities are measured by: name and fingerprint."""
        return self.report["embedders"][0]

    def groups(self) -> np.ndarray:
        """The near-duplicate group of each held-out image, numbered as they come: (H,)."""
        number: dict[str, int] = {}
        labels = self.column("group", "heldout").tolist()
        return np.array([number.setdefault(label, len(number)) for label in labels], int)

    def column(self, name: str, images: str) -> np.ndarray:
        """A column of the training or held-out images; NaN where nothing was measured."""
        values = zip(self.images["set"], self.images[name], strict=True)
        return np.array([np.nan if v is None else v for s, v in values if s == images])

    def features(self, images: str) -> np.ndarray:
        """Features for quality, mapped from the cache. Errors: `UserError` if they are gone."""
        try:
            # Without links, as the place was written.
            file = self.folder.resolve() / self.report["quality_features"][images]
            return np.load(file, mmap_mode="r")
        except OSError as error:
            raise UserError(
                f"the features of {self.name} are gone ({error}). Evaluate again to have them."
            ) from error


def compare(config: ComparisonConfig) -> str:
    """The comparison in words, also written to ``comparison.json`` if a folder is given.

    A measure that one of them cannot be compared by is left out, and why is said.
    Errors: `UserError` for folders that are no evaluations, or differ in more than the model.
    """
    first, second = Evaluation.read(config.first), Evaluation.read(config.second)
    if first.folder.resolve() == second.folder.resolve():
        return f"{config.first} and {config.second} are the same evaluation: nothing differs."
    _require_pairs(first, second)
    results, kid, left_out = _paired(first, second, config), None, {}
    try:
        results |= _losses(first, second, config)
    except UserError as error:
        left_out["heldout_loss"] = str(error)
    try:
        kid = _kid(first, second, config.confidence_level)
    except UserError as error:
        left_out["kid"] = str(error)
    text = _words(first, second, results, kid, left_out)
    if config.output_dir is not None:
        content = {
            "schema_version": SCHEMA_VERSION,
            "first": first.name,
            "second": second.name,
            "embedder": first.embedder["name"],
            "pairs": len(first.pairs["prompt"]),
            "results": {name: asdict(result) for name, result in results.items()},
            "kid_difference": kid and asdict(kid),
            "left_out": left_out,
            "verdict": text,
        }
        folder = Path(config.output_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder / FILE, json.dumps(_plain(content), indent=2) + "\n")
    return text


def _require_pairs(first: Evaluation, second: Evaluation) -> None:
    differences = _differences(first, second, _SHARED)
    if first.embedder != second.embedder:
        shown = [f"{e.embedder['name']} ({e.embedder['fingerprint']:.8})" for e in (first, second)]
        differences.append(f"embedder: {' and '.join(shown)}")
    if not np.array_equal(first.groups(), second.groups()):
        differences.append("other groups of held-out images (--group_column)")
    for name in ("prompt_id", "prompt", "image"):
        if first.pairs[name] != second.pairs[name]:
            differences.append(f"other generations ({name})")
            break
    if differences:
        raise UserError(
            f"{first.folder} and {second.folder} cannot be compared, for they differ in more than "
            f"the model: {'; '.join(differences)}. Evaluate both with the same settings."
        )


def _differences(
    first: Evaluation, second: Evaluation, paths: Sequence[tuple[str, ...]]
) -> list[str]:
    """In which of these the reports differ, in words."""
    found = []
    for path in paths:
        values = [_at(evaluation.report, path) for evaluation in (first, second)]
        if values[0] != values[1]:
            found.append(f"{'.'.join(path)}: {values[0]!r:.60} and {values[1]!r:.60}")
    return found


def _paired(
    first: Evaluation, second: Evaluation, config: ComparisonConfig
) -> dict[str, PairedResult]:
    """How much lower each number is for the second model."""

    def difference(statistic: Callable[..., float], name: str, shared=()) -> PairedResult:
        prompts = np.unique(first.pairs["prompt_id"], return_inverse=True)[1]
        return paired_difference(
            statistic,
            np.array(first.pairs[name], float),
            np.array(second.pairs[name], float),
            shared,
            clusters=[prompts, *[first.groups() for _ in shared]],
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
    return results


def _losses(
    first: Evaluation, second: Evaluation, config: ComparisonConfig
) -> dict[str, PairedResult]:
    """How much lower the held-out loss is for the second model; empty where neither has one.

    Errors: `UserError` for losses that were not taken alike.
    """
    _require_same(first, second, _SHARED_BY_LOSSES)
    losses = [evaluation.column("loss", "heldout") for evaluation in (first, second)]
    (measured,) = np.nonzero(np.isfinite(losses[0]))
    if not len(measured):
        return {}
    result = paired_difference(
        np.mean,
        *(loss_H[measured] for loss_H in losses),
        clusters=[first.groups()[measured]],
        resamples=config.bootstrap_resamples,
        level=config.confidence_level,
        seed=config.seed,
    )
    return {"heldout_loss": result}


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
    """KID of the second minus that of the first; None where neither has one.

    Errors: `UserError` for features by two embedders, or gone, or of too few images.
    """
    _require_same(first, second, _SHARED_BY_KID)
    if first.report["quality_features"] is None:
        return None
    features = [e.features("generated") for e in (first, second)]
    # Features lie in the order of drawing: all images of a prompt together.
    prompt_G = np.arange(len(features[0])) // first.report["data"]["images_per_prompt"]
    return kid_difference(*features, first.features("heldout"), prompt_G, first.groups(), level)


def _require_same(first: Evaluation, second: Evaluation, paths: Sequence[tuple[str, ...]]) -> None:
    if differences := _differences(first, second, paths):
        raise UserError(
            f"the evaluations differ in {'; '.join(differences)}. Evaluate both with the same "
            "settings to have it."
        )


def _words(
    first: Evaluation,
    second: Evaluation,
    results: dict[str, PairedResult],
    kid: Estimate | None,
    left_out: dict[str, str],
) -> str:
    """The verdict, then a line a number, and a line for each that is missing and why."""
    key = "excess_score" if "excess_score" in results else "memorization_score"
    reduction = results[key].relative_reduction
    if np.isfinite(reduction.value):
        shown = [f"{-x:+z.1%}" for x in (reduction.value, reduction.high, reduction.low)]
    else:
        shown = [f"{x:+z.4f}" for x in _change(results[key])]
    found = f"{_LABELS[key]} {shown[0]} [{shown[1]}, {shown[2]}]"
    if kid is not None:
        found += f", KID {kid.value:+z.5f} [{kid.low:+z.5f}, {kid.high:+z.5f}]"
    names = f"{second.name} against {first.name}"
    lines = [f"{names}: {with_minus(found)}, by {first.embedder['name']}."]
    for name, result in results.items():
        value, low, high = _change(result)
        numbers = with_minus(f"{value:+z.4f} [{low:+z.4f}, {high:+z.4f}]")
        lines.append(f"  {_LABELS[name]}: {numbers}, p = {result.p_value:.3g}")
    lines += [f"  {_LABELS[name]} left out: {reason}" for name, reason in left_out.items()]
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
