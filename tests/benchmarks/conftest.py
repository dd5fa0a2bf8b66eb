"""Trainers as tests of the engine have them."""

from tests.engine.conftest import settings, trainer_for  # noqa: F401
