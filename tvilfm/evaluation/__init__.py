"""Protocols, query texts, metrics and results."""
