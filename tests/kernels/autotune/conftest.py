"""The tests have a cache directory of their own."""

from tests.kernels.tuning_support import folder  # noqa: F401  (a fixture)
