"""The Serve application: its deployments, the resources each reserves, and how they are connected."""

from __future__ import annotations

import logging
from typing import Any

from ray import serve

from cluster.places.finished import FinishedRun, check_reachable, finished_run, min_scores_of, spaces_of
from cluster.serve.common import HEALTH_S
from cluster.serve.replica import Replica
from tvilfm.config import CaptionerSection, Config, EvaluateSection
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.spaces import ModelSpaces
from tvilfm.service.keys import key_store
from tvilfm.service.messages import ModelFacts, Weights

REPLICA_CPUS, ENCODER_CPUS, SHARD_CPUS = 0.8, 0.8, 0.4  # two replicas fit on two CPUs
UNDER_WAY = 1000  # concurrent requests of a replica, which itself refuses those above serve.max_queued
AT_A_PART = 32  # minimum for encoders and shards; the router backs off longer and longer from a full one


def filter_captioner(config: Config, run: FinishedRun) -> CaptionerSection | None:
    """Return the captioner that is used when a client sends no infrared caption; None = no captioner.

    Raises:
        ValueError: `serve.captioner` is `run`, and the run has no fine-tuned captioner.
    """
    name = config.serve.captioner
    if name != "run":
        return None if name is None else config.caption.infrared.model_copy(update={"model": name})
    if run.captioner is None:
        raise ValueError(
            "serve.captioner: expected a run that fine-tuned captioners, got one with captions from files. "
            "Set serve.captioner to a model or to null."
        )
    return run.config.caption.infrared.model_copy(update={"model": str(run.captioner), "revision": None})


def resources(config: Config) -> dict[str, float]:
    """Return the CPUs and GPUs that the service reserves without load."""
    section = config.serve
    searchers = section.shards if section.shards > 1 else section.replicas
    encoders = section.shared_encoders or section.replicas
    cpus = section.replicas * REPLICA_CPUS + section.shared_encoders * ENCODER_CPUS
    cpus += section.shards * SHARD_CPUS * (section.shards > 1)
    return {"CPU": cpus, "GPU": encoders * config.cluster.gpus_per_worker + searchers * section.searcher_gpus}


def _unlike_the_evaluation(section: EvaluateSection) -> str | None:
    """Return why the service, which sums plain similarities, ranks differently from the evaluation, or None."""
    for key, plain, given in (
        ("rerank.method", "none", section.rerank.method),
        ("ensemble.temperature", "null", section.ensemble.temperature or "null"),
    ):
        if given != plain:
            return (
                f"evaluate.{key}: expected {plain} to rank as the evaluation does, got {given}. The service ignores it."
            )
    return None


def _facts(config: Config, run: FinishedRun, spaces: ModelSpaces) -> ModelFacts:
    min_scores = min_scores_of(run)
    if config.serve.min_score == "fitted" and not min_scores:
        raise ValueError(
            "serve.min_score: expected a run that was evaluated on validation identities, got one without score "
            "thresholds. Evaluate the run again, or set serve.min_score to null."
        )
    return ModelFacts(
        model=config.run.name,
        space_id=spaces.id,
        dim=spaces.heads.dim,
        width=spaces.heads.width,
        depth_range=run.config.data.depth_range,
        text=spaces.text,
        captioner=config.serve.captioner is not None,
        weights=Weights(**run.config.evaluate.ensemble.weights),
        min_scores=min_scores,
        min_score=config.serve.min_score,
    )


def application(args: dict[str, Any]) -> serve.Application:
    """Return the Serve application, for `tvilfm serve` and for Serve's config files.

    Args:
        args: `config`, a resolved run description, as printed by `tvilfm config show`.

    Raises:
        ValueError: the run is not finished or lacks its captioner or its score thresholds, the gallery of its model is
            missing, or the file of keys is missing.
    """
    config = Config.model_validate(args["config"])
    run = finished_run(config)
    if (difference := _unlike_the_evaluation(run.config.evaluate)) is not None:
        logging.getLogger("ray.serve").warning(difference)
    section, gpus = config.serve, config.cluster.gpus_per_worker
    captioner = filter_captioner(config, run)
    facts = _facts(config, run, spaces_of(run))
    check_reachable(config)
    gallery = Gallery.open(config.gallery_url, space_id=facts.space_id)
    if section.keys is not None:
        key_store(section.keys, gallery.database).read()
    gallery.close()
    encoder, shards = None, []
    if section.shared_encoders:
        from cluster.serve.encoder import Encoder

        encoder = _part(config, Encoder, ENCODER_CPUS, gpus, section.shared_encoders).bind(
            config, run, facts.space_id, captioner
        )
        gpus = 0
    if section.shards > 1:
        from cluster.serve.searcher import Shard

        for number in range(section.shards):
            part = _part(config, Shard, SHARD_CPUS, section.searcher_gpus, 1, name=f"Shard{number}")
            shards.append(part.bind(config, facts.space_id, number))
    else:
        gpus += section.searcher_gpus
    replica = serve.deployment(
        name="Replica",
        ray_actor_options={"num_cpus": REPLICA_CPUS, "num_gpus": gpus},
        max_ongoing_requests=UNDER_WAY,
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=5,
        autoscaling_config={
            "min_replicas": section.replicas,
            "max_replicas": section.max_replicas,
            "target_ongoing_requests": section.batch,
        },
    )(serve.ingress()(Replica))
    return replica.bind(config, facts, run, captioner, encoder, shards)


def _part(
    config: Config, of: type, cpus: float, gpus: float, replicas: int, *, name: str | None = None
) -> serve.Deployment:
    deployment: serve.Deployment = serve.deployment(
        name=name or of.__name__,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        num_replicas=replicas,
        max_queued_requests=config.serve.max_queued,
        max_ongoing_requests=max(2 * config.serve.batch, AT_A_PART),
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=5,
    )(of)
    return deployment
