"""Optimizer, step, loop and checkpoint of both stages."""
