"""`tvilfm data`: create a synthetic dataset in any layout, and check a dataset on a local disk."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.cli.options import JsonOption
from tvilfm.config import Config, DataSection, default_description, load_config
from tvilfm.datasets.findings import Findings
from tvilfm.datasets.naming import write_table
from tvilfm.datasets.synthetic.layouts import SIZES, Layout, Size, write_layout

REGDB_IMAGES = 10
SHOWN = 3

app = typer.Typer(no_args_is_help=True, help="Create and check datasets.")


@app.command("synth")
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    identities: Annotated[
        str, typer.Option(help="tiny, small, large, or numbers of identities as TRAIN,VAL,TEST.", show_default=True)
    ] = "small",
    images_per_camera: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images per person and camera; infrared cameras of the layouts sysu_mm01 and folder take twice as "
            "many. Default: 10 for regdb, otherwise the value of the size (1 for TRAIN,VAL,TEST).",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    layout: Annotated[Layout, typer.Option(help="On-disk layout.")] = "sysu_mm01",
) -> None:
    """Render the synthetic tri-modal benchmark. The same seed gives the same bytes."""
    size = _size(identities)
    if layout == "regdb":
        size = replace(size, images_per_camera=REGDB_IMAGES)
    if images_per_camera is not None:
        size = replace(size, images_per_camera=images_per_camera)
    write_layout(out, size, seed=seed, layout=layout)
    typer.echo(f"{out}: {size.train} + {size.val} + {size.test} identities, layout {layout}, seed {seed}")


def _size(identities: str) -> Size:
    if identities in SIZES:
        return SIZES[identities]
    try:
        train, val, test = (int(part) for part in identities.split(","))
    except ValueError:
        raise ValueError(
            f"--identities: expected {', '.join(SIZES)} or TRAIN,VAL,TEST as in 800,80,120, got {identities!r}."
        ) from None
    if min(train, val, test) < 1:
        raise ValueError(f"--identities: expected at least one identity in each split, got {identities!r}.")
    return Size(train=train, val=val, test=test, images_per_camera=1)


@app.command("check")
def check(
    config: Annotated[
        Path | None, typer.Option("--config", help="Run description; default: ./ray_config.yaml.", show_default=False)
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", "--recipe", help="Recipe of the description's `sizes`.", show_default=False)
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Folder of the run whose model you want to evaluate on this dataset.", show_default=False),
    ] = None,
    images: Annotated[bool, typer.Option(help="Open every image, which is the slow part.")] = True,
    every: Annotated[
        bool, typer.Option("--every", help=f"List all files with a problem, not only the first {SHOWN}.")
    ] = False,
    in_json: JsonOption = False,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="data.name=regdb data.root=/path ...")
    ] = None,
) -> None:
    """Compare a dataset with the published counts, look for problems, and print how to fix each.

    Give the options of the run that will use the dataset: the check also says whether that run can train and evaluate.
    """
    from tvilfm.evaluation.feasibility import check_config  # with torch, which takes seconds

    resolved = load_config(config or default_description(), overrides or [], size=size)
    trained: DataSection | None = None
    if run is not None:
        trained = load_config(run / "config.yaml").data
    findings = check_config(resolved, images=images, trained=trained)
    if in_json:
        typer.echo(json.dumps(asdict(findings), indent=2, default=str))
    else:
        _print_findings(resolved, findings, images=images, every=every)
    if not findings.sound:
        raise typer.Exit(1)


def _print_findings(resolved: Config, findings: Findings, *, images: bool, every: bool) -> None:
    console = Console()
    console.print(f"{resolved.data.name} in {resolved.data_root}", highlight=False)
    if findings.counts:
        console.print(_counts_table(findings))
    if findings.faults:
        console.print(_faults_table(findings, every=every))
    else:
        console.print("no problems found")
    if not images:
        console.print("images were not opened (--no-images)")


@app.command("table")
def table(
    root: Annotated[Path, typer.Argument(help="Folder of images whose paths contain person and camera.")],
    infrared_cameras: Annotated[
        str | None,
        typer.Option(help="Numbers of the infrared cameras, such as 3,6; not needed below folders visible, infrared."),
    ] = None,
) -> None:
    """Write manifest.csv for file names as in Market-1501, or trees such as cam3/0001/. Then use data.name=folder."""
    try:
        cameras = [int(camera) for camera in (infrared_cameras or "").split(",") if camera.strip()]
    except ValueError:
        raise ValueError(f"--infrared-cameras: expected numbers such as 3,6, got {infrared_cameras!r}.") from None
    rows = write_table(root, cameras)
    people = len({row["pid"] for row in rows})
    typer.echo(f"{root / 'manifest.csv'}: {len(rows)} images of {people} people; look at it, then use data.name=folder")


def _counts_table(findings: Findings) -> Table:
    table = Table("count", "found", "expected")
    for count in findings.counts:
        wrong = count.expected is not None and count.found != count.expected
        expected = "" if count.expected is None else str(count.expected)
        table.add_row(count.what, str(count.found), expected, style="red" if wrong else None)
    return table


def _faults_table(findings: Findings, *, every: bool) -> Table:
    table = Table(show_lines=True)
    for heading in ("", "problem", "where", "how to fix it"):
        table.add_column(heading, overflow="fold")  # a path that is cut off cannot be opened
    for fault in findings.faults:
        shown = fault.where if every else fault.where[:SHOWN]
        more = len(fault.where) - len(shown)
        where = "\n".join((*shown, *([f"and {more} more"] if more else [])))
        severity = Text("fault", style="red") if fault.serious else Text("note", style="yellow")
        table.add_row(severity, Text(fault.what), Text(where), Text(fault.fix))
    return table
