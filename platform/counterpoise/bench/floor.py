"""What a computation cannot take less than: its operations at the rates that this device was measured at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operation_floor(run: Callable[[], Any], device: torch.device, threads: int) -> dict[str, Any]:
    """Seconds that arithmetic and that memory traffic of a call take at least.

    FLOPs are those of convolutions and matrix products; bytes are what every operation reads and writes, as if nothing
    stayed in a cache and nothing were fused. Rates are those of one matrix product, one convolution and one copy,
    float32, of one thread times `threads` (a GPU: of the device). together_s: the larger of both for each operation.
    """
    from counterpoise.planning.calibrate import rates
    from counterpoise.planning.workload import OpLog

    run()
    with OpLog() as log:
        run()
    scale = 1 if device.type == "cuda" else threads
    measured = {name: value * scale for name, (value, _) in rates(device).items()}
    arithmetic = memory = together = 0.0
    for convolution, flops, moved in log.rows:
        by_flops = flops / measured["device.convolution_flops" if convolution else "device.flops"]
        by_bytes = moved / measured["device.bytes_per_s"]
        arithmetic, memory, together = arithmetic + by_flops, memory + by_bytes, together + max(by_flops, by_bytes)
    return {
        "flops": sum(flops for _, flops, _ in log.rows),
        "bytes": sum(moved for *_, moved in log.rows),
        "arithmetic_s": arithmetic,
        "memory_s": memory,
        "together_s": together,
        "rates": measured,
    }
