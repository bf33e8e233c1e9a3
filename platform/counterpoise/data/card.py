"""The card of a corpus: `corpus.yaml`, read and checked. Imports neither torch nor pyarrow."""

from __future__ import annotations

import os
import posixpath
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from counterpoise import storage
from counterpoise.contracts import LABEL, ROW, ConfigError, DataError
from counterpoise.plain import MAX_YAML_BYTES, NotPlain, read_yaml
from counterpoise.wording import did_you_mean

CARD = "corpus.yaml"
SPLITS = ("train", "valid", "test")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AudioPreprocess(_Model):
    """A log spectrogram [1, F, T]; the defaults give the 257 x 188 of the CREMA-D papers."""

    sample_rate: int = Field(default=22050, gt=0, description="Hz; files of another rate are resampled")
    seconds: float = Field(default=3.0, gt=0, le=600, description="length; longer clips are cut at the end")
    fill: Literal["tile", "zero"] = Field(
        default="tile", description="shorter clips are repeated, or followed by silence"
    )
    n_fft: int = Field(default=512, ge=2, description="samples of a window")
    hop_length: int = Field(default=353, ge=1, description="samples between windows")
    mel: int | None = Field(default=None, ge=1, description="mel bands; null keeps the n_fft // 2 + 1 linear bins")
    spectrum: Literal["magnitude", "density"] = Field(
        default="magnitude",
        description="magnitude: |STFT| with a Hann window, the clip reflected at its ends; density: power per Hz with "
        "the defaults of scipy.signal.spectrogram (Tukey window 0.25, each window less its mean, none beyond the clip)",
    )
    log_floor: float = Field(default=1e-7, gt=0, description="added to the spectrum before the logarithm")
    clip: bool = Field(default=True, description="clip the waveform to -1..1")
    mean: float = Field(default=0.0, description="subtracted from the log spectrogram")
    std: float = Field(default=1.0, gt=0, description="the log spectrogram is divided by it")
    standardize: bool = Field(
        default=False, description="each log spectrogram less its own mean, divided by its own deviation"
    )

    @model_validator(mode="after")
    def _long_enough(self) -> AudioPreprocess:
        if self.spectrum == "magnitude" and self.num_samples <= self.n_fft // 2:
            raise ValueError(f"seconds {self.seconds} is shorter than half a window of n_fft {self.n_fft} samples")
        if self.spectrum == "density" and self.num_samples < self.n_fft:
            raise ValueError(f"seconds {self.seconds} is shorter than a window of n_fft {self.n_fft} samples")
        if self.spectrum == "density" and self.hop_length > self.n_fft:
            raise ValueError(f"hop_length {self.hop_length} is more than a window of n_fft {self.n_fft} samples")
        return self

    @model_validator(mode="after")
    def _scaled_once(self) -> AudioPreprocess:
        if self.standardize and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError("standardize takes mean and deviation of each clip; leave mean and std out")
        return self

    @model_serializer(mode="wrap")
    def _without_later_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A corpus whose card says nothing about a later field has the fingerprint it had before that field came."""
        later = {"spectrum": "magnitude", "standardize": False}
        return {k: v for k, v in handler(self).items() if k not in later or v != later[k]}

    @property
    def num_samples(self) -> int:
        return round(self.seconds * self.sample_rate)

    @property
    def shape(self) -> tuple[int, ...]:
        # half a window, rounded down, is reflected at both ends: a window of an odd size has one sample less room
        inside = self.num_samples - (self.n_fft if self.spectrum == "density" else self.n_fft % 2)
        return (1, self.mel or self.n_fft // 2 + 1, 1 + inside // self.hop_length)


class ImagePreprocess(_Model):
    """Pixels as (x / 255 - mean) / std [C, H, W]."""

    size: tuple[int, int] = Field(description="height and width in pixels; other sizes are scaled (bilinear)")
    channels: Literal[1, 2, 3] = Field(default=3, description="1 grey, 3 RGB, 2 its first two: u and v of optical flow")
    mean: tuple[float, ...] = Field(default=(0.0,), description="per channel or one for all, on the 0..1 scale")
    std: tuple[float, ...] = Field(default=(1.0,), description="per channel or one for all, on the 0..1 scale")

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _fits(self) -> ImagePreprocess:
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"{name} has {len(getattr(self, name))} values; give 1 or {self.channels}")
        if min(self.std) <= 0:
            raise ValueError("std must be greater than 0")
        if min(self.size) < 1 or max(self.size) > 4096:
            raise ValueError(f"size is {list(self.size)}; each side must lie in 1..4096")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels, *self.size)


class FramesPreprocess(ImagePreprocess):
    """Evenly spaced frames [T, C, H, W] of a list of encoded images; too few frames are repeated."""

    num_frames: int = Field(ge=1, description="frames taken, evenly spaced, first and last included")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_frames, self.channels, *self.size)


class TextPreprocess(_Model):
    """Token ids [L]: hashed lower-cased words, or the pieces of a Hugging Face tokenizer; 0 pads.

    Encoders with pretrained weights need the tokenizer of their model. Where a tokenizer pads with another id than 0,
    the two are exchanged (data/tokens.py), so that 0 pads in every corpus.
    """

    max_length: int = Field(default=32, ge=1, description="words kept; pieces, with the special ones")
    vocabulary: int = Field(default=20000, ge=2, description="of hashed words: token ids lie in 1..vocabulary-1")
    tokenizer: str | None = Field(
        default=None,
        min_length=1,
        description="folder with a tokenizer (/path, s3://, or ./path from the card) or its name on the hub",
    )

    @model_validator(mode="after")
    def _one_vocabulary(self) -> TextPreprocess:
        if self.tokenizer is not None and "vocabulary" in self.model_fields_set:
            raise ValueError("a tokenizer has a vocabulary of its own; give tokenizer or vocabulary")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.max_length,)


class VectorPreprocess(_Model):
    """A feature vector [D]."""

    shape: tuple[int] | None = Field(default=None, description="[D]; null takes it from the train split")
    standardize: bool = Field(default=False, description="z-score per feature, with mean and std of the train split")


class SeriesPreprocess(_Model):
    """A multichannel series [T, C], stored flat, time first."""

    shape: tuple[int, int] = Field(description="[T, C]")
    standardize: bool = Field(default=False, description="z-score per channel, with mean and std of the train split")


class AudioModality(_Model):
    kind: Literal["audio"]
    column: str = Field(description="column of encoded bytes")
    encoding: Literal["wav", "flac", "ogg"] | None = Field(default=None, description="null accepts any of them")
    preprocess: AudioPreprocess = AudioPreprocess()


class ImageModality(_Model):
    kind: Literal["image"]
    column: str = Field(description="column of encoded bytes")
    encoding: Literal["png", "jpeg"] | None = Field(default=None, description="null accepts either")
    preprocess: ImagePreprocess


class FramesModality(_Model):
    kind: Literal["frames"]
    column: str = Field(description="column of lists of encoded images")
    encoding: Literal["png", "jpeg"] | None = Field(default=None, description="null accepts either")
    preprocess: FramesPreprocess


class TextModality(_Model):
    kind: Literal["text"]
    column: str = Field(description="column of strings, or of their UTF-8 bytes")
    pair: str | None = Field(default=None, min_length=1, description="column of a second text; needs a tokenizer")
    encoding: Literal["utf8"] = "utf8"
    preprocess: TextPreprocess = TextPreprocess()

    @model_validator(mode="after")
    def _tokenizer_for_a_pair(self) -> TextModality:
        if self.pair is not None and self.preprocess.tokenizer is None:
            raise ValueError("pair needs preprocess.tokenizer: hashed words know no second text")
        if self.pair == self.column:
            raise ValueError(f"pair and column are both {self.column!r}")
        return self


class VectorModality(_Model):
    kind: Literal["vector"]
    column: str | tuple[str, ...] = Field(description="one column of lists, or several columns of numbers")
    encoding: Literal["float32", "float64"] | None = Field(
        default=None, description="for the reader only; any number is read"
    )
    preprocess: VectorPreprocess = VectorPreprocess()


class SeriesModality(_Model):
    kind: Literal["series"]
    column: str = Field(description="column of flat lists of T * C numbers")
    encoding: Literal["float32", "float64"] | None = Field(
        default=None, description="for the reader only; any number is read"
    )
    preprocess: SeriesPreprocess


ModalityCard = Annotated[
    AudioModality | ImageModality | FramesModality | TextModality | VectorModality | SeriesModality,
    Field(discriminator="kind"),
]
AnyModality = AudioModality | ImageModality | FramesModality | TextModality | VectorModality | SeriesModality


class Carve(_Model):
    """A split taken out of another one: decided by sample ids, labels, groups and the seed alone."""

    source: Literal["train"] = Field(default="train", alias="from", description="the split it is taken from")
    fraction: float = Field(default=0.1, gt=0, lt=1, description="part of the source's rows")
    seed: int = Field(default=0, description="another seed carves other rows")
    group: str | None = Field(default=None, description="column whose rows stay together (speaker, clip, ...)")
    stratify: bool = Field(default=True, description="the fraction of every class, where groups allow it")


class SplitCard(_Model):
    """Where a split's rows are: files, or a part carved out of train."""

    files: tuple[str, ...] = Field(
        default=(), description="Parquet files or globs, relative to the card, absolute, or s3://"
    )
    where: dict[str, Any] = Field(default_factory=dict, description="keep rows whose column has this value (or one of)")
    expected: int | None = Field(default=None, ge=0, description="number of rows; checked on opening")
    sha256: dict[str, str] = Field(default_factory=dict, description="file name to SHA-256; checked by `corpora check`")
    carve: Carve | None = None

    @field_validator("files", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> SplitCard:
        if bool(self.files) == (self.carve is not None):
            raise ValueError("give either files or carve")
        if self.carve and self.where:
            raise ValueError("where goes with files, not with carve")
        return self


class Protocol(_Model):
    """What makes numbers of a corpus comparable: frames, spectrogram, splits, and what selects the epoch.

    Whatever it does not say is as on the card. A protocol is never changed: another one gets the next version.
    """

    description: str = Field(min_length=1, description="what is done, and where the published code does otherwise")
    source: tuple[str, ...] = Field(default=(), description="papers and code it is taken from")
    select_on: Literal["valid", "test"] = Field(
        default="valid",
        description="split that selects the epoch; test: as papers without a valid split do, so its accuracy is the "
        "best of all epochs and too high",
    )
    splits: dict[Literal["train", "valid", "test"], SplitCard] = Field(
        default_factory=dict, description="splits that are others than the card's"
    )
    preprocess: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="per modality, preprocessing that differs from the card's"
    )

    @field_validator("source", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_selection(self) -> Protocol:
        if self.select_on == "test" and "valid" in self.splits:
            raise ValueError("select_on: test makes test the valid split; leave splits.valid out")
        return self


class Card(_Model):
    """What a corpus is and where its parts are."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=64, description="lower case, one word")
    title: str = ""
    description: str = ""
    licence: str = Field(default="", description="of the data, not of the code")
    source: tuple[str, ...] = Field(default=(), description="where it comes from: addresses or words")
    citation: str = ""
    classes: tuple[str, ...] = Field(default=(), description="class names in label order")
    num_classes: int | None = Field(
        default=None, ge=2, description="instead of `classes`, for integer labels without names"
    )
    label: str = Field(default="label", description="column of integers, or of strings that are in `classes`")
    sample_id: str | None = Field(default=None, description="column; null makes ids from file names and row numbers")
    splits: dict[Literal["train", "valid", "test"], SplitCard]
    modalities: dict[str, ModalityCard] = Field(min_length=1)
    weak: str | None = Field(default=None, description="the modality that joint training usually leaves behind")
    protocols: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+-v[1-9][0-9]*$")], Protocol] = Field(
        default_factory=dict, description="by name and version, such as ogm_ge-v1"
    )

    _location: str = PrivateAttr("")
    _selects_on: Literal["valid", "test"] = PrivateAttr("valid")

    @field_validator("source", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("classes", mode="before")
    @classmethod
    def _as_names(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        if any(isinstance(v, bool) or v is None for v in value):
            raise ValueError("a class name is read as yes/no/null; put it in quotes")
        return tuple(str(v) for v in value)

    @model_validator(mode="after")
    def _consistent(self) -> Card:
        if bool(self.classes) == (self.num_classes is not None):
            raise ValueError("give either classes or num_classes")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("a class name is given twice")
        if self.classes and len(self.classes) < 2:
            raise ValueError("give at least two classes")
        if "train" not in self.splits:
            raise ValueError("splits has no train")
        if self.splits["train"].carve:
            raise ValueError("splits.train cannot be carved; give its files")
        for name in self.modalities:
            if name in (LABEL, ROW, "fused") or not name.isidentifier():
                raise ValueError(f"modalities.{name}: the name must be one word, and not label, row or fused")
        if self.weak is not None and self.weak not in self.modalities:
            raise ValueError(f"weak: {_no_modality(self, self.weak)}")
        for name, protocol in self.protocols.items():
            if protocol.select_on == "test" and "test" not in self.splits | protocol.splits:
                raise ValueError(f"protocols.{name} selects on test, and there is no such split")
            try:
                self.under(name)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self

    @property
    def location(self) -> str:
        """Path or URI of the file this card was read from; empty for a card made in code."""
        return self._location

    @property
    def selects_on(self) -> Literal["valid", "test"]:
        """The rows that the valid split holds: its own, or those of test (`Protocol.select_on`)."""
        return self._selects_on

    @property
    def folder(self) -> str:
        return self._location.rsplit("/", 1)[0] if "/" in self._location else "."

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes or tuple(str(k) for k in range(self.num_classes or 0))

    def at(self, location: str) -> Card:
        """The same card as if read from `location`, which relative file names are resolved against."""
        copy = self.model_copy()
        copy._location = location
        return copy

    def under(self, protocol: str | None = None, preprocess: Mapping[str, Mapping[str, Any]] | None = None) -> Card:
        """The card as a protocol has it, and with further changes of preprocessing; null goes back to the default."""
        card = self
        if protocol is not None:
            if protocol not in self.protocols:
                raise ConfigError(
                    f"corpus {self.name} has no protocol '{protocol}'{did_you_mean(protocol, self.protocols)}; "
                    f"it has: {', '.join(self.protocols) or 'none'}"
                )
            chosen = self.protocols[protocol]
            splits = {**self.splits, **chosen.splits}
            if chosen.select_on == "test":
                splits["valid"] = splits["test"]
            card = self.model_copy(update={"splits": splits})
            card._selects_on = chosen.select_on
            card = card._preprocessed(chosen.preprocess, f"protocols.{protocol}.preprocess")
        return card._preprocessed(preprocess or {}, "preprocess")

    def _preprocessed(self, changes: Mapping[str, Mapping[str, Any]], place: str) -> Card:
        modalities = dict(self.modalities)
        for name, values in changes.items():
            if name not in modalities:
                raise ConfigError(f"{place}.{name}: {_no_modality(self, name)}")
            old = modalities[name]
            merged = {**old.preprocess.model_dump(exclude_unset=True), **values}
            given = {"preprocess": {key: value for key, value in merged.items() if value is not None}}
            try:
                modalities[name] = type(old).model_validate(old.model_dump(exclude_unset=True) | given)
            except ValidationError as error:
                raise ConfigError(f"{place}.{name}: {_preprocess_problems(error, old)}") from None
        return self.model_copy(update={"modalities": modalities})

    def select(self, modalities: Iterable[str] | None) -> dict[str, AnyModality]:
        """The named modalities, in the order given; all of them for None."""
        names = tuple(self.modalities) if modalities is None else tuple(modalities)
        for name in names:
            if name not in self.modalities:
                raise ConfigError(_no_modality(self, name))
        if not names:
            raise ConfigError(f"no modalities chosen; corpus {self.name} has: {', '.join(self.modalities)}")
        if len(set(names)) != len(names):
            raise ConfigError(f"a modality is chosen twice: {', '.join(names)}")
        return {name: self._placed(self.modalities[name]) for name in names}

    def _placed(self, modality: AnyModality) -> AnyModality:
        """The modality with a tokenizer's ./folder counted from the card."""
        if not isinstance(modality, TextModality):
            return modality
        given = modality.preprocess.tokenizer
        if given is None or not given.startswith(("./", "../")):
            return modality
        scheme, slashes, path = self.folder.rpartition("://")
        place = scheme + slashes + posixpath.normpath(posixpath.join(path, given))
        if not slashes:
            place = os.path.abspath(place)
        return modality.model_copy(update={"preprocess": modality.preprocess.model_copy(update={"tokenizer": place})})


def _no_modality(card: Card, name: str) -> str:
    known = did_you_mean(name, card.modalities)
    return f"corpus {card.name} has no modality '{name}'{known}; it has: {', '.join(card.modalities)}"


def _preprocess_problems(error: ValidationError, modality: AnyModality) -> str:
    """What is wrong with changed preprocessing, in one line."""
    known = type(modality.preprocess).model_fields
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"][1:])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key '{key}'{did_you_mean(key, known)}; known keys: {', '.join(known)}")
        else:
            lines.append(f"{key or 'preprocess'}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)


def card_lines(card: Card) -> list[str]:
    """What a card says, for the terminal."""
    lines = [f"{card.name}: {card.title}" if card.title else card.name]
    lines += [*_folded(card.description, ""), ""]
    facts = {"licence": card.licence, "source": ", ".join(card.source), "citation": card.citation}
    facts["classes"] = f"{len(card.class_names)}: {', '.join(card.class_names)}"
    for name, text in facts.items():
        lines += _folded(text, " " * 10, f"{name:9} ") if text else []
    for name, split in card.splits.items():
        carve = split.carve
        text = ", ".join(split.files)
        if carve is not None:
            text = f"{carve.fraction:g} of {carve.source}" + (f", by {carve.group}" if carve.group else "")
        lines.append(f"{name:9} {text}" + (f", {split.expected} rows" if split.expected is not None else ""))
    for name, modality in card.modalities.items():
        settings = modality.preprocess.model_dump(exclude_none=True, mode="json")
        text = ", ".join(f"{key} {value}" for key, value in settings.items())
        shape = modality.preprocess.shape
        size = " x ".join(map(str, shape)) if shape else "as stored"
        weak = ", weak in joint training" if name == card.weak else ""
        lines += ["", f"modality {name}: {modality.kind}, {size}{weak}", *_folded(text, "  ")]
    for name, protocol in card.protocols.items():
        lines += ["", f"protocol {name}" + (" (selects on test)" if protocol.select_on == "test" else "")]
        lines += _folded(protocol.description, "  ")
        lines += _folded(", ".join(protocol.source), " " * 10, "  source: ") if protocol.source else []
    return lines


def _folded(text: str, indent: str, first: str | None = None) -> list[str]:
    """Lines of text; the first begins with `first`."""
    begin = indent if first is None else first
    words = " ".join(text.split())
    return textwrap.wrap(words, 110, initial_indent=begin, subsequent_indent=indent, break_on_hyphens=False)


def corpora_home() -> str:
    """The folder of prepared corpora: $COUNTERPOISE_HOME/corpora, by default ~/.cache/counterpoise/corpora."""
    home = os.environ.get("COUNTERPOISE_HOME")
    if not home:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        home = os.path.join(cache, "counterpoise")
    return storage.join(home, "corpora")


def prepared_corpora() -> list[str]:
    """Names of the corpora under `corpora_home()`, sorted."""
    home = corpora_home()
    return [
        n for n in storage.list_names(home) if not n.startswith(".") and storage.exists(storage.join(home, n, CARD))
    ]


def load_card(place: str | os.PathLike[str]) -> Card:
    """The card named by a corpus name, a folder, or a `corpus.yaml` (local or s3://)."""
    text = os.fspath(place)
    if text.endswith((".yaml", ".yml")):
        location = text
    elif "/" in text or os.sep in text or text in (".", ".."):
        location = storage.join(text, CARD)
    else:
        location = storage.join(corpora_home(), text, CARD)
        if not storage.exists(location):
            raise ConfigError(_unknown_corpus(text))
    if not storage.exists(location):
        raise ConfigError(f"{location}: no such file; give a corpus name, or a folder that holds a {CARD}")
    if storage.is_local(location):
        location = str(Path(location.removeprefix("file://")).absolute())
    return parse_card(storage.read_bytes(location), location)


def _unknown_corpus(name: str) -> str:
    from counterpoise.data.recipes import recipe_names

    recipes = recipe_names()
    if name in recipes:
        return f"corpus {name} is not prepared; run: counterpoise corpora prepare {name}"
    known = sorted({*recipes, *prepared_corpora()})
    return (
        f"corpus is '{name}'{did_you_mean(name, known)}; known corpora: {', '.join(known) or 'none'}. "
        f"A folder is given with a slash, as in ./{name}"
    )


def parse_card(data: bytes, location: str) -> Card:
    """The card in the bytes of a `corpus.yaml`; `location` is named in errors and resolves relative files."""
    if len(data) > MAX_YAML_BYTES:
        raise ConfigError(f"{location}: {len(data)} bytes; a card has at most {MAX_YAML_BYTES}")
    try:
        raw = read_yaml(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise ConfigError(f"{location}: not UTF-8 text") from None
    except NotPlain as error:
        raise ConfigError(f"{location}: not readable as YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{location}: a card is a mapping with keys such as name, splits and modalities")
    try:
        card = Card.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explained(error, location)) from None
    return card.at(location)


_KINDS: Mapping[str, type[_Model]] = {
    "audio": AudioModality,
    "image": ImageModality,
    "frames": FramesModality,
    "text": TextModality,
    "vector": VectorModality,
    "series": SeriesModality,
}


def _allowed(loc: tuple[Any, ...]) -> Iterable[str]:
    """Keys that would be right beside the wrong key at `loc`."""
    if loc[0] == "modalities" and len(loc) > 3:
        model: Any = _KINDS[loc[2]]
        return (model.model_fields["preprocess"].annotation if len(loc) > 4 else model).model_fields
    if loc[0] == "splits" and len(loc) > 2:
        model = Carve if loc[2] == "carve" and len(loc) > 3 else SplitCard
        return [field.alias or name for name, field in model.model_fields.items()]
    return SPLITS if loc[0] == "splits" else Card.model_fields


def _explained(error: ValidationError, location: str) -> str:
    lines = []
    for problem in error.errors():
        loc = problem["loc"]
        shown = [str(p) for i, p in enumerate(loc) if p != "[key]" and not (loc[0] == "modalities" and i == 2)]
        key = ".".join(shown) or "card"
        given = problem.get("input")
        if problem["type"] == "extra_forbidden":
            known = list(_allowed(loc))
            lines.append(f"{key}: unknown key{did_you_mean(loc[-1], known)}; known keys: {', '.join(known)}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: missing")
        elif problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
            kind = given.get("kind") if isinstance(given, dict) else given
            lines.append(f"{key}.kind is '{kind}'{did_you_mean(kind, _KINDS)}; known kinds: {', '.join(_KINDS)}")
        elif problem["type"] == "literal_error" and loc[0] == "splits" and len(loc) < 4:
            lines.append(f"{key}: no such split{did_you_mean(given, SPLITS)}; splits are: {', '.join(SPLITS)}")
        elif problem["type"] == "value_error":
            lines.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"{key} is {given!r:.80}: {problem['msg'][0].lower()}{problem['msg'][1:]}")
    return f"{location}: " + "; ".join(lines)


def resolve(card: Card, pattern: str) -> str:
    """A file or glob of the card as an absolute path or URI."""
    if "://" in pattern or os.path.isabs(pattern):
        return pattern
    return storage.join(card.folder, pattern)


def split_card(card: Card, split: str) -> SplitCard | None:
    if split not in SPLITS:
        raise DataError(f"no split is called '{split}'{did_you_mean(split, SPLITS)}; splits are: {', '.join(SPLITS)}")
    return card.splits.get(split)  # type: ignore[call-overload]
