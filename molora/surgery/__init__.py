"""Module surgery: what a model looks like, where experts go, and how they get there and out again."""
