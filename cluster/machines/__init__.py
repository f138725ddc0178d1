"""Clusters: files that create one, jobs that run on one, and a check of its nodes."""
