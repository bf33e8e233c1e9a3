"""`counterpoise plan` from its options to a plan as plain data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from counterpoise.config import Experiment, parse_set, read_yaml, resolve
from counterpoise.contracts import ConfigError
from counterpoise.planning import calibrate
from counterpoise.planning.facts import Facts, chosen, facts_for, table
from counterpoise.planning.model import Model, to_json
from counterpoise.planning.workload import MODEL, SHARDS, Workload, of_experiment, of_numbers
from counterpoise.sweepfile import Asked, ask
from counterpoise.wording import did_you_mean

Say = Callable[[str], None]
_PUTS_PER_CHECKPOINT = 7  # three files, state, manifest, marker, pointer


@dataclass(frozen=True)
class Cluster:
    """Where it would run; what is None is found out."""

    gpu: str | None
    nodes: int
    per_node: int | None
    cores: int | None
    network: str
    store: str
    precision: str = "fp32"
    price: float | None = None


def here() -> str:
    """The kind of this machine's devices, as plans name it: a GPU of the table, or cpu."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    known = [kind for kind in table()["devices"] if kind in name.replace(" ", "")]
    return known[0] if known else name


def split_sets(sets: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """What --set changes of the experiment, and of assumptions. The latter's names are looked up by the caller."""
    of_experiment, of_facts = [], {}
    known = {name for name, *_ in _names()}
    for text in sets:
        key, value = parse_set(text)
        section = key.split(".")[0]
        if key in known or ("." in key and section in {name.split(".")[0] for name in known}):
            if key not in known:
                raise ConfigError(f"--set {key}: no such assumption{did_you_mean(key, known)}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"--set {key}={value}: give a number, e.g. 1e9")
            of_facts[key] = float(value)
        else:
            of_experiment.append(text)
    return of_experiment, of_facts


def _names() -> list[tuple[str, ...]]:
    facts = facts_for("cpu", "ethernet100", "s3", 2)
    return [(name,) for name in (*facts, *SHARDS, *MODEL)]


def _asked(experiment: str | None, sweep: str | None, sets: Sequence[str]) -> tuple[Experiment | None, Asked | None]:
    found = ask(sweep, None, sets, None, None) if sweep else None
    if experiment is not None:
        return resolve(read_yaml(experiment), sets, experiment)[0], found
    if found is not None:
        vary = {key: values[0] for key, values in found.sweep.vary.items()}
        return found.resolved(vary, found.sweep.seeds[0])[0], found
    if sets:
        raise ConfigError(f"--set {sets[0]} changes an experiment; name its file too")
    return None, None


def make(
    *, experiment: str | None, sweep: str | None, sets: Sequence[str], cluster: Cluster, per_device_batch: int | None,
    runs: str, calibration: str | None, measure: bool, say: Say,
) -> dict[str, Any]:  # fmt: skip
    """The plan; measured first if that is asked for."""
    of_file, numbers = split_sets(sets)
    resolved, asked = _asked(experiment, sweep, of_file)
    shards = {name: value for name, value in numbers.items() if name in SHARDS}
    model_numbers = {name: value for name, value in numbers.items() if name in MODEL}
    if resolved is not None and model_numbers:
        name = next(iter(model_numbers))
        raise ConfigError(f"--set {name} describes work without an experiment; leave out the one or the other")
    say("counting what a step does")
    workload = of_experiment(resolved, shards) if resolved is not None else of_numbers(shards | model_numbers)
    place = calibration or calibrate.default_file()
    if measure:
        if resolved is None:
            raise ConfigError("--calibrate measures steps of an experiment; name its file")
        calibrate.save(calibrate.calibrate(resolved, workload, runs, here(), say), place)
        say(f"measured, and written to {place}")
    found = calibrate.load(place)
    if calibration and found is None:
        raise ConfigError(f"--calibration {calibration}: no such file; --calibrate writes it")
    kind = cluster.gpu or (found["device"] if found else None)
    if kind is None:
        known = ", ".join(table()["devices"])
        raise ConfigError(f"say what it would run on with --gpu ({known}), or measure this machine with --calibrate")
    return plan(workload, kind, cluster, found, numbers, per_device_batch, asked)


def plan(
    workload: Workload, kind: str, cluster: Cluster, found: Mapping[str, Any] | None, numbers: Mapping[str, float],
    per_device_batch: int | None = None, asked: Asked | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A plan for a workload on devices of a kind. found: a calibration; numbers: what --set says of assumptions."""
    title = chosen("--gpu", "devices", kind)["title"]
    cpu = kind == "cpu"
    per_node = cluster.per_node or (1 if cpu else 8)
    cores = cluster.cores or (_cores(found) if cpu else 12 * per_node)
    facts = facts_for(kind, cluster.network, cluster.store, cores, cluster.precision == "bf16")
    if found is not None:
        values = {k: v for k, v in found["values"].items() if k != "node.cores"}
        facts = calibrate.applied(facts, {**found, "values": values}, kind)
    if cluster.cores is None:
        origin = "assumed" if not (cpu and found) else "measured"
        facts = facts.changed({"node.cores": cores}, origin, "this machine" if cpu else "12 per GPU")  # type: ignore[arg-type]
    facts = facts.changed({name: value for name, value in numbers.items() if name not in (*SHARDS, *MODEL)})
    devices = cluster.nodes * per_node
    model = Model(workload, facts, per_node, cpu)
    model.check(devices, workload.batch_size)
    result = to_json(model, devices, workload.batch_size, per_device_batch or workload.batch_size)
    result |= {
        "device": kind, "device_title": title, "network": cluster.network, "store": cluster.store,
        "price": cluster.price,
        "precision": "bfloat16, which the loop does not offer yet" if cluster.precision == "bf16"
        else "float32, convolutions in TF32 where the device has it",
        "calibrated": _calibrated(found, facts),
    }  # fmt: skip
    if cluster.price is not None:
        result["cost"] = result["device_hours"] * cluster.price
    if asked is not None:
        result["sweep"] = _sweep(model, asked, devices)
    result["assumptions"] = [fact.to_json() for fact in facts.listed()]
    return result


def _cores(found: Mapping[str, Any] | None) -> int:
    return int(found["values"]["node.cores"]["value"]) if found else os.cpu_count() or 1


def _calibrated(found: Mapping[str, Any] | None, facts: Facts) -> str | None:
    names = [fact.name for fact in facts.values() if fact.origin == "measured"]
    if found is None or not names:
        return None
    machine = found["machine"]
    return (
        f"{found['measured'][:10]} on {machine['processor']}, {machine['cores']} cores, "
        f"load {machine['load_before']:g}; {len(names)} of the numbers below"
    )


def _sweep(model: Model, asked: Asked, devices: int) -> dict[str, Any]:
    """Trials of a sweep that share the devices, each as long as a run of the plan's experiment."""
    from counterpoise.sweep import total_of

    sweep = asked.sweep
    workers, share = sweep.resources.workers, sweep.resources.gpus if not model.cpu else 1.0
    share = share or 1.0
    each = workers * share
    if each > devices:
        raise ConfigError(f"a trial of the sweep takes {each:g} devices; the plan has {devices}")
    trials, at_once = total_of(sweep), max(1, math.floor(devices / each))
    at_once = min(at_once, trials)
    # several trials on one device get a part of it each
    facts = model.facts
    slower = (
        facts if share >= 1 else facts.changed({"device.share": facts["device.share"].value * share}, "given", "sweep")
    )
    one = Model(replace(model.workload), slower, model.per_node, model.cpu)
    one.check(workers, model.workload.batch_size)
    run = one.run(workers, model.workload.batch_size)
    facts.used |= slower.used
    wall = math.ceil(trials / at_once) * run.wall_s
    saves = run.checkpoints / run.epoch_s
    return {
        "trials": trials, "scheduler": sweep.scheduler.name, "devices_per_trial": each, "at_once": at_once,
        "run_s": run.wall_s, "wall_s": wall, "device_hours": trials * each * run.wall_s / 3600,
        "puts_per_s": at_once * saves * _PUTS_PER_CHECKPOINT, "puts_allowed": model.n("store.put_per_s"),
    }  # fmt: skip
