"""Galleries, queries and search."""
