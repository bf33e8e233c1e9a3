"""Weights of elsewhere, a .pt or .pth file, as safetensors: the one way in for a pickle.

The file is read by a process of its own that has no secrets in its environment, bounded memory and time, and that
makes tensors and plain containers only (`weights_only=True`). What it writes is all that comes back.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from counterpoise import storage
from counterpoise.contracts import ConfigError, CounterpoiseError, DataError, RefusedError

ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
MEMORY = 8 * 2**30  # bytes of address space, besides six times the file; importing torch takes some of it
SECONDS = 600
_PASSED = ("PATH", "PYTHONPATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "LANG")
_ERRORS: dict[str, type[CounterpoiseError]] = {e.__name__: e for e in (ConfigError, DataError, RefusedError)}


def convert(source: str, out: str, key: str | None = None) -> dict[str, Any]:
    """Write the tensors of a .pt file to a new .safetensors file; {"tensors": n, "numbers": n, "sha256": ...}.

    source, out: paths or s3:// URIs. key: of a file with several mappings (model, optimizer, ...), the one to take;
    nested ones with dots. RefusedError for a file that asks for more than tensors.
    """
    if not source.endswith(ENDINGS):
        raise ConfigError(f"{storage.show(source)}: give a file that ends in {', '.join(ENDINGS)}")
    if not out.endswith(".safetensors"):
        raise ConfigError(f"{storage.show(out)}: the result is a .safetensors file; let its name say so")
    if storage.exists(out):
        raise RefusedError(f"{storage.show(out)} exists; give another name, nothing is overwritten")
    data = storage.read_bytes(source)
    with tempfile.TemporaryDirectory(prefix="counterpoise-convert-") as folder:
        given, made = Path(folder, "given.pt"), Path(folder, "made.safetensors")
        given.write_bytes(data)
        order: dict[str, Any] = {"given": str(given), "made": str(made), "shown": storage.show(source), "key": key}
        order["memory"] = MEMORY + 6 * len(data)
        del data
        try:
            done = subprocess.run(
                [sys.executable, "-m", "counterpoise.convert"],
                input=json.dumps(order),
                capture_output=True,
                text=True,
                timeout=SECONDS,
                env={name: os.environ[name] for name in _PASSED if name in os.environ} | {"OMP_NUM_THREADS": "1"},
            )
        except subprocess.TimeoutExpired:
            raise DataError(f"{storage.show(source)}: not read within {SECONDS} s") from None
        lines = done.stdout.splitlines()
        if done.returncode or not lines:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise DataError(f"{storage.show(source)}: the process that read it ended: {last}")
        answer: dict[str, Any] = json.loads(lines[-1])
        if "error" in answer:
            raise _ERRORS.get(answer["kind"], DataError)(answer["error"])
        storage.write_bytes(out, made.read_bytes())
    return answer


def _child() -> None:
    """Read what `convert` gave, write what it wants, answer in one line."""
    order = json.loads(sys.stdin.read())
    resource.setrlimit(resource.RLIMIT_AS, (order["memory"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = _converted(order)
    except MemoryError:
        answer = {"error": f"{order['shown']}: needs more memory than a file of its size should", "kind": "DataError"}
    except CounterpoiseError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(answer))


def _converted(order: Mapping[str, Any]) -> dict[str, Any]:
    from safetensors.torch import save_file

    from counterpoise.models.pretrained import named_tensors, unpickled

    data = Path(order["given"]).read_bytes()
    tensors = named_tensors(unpickled(data, order["shown"]), len(data), order["shown"], order["key"])
    # each with memory of its own: safetensors refuses shared one
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, order["made"], metadata={"format": "pt"})
    return {
        "tensors": len(whole),
        "numbers": sum(tensor.numel() for tensor in whole.values()),
        "sha256": storage.sha256(order["made"]),
    }


if __name__ == "__main__":
    _child()
