from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import GoogLeNet

from counterpoise.contracts import ConfigError, DataError, InputSpec
from counterpoise.engine.comm import SingleComm
from counterpoise.models.encoders import EncoderConfig, build_encoder
from counterpoise.models.i3d import I3D, inflated_weights
from counterpoise.models.norm import GlobalBatchNorm, has_batch_norm, synchronise_batch_norm

SPEC = InputSpec("frames", (6, 3, 32, 32))


def lively(network: nn.Module) -> nn.Module:
    """Batch normalisation that is not the identity, as after training; and maps of like size in every layer."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[operator]
            module.running_var.uniform_(0.3, 1)  # type: ignore[operator]
            module.weight.data.uniform_(0.7, 1.3)
            module.bias.data.normal_(0, 0.1)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return network.eval()


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, GoogLeNet]:
    torch.manual_seed(0)
    network = lively(GoogLeNet(aux_logits=True, init_weights=False))
    file = str(tmp_path_factory.mktemp("weights") / "googlenet.safetensors")
    save_file(network.state_dict(), file)
    return file, network  # type: ignore[return-value]


def encoder(channels: int, weights: str | None = None) -> I3D:
    config = EncoderConfig(name="i3d", weights=weights)
    module = build_encoder(InputSpec("frames", (6, channels, 32, 32)), config)
    assert isinstance(module, I3D)
    return module.eval()


def last_maps(network: nn.Module, x: Tensor) -> Tensor:
    """What the last block gives before it is pooled."""
    found: list[Tensor] = []
    with torch.no_grad(), network.inception5b.register_forward_hook(lambda *parts: found.append(parts[-1])):  # type: ignore[union-attr, operator]
        network(x)
    return found[0]


def test_a_boring_video_gives_what_its_image_gives(inception: tuple[str, GoogLeNet]) -> None:
    """The property that inflation is made for (section 2.4 of the paper).

    It holds where no filter reaches beyond the ends of the video, which are padded with zeros. Every block reaches one
    step further, so of 128 frames (16 steps after striding) the middle four steps are free of it, by hand:
    2 + 1 + 1 + 1 of 64 steps, then 3 + 5 of 32, then 4 + 2 of 16 on either side.
    """
    file, network = inception
    image = torch.randn(1, 3, 32, 32)
    flat = last_maps(network, image)
    video = last_maps(encoder(3, file).trunk, image.unsqueeze(2).expand(-1, -1, 128, -1, -1))
    assert video.shape == (1, 1024, 16, 1, 1) and flat.shape == (1, 1024, 1, 1)
    assert flat.std() > 0.1, "the comparison has something to compare"
    for step in range(6, 10):
        torch.testing.assert_close(video[:, :, step], flat, atol=1e-3, rtol=1e-3)
    assert (video[:, :, 0] - flat).abs().max() > 0.01


def test_filters_are_repeated_in_time_and_divided_by_their_length() -> None:
    weight = torch.randn(4, 2, 3, 3)
    found = inflated_weights({"conv": weight, "bias": torch.ones(4)})
    assert found["conv"].shape == (4, 2, 3, 3, 3) and found["bias"].equal(torch.ones(4))
    for time in range(3):
        torch.testing.assert_close(found["conv"][:, :, time], weight / 3)


def test_it_has_the_published_size() -> None:
    assert sum(p.numel() for p in encoder(3).parameters()) == 12_287_264
    assert encoder(3).width == 1024


def test_time_is_strided_where_the_paper_says() -> None:
    trunk = encoder(3).trunk
    assert trunk.conv1.conv.kernel_size == (7, 7, 7) and trunk.conv1.conv.stride == (2, 2, 2)
    assert (trunk.maxpool1.kernel_size, trunk.maxpool1.stride) == ((1, 3, 3), (1, 2, 2))
    assert (trunk.maxpool2.kernel_size, trunk.maxpool2.stride) == ((1, 3, 3), (1, 2, 2))
    assert (trunk.maxpool3.kernel_size, trunk.maxpool3.stride) == ((3, 3, 3), (2, 2, 2))
    assert (trunk.maxpool4.kernel_size, trunk.maxpool4.stride) == ((2, 2, 2), (2, 2, 2))
    assert not any(isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.MaxPool2d) for m in trunk.modules())


@pytest.mark.parametrize("channels", [1, 2])
def test_other_channels_start_from_the_mean_of_rgb(channels: int, inception: tuple[str, GoogLeNet]) -> None:
    clip = torch.randn(1, 6, 1, 32, 32)
    grey = encoder(3, inception[0])(clip.expand(-1, -1, 3, -1, -1))
    found = encoder(channels, inception[0])(clip.expand(-1, -1, channels, -1, -1))
    torch.testing.assert_close(found, grey, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("shape", [(3, 1, 15, 15), (5, 2, 17, 40), (16, 3, 20, 20)])
def test_small_videos_will_do(shape: tuple[int, ...]) -> None:
    module = build_encoder(InputSpec("frames", shape), EncoderConfig(name="i3d"))
    found = module(torch.randn(2, *shape))
    assert found.shape == (2, 1024) and torch.isfinite(found).all()
    found.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (8, 3, 14, 32)])
def test_videos_that_pooling_would_use_up_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"i3d takes 3 frames of 15 x 15 pixels or more.*num_frames and size"):
        build_encoder(InputSpec("frames", shape), EncoderConfig(name="i3d"))


@pytest.mark.parametrize("frames", range(3, 10))
def test_first_filters_of_short_videos_have_the_right_gradient(frames: int) -> None:
    """oneDNN's own is noise for 6 and 7 frames, and ends the process for 5."""
    filters = encoder(3).trunk.conv1.conv
    clip = torch.randn(2, 3, frames, 17, 20)
    out = filters(clip)
    out.square().sum().backward()
    exact = filters.weight.detach().double().requires_grad_()  # oneDNN takes no float64
    expected = nn.functional.conv3d(clip.double(), exact, stride=2, padding=3)
    expected.square().sum().backward()
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
    assert filters.weight.grad is not None and exact.grad is not None
    torch.testing.assert_close(filters.weight.grad.double(), exact.grad, atol=1e-2, rtol=1e-3)


def test_the_order_of_frames_matters() -> None:
    clip = torch.randn(1, 12, 3, 32, 32)
    module = encoder(3)
    assert not torch.allclose(module(clip), module(clip.flip(1)), atol=1e-3)


def test_its_batch_normalisation_is_over_all_workers() -> None:
    module = encoder(3)
    assert has_batch_norm(module)
    clip = torch.randn(2, 3, 6, 32, 32)
    expected = module.train().trunk.conv1(clip)
    synchronise_batch_norm(module, SingleComm())
    assert not any(isinstance(m, nn.BatchNorm3d) for m in module.modules())
    assert sum(isinstance(m, GlobalBatchNorm) for m in module.modules()) == 57
    torch.testing.assert_close(module.trunk.conv1(clip), expected, atol=1e-5, rtol=1e-4)


# The network of piergiaj/pytorch-i3d, by its own names: inputs and the six widths of every block of branches.
MIXED = {
    "3b": (192, 64, 96, 128, 16, 32, 32),
    "3c": (256, 128, 128, 192, 32, 96, 64),
    "4b": (480, 192, 96, 208, 16, 48, 64),
    "4c": (512, 160, 112, 224, 24, 64, 64),
    "4d": (512, 128, 128, 256, 24, 64, 64),
    "4e": (512, 112, 144, 288, 32, 64, 64),
    "4f": (528, 256, 160, 320, 32, 128, 128),
    "5b": (832, 256, 160, 320, 32, 128, 128),
    "5c": (832, 384, 192, 384, 48, 128, 128),
}


def released(channels: int) -> dict[str, Tensor]:
    """Random weights in the layout of rgb_imagenet.pt (3 channels) and flow_imagenet.pt (2)."""
    units = {"Conv3d_1a_7x7": (channels, 64, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (64, 192, 3)}
    for name, (inputs, b0, b1a, b1b, b2a, b2b, b3b) in MIXED.items():
        block = f"Mixed_{name}"
        units |= {f"{block}.b0": (inputs, b0, 1), f"{block}.b1a": (inputs, b1a, 1), f"{block}.b1b": (b1a, b1b, 3)}
        units |= {f"{block}.b2a": (inputs, b2a, 1), f"{block}.b2b": (b2a, b2b, 3), f"{block}.b3b": (inputs, b3b, 1)}
    state = {"logits.conv3d.weight": torch.randn(400, 1024, 1, 1, 1), "logits.conv3d.bias": torch.randn(400)}
    for name, (inputs, outputs, size) in units.items():
        state[f"{name}.conv3d.weight"] = torch.randn(outputs, inputs, size, size, size)
        for part in ("weight", "bias", "running_mean"):
            state[f"{name}.bn.{part}"] = torch.randn(outputs)
        state[f"{name}.bn.running_var"] = torch.rand(outputs)  # files of 2018 have no num_batches_tracked
    return state


@pytest.mark.parametrize("channels", [3, 2])
def test_weights_of_the_released_network_find_their_places(channels: int, tmp_path: Path) -> None:
    state = released(channels)
    torch.save(state, tmp_path / "imagenet.pt")
    trunk = encoder(channels, str(tmp_path / "imagenet.pt")).trunk.state_dict()
    places = {
        "Conv3d_1a_7x7.conv3d.weight": "conv1.conv.weight",
        "Conv3d_2c_3x3.bn.running_var": "conv3.bn.running_var",
        "Mixed_3b.b0.conv3d.weight": "inception3a.branch1.conv.weight",
        "Mixed_3c.b1b.conv3d.weight": "inception3b.branch2.1.conv.weight",
        "Mixed_4c.b2a.bn.bias": "inception4b.branch3.0.bn.bias",
        "Mixed_4f.b2b.conv3d.weight": "inception4e.branch3.1.conv.weight",
        "Mixed_5b.b1a.bn.weight": "inception5a.branch2.0.bn.weight",
        "Mixed_5c.b3b.conv3d.weight": "inception5b.branch4.1.conv.weight",
    }
    for theirs, ours in places.items():
        assert torch.equal(trunk[ours], state[theirs]), theirs
    given = {float(v.double().sum()) for n, v in state.items() if not n.startswith("logits")}
    taken = {float(v.double().sum()) for n, v in trunk.items() if not n.endswith("num_batches_tracked")}
    assert taken == given, "every tensor is used, and nothing is left as it was"


def test_three_channels_of_the_released_network_are_fitted_to_depth(tmp_path: Path) -> None:
    state = released(3)
    save_file(state, str(tmp_path / "rgb.safetensors"))
    first = encoder(1, str(tmp_path / "rgb.safetensors")).trunk.state_dict()["conv1.conv.weight"]
    assert first.shape == (64, 1, 7, 7, 7)
    assert torch.allclose(first[:, 0], state["Conv3d_1a_7x7.conv3d.weight"].sum(dim=1), atol=1e-5)


def test_released_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = released(3)
    state["Mixed_4c.b4.conv3d.weight"] = state.pop("Mixed_4c.b0.conv3d.weight")
    state["Mixed_5c.b1b.conv3d.weight"] = torch.zeros(384, 192, 1, 1, 1)
    save_file(state, str(tmp_path / "odd.safetensors"))
    with pytest.raises(DataError) as error:
        encoder(3, str(tmp_path / "odd.safetensors"))
    assert "missing: inception4b.branch1.conv.weight" in str(error.value)
    assert "not in this network: Mixed_4c.b4.conv3d.weight" in str(error.value)
    assert "inception5b.branch2.1.conv.weight 384 x 192 x 1 x 1 x 1 instead of 384 x 192 x 3 x 3 x 3" in str(
        error.value
    )
