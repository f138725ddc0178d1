"""Sweeps: search spaces, and the results of their trials."""
