"""The retrieval service over HTTP: messages, API keys, limits and the audit trail.

A `Backend` does the actual work; `cluster.serve` implements it with Ray Serve.
"""
