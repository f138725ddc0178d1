"""Files that make a cluster: rendered from the run description (`render`), and those that are the same for all."""
