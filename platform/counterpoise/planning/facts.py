"""Numbers that a plan rests on and that are not counted: each with its unit, its origin and where that is from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

from counterpoise.contracts import ConfigError
from counterpoise.wording import did_you_mean

Origin = Literal["measured", "data sheet", "documented", "assumed", "given", "counted"]
MEASURED_IN = "docs/benchmarks.md: CREMA-D, Xeon at 2.5 GHz"


@dataclass(frozen=True)
class Fact:
    """value in `unit`; meaning: what it is; origin and source: why it is believed."""

    name: str
    value: float
    unit: str
    meaning: str
    origin: Origin
    source: str

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


# Whose value does not depend on the chosen hardware: name, value, unit, meaning, origin, source.
_GENERAL: tuple[tuple[str, float, str, str, Origin, str], ...] = (
    ("device.share", 0.5, "", "part of peak arithmetic and of memory bandwidth that the step reaches", "assumed",
     "large layers reach more, small ones less; --calibrate measures it"),
    ("device.kernel_s", 8e-6, "s", "time to issue an operation from Python, forward and backward", "assumed",
     "usual for PyTorch in eager mode"),
    ("device.reserved_bytes", 1.5e9, "B", "memory that the driver, libraries and the allocator's gaps take", "assumed",
     "usual for CUDA with NCCL"),
    ("network.share", 0.8, "", "part of the bandwidth between nodes that all-reduces reach", "assumed", ""),
    ("node.link_share", 0.8, "", "part of the bandwidth between devices of a node that all-reduces reach", "assumed",
     "NCCL counts 370 of 450 GB/s on NVSwitch"),
    ("node.link_latency_s", 0.5e-6, "s", "a hop between devices of a node", "documented",
     "NCCL src/graph/tuning.cc, hwLat of NVLINK: 0.47 to 0.52 us"),
    ("collective.start_s", 4.4e-6, "s", "an all-reduce before its first hop", "documented",
     "NCCL src/graph/tuning.cc, baseLat of Tree"),
    ("collective.call_s", 20e-6, "s", "an all-reduce issued from Python, with its waiting", "assumed", ""),
    ("collective.tree", 1, "", "1: ring or tree, whichever is faster (NCCL); 0: ring only (gloo)", "documented",
     "NCCL chooses; gloo's default is its ring"),
    ("store.prefixes", 1, "", "prefixes that the corpus is spread over, each with its own limit of requests", "assumed",
     "one folder"),
    ("store.open_requests", 3, "", "requests to open a shard and read its footer; a row group is one more", "measured",
     "counted at a moto server: HEAD and two GET, 16 files of 4 row groups"),
    ("decode.samples_per_core_s", 106.1, "1/s", "samples that a core decodes, from bytes to tensors", "documented",
     MEASURED_IN),
    ("decode.cached_samples_per_core_s", 600.0, "1/s", "samples that a core makes of cached ones, crops included",
     "documented", MEASURED_IN),
    ("index.bytes_per_row", 300, "B", "memory of a worker per row of the corpus: ids, labels, places", "measured",
     "97 B held and 296 B while it is opened: tracemalloc, 200,000 rows with ids of 21 characters"),
    ("node.memory_bytes", 512e9, "B", "main memory of a node", "assumed", ""),
    ("checkpoint.bytes_per_s", 200e6, "B/s", "what rank 0 hashes and writes", "assumed", "--calibrate measures it"),
    ("checkpoint.fixed_s", 0.2, "s", "a checkpoint apart from its bytes: flushing, committing, pruning", "assumed",
     "--calibrate measures it"),
    ("checkpoint.every_s", 60, "s", "longest time between checkpoints, --checkpoint-every", "documented",
     "default of `counterpoise train`; besides one per epoch"),
    ("checkpoint.best_share", 0.3, "", "epochs that are the best so far, whose weights are written too", "assumed", ""),
    ("failure.device_mtbf_h", 16384 * 54 * 24 / 419, "h", "device-hours between failures that end a run", "documented",
     "Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, section 3.3.4)"),
    ("failure.preemptions_per_node_day", 0, "1/day", "spot reclaims of a node", "assumed", "none: on-demand nodes"),
    ("failure.restart_s", 90, "s", "from a failure to the first step of the new workers", "documented",
     "Ray Train 2.60 with a killed raylet: 62 to 93 s until the smaller group reports, on a busy machine"),
    ("ray.nodes", 250, "", "nodes that Ray's own release tests cover", "documented",
     "ray release/benchmarks/README.md, scalability envelope: 250+"),
    ("ray.actors", 10_000, "", "actors that Ray's own release tests cover", "documented",
     "ray release/benchmarks/README.md, scalability envelope: 10k+"),
)  # fmt: skip


class Facts(Mapping[str, Fact]):
    """All facts by name. `number` notes which were asked for, so that a plan lists those it rests on and no others."""

    def __init__(self, facts: Mapping[str, Fact]) -> None:
        self._facts = dict(facts)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Fact:
        return self._facts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def number(self, name: str) -> float:
        self.used.add(name)
        return self._facts[name].value

    def changed(self, values: Mapping[str, float], origin: Origin = "given", source: str = "--set") -> Facts:
        """The same with some values from elsewhere; ConfigError for one that cannot be."""
        facts = dict(self._facts)
        for name, value in values.items():
            if name not in facts:
                raise ConfigError(f"unknown assumption {name!r}{did_you_mean(name, facts)}; known: {', '.join(facts)}")
            old = facts[name]
            _check(name, value)
            facts[name] = Fact(name, float(value), old.unit, old.meaning, origin, source)
        return Facts(facts)

    def listed(self) -> list[Fact]:
        return [fact for name, fact in self._facts.items() if name in self.used]


_MAY_BE_ZERO = frozenset(
    {"collective.tree", "collective.call_s", "collective.start_s", "network.latency_s", "node.link_latency_s",
     "device.kernel_s", "device.reserved_bytes", "store.latency_s", "store.open_requests", "index.bytes_per_row",
     "checkpoint.fixed_s", "checkpoint.best_share", "failure.preemptions_per_node_day", "failure.restart_s",
     "device.serial_share"}
)  # fmt: skip
_SHARES = frozenset({"network.share", "node.link_share", "checkpoint.best_share", "collective.tree",
                     "device.serial_share"})  # fmt: skip


def _check(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ConfigError(f"--set {name}={value}: give a number")
    if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
        raise ConfigError(f"--set {name}={value:g}: give a number above 0")
    if name in _SHARES and value > 1:
        raise ConfigError(f"--set {name}={value:g}: give a part, 0 to 1")


@cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
    """hardware.yaml. YAML 1.1 reads 1e9 as a word, so numbers are made sure of."""
    text = resources.files("counterpoise.planning").joinpath("hardware.yaml").read_text(encoding="utf-8")
    content: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(text)
    words = ("title", "source")
    return {
        group: {n: {k: v if k in words else float(v) for k, v in row.items()} for n, row in rows.items()}
        for group, rows in content.items()
    }


def chosen(kind: str, group: str, name: str) -> dict[str, Any]:
    """A row of the table; ConfigError with the nearest name."""
    rows = table()[group]
    if name not in rows:
        raise ConfigError(f"{kind} is {name!r}{did_you_mean(name, rows)}; known: {', '.join(rows)}")
    return rows[name]


# Of workers that are processes of a CPU and talk by gloo, in place of what holds for GPUs.
_CPU = {"device.kernel_s": 10e-6, "device.reserved_bytes": 0.5e9, "collective.tree": 0, "collective.start_s": 0,
        "collective.call_s": 300e-6, "node.link_latency_s": 50e-6, "node.link_share": 1.0}  # fmt: skip


def facts_for(kind: str, network: str, store: str, cores: int, bf16: bool = False) -> Facts:
    """Facts of a cluster before anything is measured or given.

    kind: of device, a row of the table. network: a row's name, or Gb/s per node. cores: of a node. bf16: what training
    in bfloat16 would take; the loop trains in float32 with TF32 convolutions.
    """
    device = chosen("--gpu", "devices", kind)
    facts = [Fact(*row) for row in _GENERAL]
    sheet = device["source"]
    origin: Origin
    of_device: Origin = "assumed" if sheet.startswith("assumed") else "data sheet"

    def add(name: str, value: float, unit: str, meaning: str, origin: Origin, source: str) -> None:
        facts.append(Fact(name, value, unit, meaning, origin, source))

    if bf16 and "bf16" not in device:
        raise ConfigError(f"--precision bf16: {device['title']} has no bfloat16; use fp32")
    matrix, convolution = (device["bf16"],) * 2 if bf16 else (device["fp32"], device["tf32"])
    products, convolutions = ("bf16", "bf16") if bf16 else ("float32", "TF32 where the device has it")
    rows: tuple[tuple[str, float, str, str], ...] = (
        ("device.flops", matrix, "FLOP/s", f"peak of matrix products, in {products}"),
        ("device.convolution_flops", convolution, "FLOP/s", f"peak of convolutions, in {convolutions}"),
        ("device.bytes_per_s", device["bandwidth"], "B/s", "memory bandwidth"),
        ("device.memory_bytes", device["memory"], "B", "memory of a device"),
        ("node.link_bytes_per_s", device["link"], "B/s", "between devices of a node, per device and direction"),
    )
    for name, value, unit, meaning in rows:
        add(name, value, unit, meaning, of_device, sheet)
    row: dict[str, Any]
    add("node.cores", cores, "", "processor cores of a node", "given", "--cores")
    try:
        row = {
            "bytes": float(network) / 8 * 1e9,
            "latency": 25e-6,
            "source": "--network, in Gb/s; latency assumed, TCP",
        }
        origin = "given"
    except ValueError:
        row = chosen("--network", "networks", network)
        origin = "documented"
    add("network.bytes_per_s", row["bytes"], "B/s", "between nodes, per node and direction", origin, row["source"])
    add("network.latency_s", row["latency"], "s", "a hop between nodes", origin, row["source"])
    row = chosen("--store", "stores", store)
    origin = "assumed" if row["source"].startswith("assumed") else "documented"
    for part, key, unit, meaning in (
        ("node_bytes_per_s", "node", "B/s", "reading of a node"),
        ("total_bytes_per_s", "total", "B/s", "reading of all nodes together; 1 PB/s: no limit"),
        ("stream_bytes_per_s", "stream", "B/s", "reading of one connection; a worker reads with one"),
        ("latency_s", "latency", "s", "a request before its first byte"),
        ("get_per_s", "get", "1/s", "reading requests per prefix"),
        ("put_per_s", "put", "1/s", "writing requests per prefix"),
    ):
        add(f"store.{part}", row[key], unit, meaning, origin, row["source"])
    found = Facts({fact.name: fact for fact in facts})
    if kind != "cpu":
        return found
    add(
        "device.serial_share",
        0.1,
        "",
        "part of a step that a second core does not make faster",
        "assumed",
        "--calibrate",
    )
    return Facts({fact.name: fact for fact in facts}).changed(_CPU, "assumed", "gloo between processes of a CPU")
