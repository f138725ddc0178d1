"""The `tvilfm` command."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from cluster.data import app as data_app
from tvilfm.config import (
    Config,
    default_description,
    known_keys,
    load_config,
    load_run,
    run_folder,
    to_yaml,
    value_at,
)
from tvilfm.service.keys import KeyFile, add_key, remove_key

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="TVI-LFM on Ray.")
config_app = typer.Typer(no_args_is_help=True, help="Look at the run description.")
keys_app = typer.Typer(no_args_is_help=True, help="API keys of the retrieval service.")
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(data_app, name="data")
jobs_app = typer.Typer(no_args_is_help=True, help="Submitted jobs.")
app.add_typer(jobs_app, name="jobs")
cluster_app = typer.Typer(no_args_is_help=True, help="Clusters made from the run description.")
app.add_typer(cluster_app, name="cluster")

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="Run description; default ./ray_config.yaml.", show_default=False)
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        "--size",
        "--recipe",
        help="Recipe of the file's `sizes`: tiny, small, large (synthetic); sysu_mm01, regdb, llcm (released scripts).",
        show_default=False,
    ),
]
KeysOption = Annotated[Path, typer.Option("--file", help="File of the keys' hashes; serve.keys names it.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN] [SECTION.KEY=VALUE]...",
        help="Folder of a run, whose description is read in place of --config; then overrides, values as YAML.",
        show_default=False,
    ),
]


def _config(path: Path | None, size: str | None, arguments: list[str] | None) -> Config:
    """The description that a command's options and arguments name: of a file, or of the folder of a run."""
    folder = run_folder(arguments or [])
    if folder is None:
        return load_config(path or default_description(), arguments or [], size=size)
    if path or size:
        raise ValueError(
            f"{folder}: expected neither --config nor --size with the folder of a run, which has its own description. "
            "Leave the option out."
        )
    return load_run(folder, (arguments or [])[1:])


@app.command("run")
def run_command(config: ConfigOption = None, size: SizeOption = None, overrides: Overrides = None) -> None:
    """Run the whole chain: decode, train both stages, extract, evaluate, report. Finished stages are skipped."""
    resolved = _config(config, size, overrides)
    _run(resolved, until="report")
    typer.echo(f"to search it: {sys.argv[0]} serve --open {shlex.quote(str(resolved.run.path))}")


@app.command("train")
def train_command(
    stage: Annotated[Literal["base", "text"], typer.Option(help="Last stage to train.")] = "text",
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Train up to a stage."""
    _run(_config(config, size, overrides), until=stage)


@app.command("evaluate")
def evaluate_command(
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [SECTION.KEY=VALUE]...",
            help="Run folder, model folder or released checkpoint; then overrides, such as data.name and data.root of "
            "other data.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Evaluate a run, training what is missing; or, with data options, a trained model on other data."""
    arguments = overrides or []
    if not arguments or "=" in arguments[0]:
        _run(_config(config, size, arguments), until="results")
        return
    model, settings = Path(arguments[0]), arguments[1:]
    if any(setting.startswith("data.") for setting in settings):
        _run(_on_other_data(model, config, size, settings), until="report")
    elif (model / "config.yaml").is_file() or not model.exists():
        _run(_config(config, size, arguments), until="results")
    else:
        raise ValueError(
            f"{model}: expected the data to evaluate this model on, got none. Give data.name=... data.root=..."
        )


def _on_other_data(model: Path, config: Path | None, size: str | None, settings: list[str]) -> Config:
    """The description of a run that trains nothing: a model meets data that the settings name."""
    from tvilfm.models.opening import is_hub_name

    of_run = (model / "config.yaml").is_file()
    if of_run and (config or size):
        raise ValueError(f"{model}: expected neither --config nor --size with a run's model, got one. Leave it out.")
    source = model / "config.yaml" if of_run else config or default_description()
    own = {
        "model.trained": str(model if is_hub_name(model) else model.absolute()),
        "run.dir": str(model.absolute().parent if of_run else Path("runs")),
        "run.stages_dir": None,
        "data.root": None,
        "data.captions": None,
        "caption.source": "files",
        "evaluate.protocols": None,
    }
    overrides = [*(f"{key}={json.dumps(value)}" for key, value in own.items()), *settings]
    name = load_config(source, overrides, size=size).data.name
    return load_config(source, [f"run.name={model.absolute().stem}-on-{name}", *overrides], size=size)


def _tried(config: Config) -> Config:
    """The description of a long job, whose storage works."""
    from cluster.storage import check_storage

    if config.cluster.storage is not None:
        check_storage(config.cluster.storage)
    return config


def _run(config: Config, *, until: str) -> None:
    from cluster.run import run
    from tvilfm.report.tables import terminal_table

    outcome = run(_tried(config), until=until)
    console = Console()
    if outcome.results is not None:
        console.print(terminal_table(outcome.results))
    for note in outcome.notes:
        console.print(note, style="bold" if note.startswith("Warning:") else None, highlight=False)
    if until == "report":
        console.print(f"report: {outcome.path / 'report' / 'index.html'}", highlight=False)
    else:
        console.print(f"run: {outcome.path}", highlight=False)


@app.command("find")
def find_command(
    model: Annotated[Path, typer.Argument(help="Run folder, model folder, hub name, or released checkpoint file.")],
    folder: Annotated[Path, typer.Option("--in", help="Folder of images to search, with all folders in it.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="Infrared image of the person; give several times.", show_default=False)
    ] = None,
    text: Annotated[str | None, typer.Option(help="A sentence about the person.", show_default=False)] = None,
    infrared_caption: Annotated[
        str | None,
        typer.Option(help="What the infrared image shows; subtracted from the sentence (SFF).", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option("-k", min=1, help="Images to print.")] = 20,
    html: Annotated[Path | None, typer.Option(help="Contact sheet to write.", show_default=False)] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Table to write.", show_default=False)] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Table to write.", show_default=False)] = None,
) -> None:
    """Find a person in a folder of loose images. Needs no labels, gallery or service; images are encoded once."""
    if not image and not text:
        raise ValueError("query: expected an infrared image, a sentence, or both, got neither. Give --image or --text.")
    for path in (html, csv, as_json):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: expected a file in an existing folder. Make {path.parent} first.")
    from tvilfm.models.opening import open_model
    from tvilfm.retrieval.contact_sheet import write_contact_sheet
    from tvilfm.retrieval.find import find, table_lines, write_csv, write_json

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            typer.echo(f"\rencoded {done} of {total} images", err=True, nl=done >= total)

    images = image or []
    ranking, remarks = find(
        open_model(model),
        folder,
        images=images,
        sentence=text,
        infrared_caption=infrared_caption,
        count=count,
        progress=progress,
    )
    for line in remarks:
        typer.echo(line, err=True)
    for line in table_lines(ranking):
        typer.echo(line)
    if html is not None:
        write_contact_sheet(ranking, folder, html, images=images, sentence=text)
    if csv is not None:
        write_csv(ranking, csv)
    if as_json is not None:
        write_json(ranking, as_json)


@app.command("export")
def export_command(
    model: Annotated[Path, typer.Argument(help="Run folder, model folder, hub name, or released checkpoint file.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    kind: Annotated[
        Literal["onnx", "torchscript", "safetensors", "hub-folder"], typer.Option("--to", help="Format.")
    ] = "onnx",
) -> None:
    """Export the image encoders and the text tower, with a model card, and compare them with the model."""
    from tvilfm.models.export import export_model
    from tvilfm.models.opening import open_model

    opened = open_model(model)
    for line in opened.reported:
        typer.echo(line, err=True)
    for one in export_model(opened, out, kind):
        typer.echo(f"{one.part}: lowest cosine {one.cosine:.6f}, largest relative difference {one.difference:.1e}")
    typer.echo(f"exported: {out}")


@app.command("tune")
def tune_command(
    space: Annotated[str, typer.Argument(help="Name of a space in tune_spaces/, or the path of a YAML file.")],
    name: Annotated[str | None, typer.Option(help="Folder in run.dir; default the space's name.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds in place of the space's, such as 0,1,2.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep of that name.")] = False,
    origin: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Folder of a run whose description and finished stages the trials use.", show_default=False
        ),
    ] = None,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Run a sweep: the trials of a space, its table and its report."""
    settings = overrides or []
    if origin is not None:
        if config or size:
            raise ValueError("--from: expected neither --config nor --size beside it, got one. Leave it out.")
        run = load_run(origin)
        places = {"run.dir": run.run.dir, "run.stages_dir": run.stages_path}
        settings = [*(f"{key}={json.dumps(str(path))}" for key, path in places.items()), *settings]
        config = origin / "config.yaml"
    from cluster.tune import SPACES, sweep_space
    from tvilfm.tuning import load_space, with_seeds

    path = Path(space) if space.endswith((".yaml", ".yml")) else SPACES / f"{space}.yaml"
    loaded = load_space(path)
    if seeds is not None:
        loaded = with_seeds(loaded, seeds)
    _tried(_config(config, size, settings))
    folder = sweep_space(
        loaded,
        name=name or loaded.name,
        config_path=config or default_description(),
        overrides=settings,
        size=size,
        resume=resume,
    )
    _report(folder)


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="Of a run or a sweep, such as runs/demo or runs/ablations.")],
) -> None:
    """Write the report again: of a run, or of a sweep (page, Markdown, CSV, LaTeX) from its trials."""
    if (folder / "run.json").is_file():
        _run(load_run(folder), until="report")
    else:
        _report(folder)


def _report(folder: Path) -> None:
    from cluster.tune import report_sweep
    from tvilfm.report.sweep import markdown_table

    typer.echo(markdown_table(report_sweep(folder)))
    typer.echo(f"report: {folder / 'report' / 'index.html'}")


@app.command("index")
def index_command(
    gallery: Annotated[
        str | None, typer.Option(help="Folder or object store prefix; default gallery.uri.", show_default=False)
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Folder or URI of your own pictures; default the run's test images.", show_default=False),
    ] = None,
    camid: Annotated[
        int | None, typer.Option(help="Camera of --images.", show_default=False, min=0, max=2**31 - 1)
    ] = None,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Write people into a gallery with a finished run's model, and put it in use."""
    from cluster.index import index

    where = [] if gallery is None else [f"gallery.uri={json.dumps(gallery)}"]
    made = index(_config(config, size, [*(overrides or []), *where]), images=images, camid=camid)
    typer.echo(f"gallery: {made.uri} holds {len(made)} images in space {made.space_id}, version {made.version}")


@app.command("serve")
def serve_command(
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Serve a finished run over HTTP; where no gallery is named or made, its test images are indexed first."""
    from cluster.serve import serve_forever

    serve_forever(_config(config, size, overrides), show=show)


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Whose key it is; it stands in the audit trail.")],
    file: KeysOption,
    scope: Annotated[list[str], typer.Option(help="read, write, admin; give several times.")],
) -> None:
    """Make a key and print it, once; the file keeps its hash alone."""
    typer.echo(add_key(file, name, scope))


@keys_app.command("list")
def keys_list(file: KeysOption) -> None:
    """Print names, scopes and ages of the keys."""
    for key in KeyFile(file).read():
        typer.echo(f"{key.name}  {','.join(key.scopes)}  made {key.created:%Y-%m-%d}")


@keys_app.command("remove")
def keys_remove(name: Annotated[str, typer.Argument(help="Of the key.")], file: KeysOption) -> None:
    """Remove a key, of a running service too."""
    remove_key(file, name)


@app.command("caption-train")
def caption_train_command(
    modality: Annotated[
        Literal["visible", "infrared", "both"], typer.Option(help="Whose captioner to fine-tune.")
    ] = "both",
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Fine-tune captioners (caption.train) on the training images and their captions, and print their marks."""
    from cluster.run import run
    from tvilfm.captioning.scores import Marks

    outcome = run(
        _tried(_config(config, size, [*(overrides or []), "caption.source=finetuned"])),
        until="captioner_visible" if modality == "visible" else "captioner_infrared",
        without="captioner_visible" if modality == "infrared" else None,
    )
    for name, folder in outcome.stages.items():
        if name.startswith("captioner_"):
            typer.echo(f"{name}: {folder / 'captioner'}")
            for line in Marks.read(folder / "marks.json").lines():
                typer.echo(f"  {line}")


@app.command("caption")
def caption_command(
    out: Annotated[str, typer.Option(help="Folder or URI for captions.parquet, and what the job goes on from.")],
    images: Annotated[
        str | None,
        typer.Option(help="Folder or URI of picture files; default the run description's dataset.", show_default=False),
    ] = None,
    modality: Annotated[
        Literal["visible", "infrared"] | None, typer.Option(help="Of --images.", show_default=False)
    ] = None,
    retry_bad: Annotated[bool, typer.Option("--retry-bad", help="Also try images in quarantine again.")] = False,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Caption images into a table. What is there is not captioned again."""
    from cluster.caption import caption
    from cluster.run import make_synthetic
    from cluster.storage import check_storage

    resolved = _config(config, size, overrides)
    check_storage(out)
    if images is None:
        make_synthetic(resolved, Console(stderr=True))
    summary = caption(resolved, out=out, images=images, modality=modality, retry_bad=retry_bad)
    for line in summary.lines():
        typer.echo(line)
    summary.check(resolved.caption.max_bad_share)


@app.command("rephrase")
def rephrase_command(
    out: Annotated[str, typer.Option(help="Folder or URI for captions.parquet and what the job keeps to go on from.")],
    captions: Annotated[
        str | None,
        typer.Option(help="Parquet caption table, path or URI; default the dataset's captions.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Say every caption in other words (caption.rephrase). What is there is not asked for again."""
    from cluster.rephrase import rephrase
    from cluster.storage import check_storage

    check_storage(out)
    for line in rephrase(_config(config, size, overrides), out=out, captions=captions).lines():
        typer.echo(line)


@app.command("submit")
def submit_command(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="Any tvilfm command, after --.")],
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the job's log and end with its exit status; Ctrl-C detaches.")
    ] = False,
) -> None:
    """Run a command as a job on a Ray cluster (cluster.job_address), with this folder's program."""
    from cluster import submit

    parsed = submit.parse(app, command, default_description())
    folder = Path.cwd()
    package = submit.package_of(folder, parsed.config)
    package.check(parsed)
    client = submit.connect(parsed.config.cluster)
    same_machine = submit.on_this_machine(client.get_address())
    overrides = submit.job_paths(parsed, folder, same_machine=same_machine)
    typer.echo(f"sending {folder}: {package}", err=True)
    for name in parsed.config.cluster.env:
        if name not in os.environ:
            typer.echo(f"cluster.env: {name} is not set here and stays behind", err=True)
    for override in overrides:
        typer.echo(f"on the cluster: {override}", err=True)
    job = submit.submit(client, parsed, package, overrides)
    typer.echo(job)
    if follow:
        raise typer.Exit(submit.follow(client, job))
    typer.echo(submit.how_to(job), err=True)


@jobs_app.command("list")
def jobs_list(config: ConfigOption = None, overrides: Overrides = None) -> None:
    """List the jobs of the cluster, the last first."""
    from cluster.submit import connect, jobs_table

    Console().print(jobs_table(connect(_config(config, None, overrides).cluster)))


JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, as `tvilfm jobs list` has it.")]


@jobs_app.command("logs")
def jobs_logs(
    job: JobArgument,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until the job ends, and end with its exit status.")
    ] = False,
    config: ConfigOption = None,
    overrides: Overrides = None,
) -> None:
    """Print a job's log."""
    from cluster import submit

    client = submit.connect(_config(config, None, overrides).cluster)
    if follow:
        raise typer.Exit(submit.follow(client, job))
    submit.job(client, job)
    with submit.answered(job):
        typer.echo(client.get_job_logs(job), nl=False)


@jobs_app.command("status")
def jobs_status(job: JobArgument, config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Say how a job stands; one that has ended gives its exit status, a failed one also the end of its log."""
    from cluster import submit

    client = submit.connect(_config(config, None, overrides).cluster)
    details = submit.job(client, job)
    if details.status.is_terminal():
        raise typer.Exit(submit.report_end(client, job, shown=False))
    typer.echo(f"{job}: {details.status.value.lower()}")


@jobs_app.command("stop")
def jobs_stop(job: JobArgument, config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Stop a job; what its stages have finished stays."""
    from cluster import submit

    client = submit.connect(_config(config, None, overrides).cluster)
    submit.job(client, job)
    with submit.answered(job):
        typer.echo(f"{job}: {'stopping' if client.stop_job(job) else 'has ended before'}")


@cluster_app.command("render")
def cluster_render(
    target: Annotated[
        str,
        typer.Option(
            help="ray-up-aws, ray-up-gcp, ray-up-onprem, kuberay-cluster, kuberay-job, kuberay-service, serve-config "
            "or slurm."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="File to write; default standard output.", show_default=False)
    ] = None,
    command: Annotated[str, typer.Option(help="What kuberay-job and slurm run, such as 'tune ablations'.")] = "run",
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Write the file that makes the cluster of the description's cluster section, or runs something on one."""
    from cluster.deploy.render import render

    text = render(target, _config(config, size, overrides), command=command)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text)


@app.command("doctor")
def doctor_command(config: ConfigOption = None, size: SizeOption = None, overrides: Overrides = None) -> None:
    """Look at every machine of the cluster as a job would meet it, and say how to mend what is wrong."""
    from cluster.doctor import examine, table_of

    findings = examine(_config(config, size, overrides))
    Console().print(table_of(findings))
    if any(finding.state == "fault" for finding in findings):
        raise typer.Exit(1)


@app.command("init")
def init_command() -> None:
    """Write an annotated ray_config.yaml into this folder, to be edited. An existing file is not changed."""
    target = Path("ray_config.yaml")
    if target.exists():
        raise ValueError(f"{target}: expected a folder without one, got an existing file. Edit or remove it.")
    target.write_text(default_description().read_text())
    typer.echo(f"{target}: every key, its default and what it means")


@config_app.command("show")
def config_show(config: ConfigOption = None, size: SizeOption = None, overrides: Overrides = None) -> None:
    """Print the resolved run description."""
    typer.echo(to_yaml(_config(config, size, overrides)), nl=False)


@config_app.command("schema")
def config_schema(
    as_json: Annotated[bool, typer.Option("--json", help="JSON schema in place of one line a key.")] = False,
) -> None:
    """Print every key with its default and what it means."""
    if as_json:
        typer.echo(json.dumps(Config.model_json_schema(), indent=2))
        return
    values = Config().model_dump(mode="json")
    for key, description in known_keys().items():
        typer.echo(f"{key} = {json.dumps(value_at(values, key))}  # {description}")


def _guard() -> None:
    """Give a Ray that this command starts a token: its ports run whatever they are sent, for any machine.

    Ray reads it when it is imported. Whoever has set one has settled this; the token that Ray itself keeps in the
    home folder counts without more words, and a cluster that asks for none ignores it.
    """
    settled = any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if settled or "ray" in sys.modules:
        return
    if Path("~/.ray/auth_token").expanduser().exists():
        os.environ["RAY_AUTH_MODE"] = "token"
    elif "RAY_ADDRESS" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def main() -> None:
    """Run the command; a fault of the input ends in one message and status 2, not in a traceback."""
    _guard()
    try:
        app()
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
