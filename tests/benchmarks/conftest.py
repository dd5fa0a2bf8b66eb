"""Trainers as tests of the engine have them, and the report of some results."""

import pytest

from benchmarks.efficacy import analysis, pages, report
from benchmarks.efficacy.protocol import Protocol
from iet_sd.evaluation.statistics import bootstrap
from tests.benchmarks.planting import Report
from tests.engine.conftest import settings, trainer_for  # noqa: F401


@pytest.fixture
def report_of(monkeypatch, tmp_path):
    """The report of some results; of its intervals what they are, not how exactly."""
    monkeypatch.setattr(
        analysis,
        "bootstrap",
        lambda *given, resamples, **more: bootstrap(*given, resamples=100, **more),
    )

    def make(found, asked=None):
        asked = [] if asked is None else asked
        monkeypatch.setattr(report.files, "read_all", lambda *_: {r.cell: r for r in found})
        monkeypatch.setattr(pages, "_training_images", lambda ids: asked.append(ids) or [])
        return Report(report.write(tmp_path, tmp_path, Protocol()).read_text(), tmp_path)

    return make
