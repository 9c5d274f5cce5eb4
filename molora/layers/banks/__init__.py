"""Banks: the packed experts of one linear."""
