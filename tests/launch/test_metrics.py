"""Metrics through Ray: what a node's own endpoint shows of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

# In a process of its own: Ray reads the switches of its metrics when it is first imported.
SCRIPT = """
import json, socket, time, urllib.request
import ray
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
from counterpoise.launch.metrics import RayMetrics
publish = RayMetrics()
run = ("c1/aug", "av_digits", "aug")
samples = {"counterpoise_fused_accuracy": [((*run, "valid"), 0.5)], "counterpoise_steps_total": [(run, 7.0)],
           "counterpoise_coefficient": [((*run, "free", ""), 2.0)]}
publish(samples)  # without a connection there is nobody to tell
ray.init(address="local", num_cpus=1, include_dashboard=False, _metrics_export_port=port, logging_level=50)
end = time.monotonic() + 90
text = ""
while time.monotonic() < end and "ray_counterpoise_steps_total{" not in text:
    publish(samples)
    samples["counterpoise_steps_total"] = [(run, 9.0)]
    time.sleep(2)
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        pass
ray.shutdown()
print(json.dumps([line for line in text.splitlines() if "counterpoise" in line]))
"""


def test_ray_shows_gauges_and_counters_under_its_prefix() -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PYTHONPATH": str(ROOT / "platform"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=220)
    assert done.returncode == 0, done.stderr
    lines = json.loads(done.stdout.splitlines()[-1])
    found = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            own = ("run", "corpus", "method", "split", "coefficient", "modality")
            found[sample.name] = ({k: v for k, v in sample.labels.items() if k in own}, sample.value)
    run = {"run": "c1/aug", "corpus": "av_digits", "method": "aug"}
    assert found["ray_counterpoise_fused_accuracy"] == ({**run, "split": "valid"}, 0.5)
    assert found["ray_counterpoise_steps_total"][1] in (7.0, 9.0), "what grew is added, not the whole again"
    assert found["ray_counterpoise_coefficient"] == ({**run, "coefficient": "free", "modality": ""}, 2.0)
