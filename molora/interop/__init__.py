"""Adapter folders and checkpoints of other software: read into mixtures, and written out of them.

``molora.load`` finds the reader in ``importers.IMPORTERS``; ``export`` writes what PEFT loads. Nothing here needs PEFT.
"""
