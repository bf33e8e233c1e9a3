"""The `data:` section of an experiment."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer


class _Op(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Flip(_Op):
    """Mirror left and right; of optical flow (two channels) u changes its sign. image, frames."""

    name: Literal["flip"] = "flip"
    probability: float = Field(default=0.5, ge=0, le=1, description="chance that a sample is mirrored")


class Shift(_Op):
    """Move by up to `pixels` in each direction, zeros at the edge. image, frames."""

    name: Literal["shift"] = "shift"
    pixels: int = Field(default=2, ge=1, description="largest distance, in pixels")


class ResizedCrop(_Op):
    """Cut out a random part and scale it to full size. image, frames."""

    name: Literal["resized_crop"] = "resized_crop"
    scale: tuple[float, float] = Field(default=(0.5, 1.0), description="area of the part, as a fraction of the whole")
    ratio: tuple[float, float] = Field(default=(0.75, 1.3333), description="width over height of the part")


class Noise(_Op):
    """Add Gaussian noise. Any kind but text."""

    name: Literal["noise"] = "noise"
    std: float = Field(default=0.05, gt=0, description="of pixel values on the 0..1 scale, or in units of the feature")


class TimeShift(_Op):
    """Roll a spectrogram or series along time. audio, series."""

    name: Literal["time_shift"] = "time_shift"
    fraction: float = Field(default=0.1, gt=0, le=1, description="largest distance, as a fraction of the length")


class Mask(_Op):
    """Blank one band of frequencies and one stretch of time with the sample's minimum (SpecAugment). audio."""

    name: Literal["mask"] = "mask"
    time: float = Field(default=0.2, ge=0, le=1, description="longest stretch, as a fraction of the length")
    frequency: float = Field(default=0.2, ge=0, le=1, description="widest band, as a fraction of the bins")


class Dropout(_Op):
    """Set single features to zero. vector, series."""

    name: Literal["dropout"] = "dropout"
    probability: float = Field(default=0.1, ge=0, lt=1, description="chance of each feature")


def _spelled_out(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _word(value: Any) -> Any:
    """YAML 1.1 reads on and off as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Op = Annotated[
    Annotated[
        Flip | Shift | ResizedCrop | Noise | TimeShift | Mask | Dropout,
        Field(discriminator="name"),
    ],
    BeforeValidator(_spelled_out),
]


class DataOptions(BaseModel):
    """How a corpus is read. Nothing but `shuffle_window`, `shuffle_mib`, `bad_samples` and `augment` can change a
    number, and `transforms` its rounding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shuffle_window: int = Field(
        default=8192, ge=1, description="rows shuffled together; a smaller split is one permutation"
    )
    shuffle_mib: int = Field(
        default=512,
        ge=1,
        description="encoded MiB shuffled together: the memory that streaming takes; lowers shuffle_window if need be",
    )
    cache: Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)] = Field(
        default="auto", description="keep decoded rows in memory"
    )
    cache_limit_gib: float = Field(default=2.0, gt=0, description="cache: auto caches a corpus up to this size, in GiB")
    decode_threads: int = Field(default=2, ge=1, description="threads that decode, per worker")
    prefetch: int = Field(default=4, ge=1, description="batches made ahead of the training loop")
    bad_samples: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="largest fraction of a split that may be undecodable; 0: none, else at least one",
    )
    transforms: Literal["cpu", "device"] = Field(
        default="cpu",
        description="where spectrograms are made, training samples changed and pixels normalised: by the threads that "
        "decode, or on the device that trains, of waveforms and bytes",
    )
    augment: dict[str, tuple[Op, ...]] = Field(
        default_factory=dict,
        description="per modality, changes made to training samples, in order; `rgb+flow` changes both alike",
    )

    @model_serializer(mode="wrap")
    def _older_digests_hold(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What came later is saved, and in the digest, where it is not the default."""
        data: dict[str, Any] = default(self)
        for name in ("shuffle_mib", "transforms"):
            if getattr(self, name) == type(self).model_fields[name].default:
                del data[name]
        return data
