"""Tests of second derivatives run in float64, on small fresh models, each with its own seed."""

from tests.engine.conftest import float64, on_the_device_under_test  # noqa: F401
