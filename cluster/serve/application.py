"""The Serve application: its deployments, the resources each reserves, and how they are connected."""

from __future__ import annotations

import logging
from typing import Any

from ray import serve

from cluster.serve.encoder import Encoder
from cluster.serve.ingress import Ingress
from cluster.serve.replicas import HEALTH_S
from cluster.serve.searcher import SearcherReplica
from cluster.tables.indexing import FinishedRun, check_reachable, finished_run
from tvilfm.config import CaptionerSection, Config, EvaluateSection
from tvilfm.models import TVILFM
from tvilfm.retrieval.gallery import Gallery
from tvilfm.retrieval.spaces import space_id
from tvilfm.service.keys import KeyFile
from tvilfm.service.messages import ModelFacts, Weights

# CPUs that a replica of each deployment reserves. One of each fits on two CPUs; compute threads are not reserved.
INGRESS_CPUS, ENCODER_CPUS, SEARCHER_CPUS = 0.2, 1.0, 0.2
UNDER_WAY = 1000  # concurrent requests of an ingress; the replicas behind it reject excess load
AT_A_PART = 32  # minimum for the other replicas; the router backs off longer and longer from a full one


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


def _facts(config: Config, run: FinishedRun, model: TVILFM, space: str) -> ModelFacts:
    return ModelFacts(
        model=config.run.name,
        space_id=space,
        dim=model.spec.dim,
        width=model.spec.image_dim,
        depth_range=run.config.data.depth_range,
        text=model.text is not None,
        captioner=config.serve.captioner is not None,
        weights=Weights(**run.config.evaluate.ensemble.weights),
    )


def application(args: dict[str, Any]) -> serve.Application:
    """Return the Serve application, for `tvilfm serve` and for Serve's config files.

    Args:
        args: `config`, a resolved run description, as printed by `tvilfm config show`.

    Raises:
        ValueError: the run is not finished or lacks its captioner, the gallery of its model is missing, or the file of
            keys is missing.
    """
    config = Config.model_validate(args["config"])
    run = finished_run(config)
    if (difference := _unlike_the_evaluation(run.config.evaluate)) is not None:
        logging.getLogger("ray.serve").warning(difference)
    section = config.serve
    captioner = filter_captioner(config, run)
    if section.keys is not None:
        KeyFile(section.keys)
    model = TVILFM.from_pretrained(run.here(run.model))
    space = space_id(model, height=run.config.data.height, width=run.config.data.width)
    check_reachable(config)
    Gallery.open(config.gallery_url, space_id=space).close()

    def part(of: type, cpus: float, *, gpus: float = 0, **scale: Any) -> serve.Deployment:
        deployment: serve.Deployment = serve.deployment(
            name=of.__name__,
            ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
            max_queued_requests=section.max_queued,
            max_ongoing_requests=max(2 * section.batch, AT_A_PART),
            health_check_period_s=HEALTH_S,
            graceful_shutdown_timeout_s=5,
            **scale,
        )(of)
        return deployment

    load = {
        "min_replicas": section.encoders,
        "max_replicas": section.max_encoders,
        "target_ongoing_requests": section.batch,
    }
    gpus = config.cluster.gpus_per_worker
    encoder = part(Encoder, ENCODER_CPUS, gpus=gpus, autoscaling_config=load).bind(config, run, captioner)
    searchers = part(SearcherReplica, SEARCHER_CPUS, gpus=section.searcher_gpus, num_replicas=section.searchers)
    searcher = searchers.bind(config, space)
    ingress = serve.deployment(
        name="Ingress",
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        max_ongoing_requests=UNDER_WAY,
        health_check_period_s=HEALTH_S,
    )(serve.ingress()(Ingress))
    return ingress.bind(config, _facts(config, run, model, space), encoder, searcher)
