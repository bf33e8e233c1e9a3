from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import GoogLeNet

from counterpoise.contracts import ConfigError, InputSpec
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
