"""Predictions for whole Parquet files, part by part, by an exported model.

    <out>/predictions/part-00000.parquet, ...   one row per sample that could be decoded
          ledger.jsonl                          rows that could not, with file and reason
          summary.json                          counts, accuracies if there are labels, rate
          SHA256SUMS                            of all of these, written last
          request.json, parts/                  what was asked, and a record per finished part: what a restart needs

A part is a fixed range of rows and is computed in fixed batches, so that no number depends on who computes it, in
which order, or how often it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from counterpoise import storage
from counterpoise.contracts import ConfigError, DataError, Interrupted, RefusedError
from counterpoise.data.card import CARD, AnyModality, Card, load_card, prepared_corpora
from counterpoise.data.decode import Decoder, RowError
from counterpoise.data.index import SplitIndex, check_light, columns_of, open_parquet, open_split
from counterpoise.data.loader import Background
from counterpoise.data.shards import columns_bytes
from counterpoise.data.units import RawRows, Reader
from counterpoise.engine.again import missing_cases
from counterpoise.engine.inference import FUSED, SUMS, Model, load_model, softmax, sums_text
from counterpoise.engine.memory import reuse_memory
from counterpoise.plain import read_json
from counterpoise.wording import did_you_mean

PART_ROWS = 1024
REQUEST, SUMMARY, LEDGER = "request.json", "summary.json", "ledger.jsonl"
Record = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """The rows to predict for, and how they are read. labels of the index are -1 where there is none of the model's."""

    index: SplitIndex
    modalities: dict[str, AnyModality]
    note: str = ""


@dataclass(frozen=True)
class Work:
    """All that a part's computation needs; plain data, so that it can travel."""

    model: str
    rows: Rows
    missing: frozenset[str]
    batch_size: int
    out: str
    device: str = "cpu"
    threads: int | None = None


# Parts (all that are to be made), the work, and who is asked for a reason to stop -> records, as they are made.
RunParts = Callable[[Sequence[int], Work], Generator[Record, None, None]]


def predict_files(
    model: str,
    data: str,
    out: str,
    *,
    split: str = "test",
    batch_size: int = 64,
    missing: Sequence[str] = (),
    device: str = "auto",
    threads: int | None = None,
    run_parts: RunParts | None = None,
    stop: Callable[[], str | None] = lambda: None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict[str, Any]:
    """Predict for all rows of `data` and write what is found to `out`; the content of summary.json.

    data: a prepared corpus by name, a card or the folder of one (its `split`), or Parquet files: one, a folder of
    them, or a glob, with the columns of the corpus that the model was trained on. Labels are not needed.
    missing: modalities whose columns are not looked at. run_parts: who computes; by default this process.
    """
    loaded = load_model(model, device)
    cases = missing_cases(missing, loaded.modalities)
    gone = frozenset(name for case in cases for name in case)
    if len(gone) == len(loaded.modalities):
        raise ConfigError(f"--missing {', '.join(sorted(gone))}: nothing would be left to predict from")
    rows = open_rows(loaded, data, split, gone)
    place, target = (storage.local_path(p) if storage.is_local(p) else p for p in (model, out))
    work = Work(place, rows, gone, batch_size, target, str(loaded.device), threads)
    total, num_parts = len(rows.index), -(-len(rows.index) // PART_ROWS)
    begin(work, loaded)
    records = {number: record for number in range(num_parts) if (record := finished(work, number)) is not None}
    done = before = sum(record["rows"] for record in records.values())
    started = time.monotonic()
    left = [number for number in range(num_parts) if number not in records]
    made = run_parts(left, work) if run_parts is not None else _here(left, work, loaded, stop)
    with closing(made):
        for record in made:
            if record:
                records[record["part"]] = record
                done += record["rows"]
                rate = (done - before) / max(time.monotonic() - started, 1e-9)
                progress(done, total, f"samples, {rate:,.0f}/s")
            if (reason := stop()) and len(records) < num_parts:
                raise Interrupted(
                    f"stopped ({reason}) after {len(records)} of {num_parts} parts; the same command goes on"
                )
    return _finish(work, loaded, [records[number] for number in range(num_parts)], total - before, started)


def _here(
    parts: Sequence[int], work: Work, model: Model, stop: Callable[[], str | None]
) -> Generator[Record, None, None]:
    if work.threads is not None:
        torch.set_num_threads(work.threads)
    reuse_memory(work.device)
    for number in parts:
        record = make_part(number, work, model, stop)
        yield record or {}


# --- the rows


def open_rows(model: Model, data: str, split: str, missing: frozenset[str]) -> Rows:
    """The rows of a corpus or of Parquet files."""
    wanted = {name: modality for name, modality in model.decoder.modalities.items() if name not in missing}
    card = _card(data)
    if card is None:
        return _plain_rows(model, data, wanted)
    own = card.select([name for name in wanted if name in card.modalities] or None)
    read = {}
    for name, modality in wanted.items():
        if name not in own or own[name].kind != modality.kind:
            has = f"has {name} as {own[name].kind}" if name in own else f"has no modality {name}"
            raise ConfigError(
                f"corpus {card.name} {has}, the model takes {name} as {modality.kind}; say --missing {name} to predict "
                "without it"
            )
        changes: dict[str, Any] = {"column": own[name].column, "encoding": own[name].encoding}
        if modality.kind == "text":
            changes["pair"] = getattr(own[name], "pair", None)
        read[name] = modality.model_copy(update=changes)
    index = open_split(card, split)
    if card.class_names != model.classes:
        unknown = np.full(len(index), -1, dtype=np.int64)
        note = f"corpus {card.name} has other classes than the model, so its labels are not compared"
        return Rows(replace(index, labels=unknown), read, note)
    return Rows(index, read)


def _card(data: str) -> Card | None:
    """The card that `data` names, or None if it names Parquet files."""
    if data.endswith(".parquet") or any(c in data for c in "*?["):
        return None
    if data.endswith((".yaml", ".yml")) or storage.exists(storage.join(data, CARD)):
        return load_card(data if "/" in data else f"./{data}")
    if "/" not in data and (data in prepared_corpora() or not storage.exists(data)):
        return load_card(data)
    return None


def _files(data: str) -> list[str]:
    if data.endswith(".parquet") and not any(c in data for c in "*?["):
        return [storage.local_path(data) if storage.is_local(data) else data]
    pattern = data if any(c in data for c in "*?[") else storage.join(data, "*.parquet")
    found = [match for match in storage.glob(pattern) if match.endswith(".parquet")]
    if not found:
        raise DataError(
            f"{storage.show(data)}: no corpus ({CARD}) and no .parquet file; give a corpus, a file, a folder or a glob"
        )
    return found


def _plain_rows(model: Model, data: str, wanted: dict[str, AnyModality]) -> Rows:
    files, columns = _files(data), model.config["columns"]
    pairs: list[tuple[int, int]] = []
    sizes: list[int] = []
    ids: list[str] = []
    labels: list[int] = []
    strange = num_bytes = 0
    numbers = {name: k for k, name in enumerate(model.classes)}
    for number, uri in enumerate(files):
        with open_parquet(uri) as parquet:
            names = parquet.schema_arrow.names
            for column in (c for modality in wanted.values() for c in columns_of(modality)):
                if column not in names:
                    raise DataError(
                        f"{storage.show(uri)} has no column '{column}'{did_you_mean(column, names)}; its columns are: "
                        f"{', '.join(names)}"
                    )
            light = [c for c in (columns["sample_id"], columns["label"]) if c in names]
            check_light(parquet, light, storage.show(uri))
            found = parquet.read(columns=light).to_pydict() if light else {}
            groups = [parquet.metadata.row_group(g) for g in range(parquet.metadata.num_row_groups)]
            counts = [group.num_rows for group in groups]
            num_bytes += sum(group.total_byte_size for group in groups)
        pairs += [(number, g) for g, size in enumerate(counts) if size]
        sizes += [size for size in counts if size]
        nothing: list[Any] = [None] * sum(counts)
        stem = uri.rsplit("/", 1)[-1].removesuffix(".parquet")
        given = found.get(columns["sample_id"], nothing)
        ids += [f"{stem}/{i}" if value is None else str(value) for i, value in enumerate(given)]
        for value in found.get(columns["label"], nothing):
            label = numbers.get(value, -1) if isinstance(value, str) else _label(value, len(numbers))
            strange += label < 0 and value is not None
            labels.append(label)
    if not labels:
        raise DataError(f"{storage.show(data)}: no rows")
    index = SplitIndex(
        corpus="files",
        split="all",
        files=tuple(files),
        group_pairs=np.array(pairs, np.int64),
        group_sizes=np.array(sizes, np.int64),
        position=np.concatenate([np.arange(size) for size in sizes]),
        labels=np.array(labels, np.int64),
        sample_ids=ids,
        num_bytes=num_bytes,
    )
    note = f"{strange} rows have a label that is no class of the model; they do not count for accuracy"
    return Rows(index, wanted, note if strange else "")


def _label(value: Any, num_classes: int) -> int:
    """A whole number that is a class of the model, or -1."""
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    return int(value) if whole and 0 <= value < num_classes else -1


# --- what was asked


def begin(work: Work, model: Model) -> None:
    """Make `out` the place of this request, or find that it is already; RefusedError if it holds anything else."""
    index = work.rows.index
    ids = hashlib.sha256("\n".join(index.sample_ids).encode())
    ids.update(index.labels.tobytes())
    request = {
        "format": 1,
        "model": model.digest,
        "samples": len(index),
        "rows": ids.hexdigest(),
        "files": {storage.show(uri): storage.size(uri) for uri in index.files},
        "modalities": {name: columns_of(modality) for name, modality in work.rows.modalities.items()},
        "missing": sorted(work.missing),
        "batch_size": work.batch_size,
        "part_rows": PART_ROWS,
    }
    place = storage.join(work.out, REQUEST)
    if storage.exists(place):
        before = _json(place)
        differs = [key for key, value in request.items() if before.get(key) != value]
        if differs:
            raise RefusedError(
                f"{storage.show(work.out)} holds predictions of another request ({', '.join(differs)} differ); give "
                "another --out, or the same model, data and options to go on"
            )
    elif storage.list_names(work.out):
        raise RefusedError(f"{storage.show(work.out)} is not empty and holds no predictions; give another --out")
    else:
        storage.write_text(place, json.dumps(request, indent=1) + "\n")


def _json(place: str) -> dict[str, Any]:
    try:
        return dict(read_json(storage.read_text(place)))
    except (ValueError, TypeError) as error:
        raise RefusedError(f"{storage.show(place)} is damaged: {error}; give another --out") from None


def part_file(number: int) -> str:
    return f"predictions/part-{number:05d}.parquet"


def finished(work: Work, number: int) -> Record | None:
    """The record of a part that was made before, if what it says was written is there."""
    place = storage.join(work.out, "parts", f"part-{number:05d}.json")
    if not storage.exists(place):
        return None
    record = _json(place)
    file = storage.join(work.out, part_file(number))
    if not storage.exists(file) or hashlib.sha256(storage.read_bytes(file)).hexdigest() != record["sha256"]:
        return None
    return record


# --- one part


def make_part(number: int, work: Work, model: Model, stop: Callable[[], str | None] = lambda: None) -> Record | None:
    """Compute and write one part; None if it was given up on a wish to stop."""
    started = time.monotonic()
    index = work.rows.index
    rows = range(number * PART_ROWS, min((number + 1) * PART_ROWS, len(index)))
    decoder = Decoder(work.rows.modalities, model.decoder.stats)
    names = (FUSED, *(m for m in model.modalities if m not in work.missing))
    taken: list[int] = []
    tables: dict[str, list[np.ndarray]] = {name: [] for name in names}
    bad: list[dict[str, Any]] = []
    source = Background(_decoded(rows, work, decoder), 2)
    with closing(source):
        for block, good, failed in source:
            if stop():
                return None
            bad += failed
            if good:
                logits = model.logits(model.tensors(good), [work.missing] * len(good))
                for name in names:
                    tables[name].append(logits[name].numpy())
                taken += block
    empty = np.zeros((0, len(model.classes)), np.float32)
    logits_of = {name: np.concatenate(found) if found else empty for name, found in tables.items()}
    labels = index.labels[taken] if taken else np.zeros(0, np.int64)
    data = columns_bytes(_columns(index, taken, labels, logits_of, model))
    storage.write_bytes(storage.join(work.out, part_file(number)), data)
    known = labels >= 0
    record = {
        "part": number,
        "rows": len(rows),
        "predicted": len(taken),
        "labelled": int(known.sum()),
        "correct": {name: int((z.argmax(axis=1) == labels)[known].sum()) for name, z in logits_of.items()},
        "bad": bad,
        "sha256": hashlib.sha256(data).hexdigest(),
        "seconds": round(time.monotonic() - started, 3),
    }
    storage.write_text(storage.join(work.out, "parts", f"part-{number:05d}.json"), json.dumps(record) + "\n")
    return record


def _decoded(
    rows: range, work: Work, decoder: Decoder
) -> Generator[tuple[list[int], list[dict[str, np.ndarray]], list[dict[str, Any]]], None, None]:
    """Batches of a part: rows that could be decoded, their compact arrays, and what is to be said of the others."""
    index = work.rows.index
    reader = Reader(index, work.rows.modalities)
    raw = RawRows(index, work.rows.modalities, {}, reader)

    def decode(row: int) -> dict[str, np.ndarray] | RowError:
        try:
            return decoder(raw.cells(row))
        except RowError as error:
            return error

    with closing(reader), ThreadPoolExecutor(4, "decode") as pool:
        for start in range(rows.start, rows.stop, work.batch_size):
            block = range(start, min(start + work.batch_size, rows.stop))
            results = list(zip(block, pool.map(decode, block), strict=True))
            good = [(row, found) for row, found in results if not isinstance(found, RowError)]
            bad = [
                {
                    "sample_id": index.sample_ids[row],
                    "row": row,
                    "file": storage.show(index.file_of(row)),
                    "modality": found.modality,
                    "reason": found.reason,
                }
                for row, found in results
                if isinstance(found, RowError)
            ]
            yield [row for row, _ in good], [found for _, found in good], bad


def _columns(
    index: SplitIndex, taken: list[int], labels: np.ndarray, logits: Mapping[str, np.ndarray], model: Model
) -> dict[str, Any]:
    import pyarrow as pa

    prediction = logits[FUSED].argmax(axis=1) if taken else np.zeros(0, np.int64)
    columns: dict[str, Any] = {
        "sample_id": pa.array([index.sample_ids[row] for row in taken], pa.string()),
        "prediction": prediction.astype(np.int64),
        "class": pa.array([model.classes[k] for k in prediction], pa.string()),
    }
    if (index.labels >= 0).any():
        columns["label"] = pa.array([None if k < 0 else int(k) for k in labels], pa.int64())
    for name, z in logits.items():
        columns[f"probabilities_{name}"] = softmax(z) if taken else z
    return columns


def _finish(work: Work, model: Model, records: Sequence[Record], computed: int, started: float) -> dict[str, Any]:
    bad = [row for record in records for row in record["bad"]]
    labelled = sum(record["labelled"] for record in records)
    seconds = time.monotonic() - started
    summary = {
        "model": f"{model.config['method']} on {model.config['corpus']['name']}, epoch {model.config['epoch']}",
        "samples": len(work.rows.index),
        "predicted": sum(record["predicted"] for record in records),
        "bad": len(bad),
        "missing": sorted(work.missing),
        "labelled": labelled,
        "accuracy": {
            name: sum(record["correct"][name] for record in records) / labelled for name in records[0]["correct"]
        }
        if labelled
        else None,
        "note": work.rows.note,
    }
    lines = "".join(json.dumps(row) + "\n" for row in bad)
    digests = {part_file(record["part"]): record["sha256"] for record in records}
    for name, text in ((LEDGER, lines), (SUMMARY, json.dumps(summary, indent=1) + "\n")):
        storage.write_text(storage.join(work.out, name), text)
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
    storage.write_text(storage.join(work.out, SUMS), sums_text(digests))
    return summary | {"computed": computed, "seconds": seconds}
