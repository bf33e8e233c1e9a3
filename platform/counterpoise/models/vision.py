"""Image networks of torchvision without their classifiers, for any number of channels."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from counterpoise.contracts import ConfigError
from counterpoise.models.pretrained import adapted, load_checked


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier, with a first layer for any number of channels.

    model: resnet18 (512 features) or resnet50 (2048). weights: of the network for RGB images and ImageNet's 1000
    classes, whose first filters are adapted as `pretrained.adapted` says and whose classifier is left out.
    """

    def __init__(
        self, model: str, channels: int, weights: Mapping[str, Tensor] | None = None, source: str = "weights"
    ) -> None:
        super().__init__()
        from torchvision.models import get_model

        trunk = get_model(model, weights=None)
        self.width = int(trunk.fc.in_features)
        if channels != 3:
            trunk.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        trunk.fc = nn.Identity()
        self.trunk = trunk
        if weights is not None:
            weights = dict(weights)
            if "conv1.weight" in weights:
                weights["conv1.weight"] = adapted(weights["conv1.weight"], channels)
            load_checked(trunk, weights, source, ignore=("fc.",))

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x)


def check_model(name: str) -> None:
    """ConfigError, with the nearest names, if torchvision has no classification network of that name."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = get_close_matches(name, known, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"torchvision has no classification network {name!r}{hint}")


class Backbone(nn.Module):
    """Any classification network of torchvision, its last Linear replaced by what comes into it.

    model: a name of torchvision's own list, e.g. convnext_tiny. size: height and width of the images, which
    transformers are built for. Starts as torchvision starts it; the first convolution as in `ResNet`.
    """

    def __init__(
        self,
        model: str,
        channels: int,
        size: tuple[int, int],
        weights: Mapping[str, Tensor] | None = None,
        source: str = "weights",
    ) -> None:
        super().__init__()
        from torchvision.models import get_model

        check_model(model)
        extra: dict[str, object] = {}
        if model in ("googlenet", "inception_v3"):  # their second classifiers serve training on ImageNet alone
            extra = {"aux_logits": False, "init_weights": False}
        elif model.startswith(("vit_", "maxvit_")):
            if size[0] != size[1]:
                raise ConfigError(f"{model} takes square images, not {size[0]} x {size[1]}; change the card's size")
            extra = {"image_size": size[0]} if model.startswith("vit_") else {"input_size": size}
        try:
            trunk = get_model(model, weights=None, **extra)
        except ValueError as error:
            raise ConfigError(f"{model} for images of {size[0]} x {size[1]}: {error}") from None
        self.trunk = trunk
        first, convolution = next((n, m) for n, m in trunk.named_modules() if isinstance(m, nn.Conv2d))
        linears = [(n, m) for n, m in trunk.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
        if not linears:
            raise ConfigError(f"{model} ends without a Linear, so it has no features to take; choose another network")
        last, linear = linears[-1]
        self.width = int(linear.in_features)
        _replace(trunk, last, nn.Identity())
        if convolution.in_channels != channels:
            _replace(trunk, first, _with_channels(convolution, channels))
        if weights is not None:
            weights = dict(weights)
            if f"{first}.weight" in weights:
                weights[f"{first}.weight"] = adapted(weights[f"{first}.weight"], channels)
            load_checked(trunk, weights, source, ignore=(f"{last}.", "aux1.", "aux2.", "AuxLogits."))

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x)


def _replace(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, part)


def _with_channels(layer: nn.Conv2d, channels: int) -> nn.Conv2d:
    return nn.Conv2d(
        channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        bias=layer.bias is not None,
    )


def tried(module: nn.Module, example: Tensor, what: str) -> int:
    """The width of the features of one example; ConfigError if the network does not take it."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            features = module(example)
    except (RuntimeError, ValueError, AssertionError, IndexError, AttributeError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{what} does not take inputs of {' x '.join(map(str, example.shape[1:]))}: {reason}"
        ) from None
    finally:
        module.train(training)
    if features.dim() != 2:
        raise ConfigError(f"{what} gives {features.dim() - 1}-dimensional maps instead of pooled features")
    return int(features.shape[1])
