"""What a card says of how much the model has memorized, from the report of an evaluation."""

from collections.abc import Mapping
from typing import Any

from iet_sd.evaluation.report import format_measure
from iet_sd.hub.contents import PAGE

_TITLE = "## How much comes back out\n\n"
NOT_MEASURED = _TITLE + (
    "How much of the training set it has memorized has not been measured: "
    "`python -m iet_sd evaluate` does that."
)


def section(report: Mapping[str, Any]) -> str:
    """The verdict, the headline measures with their intervals, and what they are of.

    ``report`` as in report.json.
    """
    rows = [_row(measure) for measure in report["measures"] if measure["headline"]]
    levels = {m["level"] for m in report["measures"] if m["headline"] and m["level"]}
    interval = "interval" + "".join(f", {level:.0%}" for level in sorted(levels))
    data = report["data"]
    heldout = f", {data['heldout']['count']:,} held-out images" if data["heldout"] else ""
    table = "\n".join([f"| measure | value | {interval} |", "|---|---|---|", *rows])
    return (
        f"{_TITLE}{report['verdict']}\n\n{table}\n\n"
        f"{data['prompts']:,} prompts, {data['images_per_prompt']} image(s) each, seed "
        f"{report['seed']}; {data['train']['count']:,} training images{heldout}. "
        f"Measured by `python -m iet_sd evaluate`; all measures are in `{PAGE}`."
    )


def _row(measure: Mapping[str, Any]) -> str:
    value, interval = format_measure(measure)
    embedder = f" ({measure['embedder']})" if measure["embedder"] else ""
    return f"| {measure['label']}{embedder} | {value} | {interval} |"
