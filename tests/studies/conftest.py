"""What the tests of the studies share with those of the examples."""

from tests.examples.conftest import _blank_figures, _one_thread_and_lightnings_own_log_level  # noqa: F401
