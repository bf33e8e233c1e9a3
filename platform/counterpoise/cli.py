"""counterpoise: train, evaluate, compare. Every command imports only what it needs, so help and errors come at once."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from types import TracebackType
from typing import Annotated, Any

import typer

from counterpoise import __version__
from counterpoise.contracts import ConfigError, CounterpoiseError
from counterpoise.wording import did_you_mean

app = typer.Typer(
    name="counterpoise",
    help="Balanced multimodal learning: train AUG and its rivals, from a laptop to a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
corpora = typer.Typer(help="List, prepare and check corpora.", no_args_is_help=True)
app.add_typer(corpora, name="corpora")
methods = typer.Typer(help="List the methods and show their settings.", no_args_is_help=True)
app.add_typer(methods, name="methods")
bench = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
dashboards = typer.Typer(
    help="Grafana dashboards and Prometheus rules: build, check, push, preview.", no_args_is_help=True
)
app.add_typer(dashboards, name="dashboards")
jobs = typer.Typer(help="Jobs on a Ray cluster: list, status, logs, stop. `submit` sends them.", no_args_is_help=True)
app.add_typer(jobs, name="jobs")

runs_group = typer.Typer(help="Look after runs: verify their checksums.", no_args_is_help=True)
app.add_typer(runs_group, name="runs")

Runs = Annotated[
    str, typer.Option("--runs", help="Folder or s3:// prefix that holds runs.", envvar="COUNTERPOISE_RUNS")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Engine = Annotated[str, typer.Option(help="local: this process; ray: Ray Train and Ray Data.")]
Workers = Annotated[int, typer.Option(min=1, help="Workers that share every batch.")]
Against = Annotated[
    str | None, typer.Option(metavar="CHECKOUT", help="Folder of the released AUG code; it is timed too.")
]
ChannelsLast = Annotated[bool, typer.Option("--channels-last", help="As compute.channels_last.")]
Precision = Annotated[str, typer.Option(help="fp32, tf32 or bf16, as compute.precision.")]
Compiled = Annotated[str, typer.Option(help="off, default, ..., as compute.compile.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="torch threads per worker.", show_default="cores / workers")]
CheckpointEvery = Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Longest time between checkpoints.")]
HangAfter = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="SECONDS",
        help="A worker whose step takes longer, and 20 times the median, has hung: end it, to be started again; 0: never.",
    ),
]
Address = Annotated[
    str | None, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to use.", show_default="start one here")
]
Dashboard = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Dashboard of the Ray cluster; also RAY_API_SERVER_ADDRESS.",
        show_default="http://127.0.0.1:8265",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Its ID, or its name: then the newest of that name.")]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track", envvar="COUNTERPOISE_TRACK", metavar="TRACKER", help="tensorboard, mlflow or wandb. Repeatable."
    ),
]
Missing = Annotated[
    list[str] | None,
    typer.Option(metavar="MODALITY", help="Predict without it; a+b for two at once, `each` for every one. Repeatable."),
]
MetricsPort = Annotated[
    str,
    typer.Option(
        envvar="COUNTERPOISE_METRICS_PORT",
        metavar="PORT",
        help="Port of live metrics for Prometheus; 0: any free one; off.",
    ),
]
MetricsAddress = Annotated[str, typer.Option(metavar="HOST", help="Where metrics are shown.")]
MetricsSd = Annotated[
    str | None,
    typer.Option(
        envvar="COUNTERPOISE_METRICS_SD",
        metavar="DIR",
        help="Folder in which Prometheus finds running commands (file_sd).",
        show_default=".metrics where the runs are",
    ),
]
MetricsLinger = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="SECONDS",
        help="Wait so long at the end for one more scrape.",
        show_default="a scrape interval if there were scrapes, else 0",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray and torch say, and tracebacks.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Change a value of the experiment, e.g. optim.lr=0.05. Repeatable."
    ),
]


def say(text: str = "") -> None:
    """A line for people, on standard error; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def train(
    experiment: Annotated[
        str | None, typer.Argument(help="Experiment file (YAML). Left out with --resume: the run's own.")
    ] = None,
    sets: Sets = None,
    engine: Engine = "local",
    workers: Workers = 1,
    device: Device = "auto",
    threads: Threads = None,
    runs: Runs = "runs",
    name: Annotated[str | None, typer.Option(help="Name of the run.", show_default="corpus-method-seed-time")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run --name from its last checkpoint.")] = False,
    auto_resume: Annotated[
        bool,
        typer.Option(
            "--auto-resume",
            help="Start the run --name, go on with it if it has begun, or do nothing if it has finished: for schedulers that give a command again.",
        ),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="With --resume: a value that may differ from before. Repeatable."),
    ] = None,
    checkpoint_every: CheckpointEvery = 60,
    address: Address = None,
    min_workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="On Ray: go on with fewer workers, down to so many, while nodes are missing.",
            show_default="--workers",
        ),
    ] = None,
    max_failures: Annotated[
        int,
        typer.Option(
            min=-1, help="With several workers, or on Ray: how often those that died are replaced; -1: always."
        ),
    ] = 2,
    wait: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="On Ray: how long to wait for room for the workers, at the start and when nodes are lost.",
            show_default="300; at the start only if the cluster can grow",
        ),
    ] = None,
    hang_after: HangAfter = 120,
    track: Track = None,
    metrics_port: MetricsPort = "0",
    metrics_address: MetricsAddress = "127.0.0.1",
    metrics_sd: MetricsSd = None,
    metrics_linger: MetricsLinger = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check config, data and resources; print what would run.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Train one experiment and test it."""
    from counterpoise.config import read_yaml, resolve
    from counterpoise.start import (
        Settings,
        check_same_data,
        existing,
        keep_changes,
        make_job,
        new_run,
        preview,
        publisher,
        reopen,
        run_jobs,
    )
    from counterpoise.telemetry.emitter import Options, emitting
    from counterpoise.telemetry.track import chosen

    _choice("--engine", engine, ("local", "ray"))
    trackers = chosen(track or [])
    settings = Settings(
        engine,
        workers,
        device,
        threads,
        checkpoint_every,
        address,
        max_failures,
        min_workers,
        wait,
        verbose=verbose,
        track=trackers,
        hang_s=hang_after,
    )
    metrics = Options.parse(metrics_port, metrics_address, metrics_sd, metrics_linger, runs)
    given = read_yaml(experiment) if experiment else None
    if auto_resume:
        if name is None:
            raise ConfigError("--auto-resume needs a --name, by which the run is found when the command is given again")
        resume = existing(runs, name) is not None
    if resume:
        if name is None:
            raise ConfigError("--resume needs the --name of the run to continue")
        folder, resolved, changes = reopen(
            runs, name, given, experiment or name, sets or [], allow_change or [], finished=auto_resume
        )
        if folder.state() == "finished":
            say(f"run         {folder.uri} has finished; nothing is left to do")
            _print_results([folder.uri], [folder.read_json("summary.json")])
            return
        seen = preview(resolved, settings)
        check_same_data(folder, seen)
        for change in changes:
            say(f"changed  {change}")
    else:
        if given is None:
            raise ConfigError("name an experiment file, e.g. counterpoise train trainables/experiments/av_digits.yaml")
        resolved, provenance = resolve(given, sets or [], str(experiment))
        seen = preview(resolved, settings)
    for line in seen.lines():
        say(line)
    if dry_run:
        say("dry run: everything that could be checked is in order; nothing was started")
        return
    if resume:
        keep_changes(folder, resolved, changes)
    else:
        folder = new_run(seen, provenance, runs, name, sys.argv[1:])
    say(f"run         {folder.uri}")
    with emitting(metrics, runs, folder.name, publish=publisher(seen.settings)):
        summaries = run_jobs([make_job(seen, folder, resume)], seen.settings)
        _print_results([folder.uri], summaries)


def _print_results(uris: Sequence[str], summaries: Sequence[dict[str, Any]]) -> None:
    from counterpoise.reports.records import read_run
    from counterpoise.reports.tables import text_table

    say()
    print(text_table([read_run(uri) for uri in uris]))
    for summary in summaries:
        if skipped := (summary.get("test") or {}).get("skipped"):
            say(f"{summary['run']}: {skipped} test rows could not be decoded and are left out, see ledger.jsonl")


@app.command()
def compare(
    experiment: Annotated[
        str | None, typer.Argument(help="Experiment file (YAML). Left out with --resume: the comparison's own.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            "-m",
            metavar="A,B,...",
            help="Methods, with settings: joint,aug:lam=0.2:optim.lr=0.1. all: every one that can run.",
            show_default="with --resume: as before",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds of every method.", show_default="5, or as before")
    ] = None,
    first_seed: Annotated[
        int | None, typer.Option(min=0, help="The first of them.", show_default="0, or as before")
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=V1,V2,...", help="A grid for every method, e.g. optim.lr=0.01,0.03,0.1; chosen on valid."
        ),
    ] = None,
    tune_seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds that choose.", show_default="1, or as before")
    ] = None,
    sets: Sets = None,
    engine: Engine = "local",
    workers: Workers = 1,
    device: Device = "auto",
    threads: Threads = None,
    runs: Runs = "runs",
    name: Annotated[
        str | None, typer.Option(help="Name of the comparison.", show_default="corpus-compare-time")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the comparison --name; more --seeds or --methods extend it.")
    ] = False,
    checkpoint_every: CheckpointEvery = 60,
    address: Address = None,
    track: Track = None,
    metrics_port: MetricsPort = "0",
    metrics_address: MetricsAddress = "127.0.0.1",
    metrics_sd: MetricsSd = None,
    metrics_linger: MetricsLinger = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="HTML file to write.", show_default="report.html in the folder")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything; print the plan and the trials.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train methods with the same seeds and budget; a table with exact paired tests, and a report."""
    from counterpoise.compare import compare as run_comparison
    from counterpoise.start import Settings
    from counterpoise.telemetry.emitter import Options
    from counterpoise.telemetry.track import chosen

    _choice("--engine", engine, ("local", "ray"))
    complete = run_comparison(
        experiment=experiment,
        methods=methods,
        settings=Settings(
            engine, workers, device, threads, checkpoint_every, address, verbose=verbose, track=chosen(track or [])
        ),
        runs=runs,
        name=name,
        sets=sets or [],
        seeds=seeds,
        first_seed=first_seed,
        tune=tune,
        tune_seeds=tune_seeds,
        resume=resume,
        dry_run=dry_run,
        out=out,
        as_json=as_json,
        metrics=Options.parse(metrics_port, metrics_address, metrics_sd, metrics_linger, runs),
    )
    if not complete:
        say("counterpoise: some trials failed, see the notes; --resume tries them again")
        raise typer.Exit(1)


@app.command()
def sweep(
    file: Annotated[
        str | None, typer.Argument(metavar="SWEEP.yaml", help="Sweep file. Left out with --resume: the sweep's own.")
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="Another corpus: its experiment beside the sweep's, or a prepared one with usual encoders."),
    ] = None,
    weak: Annotated[
        str | None,
        typer.Option(
            metavar="MODALITY", help="What {weak} in the file stands for.", show_default="as the corpus's card says"
        ),
    ] = None,
    sets: Sets = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers of every trial.", show_default="as the file says")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds 0, 1, ... of every point.", show_default="as the file says")
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials at a time.", show_default="as many as there is room for")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a trial that failed is tried again.")] = 2,
    runs: Runs = "runs",
    name: Annotated[str | None, typer.Option(help="Name of the sweep.", show_default="file-time")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep --name; what has finished is not run again.")
    ] = False,
    reuse: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUNS", help="Runs, sweeps or folders of runs: what they have finished is copied. Repeatable."
        ),
    ] = None,
    checkpoint_every: CheckpointEvery = 60,
    address: Address = None,
    with_stopped: Annotated[
        bool, typer.Option("--with-stopped", help="Table: also points of which a scheduler stopped a seed.")
    ] = False,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="HTML file to write.", show_default="report.html in the folder")
    ] = None,
    metrics_port: MetricsPort = "0",
    metrics_address: MetricsAddress = "127.0.0.1",
    metrics_sd: MetricsSd = None,
    metrics_linger: MetricsLinger = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything; print the trials and an estimate from measured steps.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a grid, a search or a population of trials on Ray Tune; a table and a report at the end."""
    from counterpoise.start import Settings
    from counterpoise.sweep import run_sweep
    from counterpoise.sweepfile import ask
    from counterpoise.telemetry.emitter import Options

    if file is None and (sets or corpus or weak or workers or seeds):
        raise ConfigError(
            "--set, --corpus, --weak, --workers and --seeds change what a sweep file asks for; name the file too"
        )
    asked = ask(file, corpus, sets or [], workers, range(seeds) if seeds else None, weak) if file else None
    whole = run_sweep(
        asked=asked,
        settings=Settings("ray", 1, checkpoint_every_s=checkpoint_every, address=address, verbose=verbose),
        runs=runs,
        name=name,
        resume=resume,
        reuse=reuse or [],
        dry_run=dry_run,
        max_concurrent=max_concurrent,
        retries=retries,
        with_stopped=with_stopped,
        out=out,
        as_json=as_json,
        metrics=Options.parse(metrics_port, metrics_address, metrics_sd, metrics_linger, runs),
    )
    if not whole:
        say("counterpoise: some trials failed; --resume tries them again")
        raise typer.Exit(1)


@app.command()
def plan(
    experiment: Annotated[
        str | None,
        typer.Argument(help="Experiment file (YAML). Left out: the sweep's, or numbers by --set model.* and shards.*."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="h100, h200, a100, l4, t4, mi300x or cpu.", show_default="what --calibrate measured"
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs of a node; of cpu, workers.", show_default="8; of cpu 1")
    ] = None,
    cores: Annotated[
        int | None, typer.Option(min=1, help="Cores of a node.", show_default="12 per GPU; of cpu as here")
    ] = None,
    network: Annotated[
        str,
        typer.Option(metavar="NAME", help="Between nodes: Gb/s of a node, ethernet25, ethernet100, efa3200 or ib3200."),
    ] = "ethernet100",
    store: Annotated[
        str, typer.Option(metavar="NAME", help="Where the corpus is: s3, nfs, or disk (a copy per node).")
    ] = "s3",
    precision: Annotated[
        str, typer.Option(help="fp32: as the loop trains; bf16: what that would bring, if the loop had it.")
    ] = "fp32",
    per_device_batch: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="SAMPLES", help="Batch of each device where it grows with them.", show_default="batch_size"
        ),
    ] = None,
    sweep: Annotated[str | None, typer.Option(metavar="SWEEP.yaml", help="Also what this sweep would take.")] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Of a device-hour, in any currency.", show_default="no cost")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="Change the experiment, or an assumption of the list. Repeatable."
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="First measure this machine, for about a minute, for this plan and later ones."
        ),
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Where measurements are kept.", show_default="calibration.json of the cache folder"
        ),
    ] = None,
    runs: Runs = "runs",
    picture: Annotated[
        str | None, typer.Option("--plot", metavar="PNG", help="Draw the curves into this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict step time, scaling, input, failures and cost on a cluster, and say what breaks first."""
    from counterpoise.planning.command import Cluster, make
    from counterpoise.planning.text import lines, plot

    _choice("--precision", precision, ("fp32", "bf16"))
    found = make(
        experiment=experiment,
        sweep=sweep,
        sets=sets or [],
        cluster=Cluster(gpu, nodes, per_node, cores, network, store, precision, price),
        per_device_batch=per_device_batch,
        runs=runs,
        calibration=calibration,
        measure=calibrate,
        say=say,
    )
    if picture:
        plot(found, picture)
    print(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))


@app.command()
def demo(
    workers: Annotated[int, typer.Option(min=1, help="Ray Train workers.")] = 2,
    engine: Annotated[str, typer.Option(help="ray or local.")] = "ray",
    epochs: Annotated[
        int | None, typer.Option(min=2, help="Epochs of each run.", show_default="as the experiment says")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    runs: Runs = "runs",
    verbose: Verbose = False,
) -> None:
    """Prepare a small real corpus, train plain joint learning and AUG on it, and compare them in a report."""
    from counterpoise.demo import run_demo

    _choice("--engine", engine, ("local", "ray"))
    run_demo(engine=engine, workers=workers, epochs=epochs, seed=seed, runs=runs, verbose=verbose)


@app.command(context_settings={"allow_interspersed_args": False})
def submit(
    context: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND ...",
            help="train, compare, sweep, evaluate, predict or corpora prepare, and its arguments.",
        ),
    ],
    address: Dashboard = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the job, and of its run.", show_default="that of the run")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Do not follow the log; print the job's ID.")] = False,
    shared: Annotated[
        bool, typer.Option("--shared", help="Absolute paths in COMMAND are mounted on every node.")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Variable of driver and workers; never a secret, Ray keeps it. Repeatable."
        ),
    ] = None,
    working_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder to send.", show_default="the checkout, if there is one")
    ] = None,
    runtime_env: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Ray's runtime environment.", show_default="cluster/runtime_env.yaml"),
    ] = None,
    grace: Annotated[
        int, typer.Option(min=1, metavar="SECONDS", help="Time to write a checkpoint when the job is stopped.")
    ] = 120,
    driver_cpus: Annotated[
        float | None,
        typer.Option(min=0, help="CPUs of the driver; 0: it runs on the head.", show_default="evaluate: 1, else 0"),
    ] = None,
    driver_gpus: Annotated[float, typer.Option(min=0, help="GPUs of the driver, e.g. 1 for evaluate.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, also the cluster; send nothing.")
    ] = False,
) -> None:
    """Run a command of ours as a job of a Ray cluster and follow it; the exit code is the command's.

    counterpoise submit train EXPERIMENT.yaml --workers 4 --runs s3://bucket/runs --name a1
    """
    from counterpoise.jobs import parse, plan
    from counterpoise.jobs import submit as start

    asked = parse(context.find_root().command, command)
    order = plan(
        asked, name=name, working_dir=working_dir, runtime_env=runtime_env, env=env or [], shared=shared, grace_s=grace,
        cpus=driver_cpus, gpus=driver_gpus, say=say,
    )  # fmt: skip
    job_id, code = start(order, address, detach=detach, dry_run=dry_run, say=say)
    if detach and job_id:
        print(job_id)
    raise typer.Exit(code)


@jobs.command("list")
def jobs_list(address: Dashboard = None, as_json: Json = False) -> None:
    """Jobs that the cluster knows, the newest first."""
    from counterpoise.launch.submit import connect, facts, lines, submitted

    found = submitted(connect(address, say))
    print(json.dumps([facts(job) for job in found], indent=2) if as_json else "\n".join(lines(found)))


@jobs.command("status")
def jobs_status(job: JobId, address: Dashboard = None, as_json: Json = False) -> None:
    """How a job stands."""
    from counterpoise.launch.submit import connect, facts, find

    found = facts(find(connect(address, say), job))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for key, value in found.items():
        if value is not None:
            shown = f"{datetime.fromtimestamp(value):%Y-%m-%d %H:%M:%S}" if key == "started" else value
            print(f"{key.replace('_', ' '):10}  {shown}")


@jobs.command("logs")
def jobs_logs(
    job: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until the job ends; the exit code is then the job's.")
    ] = False,
    address: Dashboard = None,
) -> None:
    """What a job has printed. Ctrl-C while following leaves the job alone."""
    from counterpoise import jobs as ours
    from counterpoise.launch.submit import connect, find

    client = connect(address, say)
    found = find(client, job)
    if not follow:
        print(client.get_job_logs(found.submission_id), end="")
        return
    raise typer.Exit(ours.follow(client, found.submission_id, say))


@jobs.command("stop")
def jobs_stop(
    job: JobId,
    address: Dashboard = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended.")] = True,
) -> None:
    """Let a job write a checkpoint and end. It goes on with the same command and --resume."""
    from counterpoise.launch.submit import connect, find, stop

    client = connect(address, say)
    stop(client, find(client, job), say, wait)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="Run folder.")],
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    corpus: Annotated[str | None, typer.Option(help="Another corpus with the same modalities and classes.")] = None,
    device: Device = "auto",
    probe: Annotated[
        bool, typer.Option("--probe", help="Also fit a linear probe to every frozen encoder: compares between methods.")
    ] = False,
    missing: Missing = None,
    missing_rate: Annotated[
        list[float] | None,
        typer.Option(min=0, max=1, metavar="SHARE", help="Let this share of samples lack one modality. Repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate the selected epoch of a finished run on a split, and save the predictions."""
    from counterpoise.engine.again import evaluate_run

    _choice("--split", split, ("train", "valid", "test"))
    result = evaluate_run(run, split, corpus, device, probe, missing or [], missing_rate or [])
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"{result['run']}, epoch {result['epoch']}, {result['split']} of {result['corpus']}: {result['samples']} samples"
    )
    names = list(result["accuracy"])
    width = max(map(len, names))
    print(f"{'':{width}}  accuracy     mAP  macro-F1")
    for name in names:
        print(
            f"{name:{width}}  {result['accuracy'][name]:8.4f}  {result['map'][name]:6.4f}  {result['macro_f1'][name]:8.4f}"
        )
    if len(names) > 2:
        print(f"gap between modalities {result['gap']:.4f}")
    for part, accuracy in result.get("accuracy_of_part", {}).items():
        print(f"accuracy of {part} {accuracy:.4f}")
    lacking = {f"fused without {name}": values for name, values in result.get("missing", {}).items()}
    lacking |= {
        f"fused, one missing in {float(rate):.0%}": values for rate, values in result.get("missing_rates", {}).items()
    }
    if lacking:
        print(f"\n{'':{max(map(len, lacking))}}  accuracy     mAP  macro-F1")
    for name, values in lacking.items():
        print(
            f"{name:{max(map(len, lacking))}}  {values['accuracy']:8.4f}  {values['map']:6.4f}  {values['macro_f1']:8.4f}"
        )
    if result["skipped"]:
        say(f"{result['skipped']} rows could not be decoded and are left out")
    say(f"predictions in {result['predictions']}")


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run folder.")],
    out: Annotated[str, typer.Option("--out", "-o", help="New folder or s3:// prefix.")],
    epoch: Annotated[
        str | None, typer.Option(help="best or last; needed for a run that is not finished.", show_default="best")
    ] = None,
) -> None:
    """Write the selected weights with all that predicting needs, and a model card; load_model(OUT) reads it."""
    from counterpoise.engine.export import export_run

    if epoch is not None:
        _choice("--epoch", epoch, ("best", "last"))
    content = export_run(run, out, epoch)  # type: ignore[arg-type]
    say(f"epoch {content['epoch']} of {content['run']['name']}: {content['num_parameters']:,} numbers")
    print(out)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="What `counterpoise export` wrote: folder or s3:// prefix.")],
    data: Annotated[str, typer.Argument(help="A corpus, its card, or Parquet files: one, a folder or a glob.")],
    out: Annotated[str, typer.Option("--out", "-o", help="New folder or s3:// prefix, or one to go on with.")],
    split: Annotated[str, typer.Option(help="Of a corpus: train, valid or test.")] = "test",
    engine: Annotated[str, typer.Option(help="local: this process; ray: actors of Ray Data.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="ray: actors, each with the model in memory.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in one forward pass.")] = 64,
    missing: Annotated[
        list[str] | None,
        typer.Option(metavar="MODALITY", help="Predict without it; its column may be absent. Repeatable."),
    ] = None,
    device: Device = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch threads.", show_default="local: all cores; ray: 1 per actor")
    ] = None,
    address: Address = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Predict for whole Parquet files with an exported model. After a stop, the same command goes on."""
    from counterpoise.contracts import Interrupted
    from counterpoise.engine.bulk import predict_files
    from counterpoise.start import StopRequest
    from counterpoise.telemetry.progress import progress
    from counterpoise.wording import duration

    _choice("--engine", engine, ("local", "ray"))
    _choice("--split", split, ("train", "valid", "test"))
    run_parts = None
    if engine == "ray":
        from counterpoise.launch.predict import ray_predict

        run_parts = ray_predict(workers, address, verbose)
    stop = StopRequest("stopping; finished parts stay; once more quits at once")
    try:
        with progress("predicting") as callback, stop.installed():
            found = predict_files(
                model, data, out, split=split, batch_size=batch_size, missing=missing or [], device=device,
                threads=threads, run_parts=run_parts, stop=stop, progress=callback,
            )  # fmt: skip
    except Interrupted as error:
        error.exit_code = stop.exit_code
        raise
    if as_json:
        print(json.dumps(found, indent=2))
        return
    say(f"{found['model']}: {found['predicted']} of {found['samples']} samples predicted")
    if found["computed"]:
        say(f"{found['computed']} now in {duration(found['seconds'])}, {found['computed'] / found['seconds']:,.0f}/s")
    if found["bad"]:
        say(f"{found['bad']} rows could not be decoded, see {out.rstrip('/')}/ledger.jsonl")
    if found["note"]:
        say(found["note"])
    if found["accuracy"]:
        print("accuracy  " + "  ".join(f"{name} {value:.4f}" for name, value in found["accuracy"].items()))
    say(f"predictions in {out.rstrip('/')}/predictions")


@app.command()
def report(
    run: Annotated[list[str], typer.Argument(help="Runs, comparisons, sweeps, or folders that hold runs.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--format", "-f", metavar="A,B,...", help="html, md, latex, csv.", show_default="as --out ends, else html"
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="File to write; further formats lie beside it.", show_default="report.html"),
    ] = None,
    pictures: Annotated[
        str | None, typer.Option(help="Also write the pictures as PNG, SVG and PDF to this folder.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    published: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Papers whose numbers stand beside ours where the corpus is theirs: aug, aug-v1, balance-benchmark, pmr; or none.",
            show_default="AUG's main results, or as the sweep says",
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Compare runs: tables in the papers' form, a leaderboard, pictures, and where every number comes from."""
    from counterpoise.report import check_formats, write

    chosen = None if published is None else [name.strip() for name in published.split(",") if name.strip() != "none"]
    write(
        run,
        formats=check_formats(form, out),
        out=out,
        pictures=pictures,
        title=title,
        published=chosen,
        device=device,
    )


@app.command()
def watch(
    run: Annotated[list[str], typer.Argument(help="Runs, or folders that hold runs, comparisons or sweeps.")],
    once: Annotated[bool, typer.Option("--once", help="Print how it stands, and stop.")] = False,
    interval: Annotated[
        float | None,
        typer.Option(min=0.2, metavar="SECONDS", help="Time between two looks.", show_default="1, or 10 for s3://"),
    ] = None,
) -> None:
    """See runs live: accuracies and gap over epochs, scores against the thresholds, decisions, speed, checkpoints."""
    from counterpoise.watch import watch_runs

    watch_runs(run, once=once, interval_s=interval)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: packages, devices, Ray, disk, storage. Every problem comes with its remedy."""
    from counterpoise.doctor import examine, render

    findings = examine()
    print(json.dumps([f.to_json() for f in findings], indent=2) if as_json else render(findings))
    if any(f.level == "problem" for f in findings):
        raise typer.Exit(6 if any(f.refusal for f in findings) else 4)


@corpora.command("list")
def corpora_list(as_json: Json = False) -> None:
    """Corpora that can be prepared, and those that are."""
    from counterpoise.data.card import corpora_home, prepared_corpora
    from counterpoise.data.recipes import recipes

    known = recipes()
    rows = [
        {"name": r.name, "prepared": r.prepared, "modalities": list(r.card.modalities), "title": r.card.title}
        for r in known
    ]
    rows += [
        {"name": name, "prepared": True, "modalities": [], "title": ""}
        for name in prepared_corpora()
        if name not in {r.name for r in known}
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    width = max([len(str(row["name"])) for row in rows], default=4)
    for row in rows:
        state = "prepared" if row["prepared"] else "not prepared"
        print(f"{row['name']:{width}}  {state:12}  {row['title']}")
    say(f"prepared corpora lie in {corpora_home()}; a card anywhere works too: corpora check PATH")


@corpora.command("show")
def corpora_show(
    place: Annotated[str, typer.Argument(help="A corpus of `corpora list`, or path or URI of a card.")],
    protocol: Annotated[str | None, typer.Option(help="The card as this protocol has it.")] = None,
    as_json: Json = False,
) -> None:
    """The card of a corpus: classes, splits, preprocessing of every modality, and its protocols."""
    from counterpoise.data.card import card_lines
    from counterpoise.data.recipes import card_of

    card = card_of(place).under(protocol)
    if as_json:
        print(json.dumps(card.model_dump(mode="json", by_alias=True), indent=2))
    else:
        print("\n".join(card_lines(card)))


@corpora.command("prepare")
def corpora_prepare(
    name: Annotated[str, typer.Argument(help="A corpus of `corpora list`.")],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder or s3:// prefix.", show_default="corpora home")
    ] = None,
    raw: Annotated[
        str | None, typer.Option(help="Folder or s3:// prefix of the original download, for corpora made from one.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="Option of the recipe, e.g. seed=1. Repeatable."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read the download.")] = 1,
    engine: Annotated[
        str, typer.Option(help="local: processes of this machine; ray: tasks of a Ray cluster.")
    ] = "local",
    address: Address = None,
    again: Annotated[
        bool, typer.Option("--again", help="Look at the download of a finished corpus again; redo what has changed.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Make the shards and the card of a corpus. After a stop, the same command goes on."""
    from counterpoise.config import parse_set
    from counterpoise.contracts import Interrupted
    from counterpoise.data.ingest import explained
    from counterpoise.data.recipes import needs_raw, prepare
    from counterpoise.data.shards import read_manifest
    from counterpoise.start import StopRequest
    from counterpoise.telemetry.progress import progress

    _choice("--engine", engine, ("local", "ray"))
    run_parts = None
    if engine == "ray" and needs_raw(name):
        from counterpoise.launch.prepare import ray_parts

        run_parts = ray_parts(address, verbose)
    stop = StopRequest("stopping; finished parts stay; once more quits at once")
    politely = stop.installed() if needs_raw(name) else contextlib.nullcontext()  # what is made whole has no parts
    options = dict(parse_set(o) for o in option or [])
    try:
        with progress(f"preparing {name}") as callback, politely:
            place = prepare(
                name, out, callback, raw=raw, workers=workers, again=again, run_parts=run_parts, stop=stop, **options
            )
    except Interrupted as error:
        error.exit_code = stop.exit_code
        raise
    if needs_raw(name) and (manifest := read_manifest(place)):
        for line in explained(manifest):
            say(line)
    say(f"corpus {name} is in {place}")


@corpora.command("check")
def corpora_check(
    place: Annotated[str, typer.Argument(help="Name of a prepared corpus, or path or URI of a card.")],
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="Also unused columns, files without checksums, and samples of two splits that are alike."
        ),
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Write the checksums of a corpus that has none, if nothing is wrong.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read and decode every row, compare checksums; report counts, duplicates, overlaps and what cannot be decoded."""
    from counterpoise.data.card import load_card
    from counterpoise.data.check import check_corpus, record_sums
    from counterpoise.telemetry.progress import progress

    card = load_card(place)
    with progress(f"checking {place}") as callback:
        found = check_corpus(card, progress=callback, deep=deep)
    print(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(found.lines()))
    if found.errors:
        raise typer.Exit(3)
    if record:
        say(f"checksums of {record_sums(card)} files are in {card.folder}/manifest.json")


@runs_group.command("verify")
def runs_verify(
    places: Annotated[
        list[str], typer.Argument(metavar="PLACE...", help="Runs, folders of runs, exported models, predictions.")
    ],
    as_json: Json = False,
) -> None:
    """Compare every byte that has a checksum with it: records, predictions, checkpoints, exported weights."""
    from counterpoise.integrity import verify_places

    damaged, shown = 0, []
    for found in verify_places(places):
        damaged += bool(found.problems)
        shown.append(found.to_json())
        if not as_json:
            print("\n".join(found.lines()), flush=True)
    if as_json:
        print(json.dumps(shown, indent=2))
    if damaged:
        say(f"counterpoise: {damaged} of {len(shown)} damaged; restore them from a copy, or make them again")
        raise typer.Exit(6)


@app.command()
def convert(
    file: Annotated[str, typer.Argument(metavar="FILE.pt", help="Weights of elsewhere; path or s3:// URI.")],
    out: Annotated[str, typer.Argument(metavar="OUT.safetensors", help="New file.")],
    key: Annotated[
        str | None, typer.Option(help="Which mapping of the file, e.g. model.", show_default="state_dict, or all")
    ] = None,
) -> None:
    """Make safetensors of a .pt file, without running what it may hold; encoders take both as `weights`."""
    from counterpoise.convert import convert as run_convert

    made = run_convert(file, out, key)
    say(f"{made['tensors']} tensors, {made['numbers']:,} numbers, SHA-256 {made['sha256']}")
    print(out)


@methods.command("list")
def methods_list(as_json: Json = False) -> None:
    """Methods that an experiment can name."""
    from counterpoise.methods import METHODS

    rows = [(name, (method.__doc__ or "").splitlines()[0], method.paper) for name, method in METHODS.items()]
    if as_json:
        print(json.dumps([dict(zip(("name", "summary", "paper"), row, strict=True)) for row in rows], indent=2))
        return
    width = max(len(name) for name, *_ in rows)
    for name, summary, _ in rows:
        print(f"{name:{width}}  {summary}")


@methods.command("show")
def methods_show(name: Annotated[str, typer.Argument(help="A method of `methods list`.")]) -> None:
    """The formula of a method, where it departs from paper or released code, and its settings with defaults."""
    from counterpoise.config import known_method
    from counterpoise.methods.describe import describe

    print(describe(name, known_method(name)))


@bench.command("step")
def bench_step(
    encoder: Annotated[str, typer.Option(help="Encoder of both modalities.")] = "resnet18",
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    audio: Annotated[str, typer.Option(metavar="FxT", help="Bins and columns of spectrograms.")] = "112x112",
    image: Annotated[str, typer.Option(metavar="HxW", help="Height and width of pictures.")] = "112x112",
    classifiers: Annotated[
        list[int] | None, typer.Option(help="Classifiers of the weak modality. Repeatable.", show_default="1 and 11")
    ] = None,
    against: Against = None,
    channels_last: ChannelsLast = False,
    precision: Precision = "fp32",
    compile: Compiled = "off",
    floor: Annotated[
        bool, typer.Option("--floor", help="Count the encoders' operations; what they take at measured rates.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=3)] = 20,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time of AUG's step as a ratio to forward and backward of the encoders alone, in turns in one command."""
    from counterpoise.bench.step import render, shape, step_ratio

    compute = _compute(channels_last, precision, compile)
    result = step_ratio(
        encoder,
        batch_size,
        shape("--audio", audio),
        shape("--image", image),
        tuple(classifiers or (1, 11)),
        rounds,
        threads,
        device,
        compute=compute,
        against=against,
        floor=floor,
        say=say,
    )
    _show(result, render, as_json)


def _show(result: dict[str, Any], render: Callable[[Any], str], as_json: bool) -> None:
    print(json.dumps(result, indent=2) if as_json else render(result))


def _compute(channels_last: bool, precision: str, compile: str) -> dict[str, Any]:
    """The section `compute` of an experiment that options of a measurement say."""
    from counterpoise.models.compute import Compute

    chosen = {"channels_last": channels_last, "precision": precision, "compile": compile}
    try:
        return Compute.model_validate(chosen).model_dump()
    except ValueError as error:
        raise ConfigError(f"--{str(error).splitlines()[1]} is not one of its choices") from None


@bench.command("epoch")
def bench_epoch(
    against: Against = None,
    rows: Annotated[int, typer.Option(min=16, help="Clips of the corpus that is made for it.")] = 48,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    classifiers: Annotated[int, typer.Option(min=1, help="Classifiers of the weak modality.")] = 5,
    processes: Annotated[
        int, typer.Option(min=1, help="Decoding threads of ours, worker processes of the released loader.")
    ] = 2,
    cache: Annotated[str, typer.Option(help="on or off, as data.cache.")] = "off",
    channels_last: ChannelsLast = False,
    precision: Precision = "fp32",
    compile: Compiled = "off",
    guards: Annotated[
        bool, typer.Option("--guards", help="Also with a checkpoint at the end, and without checksums of pages.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=3)] = 3,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    device: Device = "auto",
    resampler: Annotated[
        str, typer.Option(help="Of the released loader: librosa, scipy, or auto: librosa if it is installed.")
    ] = "auto",
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder to keep the corpus in.", show_default="a temporary one")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time of AUG's training epoch, its reading included, against the released code's, in turns."""
    from counterpoise.bench.epoch import epoch_rates, render

    if cache not in ("on", "off"):
        raise ConfigError(f"--cache is {cache!r}; choose on or off")
    compute = _compute(channels_last, precision, compile)
    with _folder_for(out) as folder:
        result = epoch_rates(
            rows=rows,
            batch_size=batch_size,
            classifiers=classifiers,
            processes=processes,
            threads=threads,
            rounds=rounds,
            device=device,
            compute=compute,
            cache=cache,
            against=against,
            resampler=resampler,
            out=folder,
            say=say,
            guards=guards,
        )
    _show(result, render, as_json)


@bench.command("scaling")
def bench_scaling(
    encoder: Annotated[str, typer.Option(help="Encoder of both modalities.")] = "resnet18",
    batch_size: Annotated[int, typer.Option(min=1, help="Of all workers; weak: of as many as there are at most.")] = 32,
    audio: Annotated[str, typer.Option(metavar="FxT", help="Bins and columns of spectrograms.")] = "64x64",
    image: Annotated[str, typer.Option(metavar="HxW", help="Height and width of pictures.")] = "64x64",
    workers: Annotated[
        list[int] | None, typer.Option(help="Numbers of workers. Repeatable.", show_default="1, 2 and 4")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a measurement.")] = 2,
    channels_last: ChannelsLast = False,
    precision: Precision = "fp32",
    compile: Compiled = "off",
    batch_norm: Annotated[str, typer.Option(help="sync or local, as batch_norm of an experiment.")] = "sync",
    rounds: Annotated[int, typer.Option(min=3)] = 5,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Strong and weak scaling of a training step over processes of this machine, in turns."""
    from counterpoise.bench.scaling import render, scaling
    from counterpoise.bench.step import shape

    if batch_norm not in ("sync", "local"):
        raise ConfigError(f"--batch-norm is {batch_norm!r}; choose sync or local")
    result = scaling(
        encoder=encoder,
        batch_size=batch_size,
        audio=shape("--audio", audio),
        image=shape("--image", image),
        workers=tuple(workers or (1, 2, 4)),
        steps=steps,
        rounds=rounds,
        device=device,
        compute=_compute(channels_last, precision, compile),
        batch_norm=batch_norm,
        say=say,
    )
    _show(result, render, as_json)


@bench.command("start")
def bench_start(
    rounds: Annotated[int, typer.Option(min=3)] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Workers on Ray.")] = 1,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="Also on a Ray of its own.")] = True,
    as_json: Json = False,
) -> None:
    """Time from `counterpoise train` to its first step, against `import torch` and against a TorchTrainer alone."""
    from counterpoise.bench.start import render, start_times

    result = start_times(rounds=rounds, workers=workers, ray=ray, say=say)
    _show(result, render, as_json)


@bench.command("all")
def bench_all(
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for one JSON file of each measurement.")] = "bench",
    against: Against = None,
    channels_last: ChannelsLast = False,
    precision: Precision = "fp32",
    compile: Compiled = "off",
    device: Device = "auto",
) -> None:
    """step, ingest, epoch and scaling with their usual settings, one after the other: tables here, JSON in a folder."""
    from counterpoise.bench.all import measure_all

    compute = _compute(channels_last, precision, compile)
    measure_all(out, against, compute, device, say=say, show=print)


@bench.command("ingest")
def bench_ingest(
    rows: Annotated[int, typer.Option(min=16, help="Clips of the corpus that is made for it.")] = 256,
    processes: Annotated[
        int, typer.Option(min=1, help="Decoding threads of ours, worker processes of the released loader.")
    ] = 2,
    rounds: Annotated[int, typer.Option(min=3, help="Measured epochs of each side.")] = 5,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder to keep the corpus in.", show_default="a temporary one")
    ] = None,
    s3: Annotated[
        bool | None,
        typer.Option("--s3/--no-s3", help="Also from an S3 server on loopback.", show_default="if moto is there"),
    ] = None,
    resampler: Annotated[
        str, typer.Option(help="Of the released loader: librosa, scipy, or auto: librosa if it is installed.")
    ] = "auto",
    waiting: Annotated[
        bool, typer.Option("--waiting/--no-waiting", help="Also train, and tell how much of it waits for data.")
    ] = True,
    as_json: Json = False,
) -> None:
    """From encoded data to ready batches: our shards against the released code's loader on raw files."""
    from counterpoise.bench.ingest import has_moto, ingest_rates, render

    with _folder_for(out) as folder:
        result = ingest_rates(
            rows=rows,
            processes=processes,
            rounds=rounds,
            out=folder,
            s3=has_moto() if s3 is None else s3,
            resampler=resampler,
            waiting=waiting,
            say=say,
        )
    _show(result, render, as_json)


@bench.command("stream")
def bench_stream(
    gib: Annotated[
        float, typer.Option(min=0.01, help="Encoded media of the corpus that is made for it, in GiB.")
    ] = 4.0,
    memory_gib: Annotated[float, typer.Option(min=0.1, help="Memory that the reading may take, in GiB.")] = 1.5,
    processes: Annotated[int, typer.Option(min=1, help="Decoding threads.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    shuffle_mib: Annotated[
        int | None, typer.Option(min=1, help="data.shuffle_mib of an experiment.", show_default="as training has it")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder to keep the corpus in.", show_default="a temporary one")
    ] = None,
    as_json: Json = False,
) -> None:
    """Stream a corpus larger than memory once: rate over time, and memory. Exit code 4 if it passes the bound."""
    from counterpoise.bench.stream import render, stream_epoch

    with _folder_for(out) as folder:
        result = stream_epoch(
            gib=gib,
            memory_gib=memory_gib,
            processes=processes,
            batch_size=batch_size,
            shuffle_mib=shuffle_mib,
            out=folder,
            say=say,
        )
    _show(result, render, as_json)
    if not result["within"]:
        raise typer.Exit(4)


@app.command()
def monitor(
    runs: Runs = "runs",
    metrics_sd: Annotated[
        str | None,
        typer.Option(
            "--metrics-sd",
            envvar="COUNTERPOISE_METRICS_SD",
            help="Folder where runs register.",
            show_default=".metrics where the runs are",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of Prometheus; 0: any free one.")] = 9090,
    grafana_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of Grafana; 0: any free one.")] = 3000,
    data: Annotated[
        str | None, typer.Option(help="Folder of the servers' data.", show_default=".monitor where the runs are")
    ] = None,
    keep: Annotated[str, typer.Option(metavar="TIME", help="How long Prometheus keeps data.")] = "30d",
) -> None:
    """Prometheus, and Grafana if it is installed, for runs of this machine: on loopback, until Ctrl-C."""
    from counterpoise.dashboards.stack import Places, monitor
    from counterpoise.start import StopRequest

    stop = StopRequest("stopping the servers; once more quits at once")
    with stop.installed():
        monitor(Places.of(runs, metrics_sd, data, port, grafana_port, keep), stop, say)


@dashboards.command("build")
def dashboards_build(
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Folder to write to.", show_default="dashboards/ of the checkout")
    ] = None,
) -> None:
    """Write the dashboards and Prometheus' configuration from the catalogue of metrics."""
    from counterpoise.dashboards import files

    folder = out or str(files.root())
    changed = files.build(folder)
    for place in changed:
        print(place)
    say(
        f"{len(changed)} file{'s' * (len(changed) != 1)} written"
        if changed
        else f"everything in {folder} is as it should be"
    )


@dashboards.command("check")
def dashboards_check(
    folder: Annotated[str | None, typer.Argument(help="Folder to check.", show_default="our own")] = None,
) -> None:
    """Check that dashboards and rules are current, fit Grafana's schema, and name only metrics that exist."""
    import shutil

    from counterpoise.dashboards.checks import check

    found = check(folder)
    for fault in found:
        print(fault)
    if shutil.which("promtool") is None:
        say("promtool is not installed: rules and their tests were only parsed")
    if found:
        raise typer.Exit(1)
    say("dashboards and rules are in order")


@dashboards.command("push")
def dashboards_push(
    annotations: Annotated[
        list[str] | None,
        typer.Option("--annotations", metavar="RUN", help="Also this run's decisions, as annotations. Repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
) -> None:
    """Send the dashboards to the Grafana at GRAFANA_URL, with the token of GRAFANA_TOKEN or GRAFANA_TOKEN_FILE."""
    from counterpoise.dashboards import push

    push.start(annotations or [], dry_run, say)


@dashboards.command("preview")
def dashboards_preview(
    board: Annotated[
        list[str] | None, typer.Argument(help="imbalance, sweep, training.", show_default="all of them")
    ] = None,
    prometheus: Annotated[
        str, typer.Option(envvar="COUNTERPOISE_PROMETHEUS_URL", help="Where the data comes from.")
    ] = "http://127.0.0.1:9090",
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the pictures.")] = "preview",
    minutes: Annotated[float, typer.Option(min=1, help="Time shown.")] = 30,
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%dT%H:%M"], help="Its end, local time.", show_default="now")
    ] = None,
    var: Annotated[
        list[str] | None,
        typer.Option("--var", metavar="NAME=VALUE", help="Of a dashboard's variable, e.g. run=a1. Repeatable."),
    ] = None,
    light: Annotated[bool, typer.Option("--light", help="Light colours.")] = False,
    install: Annotated[bool, typer.Option("--install", help="Only fetch and build the drawing code, once.")] = False,
) -> None:
    """Draw the dashboards as PNG from a running Prometheus with Grafana's components, without Grafana."""
    from counterpoise.dashboards import preview

    if install:
        preview.install(say)
        return
    variables: dict[str, list[str]] = {}
    for text in var or []:
        name, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"--var is {text!r}; give NAME=VALUE")
        variables.setdefault(name, []).append(value)
    theme = "light" if light else "dark"
    pictures = preview.preview(
        prometheus,
        out,
        boards=board or [],
        variables=variables,
        range_s=round(60 * minutes),
        until=until.timestamp() if until else None,
        theme=theme,
    )
    for picture in pictures:
        print(picture.file)
        if picture.empty:
            say(f"  no data in {', '.join(picture.empty)}")
        for error in picture.errors:
            say(f"  {error}")
    if any(picture.errors for picture in pictures):
        raise typer.Exit(1)


def _folder_for(out: str | None) -> contextlib.AbstractContextManager[str]:
    """The folder itself, or a temporary one for the time of the block."""
    import tempfile

    return contextlib.nullcontext(out) if out else tempfile.TemporaryDirectory(prefix="counterpoise-bench-")


@bench.command("metrics")
def bench_metrics(
    seconds: Annotated[float, typer.Option(min=0.5, help="Training between two changes.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=3)] = 10,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Step time with and without live metrics in turns, size of a scrape, and age of what it says."""
    from counterpoise.bench.metrics import measure, render

    result = measure(seconds, rounds, threads)
    _show(result, render, as_json)


@app.command()
def verify(
    address: Address = None,
    workers: Annotated[int, typer.Option(min=1, help="Workers of the runs.")] = 2,
    runs: Annotated[
        str | None,
        typer.Option(
            help="Folder or s3:// prefix that every node can write.", show_default="a temporary folder, on one node"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
    kill_nodes: Annotated[
        bool, typer.Option("--kill-nodes", help="Also kill all of Ray on a node that is not the driver's.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the runs, to look at them.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Kill workers, drivers and, if you like, a node of short runs on your cluster; say whether all came out the same."""
    from counterpoise.verify import render
    from counterpoise.verify import verify as run_verify

    result = run_verify(
        address=address,
        workers=workers,
        runs=runs,
        device=device,
        kill_nodes=kill_nodes,
        keep=keep,
        verbose=verbose,
        say=say,
    )
    _show(result, render, as_json)
    if not result["passed"]:
        raise typer.Exit(1)


def _choice(flag: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{flag} is {value!r}{did_you_mean(value, allowed)}; choose {', '.join(allowed)}")


def _without_secrets(text: str) -> str:
    from counterpoise.engine.run import redact

    return str(redact(text))


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python shows an error that nobody expected, but without the secrets that a library may quote."""
    say(_without_secrets("".join(traceback.format_exception(kind, error, trace))).rstrip())


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: one clear message and an exit code instead of a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # this process is the command
        sys.excepthook = _unexpected
    verbose = "--verbose" in arguments or "-v" in arguments
    try:
        app(arguments, standalone_mode=True)
    except CounterpoiseError as error:
        if verbose:
            raise
        say(f"counterpoise: {_without_secrets(str(error))}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("counterpoise: interrupted")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
