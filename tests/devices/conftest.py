"""Tests of devices run in float64, on small fresh models, each with its own seed."""

from tests.engine.conftest import float64  # noqa: F401
