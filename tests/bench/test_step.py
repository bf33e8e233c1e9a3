"""`bench step`: both sides get the same batch and as many classifiers. Nothing is said about who is faster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from counterpoise.bench.step import render, shape, step_ratio
from counterpoise.contracts import ConfigError, ResourceError

# A stand-in with the names of the released code; it writes down what it is given.
SCRIPT = """
import json, os, torch
from dataset.CREMA import CramedDataset
from model.AudioVideo import AVGBShareClassifier

def weight_init(module):
    pass

def train_audio_video(epoch, train_loader, model, optimizer, merge_alpha=0.5):
    print("Epoch...")
    for step, (spectrogram, image, y) in enumerate(train_loader):
        y = y.cuda()
        assert step % cfg["print_inteval"] == 0
        with open(os.path.join(os.path.dirname(__file__), "seen.jsonl"), "a") as file:
            shapes = [list(t.shape) for t in (spectrogram, image, y)]
            print(json.dumps([*shapes, float(spectrogram.sum()), model.layers]), file=file)
"""
MODEL = """
import torch

class AVGBShareClassifier(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc_out = torch.nn.Linear(2, config["setting"]["num_class"])
        self.layers = 0

    def add_layer(self, is_a=True):
        assert not is_a
        self.layers += 1
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in {"train_CREMAD.py": SCRIPT, "model/AudioVideo.py": MODEL, "utils/utils.py": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_both_sides_do_the_same_in_turns(checkout: Path) -> None:
    compute = {"channels_last": True}
    found = step_ratio("resnet18", 2, (16, 24), (32, 16), (1, 3), 3, 1, "cpu", compute=compute, against=str(checkout))
    sides = [f"{who}, {n}" for who in ("AUG", "released AUG") for n in ("1 classifier", "3 classifiers")]
    names = ["encoders alone", *sides]
    assert [row["what"] for row in found["rows"]] == names
    assert found["rows"][0]["to_encoders"]["median"] == 1 and all(row["median_s"] > 0 for row in found["rows"])
    assert [name for name, row in zip(names, found["rows"], strict=True) if "times_faster" in row] == names[1:3]
    seen = [json.loads(line) for line in (checkout / "seen.jsonl").read_text().splitlines()]
    assert len(seen) == 2 * (3 + 2), "rounds and two warm-ups, for each number of classifiers"
    assert {tuple(map(str, row[:3])) for row in seen} == {("[2, 16, 24]", "[2, 3, 1, 32, 16]", "[2, 6]")}
    assert len({row[3] for row in seen}) == 1 and {row[4] for row in seen} == {0, 2}
    text = render(found)
    assert "channels_last True" in text and "times faster than released" in text


def test_what_is_no_checkout_is_refused(tmp_path: Path, checkout: Path) -> None:
    with pytest.raises(ConfigError, match=r"no checkout of njustkmg/NeurIPS25-AUG, it has no train_CREMAD.py"):
        step_ratio("resnet18", 2, (16, 16), (16, 16), (1,), 3, 1, "cpu", against=str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="resnet18 encoders, not cnn"):
        step_ratio("cnn", 2, (16, 16), (16, 16), (1,), 3, 1, "cpu", against=str(checkout))
    (checkout / "train_CREMAD.py").write_text("import something_that_is_not_there")
    with pytest.raises(ResourceError, match="cannot be imported: No module named 'something_that_is_not_there'"):
        step_ratio("resnet18", 2, (16, 16), (16, 16), (1,), 3, 1, "cpu", against=str(checkout))


@pytest.mark.parametrize("text", ["257", "axb", "4x4", "9x9x9", "10x100000"])
def test_shapes_are_two_numbers(text: str) -> None:
    assert shape("--audio", "257x1250") == (257, 1250)
    with pytest.raises(ConfigError, match="--audio is"):
        shape("--audio", text)
