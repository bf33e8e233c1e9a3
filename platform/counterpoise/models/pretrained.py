"""Weights from files: read without running anything in them, checked against the network, fitted to its channels."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from counterpoise import storage
from counterpoise.contracts import ConfigError, DataError, RefusedError, ResourceError

PRETRAINED, NONE = "pretrained", "none"
_SHOWN = 5


def read_weights(place: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt or .pth file (path or s3:// URI) by name.

    A .pt file may hold tensors and plain containers only; RefusedError if it asks for anything else to be made.
    """
    data = storage.read_bytes(place)
    shown = storage.show(place)
    if not place.endswith(".safetensors"):
        return named_tensors(unpickled(data, shown), len(data), shown)
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except SafetensorError as error:
        raise DataError(f"{shown}: not a readable safetensors file ({error}); fetch it again") from None


def unpickled(data: bytes, shown: str) -> Any:
    """What a .pt file holds: tensors and plain containers only, RefusedError for anything else."""
    _check_members(data, shown)
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # of newer pickle protocols, which are read or refused all the same
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise RefusedError(
                f"{shown}: holds more than tensors, and reading that could run code; save its state_dict as safetensors"
            ) from None
        raise DataError(f"{shown}: not a readable weights file ({reason[0] if reason else 'damaged'})") from None
    except Exception as error:  # damaged bytes raise anything
        reason = str(error).strip().splitlines()
        raise DataError(f"{shown}: not a readable weights file ({reason[0] if reason else 'damaged'})") from None


def _check_members(data: bytes, shown: str) -> None:
    """torch.save compresses nothing: members that are larger than their file are there to fill the memory."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return  # torch says what is wrong with it
    if sum(member.file_size for member in members) > len(data):
        raise RefusedError(f"{shown}: its members are larger than the file; torch.save writes no such file")


def named_tensors(content: Any, file_bytes: int, shown: str, key: str | None = None) -> dict[str, Tensor]:
    """The mapping of names to tensors in what a .pt file of so many bytes held; under `state_dict` if it is there.

    key: where it is, with dots, if it is elsewhere.
    """
    for part in key.split(".") if key else ():
        if not isinstance(content, Mapping) or part not in content:
            raise DataError(f"{shown}: has no {key!r}{_keys(content)}")
        content = content[part]
    if key is None and isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise DataError(f"{shown}: not a mapping of names to tensors; save the network's state_dict{_keys(content)}")
    # a few bytes can be described as a huge tensor that repeats them
    needed = sum(v.numel() * v.element_size() for v in content.values())
    if needed > 8 * file_bytes:
        raise RefusedError(f"{shown}: {file_bytes:,} bytes that ask for {needed:,} bytes of tensors")
    return dict(content)


def _keys(content: Any) -> str:
    names = [str(k) for k, v in content.items() if isinstance(v, Mapping)] if isinstance(content, Mapping) else []
    under = ", ".join(names[:_SHOWN])
    return f"; it has mappings under {under}: counterpoise convert --key takes one out" if names else ""


def torchvision_weights(model: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights (IMAGENET1K_V1, the ones of the papers) from its cache or its server."""
    from torchvision.models import get_model_weights

    versions = get_model_weights(model).__members__
    if "IMAGENET1K_V1" not in versions:
        raise ConfigError(f"torchvision has no ImageNet-1k weights of {model}; give a file as weights")
    try:
        return dict(versions["IMAGENET1K_V1"].get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:  # no network; a file that is not what its name says
        raise ResourceError(
            f"weights of {model}: {versions['IMAGENET1K_V1'].url} cannot be fetched ({error}); "
            "fetch it on another machine and give the file: weights: path or s3:// URI"
        ) from None


def image_weights(weights: str, model: str) -> dict[str, Tensor]:
    """ "pretrained": torchvision's; anything else is a file."""
    return torchvision_weights(model) if weights == PRETRAINED else read_weights(weights)


def load_checked(module: nn.Module, state: Mapping[str, Tensor], source: str, ignore: Sequence[str] = ()) -> None:
    """Put weights into a network; DataError that names what is missing, left over or of another shape.

    ignore: beginnings of names that the file may have and the network has not, such as those of its classifier.
    """
    own = module.state_dict()
    # statistics counters came with torch 0.4.1; older files lack them and nothing here reads them
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in state if n not in own and not n.startswith(tuple(ignore))]
    shapes = [
        f"{n} {_shape(state[n])} instead of {_shape(v)}"
        for n, v in own.items()
        if n in state and state[n].shape != v.shape
    ]
    problems = [
        f"{what}: {', '.join(names[:_SHOWN])}" + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for what, names in (("missing", missing), ("not in this network", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise DataError(f"{storage.show(source)}: not weights of this network; {'; '.join(problems)}")
    module.load_state_dict({n: state[n] for n in own if n in state}, strict=False)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def adapted(weight: Tensor, channels: int) -> Tensor:
    """First filters [O, I, ...] for another number of channels [O, C, ...].

    Every channel gets the mean over the I channels, times I / C. A grey image given once or three times has the same
    activations, and channels of like size give activations of like size. The mean is the cross-modality start of
    Wang et al., "Temporal Segment Networks", ECCV 2016, section 3.1, which has no factor; the factor is ours.
    """
    inputs = weight.shape[1]
    if inputs == channels:
        return weight
    repeats = [1, channels, *[1] * (weight.dim() - 2)]
    return weight.mean(dim=1, keepdim=True).repeat(repeats) * (inputs / channels)
