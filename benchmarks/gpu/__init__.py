"""Benchmarks that need a GPU; each runs on a CPU at a tiny size, so that it keeps working."""
