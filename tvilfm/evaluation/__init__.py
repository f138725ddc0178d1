"""Evaluation: protocols, query texts, metrics and results."""
