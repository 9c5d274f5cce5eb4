"""Where tokens go: recorded whole, or counted while a model runs; and what the counts say."""
