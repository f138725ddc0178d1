"""Commands that run, evaluate, sweep and report, and commands that use a trained model."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from cluster.cli.options import (
    ConfigOption,
    JsonOption,
    Overrides,
    SizeOption,
    checked_storage,
    complete_space,
    described,
)
from tvilfm.config import Config, default_description, load_config, load_run

app = typer.Typer()


@app.command("run")
def run_command(config: ConfigOption = None, size: SizeOption = None, overrides: Overrides = None) -> None:
    """Run all stages: decode, train both stages, extract, evaluate, report. Finished stages are skipped."""
    resolved = described(config, size, overrides)
    _run(resolved, until="report")
    typer.echo(f"to search its images: {sys.argv[0]} serve --open {shlex.quote(str(resolved.run.path))}")


@app.command("train")
def train_command(
    stage: Annotated[Literal["base", "text"], typer.Option(help="Last stage to train.")] = "text",
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Train up to and including a stage. Finished stages are skipped."""
    _run(described(config, size, overrides), until=stage)


@app.command("evaluate")
def evaluate_command(
    in_json: JsonOption = False,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [SECTION.KEY=VALUE]...",
            help="Run folder, model folder or released checkpoint; then overrides, such as data.name and data.root of "
            "another dataset.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Evaluate a run and train its missing stages; with data options, evaluate a trained model on another dataset."""
    arguments = overrides or []
    if not arguments or "=" in arguments[0]:
        _run(described(config, size, arguments), until="results", in_json=in_json)
        return
    model, settings = Path(arguments[0]), arguments[1:]
    if any(setting.startswith("data.") for setting in settings):
        _run(_on_other_data(model, config, size, settings), until="report", in_json=in_json)
    elif (model / "config.yaml").is_file() or not model.exists():
        _run(described(config, size, arguments), until="results", in_json=in_json)
    else:
        raise ValueError(
            f"{model}: expected the dataset to evaluate this model on, got none. Give data.name=... data.root=..."
        )


def _on_other_data(model: Path, config: Path | None, size: str | None, settings: list[str]) -> Config:
    """Return the description of a run that only evaluates a trained model on the dataset of the settings."""
    from tvilfm.models.opening import is_hub_name

    of_run = (model / "config.yaml").is_file()
    if of_run and (config or size):
        raise ValueError(f"{model}: expected neither --config nor --size with a run's model, got one. Remove it.")
    source = model / "config.yaml" if of_run else config or default_description()
    own: dict[str, object] = {
        "model.trained": str(model if is_hub_name(model) else model.absolute()),
        "run.dir": str(model.absolute().parent if of_run else Path("runs")),
        "run.stages_dir": None,
        "data.root": None,
        "data.captions": None,
        "data.human_texts": None,
        "caption.source": "files",
        "evaluate.protocols": None,
        "evaluate.text_noise": [],
    }
    overrides = [*(f"{key}={json.dumps(value)}" for key, value in own.items()), *settings]
    name = load_config(source, overrides, size=size).data.name
    return load_config(source, [f"run.name={model.absolute().stem}-on-{name}", *overrides], size=size)


def _run(config: Config, *, until: str, in_json: bool = False) -> None:
    from cluster.run import run
    from tvilfm.report.tables import terminal_table

    outcome = run(checked_storage(config), until=until)
    if in_json:
        assert outcome.results is not None
        typer.echo(json.dumps(outcome.results.to_dict(), indent=2))
        return
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
    folder: Annotated[Path, typer.Option("--in", help="Folder of images to search, including subfolders.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="Infrared image of the person; may be repeated.", show_default=False)
    ] = None,
    text: Annotated[str | None, typer.Option(help="A sentence about the person.", show_default=False)] = None,
    infrared_caption: Annotated[
        str | None,
        typer.Option(
            help="Caption of the infrared image; its features are subtracted from those of the sentence (SFF).",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option("-k", min=1, help="Number of images to print.")] = 20,
    html: Annotated[Path | None, typer.Option(help="HTML contact sheet to write.", show_default=False)] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="CSV table to write.", show_default=False)] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="JSON table to write.", show_default=False)] = None,
) -> None:
    """Find a person in a folder of images. Needs no labels, gallery or service; encoded images are cached."""
    if not image and not text:
        raise ValueError("query: expected an infrared image, a sentence, or both, got neither. Give --image or --text.")
    for path in (html, csv, as_json):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(
                f"{path}: expected a file in an existing folder, got a missing one. Create {path.parent} first."
            )
    from tvilfm.models.opening import open_model
    from tvilfm.retrieval.contact_sheet import write_contact_sheet
    from tvilfm.retrieval.find import find
    from tvilfm.retrieval.found import table_lines, write_csv, write_json

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            typer.echo(f"\rencoded {done} of {total} images", err=True, nl=done >= total)

    images = image or []
    opened = open_model(model)
    ranking, remarks = find(
        opened,
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
        depth_range = opened.config.data.depth_range
        write_contact_sheet(ranking, folder, html, images=images, sentence=text, depth_range=depth_range)
    if csv is not None:
        write_csv(ranking, csv)
    if as_json is not None:
        write_json(ranking, as_json)


@app.command("export")
def export_command(
    model: Annotated[Path, typer.Argument(help="Run folder, model folder, hub name, or released checkpoint file.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    kind: Annotated[
        Literal["onnx", "torchscript", "safetensors", "hub-folder"], typer.Option("--to", help="Format.")
    ] = "onnx",
) -> None:
    """Export the image encoders and the text tower with a model card, and compare their outputs with the model's."""
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
    space: Annotated[
        str,
        typer.Argument(
            help="Name of a space in tune_spaces/, or the path of a YAML file.", autocompletion=complete_space
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the sweep and of its folder in run.dir; default: the name of the space.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds to use instead of those of the space, such as 0,1,2.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep of this name.")] = False,
    origin: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Folder of a run whose description and finished stages the trials use.", show_default=False
        ),
    ] = None,
    in_json: JsonOption = False,
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Run a sweep: run the trials of a search space, then write its table and its report."""
    settings = overrides or []
    if origin is not None:
        if config or size:
            raise ValueError("--from: expected neither --config nor --size beside it, got one. Remove it.")
        run = load_run(origin)
        places = {"run.dir": run.run.dir, "run.stages_dir": run.stages_path}
        settings = [*(f"{key}={json.dumps(str(path))}" for key, path in places.items()), *settings]
        config = origin / "config.yaml"
    from cluster.sweep import SPACES, sweep_space
    from tvilfm.sweeps.space import load_space, with_seeds

    path = Path(space) if space.endswith((".yaml", ".yml")) else SPACES / f"{space}.yaml"
    loaded = load_space(path)
    if seeds is not None:
        loaded = with_seeds(loaded, seeds)
    checked_storage(described(config, size, settings))
    folder = sweep_space(
        loaded,
        name=name or loaded.name,
        config_path=config or default_description(),
        overrides=settings,
        size=size,
        resume=resume,
    )
    _report(folder, in_json=in_json)


@app.command("clean")
def clean_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete the folders; without it they are only listed.")] = False,
) -> None:
    """List folders of a run that nothing refers to: stages of earlier settings, states of finished trainings."""
    from cluster.stages.clean import leftovers

    found = leftovers(run)
    for leftover in found:
        typer.echo(f"{leftover.bytes / 1e6:.1f} MB  {leftover.path}: {leftover.reason}")
        if yes:
            leftover.delete()
    total = sum(leftover.bytes for leftover in found) / 1e6
    typer.echo(f"{total:.1f} MB freed" if yes else f"{total:.1f} MB to free; delete with --yes")


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="Folder of a run or a sweep, such as runs/demo or runs/ablations.")],
) -> None:
    """Write the report of a run again, or the report of a sweep (HTML, Markdown, CSV, LaTeX) from its trials."""
    if (folder / "run.json").is_file():
        _run(load_run(folder), until="report")
    else:
        _report(folder)


def _report(folder: Path, *, in_json: bool = False) -> None:
    from cluster.sweep import report_sweep
    from tvilfm.report.sweep import markdown_table

    data = report_sweep(folder)
    if in_json:
        typer.echo(json.dumps([asdict(record) for record in data.records], indent=2))
        return
    typer.echo(markdown_table(data))
    typer.echo(f"report: {folder / 'report' / 'index.html'}")
