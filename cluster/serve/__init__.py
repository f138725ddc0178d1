"""The retrieval service on Ray Serve, one file per kind of replica.

    ingress (HTTP, keys, limits)  ->  encoder (model, dynamic batches, scales with load)
                                  ->  searchers (each loads the whole gallery and follows its versions)
                                  ->  writer (only one; a write is on disk before it is acknowledged)

Serve replaces a replica that dies. The ingress repeats the call that was in progress once, which is harmless because
every call can be repeated. Only `compact` has no timeout, because it takes as long as the gallery is large.
"""
