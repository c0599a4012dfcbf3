"""The tests have a cache directory of their own, and no table in memory."""

from tests.kernels.tuning_support import folder  # noqa: F401  (a fixture)
