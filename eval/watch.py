"""The former place of :mod:`molora.eval.counting.watch`."""

from molora.eval.counting.watch import *  # noqa: F403
