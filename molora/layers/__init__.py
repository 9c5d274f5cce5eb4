"""Modules that stand in the place of a base's own: a linear, a block, stacked experts, a module trained whole."""
