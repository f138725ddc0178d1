"""Clusters: write the files that create one, submit jobs to one, and check its nodes."""
