"""Tokens sorted by expert: each row meets the ranks of one expert."""
