"""Writes run folders like those of real runs: a joint run whose visual encoder stays behind, an AUG run that helps it.

Also a program: `python tests/reports/make_run.py FOLDER` writes three seeds of each there.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

CLASSES = ["anger", "disgust", "fear", "happy", "neutral", "sad"]
BEGIN = 1_790_000_000.0


def make_run(
    folder: Path,
    method: str = "aug",
    *,
    seed: int = 0,
    epochs: int = 30,
    upto: int | None = None,
    name: str | None = None,
    corpus: str = "cremad",
    classes: list[str] | None = None,
    settings: dict[str, Any] | None = None,
    epoch_s: float = 41.0,
) -> Path:
    """A run folder under `folder`; finished, or as it stands after `upto` epochs."""
    rng = random.Random(f"{method}/{seed}")
    name = name or f"{corpus}-{method}-{seed}"
    place = folder / name.replace("/", "_")
    place.mkdir(parents=True, exist_ok=True)
    modalities = ["audio", "visual"] if method not in ("audio", "visual") else [method]
    batches, samples = 84, {"train": 5358, "valid": 1340, "test": 744}
    records: list[dict[str, Any]] = []
    now = BEGIN + 86_400 * seed

    def put(kind: str, **fields: Any) -> None:
        records.append({"seq": len(records), "time": round(now, 3), "kind": kind, **fields})

    put("start", run=name, method=method, corpus=corpus, modalities=modalities, classes=classes or CLASSES,
        epochs=epochs, batches=batches, samples=samples, parameters=22_700_000, workers=2, device="cuda",
        seed=seed)  # fmt: skip
    classifiers = dict.fromkeys(modalities, 1) if method == "aug" else {}
    decisions, best, history = [], (0.0, 0), []
    ceiling = {"audio": 0.60 + rng.uniform(-0.015, 0.015), "visual": 0.34 if method != "aug" else 0.40}
    for epoch in range(1, (upto if upto is not None else epochs) + 1):
        now += epoch_s
        if method == "aug":
            ceiling["visual"] = min(0.61, 0.40 + 0.06 * (classifiers["visual"] - 1))
        speed = {"audio": 5.0, "visual": 9.0 if method != "aug" else 6.0}
        accuracy = {
            m: 1 / 6 + (ceiling[m] - 1 / 6) * (1 - math.exp(-epoch / speed[m])) + rng.gauss(0, 0.007)
            for m in modalities
        }
        single = list(accuracy.values())
        accuracy["fused"] = accuracy[modalities[0]] if len(single) == 1 else max(single) + 0.35 * min(single) - 0.09
        accuracy = {m: round(v, 4) for m, v in accuracy.items()}
        train = {m: min(0.99, v * 1.15) for m, v in accuracy.items()}
        score = {m: round(0.85 * train[m], 4) for m in modalities}
        loss = 1.9 * math.exp(-epoch / (11 if method == "joint" else 7)) + 0.3 + rng.gauss(0, 0.01)
        gap = round(max(single) - min(single), 4)
        history.append((epoch, accuracy, gap))
        if accuracy["fused"] > best[0]:
            best = (accuracy["fused"], epoch)
        put("epoch", epoch=epoch, lr=0.01, train={"loss": loss, "losses": {"fused": loss}, "accuracy": train,
            "score": score}, valid={"loss": loss * 1.2, "accuracy": accuracy, "score": score}, gap=gap,
            classifiers=dict(classifiers), coefficients={}, best_epoch=best[1], seconds=epoch_s,
            data_wait_s=1.2, samples_per_s=5358 / epoch_s)  # fmt: skip
        if method == "aug" and epoch < epochs and (epoch == 1 or epoch % 3 == 0):
            ratio = score["audio"] / score["visual"]
            add = ["visual"] if ratio > 1.01 else ["audio"] if ratio < 0.99 else []
            if add and classifiers[add[0]] < 5:
                classifiers[add[0]] += 1
                put("decision", epoch=epoch, action="assign_classifier", add=add,
                    inputs={"scores": score, "ratios": {"audio": round(ratio, 4), "visual": round(1 / ratio, 4)},
                            "sigma": 1.0, "tau": 0.01}, classifiers=dict(classifiers))  # fmt: skip
                decisions.append(records[-1])
    if seed == 0:
        put("event", event="skipped_rows", count=2)
    _write(place / "run.json", {
        "run": name, "created": f"2026-11-{10 + seed:02d}T09:30:00Z", "argv": ["counterpoise", "train",
        f"{corpus}.yaml",
        "--set", f"method.name={method}"], "commit": "5716ae4c0ffee", "group": f"{corpus}/{method}/{epochs}/{settings}",
        "versions": {"python": "3.11.9",
        "torch": "2.15.0", "counterpoise": "0.1.0"}, "seed": seed, "workers": 2, "device": "cuda",
        "data_fingerprint": "sha256:8c1d09e2", "digest": f"d{seed}{method}", "hardware": {"gpu": "NVIDIA H200",
        "cpu_cores": 16, "memory_gb": 128}})  # fmt: skip
    extra = "".join(f"  {k}: {v}\n" for k, v in (settings or {}).items())
    (place / "experiment.yaml").write_text(
        f"corpus: {corpus}\nmethod:\n  name: {method}\n{extra}optim: {{lr: 0.01, momentum: 0.9}}\n"
        f"batch_size: 64\nepochs: {epochs}\nseed: {seed}\n"
    )
    _write(place / "provenance.json", {
        "corpus": {"value": corpus, "origin": f"file {corpus}.yaml"},
        "seed": {"value": seed, "origin": "command line"},
        "method.name": {"value": method, "origin": "command line"},
        "epochs": {"value": epochs, "origin": f"file {corpus}.yaml"},
        "optim.lr": {"value": 0.01, "origin": f"file {corpus}.yaml"},
        "optim.momentum": {"value": 0.9, "origin": "default"},
        "batch_size": {"value": 64, "origin": "default"}})  # fmt: skip
    (place / "ledger.jsonl").write_text("".join(
        json.dumps({"split": "train", "sample_id": f"10{i}", "modality": "visual", "file": f"part-{i}.parquet",
                    "reason": "truncated JPEG"}) + "\n" for i in range(2 if seed == 0 else 0)))  # fmt: skip
    state, done = "running", len(history)
    if upto is None:
        _, accuracy, gap = history[best[1] - 1]
        test = {m: round(v - 0.01, 4) for m, v in accuracy.items()}
        summary = {
            "run": name, "method": method, "corpus": corpus, "modalities": modalities, "seed": seed, "epochs": epochs,
            "selected_epoch": best[1], "selection": "valid accuracy (fused)",
            "test": {"samples": 744, "skipped": 0, "accuracy": test,
                     "map": {m: round(v + 0.05, 4) for m, v in test.items()},
                     "macro_f1": {m: round(v - 0.012, 4) for m, v in test.items()}, "gap": gap},
            "valid": {"accuracy": accuracy, "gap": gap}, "classifiers": classifiers, "decisions": decisions,
            "parameters": 22_700_000, "workers": 2, "device": "cuda", "wall_s": epoch_s * epochs + seed,
            "samples_per_s": 5358 / epoch_s, "data_wait_share": 0.03, "digest": f"d{seed}{method}",
            "data_fingerprint": "sha256:8c1d09e2"}  # fmt: skip
        put("end", summary=summary)
        _write(place / "summary.json", summary)
        state = "finished"
    _write(place / "status.json", {
        "state": state, "run": name, "method": method, "epoch": min(done + 1, epochs), "epochs": epochs,
        "batch": 40 if upto is not None else batches, "batches": batches, "loss": 0.91, "samples_per_s": 5358 / epoch_s,
        "eta_s": epoch_s * (epochs - done), "workers": 2, "time": now})  # fmt: skip
    (place / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return place


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


if __name__ == "__main__":
    for method in ("joint", "aug"):
        for seed in range(3):
            print(make_run(Path(sys.argv[1]), method, seed=seed))
