"""`bench step`: both sides get the same batch and as many classifiers. Nothing is said about who is faster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.bench.checkout import make_checkout

from counterpoise.bench.floor import operation_floor
from counterpoise.bench.step import render, shape, step_ratio
from counterpoise.contracts import ConfigError, ResourceError


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path)


def test_both_sides_do_the_same_in_turns(checkout: Path) -> None:
    compute = {"channels_last": True}
    found = step_ratio("resnet18", 2, (16, 24), (32, 16), (1, 3), 3, 1, "cpu", say=print, compute=compute,
                       against=str(checkout), floor=True)  # fmt: skip
    sides = [f"{who}, {n}" for who in ("AUG", "released AUG") for n in ("1 classifier", "3 classifiers")]
    names = ["encoders alone", *sides]
    assert [row["what"] for row in found["rows"]] == names
    assert found["rows"][0]["to_encoders"]["median"] == 1 and all(row["median_s"] > 0 for row in found["rows"])
    assert [name for name, row in zip(names, found["rows"], strict=True) if "times_faster" in row] == names[1:3]
    seen = [json.loads(line) for line in (checkout / "seen.jsonl").read_text().splitlines()]
    assert len(seen) == 2 * (3 + 2), "rounds and two warm-ups, for each number of classifiers"
    assert {tuple(map(str, row[:3])) for row in seen} == {("[2, 16, 24]", "[2, 3, 1, 32, 16]", "[2, 6]")}
    assert len({row[3] for row in seen}) == 1 and {row[4] for row in seen} == {0, 2}
    memory = found["memory"]["AUG, 3 classifiers"]
    assert memory["weights"] == memory["gradients"] == memory["optimizer"] > 4 * 2 * 11e6, "two ResNet-18"
    assert memory["inputs"] == 2 * (16 * 24 + 3 * 32 * 16) * 4 + 2 * 8 * 2 and memory["activations"] > 0
    assert memory["floor"] == sum(v for k, v in memory.items() if k != "floor")
    text = render(found)
    assert "channels_last True" in text and "times faster than released" in text


def test_the_floor_of_a_product_is_counted_by_hand() -> None:
    left, right = torch.ones(64, 32), torch.ones(32, 16)
    floor = operation_floor(lambda: left @ right, torch.device("cpu"), 1)
    assert floor["flops"] == 2 * 64 * 32 * 16
    assert floor["bytes"] == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    arithmetic, memory = (floor[key] / floor["rates"][rate] for key, rate in
                          (("flops", "device.flops"), ("bytes", "device.bytes_per_s")))  # fmt: skip
    assert (floor["arithmetic_s"], floor["memory_s"]) == pytest.approx((arithmetic, memory))
    assert floor["together_s"] == pytest.approx(max(arithmetic, memory))


def test_what_is_no_checkout_is_refused(tmp_path: Path, checkout: Path) -> None:
    with pytest.raises(ConfigError, match=r"no checkout of njustkmg/NeurIPS25-AUG, it has no train_CREMAD.py"):
        step_ratio("resnet18", 2, (16, 16), (16, 16), (1,), 3, 1, "cpu", say=print, against=str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="resnet18 encoders, not cnn"):
        step_ratio("cnn", 2, (16, 16), (16, 16), (1,), 3, 1, "cpu", say=print, against=str(checkout))
    (checkout / "train_CREMAD.py").write_text("import something_that_is_not_there")
    with pytest.raises(ResourceError, match="cannot be imported: No module named 'something_that_is_not_there'"):
        step_ratio("resnet18", 2, (16, 16), (16, 16), (1,), 3, 1, "cpu", say=print, against=str(checkout))


@pytest.mark.parametrize("text", ["257", "axb", "4x4", "9x9x9", "10x100000"])
def test_shapes_are_two_numbers(text: str) -> None:
    assert shape("--audio", "257x1250") == (257, 1250)
    with pytest.raises(ConfigError, match="--audio is"):
        shape("--audio", text)
