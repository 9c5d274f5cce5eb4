"""One forward of a converted model: its frame, its passes, its balance loss, its recompute."""
