"""The retrieval service on Ray Serve, one file per kind of replica.

    ingress (HTTP, keys, limits)  ->  encoder (model, dynamic batches, scales with load)
                                  ->  searchers (each has the whole gallery in memory and follows the database)
                                  ->  PostgreSQL (holds the gallery; a write is on disk before it is acknowledged)

Serve replaces a replica that dies. The ingress repeats the call that was in progress once, which is harmless because
every call can be repeated.
"""
