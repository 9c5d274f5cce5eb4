"""The former place of :mod:`molora.initialisers.corda`."""

from molora.initialisers.corda import *  # noqa: F403
