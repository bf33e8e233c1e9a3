"""Prometheus while runs come and go: every last value is there for a quick and a slow scraper, and series stay few.

Servers that are down, slow or full, sinks that fail and clients that hang: `tests/telemetry/test_emitter.py`.
"""

from __future__ import annotations

import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Run, settings
from tests.telemetry.test_emitter import START, epoch, url_of
from tests.trust.faults import keep

from counterpoise.engine.run import RunFolder
from counterpoise.telemetry import emitter
from counterpoise.telemetry.emitter import Metrics, Options, emitting
from counterpoise.telemetry.feed import following

RUNS = 50
EACH = 60  # series of a run with two modalities


def new_run(root: Path, name: str) -> RunFolder:
    text = "corpus: /data/instruments\nmethod: {name: aug}\nseed: 0\n"
    return RunFolder.create(str(root), name, experiment_text=text, provenance={}, manifest={"run": name})


def test_series_stay_few_and_go_with_their_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(str(tmp_path))
    for number in range(RUNS):
        folder = new_run(tmp_path, f"r{number}")
        metrics.begin(folder.uri, [])
        few = {f"c{i}": 0.5 for i in range(4)}
        for record in (START, *(epoch(e, coefficients=few) for e in (1, 2))):
            metrics.record(folder.uri, {"seq": 0, "time": time.time(), **record})
        metrics.end(folder.uri)
    series = sum(len(values) for values in metrics.samples().values())
    few = emitter.KEEP * EACH / 2 < series <= 2000
    keep("18 scrapes", "runs", {"runs": RUNS, "series": series}, few)
    assert few
    monkeypatch.setattr(emitter, "KEEP_S", -1.0)
    metrics.begin(new_run(tmp_path, "last").uri, [])
    left = sum(len(values) for values in metrics.samples().values())
    keep("18 scrapes", "runs that have ended", {"runs": RUNS, "series": left}, left <= EACH)
    assert left <= EACH


def test_a_quick_and_a_slow_scraper_both_see_the_last_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second and fifteen, in hundredths of them."""
    folder, epochs = new_run(tmp_path, "r"), 5
    seen: dict[str, list[str]] = {"quick": [], "slow": []}
    answers: dict[str, list[float]] = {"quick": [], "slow": []}
    over = threading.Event()

    def scraper(name: str, every: float, url: str) -> None:
        while not over.is_set():
            try:
                asked = urllib.request.Request(url, headers={"X-Prometheus-Scrape-Timeout-Seconds": str(every)})
                with urllib.request.urlopen(asked, timeout=5) as answer:
                    text = answer.read().decode()
            except OSError:
                return
            lines = [line.split()[-1] for line in text.splitlines() if line.startswith("counterpoise_epoch{")]
            seen[name] += lines
            answers[name].append(time.monotonic())
            over.wait(every)

    threads: list[threading.Thread] = []
    with folder, emitting(Options(linger_s=10.0), str(tmp_path), "r"), following({folder.uri: False}):
        url = url_of(capsys)
        folder.append(START)
        for name, every in (("quick", 0.05), ("slow", 0.75)):
            threads.append(threading.Thread(target=scraper, args=(name, every, url)))
            threads[-1].start()
        for number in range(1, epochs + 1):
            while number == epochs and min(map(len, answers.values())) < 2:
                time.sleep(0.02)  # until both are known to come again and again
            folder.append(epoch(number))
    over.set()
    for thread in threads:
        thread.join()
    last = {name: max(map(float, values), default=0.0) for name, values in seen.items()}
    keep(
        "18 scrapes",
        "two scrapers",
        {"seen": {name: len(v) for name, v in seen.items()}},
        set(last.values()) == {epochs},
    )
    assert last == {"quick": epochs, "slow": epochs}


def test_training_under_scrapes_has_the_bits_of_training_without(
    corpus: str, run_experiment: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    content: dict[str, Any] = settings(corpus, epochs=2)
    alone = run_experiment(content)
    over = threading.Event()

    def scrape(url: str) -> None:
        while not over.is_set():
            with urllib.request.urlopen(url, timeout=5) as answer:
                answer.read()
            over.wait(0.05)

    with emitting(Options(linger_s=0), str(tmp_path), "r"):
        thread = threading.Thread(target=scrape, args=(url_of(capsys),))
        thread.start()
        try:
            watched = run_experiment(content)
        finally:
            over.set()
            thread.join()
    same = all(torch.equal(alone.weights[k], watched.weights[k]) for k in alone.weights)
    keep("18 scrapes", "20 scrapes a second", {"epochs": 2}, same)
    assert same and watched.losses() == alone.losses()
