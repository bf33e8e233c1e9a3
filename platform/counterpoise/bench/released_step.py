"""The training step that is compared with: that of the AUG authors, from a checkout of their repository.

Nothing of it is part of this project. A process of its own imports `train_CREMAD.train_audio_video` and the model from
the folder given, and runs one epoch of one batch with them. What is left out is what is no step: their dataset class
(its module is replaced by an empty one, so that librosa is not needed) and, without a GPU, their calls of `.cuda()`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from counterpoise.contracts import ConfigError, ResourceError

FILES = ("train_CREMAD.py", "model/AudioVideo.py", "utils/utils.py")
REPOSITORY = "njustkmg/NeurIPS25-AUG"


def check_checkout(place: str) -> str:
    """The absolute path of a checkout; ConfigError if it is none."""
    missing = [name for name in FILES if not (Path(place) / name).is_file()]
    if missing:
        raise ConfigError(f"--against {place}: no checkout of {REPOSITORY}, it has no {missing[0]}")
    return str(Path(place).resolve())


def released_script(place: str, device: str) -> Any:
    """The released training script as a module; for a process of its own, of which it changes more than its modules."""
    import torch

    if device == "cpu":  # their code says .cuda() without asking
        setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)  # noqa: B010
        setattr(torch.nn.Module, "cuda", lambda self, *_, **__: self)  # noqa: B010
    else:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True  # as their script has it
    sys.path.insert(0, place)
    sys.modules["dataset"] = types.ModuleType("dataset")
    sys.modules["dataset.CREMA"] = types.ModuleType("dataset.CREMA")
    setattr(sys.modules["dataset.CREMA"], "CramedDataset", None)  # noqa: B010
    try:
        script = importlib.import_module("train_CREMAD")
    except ImportError as error:
        raise ResourceError(f"--against {place}: its train_CREMAD.py cannot be imported: {error}") from None
    setattr(script, "cfg", {"print_inteval": 500})  # noqa: B010  (theirs; a global of the script)
    return script


def released_model(script: Any, classes: int, classifiers: int) -> tuple[Any, Any]:
    """Their network with so many classifiers of the visual modality, and its optimizer."""
    import torch

    torch.manual_seed(0)
    model = script.AVGBShareClassifier(config={"fps": 1, "setting": {"num_class": classes}}).cuda()
    model.apply(script.weight_init)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)  # of its crema.json
    for _ in range(classifiers - 1):
        model.add_layer(is_a=False)
    return model, optimizer


def train_released(script: Any, batches: Iterable[Any], model: Any, optimizer: Any, device: str) -> float:
    """Seconds of one of their epochs over `batches`: (spectrograms [B, F, T], pictures [B, 3, 1, H, W], one-hot)."""
    import torch

    with contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        script.train_audio_video(0, batches, model, optimizer)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def make(spec: Mapping[str, Any]) -> Callable[[int], float]:
    """In a process of its own: step(n) makes one step with n classifiers of the visual modality; its seconds.

    spec: place (of the checkout), classes, audio [B, F, T], image [B, 3, H, W], label [B], classifiers (numbers that
    will be asked for), device, threads.
    """
    import torch
    from torch.nn.functional import one_hot

    torch.set_num_threads(spec["threads"])
    script = released_script(spec["place"], spec["device"])
    models = {count: released_model(script, spec["classes"], count) for count in spec["classifiers"]}
    labels = one_hot(spec["label"], spec["classes"]).float()
    batch = tuple(tensor.to(spec["device"]) for tensor in (spec["audio"], spec["image"].unsqueeze(2), labels))
    return lambda count: train_released(script, [batch], *models[count], spec["device"])
