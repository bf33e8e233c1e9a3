"""Every way to compute gives what plain float32 gives, up to the rounding of its format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.cases import SMALL, SMALL_AUG
from tests.conftest import Done, settings
from torch import nn

from counterpoise.config import resolve
from counterpoise.contracts import ConfigError
from counterpoise.models.compute import Compute, encode, prepare

Run = Callable[..., Done]
GROUPED = {name: {"name": "cnn", "channels": [4, 8], "width": 8, "norm": "group"} for name in ("image", "sound")}
# Those that do something of their own with gradients or with passes through encoders.
METHODS = ["aug", "agm", "mmpareto", "maie"]


def picture_encoder(channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    convolved = [nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*convolved, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5)).train()


def one_pass(compute: Compute, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features, gradients and statistics of a pass."""
    encoder = picture_encoder()
    prepare(nn.ModuleDict({"image": encoder}), compute)
    torch.manual_seed(1)
    features = encode(encoder, x, compute)
    features.square().sum().backward()
    gradients = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    return {"features": features.detach(), **gradients, **dict(encoder.named_buffers())}


def test_what_is_computed_again_is_the_same_and_counted_once() -> None:
    x = torch.randn(6, 3, 8, 8)
    plain, again = one_pass(Compute(), x), one_pass(Compute(parts=1), x)
    assert plain.keys() == again.keys() and again["1.num_batches_tracked"] == 1
    assert all(plain[name].equal(again[name]) for name in plain)


def test_parts_keep_activations_of_one_part_only() -> None:
    encoder, kept = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    x = torch.randn(8, 3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        whole = encode(encoder, x, Compute())
    assert torch.Size([8, 5]) in kept
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        parts = encode(encoder, x, Compute(parts=4))
    assert torch.Size([2, 5]) not in kept and torch.Size([8, 5]) not in kept
    torch.testing.assert_close(parts, whole)
    expected = torch.autograd.grad(whole.sum(), list(encoder.parameters()))
    torch.testing.assert_close(torch.autograd.grad(parts.sum(), list(encoder.parameters())), expected)


def test_channels_last_is_a_layout_and_no_other_network() -> None:
    x = torch.randn(6, 3, 8, 8)
    plain, last = one_pass(Compute(), x), one_pass(Compute(channels_last=True), x)
    for name in plain:
        torch.testing.assert_close(last[name], plain[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_activations_have_channels_last_from_the_first_convolution_on(channels: int) -> None:
    """Spectrograms too, whose single channel is first and last at once."""
    encoder = picture_encoder(channels)
    prepare(nn.ModuleDict({"modality": encoder}), Compute(channels_last=True))
    seen: list[torch.Tensor] = []
    for layer in list(encoder)[:3]:  # type: ignore[call-overload]
        layer.register_forward_hook(lambda *call: seen.append(call[-1]))
    encode(encoder, torch.randn(6, channels, 8, 8), Compute(channels_last=True))
    assert len(seen) == 3 and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_bf16_rounds_inside_encoders_and_gives_float32_features() -> None:
    x = torch.randn(64, 3, 8, 8)
    plain, rounded = one_pass(Compute(), x), one_pass(Compute(precision="bf16"), x)
    assert rounded["features"].dtype == torch.float32 and rounded["0.weight"].dtype == torch.float32
    assert not rounded["features"].equal(plain["features"])
    for name in ("features", "0.weight", "1.running_mean"):
        similarity = torch.cosine_similarity(rounded[name].flatten(), plain[name].flatten(), dim=0)
        assert similarity > 0.99, name


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_alike_in_parts_and_channels_last(name: str, corpus_with_media: str, run_experiment: Run) -> None:
    method = SMALL[name]
    content = settings(corpus_with_media, modalities=GROUPED, batch_size=16, epochs=2, method=method)
    plain, other = run_experiment(content), run_experiment({**content, "compute": {"parts": 2, "channels_last": True}})
    assert other.experiment.digest != plain.experiment.digest
    for key, value in plain.weights.items():
        torch.testing.assert_close(
            other.weights[key], value, atol=2e-4, rtol=1e-3, msg=lambda text, n=key: f"{n}: {text}"
        )


def test_compiled_encoders_survive_new_classifiers_without_compiling_again(
    corpus: str, run_experiment: Run, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = torch._dynamo.utils.counters["frames"]
    torch._dynamo.reset()
    content = settings(corpus, method=SMALL_AUG, epochs=2, compute={"compile": "default"})
    compiled.clear()
    short = run_experiment(content)
    before = compiled["ok"]
    torch._dynamo.reset()
    compiled.clear()
    done = run_experiment({**content, "epochs": 4})
    assert before > 0 and compiled["ok"] == before, "more epochs, and classifiers, are no reason to compile"
    assert done.records("decision")[-1]["classifiers"] != short.records("decision")[-1]["classifiers"]
    plain = run_experiment(settings(corpus, method=SMALL_AUG, epochs=4))
    for key, value in plain.weights.items():
        torch.testing.assert_close(done.weights[key], value, atol=1e-4, rtol=1e-3)


def test_parts_must_fit_batches_and_batch_normalisation(corpus_with_media: str, run_experiment: Run) -> None:
    content = settings(corpus_with_media, modalities=GROUPED, batch_size=16)
    with pytest.raises(ConfigError, match=r"compute\.parts is 17, but a worker has 16 samples"):
        run_experiment({**content, "compute": {"parts": 17}})
    normalised = {m: {**e, "norm": "batch"} for m, e in GROUPED.items()}
    with pytest.raises(ConfigError, match="batch_norm=local"):
        run_experiment({**content, "modalities": normalised, "compute": {"parts": 2}})


def test_an_experiment_that_says_nothing_about_compute_keeps_its_digest(corpus: str) -> None:
    plain, said = resolve(settings(corpus))[0], resolve(settings(corpus), ["compute.precision=fp32"])[0]
    assert said.digest == plain.digest and "compute" not in plain.to_json()
    assert resolve(settings(corpus), ["compute.precision=bf16"])[0].digest != plain.digest
