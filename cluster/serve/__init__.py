"""The retrieval service on Ray Serve.

    HAProxy  ->  replicas (HTTP, keys, limits; encode, search and write)  ->  PostgreSQL (holds the gallery)

A replica answers a whole request in one process: it has the model, and a copy of the gallery that follows the database.
Where replicas share a GPU, encoders are replicas of their own (`serve.shared_encoders`); where the gallery is larger
than the memory of one machine, its rows are divided over shards (`serve.shards`).

Serve replaces a replica that dies. HAProxy repeats the request that was in progress on another replica, which is
harmless because every request can be repeated.
"""
