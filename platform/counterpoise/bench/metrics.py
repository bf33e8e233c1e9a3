"""`counterpoise bench metrics`: what showing metrics costs a run, how much a scrape weighs, how old what it says is."""

from __future__ import annotations

import contextlib
import gzip
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from counterpoise.bench.machine import Spread, machine, machine_line
from counterpoise.bench.step import OneBatch, aug_step
from counterpoise.engine.loop import Trainer
from counterpoise.engine.run import RunFolder
from counterpoise.start import Settings
from counterpoise.telemetry.emitter import Endpoint, Metrics, Options
from counterpoise.telemetry.feed import feeding

SCRAPE_EVERY_S = 1.0  # 15 times as often as Prometheus usually comes
MODALITIES, CLASSIFIERS = 6, 16  # of the large run
DECISIONS = 20
# Prometheus in its own process: reads the endpoint whose URL it was told last, again and again, as it does gzipped.
_SCRAPER = """
import sys, threading, time, urllib.request
url = [""]
def listen():
    for line in sys.stdin:
        url[0] = line.strip()
threading.Thread(target=listen, daemon=True).start()
while True:
    time.sleep(float(sys.argv[1]))
    if url[0]:
        try:
            request = urllib.request.Request(url[0], headers={"Accept-Encoding": "gzip"})
            urllib.request.urlopen(request, timeout=5).read()
        except OSError:
            pass
"""


def measure(seconds: float = 3.0, rounds: int = 10, threads: int | None = None) -> dict[str, Any]:
    """Step time with and without metrics in turns in one process, then size, duration and age of scrapes.

    seconds: of training between two changes.
    """
    settings = Settings(threads=threads, device="cpu")
    torch.set_num_threads(settings.resolved_threads)
    facts = machine()
    with tempfile.TemporaryDirectory() as root:
        step = _step_cost(root, seconds, rounds)
        size = _large_run(root)
        age = _ages(root)
    return {"machine": facts, "threads": torch.get_num_threads(), "step": step, "scrape": size, "age_s": age.to_json()}


@contextlib.contextmanager
def _shown(root: str, uri: str) -> Iterator[str]:
    """The URL of a run's metrics, for the time of the block."""
    metrics = Metrics(root)
    endpoint = Endpoint(metrics, Options(folder=str(Path(root, ".metrics"))), "bench", _warn)
    try:
        with feeding([metrics], _warn) as feed:
            feed.follow(uri, resuming=True)
            yield endpoint.url
    finally:
        endpoint.close()


def _warn(text: str) -> None:
    print(f"counterpoise: {text}", file=sys.stderr)


def _step_cost(root: str, seconds: float, rounds: int) -> dict[str, Any]:
    train, trainer = aug_step(OneBatch(64, (32, 32), (32, 32)), "cnn", 3, torch.device("cpu"), root)
    assert trainer.folder is not None
    with trainer.folder:
        return _in_turns(root, train, trainer, trainer.folder, seconds, rounds)


def _in_turns(
    root: str, train: Callable[[], None], trainer: Trainer, folder: RunFolder, seconds: float, rounds: int
) -> dict[str, Any]:
    folder.append({"kind": "start", "method": "aug", "corpus": "bench", "modalities": ["audio", "visual"]})
    folder.append(_epoch(["audio", "visual"], 3))
    for _ in range(5):
        train()
    wall: list[float] = []
    cpu: list[float] = []
    without: list[float] = []
    command = [sys.executable, "-c", _SCRAPER, str(SCRAPE_EVERY_S)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as scraper:
        try:
            for index in range(rounds):
                pair = {}
                for shown in (True, False) if index % 2 else (False, True):
                    with _scraped(root, folder.uri, scraper) if shown else contextlib.nullcontext():
                        pair[shown] = _block(train, trainer, seconds)
                wall.append(pair[True][0] / pair[False][0])
                cpu.append(pair[True][1] / pair[False][1])
                without.append(pair[False][0])
            with _scraped(root, folder.uri, scraper):
                began, used = time.perf_counter(), time.process_time()
                time.sleep(2 * seconds)
                alone = (time.process_time() - used) / (time.perf_counter() - began)
        finally:
            scraper.kill()
    return {
        "rounds": rounds,
        "seconds": seconds,
        "without_s": statistics.median(without),
        "wall_ratio": Spread.of(wall).to_json(),
        "cpu_ratio": Spread.of(cpu).to_json(),
        "cpu_share": alone,
    }


@contextlib.contextmanager
def _scraped(root: str, uri: str, scraper: subprocess.Popen[str]) -> Iterator[None]:
    assert scraper.stdin is not None
    with _shown(root, uri) as url:
        try:
            print(url, file=scraper.stdin, flush=True)
            yield
        finally:
            print(file=scraper.stdin, flush=True)


def _block(train: Callable[[], None], trainer: Trainer, seconds: float) -> tuple[float, float]:
    """Wall and CPU seconds of this process per step, with the status that the loop writes either way."""
    began, used, steps = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        train()
        trainer.progress.step, trainer.progress.batch = trainer.progress.step + 1, 1  # as the loop does
        trainer._status()
        trainer.progress.batch = 0  # the same batch again
        steps += 1
    return (time.perf_counter() - began) / steps, (time.process_time() - used) / steps


def _epoch(modalities: list[str], classifiers: int) -> dict[str, Any]:
    values = dict.fromkeys(["fused", *modalities], 0.5123456789)
    part = {"loss": 1.0123456789, "accuracy": values, "score": values}
    terms = {f"{m}/{term}": 0.3123456789 for m in modalities for term in ("residual", "all", "previous")}
    return {
        "kind": "epoch",
        "epoch": 1,
        "lr": 0.01,
        "train": part | {"losses": terms},
        "valid": part,
        "gap": 0.0,
        "classifiers": dict.fromkeys(modalities, classifiers),
        "classifier_weights": {m: [1.0] + [0.5123456789] * (classifiers - 1) for m in modalities},
        "coefficients": {f"modulation/{m}": 0.5 for m in modalities},
        "best_epoch": 1,
        "seconds": 10.0,
    }


def _decision(modalities: list[str], number: int) -> dict[str, Any]:
    return {
        "kind": "decision",
        "epoch": number,
        "action": "assign_classifier",
        "add": [modalities[number % len(modalities)]],
        "inputs": {"sigma": 0.8, "tau": 0.0},
        "classifiers": dict.fromkeys(modalities, number),
    }


def _new_run(root: str, name: str, modalities: list[str]) -> RunFolder:
    folder = RunFolder.create(root, name, experiment_text="", provenance={}, manifest={})
    folder.acquire()
    folder.append({"kind": "start", "method": "aug", "corpus": "bench", "epochs": 100, "modalities": modalities})
    return folder


def _large_run(root: str) -> dict[str, Any]:
    """A scrape of a run of six modalities with 16 classifiers each, whose classifiers were added one by one."""
    modalities = [f"modality{i}" for i in range(MODALITIES)]
    folder = _new_run(root, "large", modalities)
    for number in range(1, MODALITIES * (CLASSIFIERS - 1) + 1):
        folder.append(_decision(modalities, number))
    folder.append(_epoch(modalities, CLASSIFIERS) | {"epoch": 100})
    folder.write_status({"state": "running", "step": 5, "batches": 10, "samples": 1, "train_s": 1, "data_wait_s": 0.1})
    times = []
    with _shown(root, folder.uri) as url:
        time.sleep(1.0)
        for _ in range(20):
            began = time.perf_counter()
            text = _read(url)
            times.append(time.perf_counter() - began)
    folder.release()
    series = [line for line in text.splitlines() if not line.startswith(b"#")]
    return {
        "modalities": MODALITIES,
        "classifiers": CLASSIFIERS,
        "series": len(series),
        "bytes": len(text),
        "gzip_bytes": len(gzip.compress(text)),
        "seconds": Spread.of(times).to_json(),
    }


def _ages(root: str) -> Spread:
    """Seconds from the moment a decision is recorded until a scrape shows it."""
    folder = _new_run(root, "ages", ["audio", "visual"])
    ages = []
    with _shown(root, folder.uri) as url:
        for number in range(1, DECISIONS + 1):
            time.sleep(0.037 * number % 0.5)  # at any time between two looks
            folder.append(_decision(["audio", "visual"], number))
            began = time.perf_counter()
            wanted = b'counterpoise_decisions_total{action="assign_classifier",corpus="bench",method="aug",run="ages"} '
            while wanted + f"{float(number)}".encode() not in _read(url):
                time.sleep(0.005)
            ages.append(time.perf_counter() - began)
    folder.release()
    return Spread.of(ages)


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return bytes(answer.read())


def render(result: dict[str, Any]) -> str:
    step, scrape, age = result["step"], result["scrape"], result["age_s"]
    wall, cpu, took = step["wall_ratio"], step["cpu_ratio"], scrape["seconds"]
    return "\n".join(
        [
            machine_line(result["machine"]) + f", {result['threads']} threads",
            f"step        {step['without_s'] * 1e3:.1f} ms without metrics; with them and a scrape every "
            f"{SCRAPE_EVERY_S:g} s, {step['rounds']} pairs of {step['seconds']:g} s in turn:",
            f"            time {wall['median']:.4f} ({wall['low']:.4f} to {wall['high']:.4f}), "
            f"CPU time of the process {cpu['median']:.4f} ({cpu['low']:.4f} to {cpu['high']:.4f}): median (quartiles)",
            f"            metrics alone take {step['cpu_share']:.2%} of one core",
            f"scrape      {scrape['modalities']} modalities with {scrape['classifiers']} classifiers: "
            f"{scrape['series']} series, {scrape['bytes'] / 1000:.1f} kB, "
            f"{scrape['gzip_bytes'] / 1000:.1f} kB gzipped, "
            f"{took['median'] * 1e3:.1f} ms ({took['low'] * 1e3:.1f} to {took['high'] * 1e3:.1f})",
            f"age         a decision is in a scrape {age['median']:.2f} s after it was recorded "
            f"({age['low']:.2f} to {age['high']:.2f})",
        ]
    )
