"""What the fork server of `tests.support.trio` has loaded before it forks: libraries and compiled kernels, which nobody then reads anew."""

import tests.support.trio  # noqa: F401
from protocols import kernels

kernels.load(None)
