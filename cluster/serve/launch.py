"""`tvilfm serve`: start the service on Ray Serve, or add it to a Serve instance that is already running."""

from __future__ import annotations

import io
import signal
import tempfile
import threading
import webbrowser
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig
from rich.console import Console

from cluster.places.check import absolute_paths
from cluster.serve.application import application, resources
from cluster.serve.environment import http_options, local_environment
from cluster.session import address_of, session
from tvilfm.config import Config, ServeSection, resolve
from tvilfm.retrieval.gallery import Gallery

APPLICATION = "tvilfm"
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")  # requests are in the audit trail


@contextmanager
def serving(config: Config) -> Iterator[str]:
    """Run the service for the duration of the block.

    Yields:
        Address of the service.

    Raises:
        ValueError: the run is not finished, a file that the service needs is missing, this machine is too small, or
            Serve is already running on the cluster with other HTTP options.
    """
    # Replicas do not run in the current folder, so relative paths are made absolute.
    config = resolve(config.model_dump(mode="json"), absolute_paths(config, Path.cwd()))
    if config.gallery.url is None and not _has_gallery(config):
        from cluster.tables.indexing import index  # imports torch

        index(config)
    section = config.serve
    with ExitStack() as quiet, ExitStack() as stack:
        stack.enter_context(session(config.cluster))
        _check_room(config, ray.cluster_resources())
        app = application({"config": config.model_dump(mode="json")})
        options = HTTPOptions(**http_options(section))
        joined = _get_global_client(raise_if_no_controller_running=False)
        if joined is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tvi-", ignore_cleanup_errors=True)))
            variables = {"env_vars": local_environment(section, folder)}
            serve.start(http_options=options, logging_config=QUIET, controller_options={"runtime_env": variables})
        else:
            _check_listens_so(joined.http_config, options)
        try:
            serve.run(app, name=APPLICATION, route_prefix="/", logging_config=QUIET)
            yield _address(section)
        finally:
            if joined is None:
                # Serve's controller ends its own process, which Ray would print as a failure.
                quiet.enter_context(redirect_stdout(io.StringIO()))
                serve.shutdown()
            else:  # keep Serve for other applications
                serve.delete(APPLICATION)


def _has_gallery(config: Config) -> bool:
    """Return whether the run's own gallery exists; that of a killed `tvilfm index` was not put in use."""
    if not Path(config.gallery_url).exists():
        return False
    try:
        Gallery.open(config.gallery_url).close()
    except ValueError:
        return False
    return True


def _check_room(config: Config, existing: Mapping[str, float]) -> None:
    """Check that the cluster has the resources that the replicas reserve. Ray would wait for them forever, silently.

    Args:
        config: sections `serve` and `cluster`.
        existing: name -> amount, of all machines.

    Raises:
        ValueError: Ray runs only on this machine, and resources are missing. On a cluster, machines may be added later,
            so missing resources are only printed.
    """
    for name, amount in resources(config).items():
        has = existing.get(name, 0.0)
        if round(amount, 4) <= has:
            continue
        lack = f"expected {amount:g} {name}s for its replicas, got {has:g}"
        fix = "Lower serve.replicas, serve.searcher_gpus or cluster.gpus_per_worker"
        if address_of(config.cluster) == "local":
            raise ValueError(f"serve: {lack}. {fix}.")
        Console(stderr=True).print(f"service: {lack}. {fix}, unless machines are added on demand.", highlight=False)


def _check_listens_so(running: HTTPOptions, wanted: HTTPOptions) -> None:
    """Check the HTTP options of a running Serve. All its applications share them; Serve ignores those of later ones.

    Raises:
        ValueError: host, port or TLS files differ from the description. Another host may require keys.
    """
    keys = {"host": "host", "port": "port", "tls_cert": "ssl_certfile", "tls_key": "ssl_keyfile"}
    for key, option in keys.items():
        given, current = getattr(wanted, option), getattr(running, option)
        if given != current:
            raise ValueError(
                f"serve.{key}: expected {current}, the value of the Serve that already runs on this cluster, got "
                f"{given}. Set it to that value, or shut down that Serve first."
            )


def _address(section: ServeSection) -> str:
    """Return the URL of the service for a browser on this machine."""
    host = "127.0.0.1" if section.host in ("0.0.0.0", "::") else section.host
    scheme = "http" if section.tls_cert is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{section.port}"


def serve_forever(config: Config, *, show: bool) -> None:
    """Serve until the process receives SIGINT or SIGTERM.

    Args:
        config: sections `run` (the run), `gallery` (the gallery) and `serve` (the service).
        show: open the search page in a browser.
    """
    end = threading.Event()
    console = Console(stderr=True)
    with serving(config) as address:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: end.set())
        console.print(f"service: {address} (press Ctrl-C to stop)", highlight=False)
        if show:
            webbrowser.open(address)
        end.wait()
        console.print("service: stopping", highlight=False)
