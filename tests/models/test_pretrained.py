"""Weights from files: what is read, what is refused, and how they fit other channels."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from counterpoise.contracts import ConfigError, DataError, InputSpec, RefusedError, ResourceError
from counterpoise.models import pretrained
from counterpoise.models.encoders import EncoderConfig, build_encoder
from counterpoise.models.heads import SumHead
from counterpoise.models.network import build_network

RGB, GREY, FLOW = (InputSpec("image", (c, 32, 32)) for c in (3, 1, 2))


def encoder(spec: InputSpec, name: str, **settings: Any) -> nn.Module:
    return build_encoder(spec, EncoderConfig(name=name, **settings)).eval()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module]:
    """A ResNet-18 for RGB images and a thousand classes, and the file of its weights."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    file = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(network.state_dict(), file)
    network.fc = nn.Identity()
    return str(file), network


def test_weights_of_a_file_give_the_network_they_come_from(resnet: tuple[str, nn.Module]) -> None:
    file, source = resnet
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(RGB, "resnet18", weights=file)(image), source(image))
    clip = InputSpec("frames", (2, 3, 32, 32))
    frames = torch.stack([image, image], dim=1)
    torch.testing.assert_close(encoder(clip, "resnet18", weights=file)(frames), source(image), atol=1e-5, rtol=1e-4)


def test_pt_and_safetensors_files_say_the_same(resnet: tuple[str, nn.Module], tmp_path: Path) -> None:
    state = pretrained.read_weights(resnet[0])
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.pt")
    torch.save(state, tmp_path / "b.pth")
    for name in ("a.pt", "b.pth"):
        found = pretrained.read_weights(str(tmp_path / name))
        assert found.keys() == state.keys() and all(found[n].equal(state[n]) for n in state)


def test_the_draws_of_other_parts_do_not_depend_on_weights(resnet: tuple[str, nn.Module]) -> None:
    inputs = {"visual": RGB, "other": InputSpec("vector", (5,))}
    plain = {"visual": EncoderConfig(name="resnet18"), "other": EncoderConfig(name="mlp")}
    loaded = plain | {"visual": EncoderConfig(name="resnet18", weights=resnet[0])}
    one, two = (build_network(inputs, configs, lambda w: SumHead(w, 3), seed=1) for configs in (plain, loaded))
    for name, value in one.encoders["other"].state_dict().items():
        assert value.equal(two.encoders["other"].state_dict()[name])
    for name, value in one.head.state_dict().items():
        assert value.equal(two.head.state_dict()[name])


def test_weights_are_left_unread_where_a_checkpoint_has_others() -> None:
    config = EncoderConfig(name="resnet18", weights="/nowhere/resnet18.pt")
    build_encoder(RGB, config, pretrained=False)
    with pytest.raises(DataError, match=r"/nowhere/resnet18\.pt"):
        build_encoder(RGB, config)


# --- channels


def test_one_channel_gives_what_a_grey_image_gives(resnet: tuple[str, nn.Module]) -> None:
    file, source = resnet
    grey = torch.randn(2, 1, 32, 32)
    expected = source(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(encoder(GREY, "resnet18", weights=file)(grey), expected, atol=1e-5, rtol=1e-4)


def test_two_channels_of_like_content_give_what_three_give(resnet: tuple[str, nn.Module]) -> None:
    file, source = resnet
    grey = torch.randn(2, 1, 32, 32)
    found = encoder(FLOW, "resnet18", weights=file)(grey.expand(-1, 2, -1, -1))
    torch.testing.assert_close(found, source(grey.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4)


def test_adapted_filters_by_hand() -> None:
    weight = torch.tensor([[[[1.0]], [[2.0]], [[6.0]]]])
    assert pretrained.adapted(weight, 1).flatten().tolist() == [9.0]
    assert pretrained.adapted(weight, 2).flatten().tolist() == [4.5, 4.5]
    assert pretrained.adapted(weight, 3) is weight


# --- what is refused


class Attack:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    torch.save({"conv1.weight": torch.zeros(1), "more": Attack(trace)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Attack(trace)))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(RefusedError, match=rf"{name}: holds more than tensors.*safetensors"):
            encoder(RGB, "resnet18", weights=str(tmp_path / name))
    assert not trace.exists()
    pickle.loads((tmp_path / "b.pt").read_bytes())
    assert trace.exists(), "the attack is a real one"


def test_what_is_missing_or_too_much_is_named(resnet: tuple[str, nn.Module], tmp_path: Path) -> None:
    state = pretrained.read_weights(resnet[0])
    wrong = {n: v for n, v in state.items() if n != "bn1.weight"} | {"extra.weight": torch.zeros(1)}
    wrong["layer1.0.conv1.weight"] = torch.zeros(2, 2, 3, 3)
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(DataError) as caught:
        encoder(RGB, "resnet18", weights=str(tmp_path / "wrong.safetensors"))
    text = str(caught.value)
    assert "wrong.safetensors: not weights of this network" in text
    assert "missing: bn1.weight" in text and "not in this network: extra.weight" in text
    assert "of another shape: layer1.0.conv1.weight 2 x 2 x 3 x 3 instead of 64 x 64 x 3 x 3" in text
    with pytest.raises(DataError, match=r"missing: .* and \d+ more"):
        encoder(RGB, "resnet50", weights=resnet[0])


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04 cut short", b"version https://git-lfs"])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_files_that_are_no_weights_are_said_to_be_none(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((DataError, RefusedError), match=name):
        pretrained.read_weights(str(tmp_path / name))


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: torch.zeros(1)}, torch.zeros(2)])
def test_weights_are_a_mapping_of_names_to_tensors(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DataError, match="not a mapping of names to tensors"):
        pretrained.read_weights(str(tmp_path / "a.pt"))


def test_weights_that_cannot_be_fetched_come_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    for name, kind in (("resnet18", RGB), ("i3d", InputSpec("frames", (3, 3, 15, 15)))):
        with pytest.raises(ResourceError, match=r"https://download.*no route to host.*weights: path or s3://"):
            encoder(kind, name, weights="pretrained")


# --- any network of torchvision


@pytest.mark.parametrize(
    ("model", "spec", "width"),
    [
        ("mobilenet_v3_small", InputSpec("image", (2, 40, 30)), 1024),
        ("shufflenet_v2_x0_5", InputSpec("frames", (2, 1, 32, 32)), 1024),
        ("regnet_x_400mf", InputSpec("audio", (1, 33, 40)), 400),
        ("googlenet", InputSpec("image", (3, 32, 32)), 1024),
    ],
)
def test_networks_of_torchvision_come_by_name(model: str, spec: InputSpec, width: int) -> None:
    module = encoder(spec, "torchvision", model=model)
    assert module.width == width and module(torch.randn(2, *spec.shape)).shape == (2, width)
    assert module.train()(torch.randn(2, *spec.shape)).shape == (2, width)


def test_a_network_by_name_takes_weights_for_other_channels(tmp_path: Path) -> None:
    source = torchvision.models.shufflenet_v2_x0_5(weights=None).eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    source.fc = nn.Identity()
    grey = torch.randn(2, 1, 32, 32)
    module = encoder(GREY, "torchvision", model="shufflenet_v2_x0_5", weights=str(tmp_path / "w.pth"))
    torch.testing.assert_close(module(grey), source(grey.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "encoder torchvision needs a model, e.g."),
        ({"model": "convnext_tini"}, "no classification network 'convnext_tini'; did you mean convnext_tiny"),
        ({"model": "torchvision.models.resnet18"}, "no classification network"),
        ({"model": "fcn_resnet50"}, "no classification network"),
        ({"model": "squeezenet1_0"}, "squeezenet1_0 ends without a Linear"),
        ({"model": "vit_b_16"}, "vit_b_16 takes square images, not 32 x 31"),
        ({"model": "inception_v3"}, "inception_v3 does not take inputs of 3 x 32 x 31: "),
    ],
)
def test_names_that_make_no_encoder_are_explained(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder(InputSpec("image", (3, 32, 31)), "torchvision", **settings)


def test_a_seed_gives_the_same_network(tmp_path: Path) -> None:
    for name, extra in (("resnet50", {}), ("torchvision", {"model": "mobilenet_v3_small"})):
        states: list[dict[str, Tensor]] = []
        for _ in range(2):
            torch.manual_seed(7)
            states.append(encoder(FLOW, name, **extra).state_dict())
        assert all(value.equal(states[1][n]) for n, value in states[0].items())


def test_weights_come_from_object_storage_too() -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    import fsspec

    fsspec.filesystem("memory").pipe("/weights/a.pt", buffer.getvalue())
    assert pretrained.read_weights("memory://weights/a.pt")["a"].tolist() == [1.0, 1.0]
