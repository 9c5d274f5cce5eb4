"""Adapter folders and checkpoints of other software."""
