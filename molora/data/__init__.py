"""Data: records of any source, as rows that a model learns from."""
