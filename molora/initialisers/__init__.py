"""Ways to start experts: from the frozen weight, or from data."""
