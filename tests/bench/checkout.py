"""A stand-in with the names of the released code; it writes down what it is given."""

from __future__ import annotations

from pathlib import Path

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
        assert step % cfg["print_inteval"] in range(500)
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


def make_checkout(place: Path) -> Path:
    for name, text in {"train_CREMAD.py": SCRIPT, "model/AudioVideo.py": MODEL, "utils/utils.py": ""}.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    return place
