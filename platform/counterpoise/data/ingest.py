"""From a listing of a raw download to shards, in parts that can be made anywhere, in any order, and only once.

A part is a stretch of a split's rows in the order of the listing. It becomes one shard and one record under `parts/`:
the shard's checksum and, row by row, what was kept and what was dropped and why. Both are written whole or not at
all, the record last. So a part whose record is there and fits is finished, whoever made it; the same command after a
kill makes the others. What comes out depends neither on the number of workers nor on interruptions.

Media are read in child processes with a time limit per row. A decoder that hangs, crashes or eats memory costs one
row. Manifest and ledger are put together from the records; the card comes last and makes the folder a corpus.

This module does not know Ray; `launch/prepare.py` hands the same parts to its tasks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from counterpoise import storage
from counterpoise.contracts import ConfigError, DataError, Interrupted, ResourceError
from counterpoise.data import raw
from counterpoise.data.card import CARD, SPLITS, Card
from counterpoise.data.media import FLOW_METHOD, LIMITS, Limits, MediaError, ReadRow, described, read_row, versions
from counterpoise.data.raw import Flow, Left, Listing, Media, Pictures, Raw, RawRow, Sound, Video
from counterpoise.data.shards import MANIFEST, infer_schema, parquet_bytes
from counterpoise.wording import did_you_mean

FORMAT = 1  # of records and of what is written: another number makes all parts again
PARTS = "parts"
PLAN = f"{PARTS}/plan.json"
LEDGER = "ledger.jsonl"
NO_SPLIT = "-"  # of files that no list names
GROUP_BYTES = 16 * 2**20  # of a row group: readers take it whole
_GROUP_ROWS = 64
_SHARD = re.compile(r"(train|valid|test)-\d{6,}-\d{6,}\.parquet")
_POLL_S = 0.1
_AHEAD = 2  # parts under way at a time: while one is written, rows of the next are read

Progress = Callable[[int, int, str], None]
Stop = Callable[[], str | None]


@dataclass(frozen=True)
class Work:
    """What all parts have in common. Plain data: it can be sent to another process."""

    raw: str
    out: str
    sample_id: str  # names of columns
    label: str
    schema: Any  # of Arrow
    limits: Limits = LIMITS


@dataclass(frozen=True)
class Part:
    """Rows start to stop (exclusive) of a split. digest: of all that decides what its shard holds."""

    split: str
    start: int
    stop: int
    rows: tuple[RawRow, ...]
    digest: str

    @property
    def name(self) -> str:
        return f"{self.split}-{self.start:06d}-{self.stop:06d}"

    @property
    def shard(self) -> str:
        return f"{self.name}.parquet"

    @property
    def record(self) -> str:
        return f"{PARTS}/{self.name}.json"


Record = dict[str, Any]
# Makes parts: yields how many more rows were read, and the record of a part whenever one is finished.
RunParts = Callable[[Sequence[Part], Work, int], Generator[tuple[int, Record | None], None, None]]


# The plan


def checked(listing: Listing, card: Card) -> Listing:
    """The listing without repeated sample ids. Raises DataError if it does not fit the card."""
    if not listing.rows:
        raise DataError(
            f"corpus {card.name}: the lists name no row that is there; see the recipe's README for the layout"
        )
    seen: set[tuple[str, str]] = set()
    rows: list[RawRow] = []
    left = list(listing.left)
    classes = card.class_names
    first = listing.rows[0]
    for row in listing.rows:
        where = f"corpus {card.name}, sample {row.sample_id!r}"
        if row.split not in SPLITS:
            raise DataError(
                f"{where}: split is {row.split!r}{did_you_mean(row.split, SPLITS)}; choose {', '.join(SPLITS)}"
            )
        good = row.label in card.classes if isinstance(row.label, str) else 0 <= row.label < len(classes)
        if not good or type(row.label) is not type(first.label):
            raise DataError(f"{where}: label is {row.label!r}; the card's classes are: {', '.join(classes[:20])}")
        if row.media.keys() != first.media.keys() or row.columns.keys() != first.columns.keys():
            raise DataError(f"{where}: its columns are not those of {first.sample_id!r}; all rows need the same")
        if (row.split, row.sample_id) in seen:
            left.append(Left(row.sample_id, row.split, raw.DUPLICATE, "the first one in the list is kept"))
            continue
        seen.add((row.split, row.sample_id))
        rows.append(row)
    taken = {card.sample_id or "sample_id", card.label}
    if both := (taken & {*first.media, *first.columns}) | (first.media.keys() & first.columns.keys()):
        raise DataError(f"corpus {card.name}: two columns are called {', '.join(sorted(both))}")
    return replace(listing, rows=rows, left=left)


def schema_of(listing: Listing, sample_id: str, label: str) -> Any:
    """Arrow types of the shards' columns; of a known column, from the first row that has a value."""
    import pyarrow as pa

    first = listing.rows[0]
    example: dict[str, Any] = {sample_id: first.sample_id, label: first.label}
    for column in first.columns:
        values = (row.columns[column] for row in listing.rows)
        example[column] = next((v for v in values if v is not None and v != [] and v != ()), "")
    known = infer_schema(example)
    media = []
    for column, wanted in first.media.items():
        single = isinstance(wanted, Sound) or (isinstance(wanted, Pictures) and wanted.one)
        media.append(pa.field(column, pa.binary() if single else pa.list_(pa.binary())))
    return pa.schema([*known, *media])


def plan_parts(listing: Listing, work: Work, sizes: Mapping[str, int]) -> list[Part]:
    """All parts: by split, then in the order of the listing. sizes: bytes of the raw files.

    Sizes are part of a part's digest, so that a part is made again when one of its files was mended.
    """
    common = {
        "format": FORMAT,
        "schema": str(work.schema),
        "limits": asdict(work.limits),
        "versions": versions(),
    }
    parts = []
    for split in SPLITS:
        rows = [row for row in listing.rows if row.split == split]
        for start in range(0, len(rows), listing.rows_per_part):
            chosen = tuple(rows[start : start + listing.rows_per_part])
            digest = hashlib.sha256(json.dumps([common, split, start], sort_keys=True).encode())
            for row in chosen:
                files = {path: sizes.get(path) for wanted in row.media.values() for path in paths_of(wanted)}
                digest.update(_json([_plain(row), files]))
            parts.append(Part(split, start, start + len(chosen), chosen, digest.hexdigest()))
    return parts


def paths_of(wanted: Media) -> Iterator[str]:
    """The raw files that a cell is made from."""
    match wanted:
        case Sound() | Video():
            yield wanted.path
        case Pictures():
            yield from wanted.paths
        case Flow():
            yield from (*wanted.u, *wanted.v)
            if wanted.video is not None:
                yield wanted.video.path


def _plain(value: Any) -> Any:
    if isinstance(value, RawRow | Sound | Video | Pictures | Flow):
        # part of the digest, so that flow is made again when the way it is computed changes
        how = [FLOW_METHOD] if isinstance(value, Flow) and value.video is not None else []
        known = [f for f in fields(value) if not f.metadata.get("later") or getattr(value, f.name) != f.default]
        return [type(value).__name__, *(_plain(getattr(value, f.name)) for f in known), *how]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str, ensure_ascii=False).encode()


# One part


class Readers:
    """Child processes that read rows. One that hangs or dies is replaced, and only its row is lost."""

    def __init__(self, workers: int, limits: Limits) -> None:
        import multiprocessing

        from pebble import ProcessPool

        self._limits = limits
        self._lock = threading.Lock()
        self._pending: set[Future[ReadRow]] = set()
        self._closed = False
        self._pool = ProcessPool(
            max_workers=workers,
            context=multiprocessing.get_context("spawn"),  # a fork of a process with threads may hang
            initializer=_begin,
            initargs=(limits.memory_bytes,),
        )

    def start(self, raw_uri: str, media: Mapping[str, Media]) -> Future[ReadRow]:
        with self._lock:
            if self._closed:
                raise CancelledError
            future: Future[ReadRow] = self._pool.schedule(
                read_row, args=(raw_uri, dict(media), self._limits), timeout=self._limits.row_s
            )
            self._pending.add(future)
        return future

    def result(self, future: Future[ReadRow], raw_uri: str, media: Mapping[str, Media]) -> ReadRow | MediaError:
        """What became of the row. A process that died is given the row once more: perhaps it was not its fault."""
        from pebble import ProcessExpired

        for last in (False, True):
            try:
                found = future.result()
                self._pending.discard(future)
                return found
            except MediaError as error:
                return error
            except TimeoutError:
                return MediaError(raw.TIMED_OUT, f"{', '.join(media)}: more than {self._limits.row_s:g} s")
            except ProcessExpired as error:
                if last:
                    return MediaError(raw.CRASHED, f"{', '.join(media)}: exit code {error.exitcode}")
                future = self.start(raw_uri, media)
            except BrokenProcessPool:
                raise ResourceError(
                    "the processes that read media end as soon as they start; each may use "
                    f"{self._limits.memory_bytes:,} bytes of memory; `counterpoise doctor` looks for missing packages"
                ) from None
            except MemoryError:
                return MediaError(raw.TOO_LARGE, f"{', '.join(media)}: more than {self._limits.memory_bytes:,} bytes")
            except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
                if hasattr(error, "exit_code"):  # ours: not the row's fault
                    raise
                return MediaError(raw.UNDECODABLE, f"{', '.join(media)}: {type(error).__name__}: {error}")
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End the processes. Whoever waits for a row gets CancelledError: the pool itself would let him wait."""
        with self._lock:
            self._closed = True
            for future in self._pending:
                future.cancel()
        self._pool.stop()
        self._pool.join()


def _begin(memory_bytes: int) -> None:
    """In a child process: no more memory than agreed, so that a bomb ends with an error and not with the machine."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def make_part(part: Part, work: Work, readers: Readers, tick: Callable[[], None] = lambda: None) -> Record:
    """Read the rows of a part and write its shard and its record; returns the record."""
    _check_reach(work)
    futures = [readers.start(work.raw, row.media) for row in part.rows]
    rows: list[dict[str, Any]] = []
    ledger = []
    try:
        for row, future in zip(part.rows, futures, strict=True):
            found = readers.result(future, work.raw, row.media)
            entry: dict[str, Any] = {"split": row.split, "sample_id": row.sample_id}
            if isinstance(found, MediaError):
                entry |= {"kept": False, "reason": found.reason, "detail": found.detail}
            else:
                entry |= {"kept": True, "shard": part.shard}
                if found.remarks:
                    entry["remarks"] = found.remarks
                rows.append({work.sample_id: row.sample_id, work.label: row.label, **row.columns, **found.values})
            ledger.append(entry)
            tick()
    finally:
        for future in futures:
            future.cancel()
    shard = None
    if rows:
        data = parquet_bytes(rows, work.schema, group_rows(rows))
        storage.write_bytes(storage.join(work.out, part.shard), data)
        shard = {
            "file": part.shard,
            "rows": len(rows),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    else:
        storage.delete(storage.join(work.out, part.shard))  # of before its files changed
    record = {"digest": part.digest, "split": part.split, "shard": shard, "ledger": ledger}
    data = _json(record) + b"\n"
    storage.write_bytes(storage.join(work.out, part.record), data)
    return dict(json.loads(data))  # as another process will read it


def _check_reach(work: Work) -> None:
    """Raise where a machine lacks the folders: all files would seem missing, and shards would go nowhere."""
    for place, needed in ((work.raw, work.raw), (work.out, storage.join(work.out, PLAN))):
        if storage.is_local(place) and not storage.exists(needed):
            raise ResourceError(
                f"{place} is not there on this machine ({platform.node()}); with more than one machine raw folder and "
                "output must be on s3:// or in a folder that all of them share"
            )


def group_rows(rows: Sequence[Mapping[str, Any]]) -> int:
    def weight(value: Any) -> int:
        return len(value) if isinstance(value, bytes) else sum(map(weight, value)) if isinstance(value, list) else 8

    mean = sum(weight(v) for row in rows for v in row.values()) / len(rows)
    return max(1, min(_GROUP_ROWS, int(GROUP_BYTES / max(mean, 1))))


def local_parts(parts: Sequence[Part], work: Work, workers: int) -> Generator[tuple[int, Record | None], None, None]:
    """Parts made by child processes of this one."""
    readers = Readers(workers, work.limits)
    threads = ThreadPoolExecutor(_AHEAD, "part")
    lock = threading.Lock()
    read = 0

    def tick() -> None:
        nonlocal read
        with lock:
            read += 1

    told = 0
    waiting = iter(parts)
    running: set[Future[Record]] = set()
    try:
        while True:
            for part in itertools.islice(waiting, _AHEAD - len(running)):
                running.add(threads.submit(make_part, part, work, readers, tick))
            if not running:
                return
            done, running = wait(running, _POLL_S, FIRST_COMPLETED)
            now = read
            records: list[Record | None] = [future.result() for future in done]
            for record in records or [None]:
                yield now - told, record
                told = now
    finally:
        readers.close()  # ends the rows that threads wait for
        threads.shutdown(cancel_futures=True)


def finished_record(part: Part, out: str) -> Record | None:
    """The record of a part that is finished and unchanged, or None.

    On disk the shard's checksum is looked at; object storage takes files whole, so there its size is enough.
    """
    try:
        record = json.loads(storage.read_bytes(storage.join(out, part.record)))
        if record["digest"] != part.digest:
            return None
        shard = record["shard"]
        if shard is not None:
            place = storage.join(out, shard["file"])
            if storage.size(place) != shard["bytes"]:
                return None
            if storage.is_local(place) and hashlib.sha256(storage.read_bytes(place)).hexdigest() != shard["sha256"]:
                return None
    except (DataError, FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return dict(record)


# The whole


def prepare_raw(
    name: str,
    listing: Listing,
    source: Raw,
    card: Card,
    card_content: Mapping[str, Any],
    out: str,
    *,
    options: Mapping[str, Any],
    workers: int = 1,
    run_parts: RunParts = local_parts,
    limits: Limits = LIMITS,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Make what is missing of the corpus in `out`, and its manifest, ledger and card; returns the manifest.

    card: of the recipe; card_content: the same as plain data, to be completed with counts.
    Raises Interrupted when `stop` gives a reason; what is finished then stays.
    """
    listing = checked(listing, card)
    sample_id = card.sample_id or "sample_id"
    schema = schema_of(listing, sample_id, card.label)
    work = Work(source.uri, out, sample_id, card.label, schema, limits)
    storage.delete(storage.join(out, CARD))  # of before, if it is made again
    _claim(out, {"format": FORMAT, "name": name, "options": dict(options), "raw": storage.show(source.uri)})
    parts = plan_parts(listing, work, source.files)
    records: dict[str, Record] = {}
    there = set(storage.list_names(storage.join(out, PARTS)))
    for part in parts:
        found = finished_record(part, out) if f"{part.name}.json" in there else None
        if found is not None:
            records[part.name] = found
    total = len(listing.rows)
    before = done = sum(len(record["ledger"]) for record in records.values())
    dropped = sum(not entry["kept"] for record in records.values() for entry in record["ledger"])
    todo = [part for part in parts if part.name not in records]
    names = {part.digest: part.name for part in todo}
    begun = time.monotonic()

    shown = -1

    def show() -> None:
        nonlocal shown
        if progress and done != shown:
            shown = done
            rate = (done - before) / max(time.monotonic() - begun, 1e-3)
            said = f"{rate:.0f} rows/s" + (f", {dropped} dropped" if dropped else "")
            progress(min(done, total), total, said)

    if todo:
        with closing(run_parts(todo, work, workers)) as running:
            for more, record in running:
                done += more
                if record is not None:
                    records[names[record["digest"]]] = record
                    dropped += sum(not entry["kept"] for entry in record["ledger"])
                show()
                if stop and (reason := stop()):
                    raise Interrupted(
                        f"stopped ({reason}): {len(records)} of {len(parts)} parts are finished in "
                        f"{storage.show(out)}; the same command goes on from there"
                    )
    assert len(records) == len(parts), f"{len(records)} of {len(parts)} parts were made"
    ordered = [records[part.name] for part in parts]
    _sweep(out, parts)
    manifest = _manifest(name, listing, source, card, work, ordered, options)
    _check_kept(card, manifest, ordered)
    lines = [entry for record in ordered for entry in record["ledger"]]
    lines += [
        {"split": left.split or NO_SPLIT, "sample_id": left.sample_id, "kept": False, "reason": left.reason}
        | ({"detail": left.detail} if left.detail else {})
        for left in listing.left
    ]
    storage.write_bytes(storage.join(out, LEDGER), b"".join(_json(line) + b"\n" for line in lines))
    made, notes = _made_card(card_content, manifest, out)
    manifest["notes"] += notes
    storage.write_bytes(
        storage.join(out, MANIFEST), (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    )
    storage.write_bytes(storage.join(out, CARD), made)
    return manifest


def _claim(out: str, plan: Mapping[str, Any]) -> None:
    """Say in `out` what is being made there; refuse a folder in which something else is."""
    place = storage.join(out, PLAN)
    if storage.exists(place):
        found = json.loads(storage.read_bytes(place))
        differing = [key for key in plan if found.get(key) != plan[key]]
        if differing:
            said = "; ".join(f"{key} {found.get(key)} there, {plan[key]} now" for key in differing)
            raise ConfigError(
                f"{storage.show(out)} holds a corpus made in another way ({said}); remove it, or give another folder"
            )
        return
    if storage.list_names(out):
        raise ConfigError(f"{storage.show(out)} is not empty and holds no corpus; remove it, or give another folder")
    storage.write_bytes(place, (json.dumps(plan, indent=1) + "\n").encode())


def _sweep(out: str, parts: Sequence[Part]) -> None:
    """Remove shards and records of parts that are no longer in the plan: the card's patterns would find them."""
    shards = {part.shard for part in parts}
    for name in storage.list_names(out):
        if _SHARD.fullmatch(name) and name not in shards:
            storage.delete(storage.join(out, name))
    records = {part.record for part in parts} | {PLAN}
    for name in storage.list_names(storage.join(out, PARTS)):
        if f"{PARTS}/{name}" not in records and _SHARD.fullmatch(name.replace(".json", ".parquet")):
            storage.delete(storage.join(out, PARTS, name))


def _counts(listing: Listing, card: Card, records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """By split: rows of the published lists, of the recipe's card, listed here, kept, and dropped by reason.

    A card that carves a split out of train says what is left there, which is no number to compare with.
    """
    carved = any(split.carve for split in card.splits.values())
    promised = {n: None if carved and n == "train" else s.expected for n, s in card.splits.items()}
    kept: Counter[str] = Counter()
    dropped: dict[str, Counter[str]] = {}
    for record in records:
        for entry in record["ledger"]:
            if entry["kept"]:
                kept[entry["split"]] += 1
            else:
                dropped.setdefault(entry["split"], Counter())[entry["reason"]] += 1
    for left in listing.left:
        dropped.setdefault(left.split or NO_SPLIT, Counter())[left.reason] += 1
    order = [s for s in (*SPLITS, NO_SPLIT) if s in kept or s in dropped or s in listing.expected]
    return {
        split: {
            "published": listing.expected.get(split),
            "card": promised.get(split),  # type: ignore[call-overload]
            "listed": kept[split] + sum(dropped.get(split, Counter()).values()),
            "kept": kept[split],
            "dropped": dict(sorted(dropped.get(split, Counter()).items())),
        }
        for split in order
    }


def _manifest(
    name: str,
    listing: Listing,
    source: Raw,
    card: Card,
    work: Work,
    records: Sequence[Record],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for row in listing.rows:
        digest.update(_json(_plain(row)))
    splits: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["shard"] is not None:
            splits.setdefault(record["split"], []).append(record["shard"])
    return {
        "name": name,
        "options": dict(options),
        "raw": storage.show(source.uri),
        "format": FORMAT,
        "listing": {"rows": len(listing.rows), "sha256": digest.hexdigest(), "rows_per_part": listing.rows_per_part},
        "counts": _counts(listing, card, records),
        "notes": [*listing.notes, *_remarked(records)],
        "media": described([row.media for row in listing.rows]),
        "preprocess": {n: m.preprocess.model_dump(mode="json") for n, m in card.modalities.items()},
        "limits": asdict(work.limits),
        "versions": versions(),
        "splits": splits,
    }


def _remarked(records: Iterable[Record]) -> list[str]:
    count = sum(bool(entry.get("remarks")) for record in records for entry in record["ledger"])
    return [f"Rows that are kept with a remark in {LEDGER}: {count}."] if count else []


def _check_kept(card: Card, manifest: Mapping[str, Any], records: Sequence[Record]) -> None:
    """Raise if a split has no row left, with what was wrong with most of them."""
    for split, count in manifest["counts"].items():
        if split in SPLITS and count["listed"] and not count["kept"]:
            example = next((e for r in records for e in r["ledger"] if e["split"] == split and not e["kept"]), None)
            more = f", for example {example['sample_id']}: {example['detail']}" if example else ""
            said = ", ".join(f"{n} {reason}" for reason, n in count["dropped"].items())
            raise DataError(
                f"corpus {card.name}, split {split}: not one of {count['listed']} rows could be read ({said}{more}); "
                f"mend {manifest['raw']} and run the same command again"
            )


def _made_card(content: Mapping[str, Any], manifest: Mapping[str, Any], out: str) -> tuple[bytes, list[str]]:
    """The recipe's card with the splits that were made and the rows that are in them after carving, and notes.

    A split to be carved out of too few rows gets none; it is left out, for a card must not promise an empty split.
    """
    import yaml

    from counterpoise.data.card import parse_card
    from counterpoise.data.index import open_splits

    place = storage.join(out, CARD)
    done = {**content, "splits": {}}
    for split in SPLITS:
        before = dict((content.get("splits") or {}).get(split) or {})
        if split in manifest["splits"]:
            done["splits"][split] = {"files": f"{split}-*.parquet"}
        elif "carve" in before:
            done["splits"][split] = {"carve": before["carve"]}
    location = storage.local_path(place) if storage.is_local(place) else place
    notes = []
    for split, index in open_splits(parse_card(yaml.safe_dump(done).encode(), location), counted=False).items():
        if len(index):
            done["splits"][split]["expected"] = len(index)
        else:
            del done["splits"][split]
            notes.append(f"Split {split} is left out: train has too few rows to carve it out of them.")
    return yaml.safe_dump(done, sort_keys=False, allow_unicode=True, width=120).encode(), notes


def _difference(count: Mapping[str, Any], known: str) -> str:
    return f"{count['listed'] - count[known]:+d} rows ({count['listed']} listed, {count[known]} expected)"


def explained(manifest: Mapping[str, Any]) -> list[str]:
    """The counts of a manifest for people: what the lists have, what was kept, and where the rest went."""
    lines = ["split   published   listed     kept  dropped"]
    remedies = {
        raw.LFS_POINTER: "git-LFS pointers stand in for files: run `git lfs pull` in the raw folder",
        raw.HTML: "pages stand in for files: download them again",
        raw.MISSING: "files are missing: compare the raw folder with the layout in the recipe's README",
    }
    seen: dict[str, None] = {}
    for split, count in manifest["counts"].items():
        published = "" if count["published"] is None else str(count["published"])
        dropped = ", ".join(f"{n} {reason}" for reason, n in count["dropped"].items()) or "none"
        if split == NO_SPLIT:
            lines.append(f"in no split: {dropped}")
            continue
        lines.append(f"{split:6}  {published:>9}  {count['listed']:7}  {count['kept']:7}  {dropped}")
        if count["published"] is not None and count["published"] != count["listed"]:
            lines.append(
                f"        the lists given here differ from the published ones by {_difference(count, 'published')}"
            )
        if count["card"] is not None and count["card"] not in (count["kept"], count["published"]):
            lines.append(f"        the recipe's card differs by {_difference(count, 'card')}")
        seen |= dict.fromkeys(reason for reason in count["dropped"] if reason in remedies)
    lines += [remedies[reason] for reason in seen]
    if any(count["dropped"] for count in manifest["counts"].values()):
        lines.append(f"every row and its reason is in {LEDGER}; mended files are taken in with --again")
    return lines + list(manifest.get("notes", []))
