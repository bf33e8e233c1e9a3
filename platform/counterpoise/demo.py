"""`counterpoise demo`: the whole way from raw media to a report, on a corpus that comes with the package."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path

from counterpoise.cli import say

METHODS_SHOWN = ("joint", "aug")


def experiments_root() -> Path:
    """The shipped experiments: of the checkout, or their copy inside an installed package."""
    package = Path(__file__).resolve().parent
    installed = package / "experiments"
    return installed if installed.is_dir() else package.parents[1] / "trainables" / "experiments"


def run_demo(*, engine: str, workers: int, epochs: int | None, seed: int, runs: str, verbose: bool) -> None:
    """Prepare av_digits, train plain joint learning and AUG in one start of the engine, print and write a report."""
    from counterpoise.config import read_yaml, resolve
    from counterpoise.data.recipes import prepare
    from counterpoise.reports.html import write_report
    from counterpoise.reports.records import read_run
    from counterpoise.reports.tables import text_table
    from counterpoise.start import Settings, elapsed, make_job, new_run, preview, run_jobs
    from counterpoise.storage import join
    from counterpoise.telemetry.progress import progress

    began = time.monotonic()
    say("1. corpus: spoken digits (espeak-ng voices) and handwritten digits, as WAV and PNG in Parquet shards")
    with progress("preparing av_digits") as callback:
        corpus = prepare("av_digits", progress=callback)
    say(f"   {corpus}")

    workers_text = f"{workers} worker{'s' if workers > 1 else ''}"
    engine_text = f"Ray Train with {workers_text}" if engine == "ray" else f"this machine, {workers_text}"
    say(f"2. training: plain joint learning, then AUG, on {engine_text}")
    if engine == "ray":
        say("   Ray takes about half a minute to start on two cores")
    settings = Settings(engine=engine, workers=workers, verbose=verbose)
    source = experiments_root() / "av_digits.yaml"
    root = join(runs, f"demo-{datetime.now():%Y%m%d-%H%M%S}")
    jobs, folders = [], []
    for name in METHODS_SHOWN:
        sets = [f"method.name={name}", f"seed={seed}"] + ([f"epochs={epochs}"] if epochs else [])
        experiment, provenance = resolve(read_yaml(source), sets, str(source))
        seen = preview(experiment, settings)
        folder = new_run(seen, provenance, root, name, sys.argv[1:])
        folders.append(folder.uri)
        jobs.append(make_job(seen, folder))
    run_jobs(jobs, settings)

    say(f"3. report, {elapsed(began)} after the start")
    print(text_table([read_run(uri) for uri in folders]))
    print(f"\nreport: {write_report(folders, join(root, 'report.html'))}")
