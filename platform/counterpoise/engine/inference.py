"""Exported models: loading one, and predicting with it. Needs neither the run nor the corpus, and no Ray.

    model = load_model("exported")
    found = model.predict({"audio": "clip.wav", "visual": "frame.png"})
    found.name, found.probabilities["fused"]

Files are compared with SHA256SUMS before anything is made of them; weights are safetensors, the rest is JSON, and
names in it are looked up in the tables of methods and encoders.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from counterpoise import storage
from counterpoise.config import Experiment
from counterpoise.contracts import Batch, ConfigError, CounterpoiseError, DataError, InputSpec, RefusedError
from counterpoise.data.card import AnyModality, ModalityCard, TextModality
from counterpoise.data.decode import DecodeError, Decoder, Stats, decode_cell, input_spec
from counterpoise.data.transforms import to_tensor
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.evaluate import predictions
from counterpoise.engine.job import chosen_device
from counterpoise.engine.loop import make_method, make_network
from counterpoise.methods import Method
from counterpoise.models.network import MultimodalNet
from counterpoise.plain import read_json
from counterpoise.wording import did_you_mean

CONFIG, WEIGHTS, README, SUMS = "config.json", "model.safetensors", "README.md", "SHA256SUMS"
FORMAT = 1
FUSED = "fused"
_FILE = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9_.-]*/)?[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Facts:
    """What methods and networks are made from; the part of a DataSource that is known without data."""

    modalities: tuple[str, ...]
    classes: tuple[str, ...]
    inputs: Mapping[str, InputSpec]


@dataclass(frozen=True)
class Prediction:
    """What a model says of one sample.

    probabilities: "fused" and every modality that was there, each [K] in the order of `classes`.
    missing: the modalities that were not there.
    """

    probabilities: dict[str, np.ndarray]
    classes: tuple[str, ...] = field(repr=False)
    missing: tuple[str, ...] = ()

    @property
    def label(self) -> int:
        """The number of the most probable class."""
        return int(self.probabilities[FUSED].argmax())

    @property
    def name(self) -> str:
        """The name of the most probable class."""
        return self.classes[self.label]

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """The most probable classes with their fused probabilities."""
        fused = self.probabilities[FUSED]
        return [(self.classes[k], float(fused[k])) for k in np.argsort(-fused, kind="stable")[:count]]


class Model:
    """A trained network with its preprocessing. Made by `load_model`.

    config: the content of config.json: experiment, decisions, corpus, metrics and where it comes from.
    Safe to call from one thread at a time.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        decoder: Decoder,
        facts: Facts,
        method: Method[Any],
        net: MultimodalNet,
        device: torch.device,
        digest: str,
    ) -> None:
        self.config = dict(config)
        self.modalities, self.classes, self.inputs = facts.modalities, facts.classes, dict(facts.inputs)
        self.decoder = decoder
        self.method = method
        self.net = net
        self.device = device
        self.digest = digest  # of SHA256SUMS: two models with the same are the same

    def __repr__(self) -> str:
        what = f"{self.config['method']} on {self.config['corpus']['name']}"
        return f"Model({what}: {', '.join(self.modalities)} -> {len(self.classes)} classes)"

    # --- tensors

    def __call__(self, batch: Mapping[str, Tensor | None], missing: Collection[str] = ()) -> dict[str, Tensor]:
        """Probabilities [B, K], "fused" and per modality, of preprocessed tensors [B, ...] (shapes as `inputs` says).

        missing: modalities that are not there; those that `batch` lacks or has as None are missing too.
        """
        there = {m: x for m in self.modalities if (x := batch.get(m)) is not None and m not in missing}
        if unknown := {*batch, *missing} - {*self.modalities, "label", "row"}:
            raise ConfigError(self._no_modality(sorted(unknown)[0]))
        for name, tensor in there.items():
            if tuple(tensor.shape[1:]) != tuple(self.inputs[name].shape):
                raise DataError(
                    f"{name}: a tensor {list(tensor.shape)}; the model takes [B, "
                    f"{', '.join(map(str, self.inputs[name].shape))}]"
                )
        if len({len(tensor) for tensor in there.values()}) > 1:
            raise DataError(f"tensors of different lengths: { {m: len(x) for m, x in there.items()} }")
        gone = frozenset(self.modalities) - set(there)
        size = len(next(iter(there.values()))) if there else 0
        logits = self.logits(there, [gone] * size)
        return {name: torch.softmax(z, dim=1) for name, z in logits.items() if name not in gone}

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Tensor], missing: Sequence[frozenset[str]]) -> dict[str, Tensor]:
        """Logits [B, K] on the CPU, "fused" and per modality, where each row has its own missing modalities.

        Rows of `batch` for what is missing are not looked at; a modality that all rows lack may be left out. A
        modality's logits are NaN in rows without it.
        """
        num_rows, num_classes = len(missing), len(self.classes)
        names = (FUSED, *self.modalities)
        tables = {name: torch.full((num_rows, num_classes), float("nan")) for name in names}
        for gone in sorted(set(missing), key=sorted):
            if len(gone) == len(self.modalities):
                raise DataError(f"all modalities are missing; give one of {', '.join(self.modalities)}")
            rows = torch.tensor([i for i, other in enumerate(missing) if other == gone])
            part: Batch = {}
            for name in self.modalities:
                if name in gone:  # only its shape is used
                    spec = self.inputs[name]
                    part[name] = torch.zeros(len(rows), *spec.shape, dtype=torch.int64 if spec.kind == "text" else None)
                else:
                    part[name] = batch[name][rows]
                part[name] = part[name].to(self.device)
            out = self.method.predict(self.net, part, gone)
            for name, z in predictions(self.net, self.method, out).items():
                tables[name][rows] = z.float().cpu()
        return tables

    # --- samples

    def predict(
        self, samples: Mapping[str, Any] | Sequence[Mapping[str, Any]], batch_size: int = 64
    ) -> Prediction | list[Prediction]:
        """What the model says of one sample, or of each of several.

        A sample has a value per modality:
            audio           path, URI or bytes of a WAV, FLAC or Ogg file; samples [n] or [n, channels] (-1..1) at the
                            model's own rate, or (samples, rate)
            image           path, URI or bytes of a PNG or JPEG file; a PIL image; pixels uint8 [H, W] or [H, W, 3]
            frames          a list of such images
            text            a string, or (text, pair) for models of pairs
            vector, series  numbers [D], [T, C]
        A modality that is None or absent is missing. The prediction is then the method's without it: methods that add
        or average the terms of modalities do so over those that are there, a head over joined features gets zeros in
        its place, AGM inputs of zeros. It is only as good as what is left: `counterpoise evaluate RUN --missing each`
        measures it.
        """
        single = isinstance(samples, Mapping)
        rows: Sequence[Mapping[str, Any]] = [samples] if isinstance(samples, Mapping) else samples
        found: list[Prediction] = []
        for start in range(0, len(rows), batch_size):
            cells = [self._compact(row, start + i, single) for i, row in enumerate(rows[start : start + batch_size])]
            gone = [frozenset(self.modalities) - set(row) for row in cells]
            tables = {name: z.numpy() for name, z in self.logits(self.tensors(cells), gone).items()}
            found += self.rows(tables, gone)
        return found[0] if single else found

    def tensors(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
        """Tensors [B, ...] of compact arrays, by row and modality; zeros for what a row lacks."""
        batch = {}
        for name, modality in self.decoder.modalities.items():
            have = [row[name] for row in rows if name in row]
            if have:
                empty = np.zeros_like(have[0])
                batch[name] = to_tensor(np.stack([row.get(name, empty) for row in rows]), modality)
        return batch

    def rows(self, logits: Mapping[str, np.ndarray], missing: Sequence[frozenset[str]]) -> list[Prediction]:
        """Predictions of tables of logits [B, K]."""
        tables = {name: softmax(z) for name, z in logits.items()}
        return [
            Prediction(
                {name: table[i] for name, table in tables.items() if name not in gone},
                self.classes,
                tuple(m for m in self.modalities if m in gone),
            )
            for i, gone in enumerate(missing)
        ]

    def _compact(self, sample: Mapping[str, Any], number: int, single: bool) -> dict[str, np.ndarray]:
        if not isinstance(sample, Mapping):
            raise ConfigError(f"a sample is a mapping from modality to value, not {type(sample).__name__}")
        result = {}
        for name, value in sample.items():
            if name not in self.modalities:
                raise ConfigError(self._no_modality(name))
            if value is None:
                continue
            modality = self.decoder.modalities[name]
            try:
                result[name] = decode_cell(_cell(value, modality), modality, self.decoder.stats.get(name))
            except DecodeError as error:
                raise DataError(f"{'' if single else f'sample {number}, '}{name}: {error}") from None
        if not result:
            raise DataError(f"all modalities are missing; give one of {', '.join(self.modalities)}")
        return {m: result[m] for m in self.modalities if m in result}

    def _no_modality(self, name: str) -> str:
        known = f"{did_you_mean(name, self.modalities)}; it has: {', '.join(self.modalities)}"
        return f"the model has no modality {name!r}{known}"


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float32 of logits [B, K]; rows of NaN stay NaN."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)


# --- values that people have, as the cells that are decoded


def _cell(value: Any, modality: AnyModality) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    match modality.kind:
        case "audio":
            return _sound(value, modality.preprocess.sample_rate)
        case "image":
            return _picture(value)
        case "frames":
            if isinstance(value, str | bytes | os.PathLike):
                raise DecodeError("one file instead of a list of images")
            return [_picture(frame) for frame in value]
        case "text":
            return list(value) if isinstance(value, tuple) else value
        case _:
            return np.asarray(value, dtype=np.float64).reshape(-1)


def _read(value: str | os.PathLike[str]) -> bytes:
    return storage.read_bytes(os.fspath(value))


def _sound(value: Any, rate: int) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | os.PathLike):
        return _read(value)
    import soundfile

    if isinstance(value, tuple):
        value, rate = value
    wave = np.asarray(value, dtype=np.float32)
    if wave.ndim not in (1, 2) or wave.size == 0:
        raise DecodeError(f"samples {list(wave.shape)} instead of [n] or [n, channels]")
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, int(rate), format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def _picture(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | os.PathLike):
        return _read(value)
    from PIL import Image

    if not isinstance(value, Image.Image):
        pixels = np.asarray(value)
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
            raise DecodeError(f"pixels {pixels.dtype} {list(pixels.shape)} instead of uint8 [H, W] or [H, W, 3]")
        value = Image.fromarray(pixels)
    buffer = io.BytesIO()
    value.save(buffer, "PNG")
    return buffer.getvalue()


# --- loading


def load_model(place: str | os.PathLike[str], device: str = "cpu") -> Model:
    """The model that `counterpoise export` wrote to a folder or s3:// prefix. device: cpu, cuda or auto.

    RefusedError if a file is not what SHA256SUMS says, or the model is of a later format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    root = storage.local_path(os.fspath(place)) if storage.is_local(os.fspath(place)) else os.fspath(place)
    shown = storage.show(root)
    target = torch.device(chosen_device(device))
    sums = _sums(root)
    contents = {name: _verified(root, name, digest) for name, digest in sums.items()}
    try:
        config = read_json(contents[CONFIG])
        if not isinstance(config, dict) or config.get("model_type") != "counterpoise":
            raise RefusedError(f"{shown}/{CONFIG}: no model of Counterpoise (model_type is not counterpoise)")
        if config["format"] > FORMAT:
            raise RefusedError(
                f"{shown} has format {config['format']}, this version reads up to {FORMAT}; update counterpoise "
                f"(it was made by {config.get('library_version', 'a later version')})"
            )
        experiment, decoder, facts = described(config, root)
    except CounterpoiseError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError, RecursionError) as error:
        raise RefusedError(f"{shown}/{CONFIG} is damaged: {_line(error)}; export the run again") from None
    made: Any = facts  # of a DataSource, only what Facts has is looked at
    method = make_method(experiment, made, SingleComm())
    net = make_network(experiment, made, method, pretrained=False)
    try:
        net.head.restore(config["architecture"])
        net.load_state_dict(load(contents[WEIGHTS]))
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"{shown}/{WEIGHTS} does not fit {CONFIG}: {_line(error)}; export the run again") from None
    net.to(target).eval().requires_grad_(False)
    digest = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    return Model(config, decoder, facts, method, net, target, digest)


def described(config: Mapping[str, Any], root: str) -> tuple[Experiment, Decoder, Facts]:
    """The experiment, preprocessing, and inputs that a config.json describes; its files lie below `root`."""
    modalities: dict[str, AnyModality] = {}
    stats: dict[str, Stats] = {}
    experiment = json.loads(json.dumps(config["experiment"]))
    kind: TypeAdapter[AnyModality] = TypeAdapter(ModalityCard)
    for name, described in config["modalities"].items():
        modality = kind.validate_python(described["card"])
        if isinstance(modality, TextModality) and modality.preprocess.tokenizer is not None:
            place = _inside(root, modality.preprocess.tokenizer)
            preprocess = modality.preprocess.model_copy(update={"tokenizer": place})
            modality = modality.model_copy(update={"preprocess": preprocess})
        modalities[name] = modality
        if described["stats"] is not None:
            stats[name] = Stats.from_json(described["stats"])
        encoder = experiment["modalities"][name]
        if encoder.get("model", "").startswith("./"):
            encoder["model"] = _inside(root, encoder["model"])
    inputs = {name: input_spec(modality, stats.get(name)) for name, modality in modalities.items()}
    for name, spec in inputs.items():
        expected = config["modalities"][name]["input"]
        if spec_json(spec) != expected:
            raise RefusedError(f"modality {name} is read as {spec_json(spec)}, the model was trained on {expected}")
    facts = Facts(tuple(modalities), tuple(config["classes"]), inputs)
    return Experiment(**experiment), Decoder(modalities, stats), facts


def spec_json(spec: InputSpec) -> dict[str, Any]:
    return {
        "kind": spec.kind,
        "shape": list(spec.shape),
        "vocabulary": spec.vocabulary,
        "tokenizer": spec.tokenizer,
        "separator": spec.separator,
    }


def sums_text(digests: Mapping[str, str]) -> str:
    """The content of SHA256SUMS, as `sha256sum --check` reads it."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def read_sums(text: str) -> dict[str, str]:
    """{file: digest} of SHA256SUMS; ValueError if a line is none."""
    sums = {}
    for line in text.removesuffix("\n").split("\n"):
        digest, _, name = line.partition("  ")
        if not re.fullmatch(r"[0-9a-f]{64}", digest) or not _FILE.fullmatch(name):
            raise ValueError(f"a line reads {line[:100]!r}")
        sums[name] = digest
    return sums


def _sums(root: str) -> dict[str, str]:
    place = storage.join(root, SUMS)
    if storage.exists(storage.join(root, "run.json")):
        raise DataError(
            f"{storage.show(root)} is a run, not an exported model; export it: counterpoise export RUN --out DIR"
        )
    if not storage.exists(place):
        raise DataError(f"{storage.show(root)} holds no exported model: there is no {SUMS}")
    try:
        sums = read_sums(storage.read_text(place))
    except ValueError as error:
        raise RefusedError(f"{storage.show(place)} is damaged: {error}; export the run again") from None
    for name in (CONFIG, WEIGHTS):
        if name not in sums:
            raise RefusedError(f"{storage.show(place)} does not list {name}; export the run again")
    return sums


def _verified(root: str, name: str, digest: str) -> bytes:
    place = storage.join(root, name)
    try:
        data = storage.read_bytes(place)
    except DataError:
        raise RefusedError(f"{storage.show(place)} is missing, {SUMS} lists it; copy the folder again") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise RefusedError(f"{storage.show(place)} is not what {SUMS} says; copy the folder again, or export anew")
    return data


def _inside(root: str, name: str) -> str:
    """The place of `./name` of a config.json; only folders right below the model's own."""
    match = re.fullmatch(r"\./([A-Za-z0-9_-]+)", name)
    if match is None:
        raise ValueError(f"{name!r} is no folder of the model")
    return storage.join(root, match[1])


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
