"""Search: the ensemble query."""
