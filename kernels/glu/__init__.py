"""The middle of a gated feed-forward block, all chosen experts at once."""
