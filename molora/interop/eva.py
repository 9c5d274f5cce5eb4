"""The former place of :mod:`molora.initialisers.eva`."""

from molora.initialisers.eva import *  # noqa: F403
