"""The retrieval service over HTTP: what it says, who may ask, what it refuses and what it notes down.

Who does the work behind it is a `Backend`; with Ray Serve that is `cluster.serve`.
"""
