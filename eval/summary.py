"""The former place of :mod:`molora.eval.counting.summary`."""

from molora.eval.counting.summary import *  # noqa: F403
