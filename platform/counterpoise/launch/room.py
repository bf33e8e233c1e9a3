"""Where workers can be: nodes of a Ray cluster that are there and stay, and what is free on them."""

from __future__ import annotations

import json
import math
import socket
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private.state import state  # what `ray.nodes` lacks: drains, and free resources per node

from counterpoise.contracts import CounterpoiseError

_ANSWER_S = 1.0
_TINY = 1e-6  # Ray counts resources in ten thousandths


Resources = Mapping[str, Mapping[str, float]]  # by node


def fitting(free: Resources, need: Mapping[str, float], most: int, totals: Resources, there: int = 0) -> int:
    """How many workers, up to `most`, find room on what is free, with a little CPU left for tasks that read and decode.

    need: resources of one worker. totals: of the nodes. there: workers that stand there already.
    """
    per_node = [
        min((math.floor(have.get(name, 0.0) / amount + _TINY) for name, amount in need.items() if amount), default=most)
        for have in free.values()
    ]
    count = min(most, sum(per_node))
    cpus = sum(have.get("CPU", 0.0) for have in totals.values())
    while count > 0 and cpus - (there + count) * need.get("CPU", 0.0) <= _TINY:
        count -= 1
    return count


def draining() -> dict[str, int]:
    """Nodes that will be taken away, and when (Unix time in milliseconds; 0: nobody said)."""
    return dict(state.get_draining_nodes())


def free() -> dict[str, dict[str, float]]:
    """Free resources of every node that stays, as Ray knows them by now."""
    leaving = draining()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return {n: have for n, have in state.available_resources_per_node().items() if n in alive and n not in leaving}


def totals() -> dict[str, dict[str, float]]:
    """All resources of every node that stays."""
    leaving = draining()
    return {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving}


def silent() -> list[str]:
    """Addresses of nodes that Ray takes to be alive but that do not answer: it will know in some seconds."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(max(1, min(32, len(alive)))) as pool:
        answers = list(pool.map(_answers, alive))
    return [node["NodeManagerAddress"] for node, answer in zip(alive, answers, strict=True) if not answer]


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True


def node_names() -> dict[str, str]:
    """How to name nodes to people, dead ones too: by address, with the host's name where it is another."""
    names = {}
    for node in ray.nodes():
        address, host = node["NodeManagerAddress"], node.get("NodeManagerHostname") or ""
        names[node["NodeID"]] = f"{address} ({host})" if host and host != address else address
    return names


def can_grow() -> bool:
    """Whether an autoscaler may add nodes to the cluster."""
    return bool(state.get_max_resources_from_cluster_config())


def print_facts() -> None:
    """For a process of its own: which node a driver here belongs to, and how many nodes have CPUs, as JSON."""
    from counterpoise.launch.cluster import cluster

    try:
        with cluster(1):
            nodes = sum(have.get("CPU", 0) > 0 for have in totals().values())
            print(json.dumps({"node": ray.get_runtime_context().get_node_id(), "nodes": nodes}))
    except CounterpoiseError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
