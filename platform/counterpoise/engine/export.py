"""Exporting a run: the selected weights with all that is needed to predict with them, and a model card.

    <out>/model.safetensors   weights of encoders and head
          config.json         experiment, decisions, classes, modalities with preprocessing, where it comes from
          README.md           the model card
          encoder-<modality>/, tokenizer-<modality>/   configuration and tokenizer of Hugging Face models
          SHA256SUMS          written last: a folder without it is no model

`engine/inference.py` reads it back.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Literal

import yaml

from counterpoise import hub, storage
from counterpoise.config import Experiment, parse_yaml, resolve
from counterpoise.contracts import ConfigError, DataError, DataSource, Record, RefusedError
from counterpoise.data.card import Card, TextModality
from counterpoise.data.loader import LocalData
from counterpoise.engine import checkpoint
from counterpoise.engine.again import selected
from counterpoise.engine.inference import CONFIG, FORMAT, FUSED, README, SUMS, WEIGHTS, load_model, spec_json, sums_text
from counterpoise.engine.job import open_data
from counterpoise.engine.loop import encoder_configs
from counterpoise.engine.run import RunFolder, redact
from counterpoise.methods import METHODS
from counterpoise.models.encoders import BERT

Epoch = Literal["best", "last"]


def export_run(run: str, out: str, epoch: Epoch | None = None) -> dict[str, Any]:
    """Write the model of a run to a folder or s3:// prefix that holds nothing yet; the content of its config.json.

    epoch: best, the selected one (what a finished run gives without saying), or last, the newest checkpoint.
    """
    folder = RunFolder.open(run)
    if epoch not in (None, "best", "last"):
        raise ConfigError(f"--epoch is {epoch!r}; choose best or last")
    state = folder.state()
    if state != "finished" and epoch is None:
        raise RefusedError(
            f"run {folder.name} is {folder.describe()}; finish it with --resume, or say --epoch best (best so far) or "
            "--epoch last"
        )
    if (storage.is_local(out) and os.path.isfile(storage.local_path(out))) or storage.list_names(out):
        raise RefusedError(f"{storage.show(out)} is not empty; give another --out, nothing is overwritten")
    weights, about = _last(folder) if epoch == "last" else _best(folder)
    experiment, _ = resolve(parse_yaml(folder.experiment_text, folder.at("experiment.yaml")))
    data = open_data(experiment, state=folder.manifest.get("preprocessing"))
    try:
        assert isinstance(data, LocalData)
        known = folder.manifest.get("data_fingerprint")
        if known and known != data.fingerprint:
            raise RefusedError(
                f"corpus {experiment.corpus} is not the one run {folder.name} was trained on (fingerprint "
                f"{str(known)[:12]}, now {data.fingerprint[:12]}), so its preprocessing and classes cannot be trusted"
            )
        content = _config(folder, experiment, data, about)
        files = _pieces(content, experiment, data, out)
    finally:
        data.close()
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    content["num_parameters"] = sum(tensor.numel() for tensor in tensors.values())
    files[WEIGHTS] = _put(out, WEIGHTS, save(tensors, metadata={"format": "pt"}))
    content["files"] = dict(files)
    text = json.dumps(content, indent=2, sort_keys=False, ensure_ascii=False) + "\n"
    files[CONFIG] = _put(out, CONFIG, text.encode())
    files[README] = _put(out, README, model_card(content, out).encode())
    storage.write_text(storage.join(out, SUMS), sums_text(files))
    load_model(out)  # what was written is what can be read
    return content


def _put(out: str, name: str, data: bytes) -> str:
    storage.write_bytes(storage.join(out, name), data)
    return hashlib.sha256(data).hexdigest()


def _best(folder: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights of the selected epoch, and what is known about them."""
    best = selected(folder)
    state, records = best.state, folder.records()
    epoch = int(state["epoch"])
    summary = folder.read_json("summary.json") if storage.exists(folder.at("summary.json")) else None
    about = {
        "epoch": epoch,
        "selection": (summary or {}).get("selection", "best so far, the run is unfinished"),
        "architecture": state["architecture"],
        "classifiers": state["classifiers"],
        "decisions": [_decision(r) for r in records if r["kind"] == "decision" and r["epoch"] < epoch],
        "metrics": _tested(summary) if summary else _while_training(records, epoch),
    }
    return best.tensors["model"], about


def _last(folder: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights of the newest checkpoint, and what is known about them."""
    last = checkpoint.latest(folder.checkpoints)
    if last is None:
        raise DataError(f"run {folder.name} has no checkpoint yet")
    progress, records = last.state["progress"], folder.records()
    whole = progress["batch"] == 0
    epoch = int(progress["epoch"]) - 1
    if whole and epoch < 1:
        raise DataError(f"run {folder.name} has not finished an epoch yet")
    about = {
        "epoch": epoch if whole else epoch + 1,
        "selection": "last epoch" if whole else f"last checkpoint, after batch {progress['batch']} of its epoch",
        "architecture": last.state["architecture"],
        "classifiers": (progress["decisions"][-1]["classifiers"] if progress["decisions"] else None)
        or next((r["classifiers"] for r in reversed(records) if r["kind"] == "epoch"), {}),
        "decisions": [_decision(r) for r in progress["decisions"]],
        "metrics": _while_training(records, epoch) if whole else None,
    }
    return last.tensors["model"], about


def _decision(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("epoch", "action", "add", "inputs", "classifiers") if key in record}


def _tested(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a finished run measured at the selected epoch."""
    split = next(name for name in ("test", "valid", "train") if "samples" in (summary.get(name) or {}))
    found = summary[split]
    return {"split": split, **{key: found[key] for key in ("samples", "accuracy", "map", "macro_f1", "gap")}}


def _while_training(records: list[Record], epoch: int) -> dict[str, Any] | None:
    """Accuracies on valid after an epoch (or on train, where there is no valid split)."""
    for record in records:
        if record["kind"] == "epoch" and record["epoch"] == epoch:
            split = "valid" if record["valid"] else "train"
            found = record[split]
            return {"split": split, "samples": found["samples"], "accuracy": found["accuracy"], "gap": record["gap"]}
    return None


def _config(folder: RunFolder, experiment: Experiment, data: LocalData, about: Mapping[str, Any]) -> dict[str, Any]:
    card, manifest = data.card, folder.manifest
    method = METHODS[experiment.method_name]
    chosen = {name: encoder.model_dump(mode="json") for name, encoder in encoder_configs(experiment, data).items()}
    return {
        "model_type": "counterpoise",
        "format": FORMAT,
        "library_name": "counterpoise",
        "library_version": metadata.version("counterpoise"),
        "method": experiment.method_name,
        "paper": method.paper,
        "classes": list(data.classes),
        "modalities": {
            name: {
                "card": card.modalities[name].model_dump(mode="json"),
                "stats": data.preprocessing_state().get(name),
                "input": spec_json(data.inputs[name]),
            }
            for name in data.modalities
        },
        "columns": {"label": card.label, "sample_id": card.sample_id},
        **about,
        "experiment": {**experiment.to_json(), "corpus": card.name, "modalities": chosen},
        "corpus": _corpus(card, data),
        "run": {
            "name": folder.name,
            "digest": experiment.digest,
            "seed": experiment.seed,
            "created": manifest.get("created"),
            "commit": manifest.get("commit"),
            "versions": manifest.get("versions", {}),
        },
    }


def _corpus(card: Card, data: DataSource) -> dict[str, Any]:
    about = {"title": card.title, "licence": card.licence, "source": list(card.source), "citation": card.citation}
    samples = {split: data.num_samples(split) for split in ("train", "valid", "test")}
    return redact({"name": card.name, **about, "fingerprint": data.fingerprint, "samples": samples})


def _pieces(content: dict[str, Any], experiment: Experiment, data: LocalData, out: str) -> dict[str, str]:
    """Copy tokenizers and configurations of Hugging Face models, and let `content` refer to the copies; digests."""
    digests: dict[str, str] = {}

    def copied(model: str, kind: hub.Kind, below: str) -> str:
        place = storage.join(out, below)
        for name in hub.copy(model, kind, place):
            digests[f"{below}/{name}"] = hashlib.sha256(storage.read_bytes(storage.join(place, name))).hexdigest()
        return f"./{below}"

    for name, modality in data.decoder.modalities.items():
        if isinstance(modality, TextModality) and modality.preprocess.tokenizer is not None:
            described = content["modalities"][name]["card"]["preprocess"]
            described["tokenizer"] = copied(modality.preprocess.tokenizer, "tokenizer", f"tokenizer-{name}")
            described.pop("vocabulary", None)  # the tokenizer's own
        encoder = content["experiment"]["modalities"][name]
        if encoder["name"] in ("bert", "transformers"):
            encoder["model"] = copied(encoder.get("model") or BERT, "configuration", f"encoder-{name}")
        encoder.pop("weights", None)  # they are in model.safetensors
    return digests


# --- the model card


def model_card(content: Mapping[str, Any], out: str) -> str:
    """README.md as Hugging Face has it: front matter, then what it is, where from, how good, and how to load it."""
    corpus, metrics, run = content["corpus"], content["metrics"], content["run"]
    modalities, corpus_title = list(content["modalities"]), corpus["title"] or corpus["name"]
    title = f"{content['method']} on {corpus['name']}"
    tags = ["counterpoise", "multimodal", "balanced-multimodal-learning", content["method"]]
    tags += sorted({described["card"]["kind"] for described in content["modalities"].values()})
    front: dict[str, Any] = {
        "license": "other",
        "license_name": "as-the-training-data",
        "library_name": "counterpoise",
        "tags": tags,
        "datasets": [corpus["name"]],
        "metrics": ["accuracy"],
    }
    if metrics:
        found = [
            {"type": "accuracy", "name": f"accuracy ({name})", "value": round(value, 4)}
            for name, value in ((name, metrics["accuracy"][name]) for name in (FUSED, *modalities))
        ]
        front["model-index"] = [
            {
                "name": title,
                "results": [
                    {
                        "task": {"type": "other", "name": "multimodal classification"},
                        "dataset": {
                            "name": corpus_title,
                            "type": corpus["name"],
                            "split": metrics["split"],
                        },
                        "metrics": found,
                    }
                ],
            }
        ]
    folder = out.rstrip("/").rsplit("/", 1)[-1]
    kinds = {name: described["card"]["kind"] for name, described in content["modalities"].items()}
    example = ", ".join(f'"{name}": {_EXAMPLES[kind]}' for name, kind in kinds.items())
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {_text(title)}",
        "",
        f"A classifier of {_list(modalities)} with {len(content['classes'])} classes "
        f"({_shortened(content['classes'])}), trained with the method `{content['method']}` of Counterpoise "
        f"{content['library_version']}.",
        "",
        "## Use",
        "",
        "```python",
        "from counterpoise import load_model",
        "",
        f"model = load_model({json.dumps(folder)})",
        f"found = model.predict({{{example}}})",
        'print(found.name, found.probabilities["fused"])',
        "```",
        "",
        "A modality may be left out; the method then predicts from the others. `counterpoise predict` "
        "predicts for whole Parquet files.",
        "",
        "## Training data",
        "",
        f"- Corpus: {_text(corpus_title)} (`{corpus['name']}`), "
        + ", ".join(f"{split} {count:,}" for split, count in corpus["samples"].items() if count)
        + " samples",
        f"- Licence of the data: {_text(corpus['licence']) or 'not stated on the card of the corpus'}",
        *[f"- Source: {_text(source)}" for source in corpus["source"]],
        *([f"- Cite: {_text(corpus['citation'])}"] if corpus["citation"] else []),
        f"- Fingerprint of ids, labels and preprocessing: `{corpus['fingerprint']}`",
        "",
        "## Method",
        "",
        f"`{content['method']}`: {_text((METHODS[content['method']].__doc__ or '').splitlines()[0])} "
        f"Source: {_text(content['paper'])}.",
        "",
        f"Epoch {content['epoch']} of {content['experiment']['epochs']} ({_text(content['selection'])}), "
        f"seed {run['seed']}, digest of the experiment `{run['digest']}`, {content['num_parameters']:,} numbers in the "
        "weights file." + _classifiers(content["classifiers"]),
        "",
        *_measured(content),
        "## Limits",
        "",
        "- One run with one seed; another seed gives other numbers.",
        f"- Nothing is known about data unlike {_text(corpus_title)}.",
        "- Probabilities are softmax outputs; their calibration was not measured.",
        "- The licence above is that of the training data; whether and how it bears on weights is for you to judge.",
        "",
        "## Files",
        "",
        "`config.json` has the resolved experiment, every decision with its inputs, preprocessing and versions. "
        "`sha256sum --check SHA256SUMS` verifies the folder; `load_model` does so by itself.",
        "",
    ]
    return "\n".join(lines)


_EXAMPLES = {
    "audio": '"clip.wav"',
    "image": '"picture.png"',
    "frames": '["frame-0.jpg", "frame-1.jpg"]',
    "text": '"some words"',
    "vector": "numbers",
    "series": "series",
}


def _measured(content: Mapping[str, Any]) -> list[str]:
    metrics = content["metrics"]
    if not metrics:
        return ["## Measured", "", "Nothing: the weights are of the middle of an epoch.", ""]
    titles = {"accuracy": "accuracy", "map": "mAP", "macro_f1": "macro-F1"}
    columns = [(key, title) for key, title in titles.items() if key in metrics]
    lines = ["## Measured", "", f"On the {metrics['split']} split, {metrics['samples']:,} samples:", ""]
    lines += ["| | " + " | ".join(title for _, title in columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name in (FUSED, *content["modalities"]):
        lines.append(f"| {_text(name)} | " + " | ".join(f"{metrics[key][name]:.4f}" for key, _ in columns) + " |")
    lines += ["", f"Gap between the best and the worst modality: {metrics['gap']:.4f}."]
    method = METHODS[content["method"]]
    lines.append(f"Numbers of a modality come from: {_text(method.modality_predictions)}.")
    if method.probe:
        lines.append("The model's own per-modality probabilities are not from these probes.")
    if content["metrics"]["split"] != "test":
        lines.append(f"The {metrics['split']} split took part in choosing the epoch, so these numbers are optimistic.")
    return [*lines, ""]


def _classifiers(counts: Mapping[str, int]) -> str:
    said = ", ".join(f"{name} {count}" for name, count in (counts or {}).items())
    return f" Classifiers: {said}." if said else ""


def _text(value: object) -> str:
    """One line of Markdown in which nothing of a card's text is markup."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(str(value).split())) if value else ""


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _shortened(names: list[str], most: int = 12) -> str:
    return ", ".join(map(_text, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
