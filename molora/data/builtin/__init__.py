"""The demo's data and model: from installed packages, nothing is downloaded."""
