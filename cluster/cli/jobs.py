"""Commands that submit jobs to a cluster, render the files that create one, and check its nodes."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli.options import ConfigOption, JsonOption, Overrides, SizeOption, complete_target, described
from tvilfm.config import default_description

app = typer.Typer()
jobs_app = typer.Typer(no_args_is_help=True, help="List, follow and stop submitted jobs.")
app.add_typer(jobs_app, name="jobs")
cluster_app = typer.Typer(no_args_is_help=True, help="Write the files that create a cluster.")
app.add_typer(cluster_app, name="cluster")


@app.command("submit")
def submit_command(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="Any tvilfm command, after --.")],
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the job's log and return its exit status; Ctrl-C detaches.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Send large untracked files without a question.")] = False,
) -> None:
    """Run a command as a job on a Ray cluster (cluster.job_address). The current folder is sent with the job."""
    from cluster.cli.app import app as commands
    from cluster.machines import jobs, submit

    parsed = submit.parse(commands, command, default_description())
    submit.check_dataset(parsed)
    folder = Path.cwd()
    package = submit.package_of(folder, parsed.config)
    package.check(parsed)
    size = package.untracked_bytes()
    if size > submit.UNASKED_BYTES and not yes:
        typer.confirm(
            f"{folder}: {submit.megabytes(size)} are not tracked by git (.gitignore leaves files out). Send them?",
            abort=True,
            err=True,
        )
    client = jobs.connect(parsed.config.cluster)
    same_machine = jobs.on_this_machine(client.get_address())
    overrides = submit.job_paths(parsed, folder, same_machine=same_machine)
    typer.echo(f"sending {folder}: {package}", err=True)
    for name in parsed.config.cluster.env:
        if name not in os.environ:
            typer.echo(f"cluster.env: {name} is not set here and is not sent", err=True)
    for override in overrides:
        typer.echo(f"on the cluster: {override}", err=True)
    job = submit.submit(client, parsed, package, overrides)
    typer.echo(job)
    if follow:
        raise typer.Exit(jobs.follow(client, job))
    typer.echo(jobs.how_to(job), err=True)


@jobs_app.command("list")
def jobs_list(in_json: JsonOption = False, config: ConfigOption = None, overrides: Overrides = None) -> None:
    """List the jobs of the cluster, the newest first."""
    from cluster.machines.jobs import connect, jobs_rows, jobs_table

    rows = jobs_rows(connect(described(config, None, overrides).cluster))
    if in_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        Console().print(jobs_table(rows))


JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, as printed by `tvilfm jobs list`.")]


@jobs_app.command("logs")
def jobs_logs(
    job: JobArgument,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the log until the job ends, and return its exit status.")
    ] = False,
    config: ConfigOption = None,
    overrides: Overrides = None,
) -> None:
    """Print a job's log."""
    from cluster.machines import jobs

    client = jobs.connect(described(config, None, overrides).cluster)
    if follow:
        raise typer.Exit(jobs.follow(client, job))
    jobs.job(client, job)
    with jobs.answered(job):
        typer.echo(client.get_job_logs(job), nl=False)


@jobs_app.command("status")
def jobs_status(job: JobArgument, config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Print the status of a job. Return the exit status of an ended job; print the end of a failed job's log."""
    from cluster.machines import jobs

    client = jobs.connect(described(config, None, overrides).cluster)
    details = jobs.job(client, job)
    if details.status.is_terminal():
        raise typer.Exit(jobs.report_end(client, job, shown=False))
    typer.echo(f"{job}: {details.status.value.lower()}")


@jobs_app.command("stop")
def jobs_stop(job: JobArgument, config: ConfigOption = None, overrides: Overrides = None) -> None:
    """Stop a job. Finished stages are kept."""
    from cluster.machines import jobs

    client = jobs.connect(described(config, None, overrides).cluster)
    jobs.job(client, job)
    with jobs.answered(job):
        typer.echo(f"{job}: {'stopping' if client.stop_job(job) else 'has already ended'}")


@cluster_app.command("render")
def cluster_render(
    target: Annotated[
        str,
        typer.Option(
            help="Kind of file: ray-up-aws, ray-up-gcp, ray-up-onprem, kuberay-cluster, kuberay-job, kuberay-service, "
            "serve-config or slurm.",
            autocompletion=complete_target,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: standard output.", show_default=False)
    ] = None,
    command: Annotated[
        str, typer.Option(help="Command that kuberay-job and slurm run, such as 'tune ablations'.")
    ] = "run",
    config: ConfigOption = None,
    size: SizeOption = None,
    overrides: Overrides = None,
) -> None:
    """Write a file that creates the cluster of the description's cluster section, or runs a command on one."""
    from cluster.machines.render import render

    text = render(target, described(config, size, overrides), command=command)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text)


@app.command("doctor")
def doctor_command(
    in_json: JsonOption = False, config: ConfigOption = None, size: SizeOption = None, overrides: Overrides = None
) -> None:
    """Check every machine of the cluster as a job would use it, and print how to fix each problem."""
    from cluster.machines.doctor import examine, table_of

    findings = examine(described(config, size, overrides))
    if in_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        Console().print(table_of(findings))
    if any(finding.state == "fault" for finding in findings):
        raise typer.Exit(1)
