"""`tvilfm serve`: the retrieval service on Ray Serve.

    ingress (HTTP, keys, limits)  ->  encoder (model, dynamic batches, scales with load)
                                  ->  searchers (each the whole gallery, follow its versions)
                                  ->  writer (one; a write is on disk before it is acknowledged)

A part that is killed is replaced by Serve; what was under way there is tried once more here before a client hears of
it, as every call may be repeated without harm. A compaction takes as long as it takes, so slowness is no sign of death
there.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from ray.util.metrics import Counter, Histogram
from rich.console import Console

from cluster.deploy.render import http_options
from cluster.index import FinishedRun, build_index, finished_run, index
from cluster.session import address_of, session
from cluster.storage import absolute_paths
from tvilfm.captioning.captioner import Captioner
from tvilfm.captioning.colors import remove_colors
from tvilfm.config import CaptionerSection, Config, EvaluateSection, ServeSection, resolve
from tvilfm.evaluation.extract import encode_pixels
from tvilfm.models import TVILFM
from tvilfm.retrieval.gallery import POINTER, Gallery, GalleryLocked
from tvilfm.retrieval.pictures import Pixels, resized
from tvilfm.retrieval.query import Query, QueryEncoder, Question
from tvilfm.retrieval.search import Answer, Request, Searcher
from tvilfm.retrieval.spaces import gallery_vectors, space_id
from tvilfm.service.app import create_app
from tvilfm.service.audit import Audit
from tvilfm.service.backend import Busy, Change, Unavailable
from tvilfm.service.keys import KeyFile
from tvilfm.service.messages import ModelFacts, Status, Weights
from tvilfm.service.writer import GalleryWriter

APPLICATION = "tvilfm"
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")  # the audit trail says who asked
# CPUs that each part reserves; together they fit on two, and a part that computes has its threads beside them.
INGRESS_CPUS, ENCODER_CPUS, SEARCHER_CPUS, WRITER_CPUS = 0.1, 1.0, 0.2, 0.2
UNDER_WAY = 1000  # requests of an ingress at once; the parts behind it say when it is too much
AT_A_PART = 32  # likewise of another part, at least: the router waits ever longer for a part that is full
HEALTH_S = 1.0  # a replica that died is noticed within this time
PATIENCE_S = 40.0  # that a part may take to answer anything but compact, its replacement included
TURN_S = PATIENCE_S / 2  # that a write waits for the change before it: none is made when its client waits no more
LOCK_S = 0.2  # between two looks whether the writer before has ended
RETENTION_S = 3600.0  # between two looks for people who have to leave the gallery
BOUNDARIES_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]

T = TypeVar("T")


class Encoder:
    """Replica: pictures and sentences to vectors, those of several requests together."""

    def __init__(self, config: Config, run: FinishedRun, captioner: CaptionerSection | None) -> None:
        device = "cuda" if config.cluster.gpus_per_worker > 0 else "cpu"
        self._model = TVILFM.from_pretrained(run.here(run.model)).to(device).eval()
        self._captioner = None
        if captioner is not None:
            model = str(run.here(Path(captioner.model)))
            self._captioner = Captioner.load(captioner.model_copy(update={"model": model}), device=device)
        data = run.config.data
        self._size = {"height": data.height, "width": data.width}
        self._encoder = QueryEncoder(
            self._model,
            **self._size,
            filter_text=run.config.loss.filter_text,
            captioner=None if self._captioner is None else self._caption,
        )
        self._batch = config.serve.batch
        self.encode.set_max_batch_size(config.serve.batch)
        self.encode.set_batch_wait_timeout_s(config.serve.batch_wait_ms / 1000)

    @serve.batch
    async def encode(self, groups: list[Sequence[Question]]) -> list[list[Query]]:
        """The questions of several requests."""
        questions = [one for group in groups for one in group]
        found = iter(await asyncio.to_thread(_in_batches, self._encoder.encode, self._batch, questions))
        return [[next(found) for _ in group] for group in groups]

    async def ready(self) -> None:
        """Answers when there is an encoder."""

    def _caption(self, pictures: Sequence[Pixels]) -> list[str]:
        """What infrared pictures show, without colours."""
        assert self._captioner is not None
        return [remove_colors(sentence) for sentence in self._captioner.caption(pictures)]

    async def encode_visible(self, pictures: Sequence[Pixels]) -> list[dict[str, Any]]:
        """Vectors of visible pictures."""
        return await asyncio.to_thread(self._encode_visible, pictures)

    def _encode_visible(self, pictures: Sequence[Pixels]) -> list[dict[str, Any]]:
        pixels = np.stack([resized(picture, **self._size) for picture in pictures])
        vectors = gallery_vectors(self._model, encode_pixels(self._model, pixels, "visible"))
        return [{name: part[row] for name, part in vectors.items()} for row in range(len(pictures))]


class SearcherReplica:
    """Replica: the gallery in memory, following its writer."""

    def __init__(self, config: Config, space: str) -> None:
        gallery = Gallery.open(config.gallery_uri, space_id=space)
        device = "cuda" if config.serve.searcher_gpus > 0 else "cpu"
        self._gallery = gallery
        self._searcher = Searcher(gallery, config.gallery, device=device)
        self._batch = config.serve.batch
        self._lock = threading.Lock()  # one refresh at a time; searches go on meanwhile
        self.search.set_max_batch_size(config.serve.batch)
        self.search.set_batch_wait_timeout_s(config.serve.batch_wait_ms / 1000)
        threading.Thread(target=self._follow, args=(config.serve.follow_s,), daemon=True).start()

    @serve.batch
    async def search(self, groups: list[tuple[Sequence[Query], Sequence[Request], int]]) -> list[list[Answer]]:
        """The queries of several requests, on a version that is no older than any of them wants."""
        queries = [query for group in groups for query in group[0]]
        requests = [request for group in groups for request in group[1]]
        found = iter(await asyncio.to_thread(self._search, queries, requests, max(group[2] for group in groups)))
        return [[next(found) for _ in group[0]] for group in groups]

    async def picture(self, id: str) -> bytes | None:
        """The thumbnail of a row."""
        found = await asyncio.to_thread(self._gallery.picture, id)
        return None if found is None else found[1]

    async def facts(self) -> dict[str, Any]:
        """What `Status` says of the gallery."""
        return await asyncio.to_thread(self._facts)

    async def ready(self) -> None:
        """Answers when there is a searcher."""

    def _search(self, queries: Sequence[Query], requests: Sequence[Request], min_version: int) -> list[Answer]:
        if self._searcher.gallery.version < min_version:
            self._refresh()
        return self._read(lambda: _in_batches(self._searcher.search, self._batch, queries, requests))

    def _facts(self) -> dict[str, Any]:
        return self._read(self._facts_of_version)

    def _facts_of_version(self) -> dict[str, Any]:
        searched = self._searcher.gallery
        cameras = pc.unique(searched.load(None, ["camid"])["camid"]).to_pylist()
        return {
            "images": len(searched),
            "version": searched.version,
            "search": self._searcher.kind,
            "cameras": sorted(cameras),
            "gallery_in_use": searched.in_use,
        }

    def _read(self, read: Callable[[], T]) -> T:
        """What is read from a version; once more from a later one, as compaction takes the files of earlier ones."""
        version = self._searcher.gallery.version
        try:
            return read()
        except Exception:
            self._refresh()
            if self._searcher.gallery.version == version:
                raise
            return read()

    def _refresh(self) -> None:
        with self._lock:
            self._searcher.refresh()

    def _follow(self, every_s: float) -> None:
        while True:
            time.sleep(every_s)
            with _going_on("the gallery could not be read"):  # what is known is searched till it can
                self._refresh()


class Writer:
    """Replica, the only one of its kind: every change of the gallery goes through it.

    Where a service is replaced, the writer before ends only once this one is ready. So it is ready at once, and begins
    when that has ended; changes wait for it as they do for each other.
    """

    def __init__(self, config: Config, space: str) -> None:
        self._config, self._space = config, space
        self._days = config.serve.retention_days
        self._on_disk = True  # whether people who left may still be in files: a writer before may have been killed
        self._begun = threading.Event()
        try:
            self._begin()
        except GalleryLocked:
            threading.Thread(target=self._begin_later, daemon=True).start()

    def _begin(self) -> None:
        audit = Audit(self._config.audit_path, days=self._config.serve.audit_days)
        self._gallery = Gallery.open(self._config.gallery_uri, write=True, space_id=self._space)
        self._writer = GalleryWriter(self._gallery, audit)
        self._begun.set()
        if self._days is not None:
            threading.Thread(target=self._retain, daemon=True).start()

    def _begin_later(self) -> None:
        while not self._begun.is_set():
            time.sleep(LOCK_S)
            with _going_on("the gallery could not be opened"), suppress(GalleryLocked):
                self._begin()

    def _at_work(self, until: float) -> GalleryWriter:
        if not self._begun.wait(max(0.0, until - time.monotonic())):
            raise Unavailable("gallery: expected the end of the writer before, got none in time")
        return self._writer

    async def upsert(self, rows: pa.Table, space: str, by: str | None) -> Change:
        """Write rows."""
        if self._days is not None:  # who has no time could never leave; see also `_forget_before`
            now = pa.scalar(datetime.now(UTC), rows["time"].type)
            rows = rows.set_column(rows.column_names.index("time"), "time", pc.fill_null(rows["time"], now))
        end = _turn()
        return await asyncio.to_thread(lambda: self._at_work(end).upsert(rows, space_id=space, by=by, until=end))

    async def delete(self, ids: Sequence[str], by: str | None) -> Change:
        """Remove rows."""
        end = _turn()
        return await asyncio.to_thread(lambda: self._at_work(end).delete(ids, by=by, until=end))

    async def delete_person(self, pid: int, by: str | None) -> Change:
        """Remove the rows of a person."""
        end = _turn()
        return await asyncio.to_thread(lambda: self._at_work(end).delete_person(pid, by=by, until=end))

    async def compact(self, by: str | None) -> Change:
        """Remove from disk what was removed, and have a large gallery indexed."""
        end = _turn()
        return await asyncio.to_thread(lambda: self._at_work(end).change("compact", self._compact, by=by))

    async def ready(self) -> None:
        """Answers when there is a writer, begun or not."""

    def _compact(self) -> int:
        self._gallery.compact()
        if len(self._gallery) > self._config.gallery.exact_limit:
            with _going_on("the gallery could not be indexed"):  # compact it is
                build_index(self._gallery, self._config, workers=False)
        return len(self._gallery)

    def _forget_before(self, time: datetime) -> int:
        """Delete who came before, and then from files too; who has no time came now at the latest."""
        self._gallery.date_undated(datetime.now(UTC))
        count = self._gallery.delete_before(time)
        self._on_disk |= count > 0
        if self._on_disk:
            try:
                self._compact()
            except ValueError:
                self._gallery.clean()  # tables of other models may show them; this one does not
                raise
            self._on_disk = False
        return count

    def _retain(self) -> None:
        while True:
            oldest = datetime.now(UTC) - timedelta(days=self._days)
            with _going_on("people who have to leave could not be removed from every file"):
                self._writer.change("retention", partial(self._forget_before, oldest), by=None)
            time.sleep(RETENTION_S)


class Ingress:
    """Replica: the HTTP service, and its `Backend`."""

    def __init__(
        self,
        config: Config,
        facts: ModelFacts,
        encoder: DeploymentHandle,
        searcher: DeploymentHandle,
        writer: DeploymentHandle,
    ) -> None:
        self._config = config
        self._encoder, self._searcher, self._writer = encoder, searcher, writer
        self.facts = facts
        self._seconds = Histogram(
            "tvilfm_stage_seconds", "Seconds that a stage of a request took.", BOUNDARIES_S, tag_keys=("stage",)
        )
        self._refusals = Counter("tvilfm_refused", "Requests that a part could not take.", tag_keys=("why",))

    def __serve_build_asgi_app__(self) -> FastAPI:
        config = self._config
        return create_app(
            self,
            config.serve,
            audit=Audit(config.audit_path, days=config.serve.audit_days),
            thumbnail_height=config.gallery.thumbnail_height,
            observe=lambda stage, seconds: self._seconds.observe(seconds, tags={"stage": stage}),
        )

    async def encode(self, questions: Sequence[Question]) -> list[Query]:
        return await self._call(self._encoder.encode, questions)

    async def encode_visible(self, pictures: Sequence[Pixels]) -> list[dict[str, Any]]:
        return await self._call(self._encoder.encode_visible, pictures)

    async def search(
        self, queries: Sequence[Query], requests: Sequence[Request], *, min_version: int = 0
    ) -> list[Answer]:
        return await self._call(self._searcher.search, (queries, requests, min_version))

    async def upsert(self, rows: pa.Table, *, space_id: str, by: str | None) -> Change:
        return await self._call(self._writer.upsert, rows, space_id, by)

    async def delete(self, ids: Sequence[str], *, by: str | None) -> Change:
        return await self._call(self._writer.delete, ids, by)

    async def delete_person(self, pid: int, *, by: str | None) -> Change:
        return await self._call(self._writer.delete_person, pid, by)

    async def compact(self, *, by: str | None) -> Change:
        return await self._call(self._writer.compact, by, patience_s=None)

    async def picture(self, id: str) -> bytes | None:
        return await self._call(self._searcher.picture, id)

    async def ready(self) -> None:
        await asyncio.gather(*(self._call(part.ready) for part in (self._encoder, self._searcher, self._writer)))

    async def status(self) -> Status:
        return Status(**dict(self.facts), **await self._call(self._searcher.facts))

    async def _call(self, method: DeploymentHandle, *arguments: Any, patience_s: float | None = PATIENCE_S) -> Any:
        """What a part answers; once more if it dies meanwhile, or takes longer than that (None = for ever)."""
        for last in (False, True):
            try:
                async with asyncio.timeout(patience_s):
                    return await method.remote(*arguments)
            except BackPressureError:
                self._refusals.inc(tags={"why": "busy"})
                raise Busy("service: expected room for one more request, got a full queue") from None
            except (RayActorError, ObjectLostError, DeploymentUnavailableError, TimeoutError):
                if last:
                    self._refusals.inc(tags={"why": "unavailable"})
                    raise Unavailable("service: expected an answer, got none while a part is replaced") from None
            except RayTaskError as error:
                if isinstance(error.cause, Unavailable):
                    self._refusals.inc(tags={"why": "unavailable"})
                if isinstance(error.cause, (ValueError, Unavailable)):
                    raise error.cause from None
                raise


def _in_batches(work: Callable[..., list[T]], size: int, *columns: Sequence[Any]) -> list[T]:
    """What `work` makes of columns, a few rows at a time: Serve counts requests, each of which may bring many."""
    starts = range(0, len(columns[0]), size)
    return [one for start in starts for one in work(*(column[start : start + size] for column in columns))]


def _turn() -> float:
    """Till when a write that comes now waits; its wait for a thread is counted in."""
    return time.monotonic() + TURN_S


@contextmanager
def _going_on(what: str) -> Iterator[None]:
    """Let a thread outlive a store that does not answer: the fault goes to the log, and the next turn tries again."""
    try:
        yield
    except Exception:
        logging.getLogger("ray.serve").exception("%s; trying again", what)


def filter_captioner(config: Config, run: FinishedRun) -> CaptionerSection | None:
    """Who says what infrared pictures show, where the client does not; None = nobody.

    Raises:
        ValueError: the run's captioner is wanted and it has none.
    """
    name = config.serve.captioner
    if name != "run":
        return None if name is None else config.caption.infrared.model_copy(update={"model": name})
    if run.captioner is None:
        raise ValueError(
            "serve.captioner: expected a run that fine-tuned captioners, got one with the captions of files. "
            "Name a model, or set serve.captioner=null."
        )
    return run.config.caption.infrared.model_copy(update={"model": str(run.captioner), "revision": None})


def _unlike_the_evaluation(section: EvaluateSection) -> str | None:
    """Why the service, which sums plain similarities, ranks otherwise than the run's evaluation; None = it does not."""
    for key, plain, given in (
        ("rerank.method", "none", section.rerank.method),
        ("ensemble.temperature", "null", section.ensemble.temperature or "null"),
    ):
        if given != plain:
            return f"evaluate.{key}: expected {plain} to rank as the evaluation does, got {given}. It serves without."
    return None


def application(args: dict[str, Any]) -> serve.Application:
    """The service, for `tvilfm serve` and for Serve's own config files.

    Args:
        args: `config`, a resolved run description, as `tvilfm config show` prints.

    Raises:
        ValueError: the run is not finished or has no captioner, there is no gallery of its model, or no file of keys.
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
    Gallery.open(config.gallery_uri, space_id=space)
    facts = ModelFacts(
        model=config.run.name,
        space_id=space,
        text=model.text is not None,
        captioner=section.captioner is not None,
        weights=Weights(**run.config.evaluate.ensemble.weights),
    )

    def part(of: type, cpus: float, *, gpus: float = 0, **scale: Any) -> serve.Deployment:
        return serve.deployment(
            of,
            name=of.__name__,
            ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
            max_queued_requests=section.max_queued,
            max_ongoing_requests=max(2 * section.batch, AT_A_PART),
            health_check_period_s=HEALTH_S,
            graceful_shutdown_timeout_s=5,
            **scale,
        )

    load = {
        "min_replicas": section.encoders,
        "max_replicas": section.max_encoders,
        "target_ongoing_requests": section.batch,
    }
    gpus = config.cluster.gpus_per_worker
    encoder = part(Encoder, ENCODER_CPUS, gpus=gpus, autoscaling_config=load).bind(config, run, captioner)
    searchers = part(SearcherReplica, SEARCHER_CPUS, gpus=section.searcher_gpus, num_replicas=section.searchers)
    searcher = searchers.bind(config, space)
    writer = part(Writer, WRITER_CPUS, num_replicas=1).bind(config, space)
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        max_ongoing_requests=UNDER_WAY,
        health_check_period_s=HEALTH_S,
    )
    return ingress.bind(config, facts, encoder, searcher, writer)


@contextmanager
def serving(config: Config) -> Iterator[str]:
    """Have the service while the block runs.

    Yields:
        Its address.

    Raises:
        ValueError: the run is not finished, what it needs to serve is not there, this machine is too small, or Serve
            runs on the cluster already and listens otherwise.
    """
    # Its parts may run elsewhere than in this folder.
    config = resolve(config.model_dump(mode="json"), absolute_paths(config, Path.cwd()))
    if config.gallery.uri is None and not (Path(config.gallery_uri) / POINTER).exists():
        index(config)
    section = config.serve
    with session(config.cluster):
        _check_room(config, ray.cluster_resources())
        app = application({"config": config.model_dump(mode="json")})
        options = HTTPOptions(**http_options(section))
        joined = _get_global_client(raise_if_no_controller_running=False)
        if joined is None:
            serve.start(http_options=options, logging_config=QUIET)
        else:
            _check_listens_so(joined.http_config, options)
        try:
            serve.run(app, name=APPLICATION, route_prefix="/", logging_config=QUIET)
            yield _address(section)
        finally:
            if joined is None:
                serve.shutdown()
            else:  # other applications may run there
                serve.delete(APPLICATION)


def _check_room(config: Config, resources: Mapping[str, float]) -> None:
    """Ray waits for ever, and says nothing, where parts reserve more than there is.

    Args:
        config: `serve`, and `cluster`.
        resources: name -> amount, of all machines. Where they were joined more may come, so that a lack is said alone.

    Raises:
        ValueError: this machine lacks some.
    """
    section = config.serve
    cpus = INGRESS_CPUS + WRITER_CPUS + section.encoders * ENCODER_CPUS + section.searchers * SEARCHER_CPUS
    gpus = section.encoders * config.cluster.gpus_per_worker + section.searchers * section.searcher_gpus
    for name, amount in (("CPU", cpus), ("GPU", gpus)):
        has = resources.get(name, 0.0)
        if round(amount, 4) <= has:
            continue
        lack = f"expected {amount:g} {name}s for its parts, got {has:g}"
        mend = "Lower serve.encoders, serve.searchers, serve.searcher_gpus or cluster.gpus_per_worker"
        if address_of(config.cluster) == "local":
            raise ValueError(f"serve: {lack}. {mend}.")
        Console(stderr=True).print(f"service: {lack}. {mend}, unless machines are added on demand.", highlight=False)


def _check_listens_so(running: HTTPOptions, wanted: HTTPOptions) -> None:
    """Serve listens in one way for all its applications, and ignores what a later one asks for.

    Raises:
        ValueError: it listens elsewhere than the description says, where keys may be needed, or without its TLS.
    """
    keys = {"host": "host", "port": "port", "tls_cert": "ssl_certfile", "tls_key": "ssl_keyfile"}
    for key, option in keys.items():
        given, there = getattr(wanted, option), getattr(running, option)
        if given != there:
            raise ValueError(
                f"serve.{key}: expected {there}, as Serve runs on this cluster already, got {given}. Set it so, or end "
                "that Serve first."
            )


def _address(section: ServeSection) -> str:
    """Where a browser of this machine finds the service."""
    host = "127.0.0.1" if section.host in ("0.0.0.0", "::") else section.host
    scheme = "http" if section.tls_cert is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{section.port}"


def serve_forever(config: Config, *, show: bool) -> None:
    """Serve until the process is told to end.

    Args:
        config: which run (`run`), which gallery (`gallery`), and the service (`serve`).
        show: open the page in a browser.
    """
    end = threading.Event()
    console = Console(stderr=True)
    with serving(config) as address:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: end.set())
        console.print(f"service: {address} (Ctrl-C ends it)", highlight=False)
        if show:
            webbrowser.open(address)
        end.wait()
        console.print("service: ending", highlight=False)
