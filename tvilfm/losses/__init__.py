"""The loss terms of both stages."""
