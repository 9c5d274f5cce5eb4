"""Evaluation: losses and answers, what the routing says, and pictures of it."""
