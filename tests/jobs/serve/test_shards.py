"""The service with an encoder and shards of the gallery in processes of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.serve.launch import serving
from cluster.tables.indexing import index
from tests.jobs.serve.test_serve import assert_ranks_as_evaluated
from tests.processes import free_ports
from tests.untrained_run import UntrainedRun, evaluated_rankings
from tvilfm.config import resolve
from tvilfm.service.client import Client


@pytest.mark.slow
def test_two_shards_and_a_shared_encoder_rank_as_the_evaluation(
    untrained_run: UntrainedRun, ray_session: None, new_database: Callable[[], str]
) -> None:
    overrides = ["serve.shards=2", "serve.shared_encoders=1", "serve.replicas=1", f"serve.port={free_ports(1)[0]}"]
    url = new_database()
    overrides += ["serve.max_replicas=1", f"gallery.url={url}", f"gallery.read_url={url}"]
    config = resolve(untrained_run.config.model_dump(mode="json"), overrides)
    index(config)
    rankings = list(evaluated_rankings(config, untrained_run.evaluator))
    with serving(config) as address, Client(address) as client:
        assert_ranks_as_evaluated(client, rankings)
        status = client.status()
        assert (status.images, status.search, status.gallery_in_use) == (16, "exact", True)
        hits = client.search(sentence="a coat", by_identity=True, k=100).hits
        assert len({hit.pid for hit in hits}) == len(hits) == 4
        version = client.delete(hits[0].id).version
        left = client.search(sentence="a coat", k=100, min_version=version)
    assert len(left.hits) == 15 and left.version >= version
