"""Run folders: everything one run leaves behind, on local disk or in object storage.

    <root>/<name>/experiment.yaml      the experiment as it was resolved
                  provenance.json      where each value of it came from
                  run.json             the manifest: name, time, command, commit, versions, ...
                  records.jsonl        one record per line: the truth that tables, pictures and gauges are drawn from
                  ledger.jsonl         rows that could not be read
                  status.json          where the run stands now; replaced often
                  checkpoints/, best/  see `checkpoint.py`
                  summary.json, predictions.parquet, ...
                  lock, stop           who writes here; a request to stop
                  SHA256SUMS           of a finished run, for `verify`

Only a process that holds the lock writes records. Readers need no lock: files are replaced whole, and a last
line of records.jsonl that is still being written is left out. This module imports neither torch nor pyarrow.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import IO, Any

from counterpoise import storage
from counterpoise.contracts import (
    ConfigError,
    CounterpoiseError,
    DataError,
    Record,
    RefusedError,
)
from counterpoise.data.shards import columns_bytes
from counterpoise.engine import checkpoint
from counterpoise.plain import read_json

EXPERIMENT = "experiment.yaml"
PROVENANCE = "provenance.json"
MANIFEST = "run.json"
RECORDS = "records.jsonl"
LEDGER = "ledger.jsonl"
STATUS = "status.json"
PREDICTIONS = "predictions.parquet"
LOCK = "lock"
STOP = "stop"
SUMS = "SHA256SUMS"

STATES = ("created", "running", "interrupted", "stopped", "failed", "finished")  # stopped: early, by a scheduler

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
TRACKERS = "trackers.json"  # what trackers have been told (telemetry/track.py)
_UNSEALED = {STATUS, LOCK, STOP, SUMS, TRACKERS}  # change after the run ends, or are about now and not about the run
_log = logging.getLogger(__name__)


class RunFolder:
    """One run's folder. `create` or `open` it; `acquire` (or `with`) before writing records."""

    # A lock held elsewhere whose owner we cannot ask (another host, object storage) counts as left behind
    # after this.
    stale_s = 300.0

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.name = self.uri.rsplit("/", 1)[-1]
        self.is_local = storage.is_local(uri)
        self.min_interval_s = 0.5 if self.is_local else 10.0  # between two status.json, and two looks for `stop`
        self._records = JsonLines(self.at(RECORDS))
        self._mutex = threading.RLock()
        self._token: str | None = None
        self._lost: str | None = None  # who took the lock from us
        self._beat = self._status_time = self._stop_time = float("-inf")
        self._status: dict[str, Any] = {}
        self._stop: str | None = None

    def __repr__(self) -> str:
        return f"RunFolder({storage.show(self.uri)!r})"

    def at(self, *parts: str) -> str:
        """The place of a file or folder of the run."""
        return storage.join(self.uri, *parts)

    # ------------------------------------------------------------------------------------ create and open

    @classmethod
    def create(
        cls,
        root_uri: str,
        name: str,
        *,
        experiment_text: str,
        provenance: Mapping[str, Any],
        manifest: Mapping[str, Any],
    ) -> RunFolder:
        """A new folder. A name in use is refused; of several processes with one name exactly one gets it."""
        check_name(name)
        if line := _line_with_secret(experiment_text):
            raise ConfigError(
                f"line {line} of the experiment holds what looks like a secret and would be saved. "
                "Give credentials through the environment (AWS_*)"
            )
        run = cls(storage.join(root_uri, name))
        own = {"name": name, "created": _now(), "format": 1, "id": uuid.uuid4().hex}
        content = {
            MANIFEST: _pretty(redact({**manifest, **own})),
            EXPERIMENT: experiment_text,
            PROVENANCE: _pretty(redact(provenance)),
        }
        made = run._make_local(content) if run.is_local else run._make_remote(content)
        if not made:
            raise RefusedError(
                f"run {name!r} exists in {storage.show(root_uri)} ({run.describe()}); "
                "choose another --name, or continue it with --resume"
            )
        return run

    def _make_local(self, content: Mapping[str, str]) -> bool:
        """Fill a folder under another name, then rename it: a run folder is never half made."""
        final = storage.local_path(self.uri)
        root = os.path.dirname(final)
        storage.make_folder(root)
        temporary = os.path.join(root, f".tmp-{uuid.uuid4().hex}")
        try:
            os.mkdir(temporary)
            for file, text in content.items():
                storage.write_file(os.path.join(temporary, file), text.encode())
            storage.sync_folder(temporary)
            os.rename(temporary, final)  # fails on a folder that holds anything
            storage.sync_folder(root)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if os.path.lexists(final):
                return False
            raise storage.disk_error(final, error, sum(map(len, content.values()))) from error
        return True

    def _make_remote(self, content: Mapping[str, str]) -> bool:
        if storage.list_names(self.uri) or not storage.write_new(self.at(MANIFEST), content[MANIFEST].encode()):
            return False
        for file, text in content.items():
            if file != MANIFEST:
                storage.write_text(self.at(file), text)
        return True

    @classmethod
    def open(cls, uri: str) -> RunFolder:
        """An existing run."""
        run = cls(uri)
        if not storage.exists(run.at(MANIFEST)):
            raise DataError(f"{storage.show(run.uri)} is not a run folder: it has no {MANIFEST}")
        return run

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(self.read_json(MANIFEST))

    @property
    def provenance(self) -> dict[str, Any]:
        return dict(self.read_json(PROVENANCE))

    @property
    def experiment_text(self) -> str:
        return storage.read_text(self.at(EXPERIMENT))

    @property
    def checkpoints(self) -> str:
        return self.at("checkpoints")

    @property
    def best(self) -> str:
        return self.at("best")

    # ------------------------------------------------------------------------------------------------ lock

    def acquire(self) -> None:
        """Become the one writer; refused while another process is. What a dead one left behind is taken over."""
        if self._token:
            return
        token = uuid.uuid4().hex
        with self._exclusively():
            owner = self._owner()
            if owner and self._is_alive(owner):
                raise RefusedError(self._held_by(owner))
            if owner is not None:
                _log.warning("run %s: taking over the lock left behind by %s", self.name, _who(owner))
                storage.delete(self.at(LOCK))
            won = storage.write_new(self.at(LOCK), self._lock_text(token))
        if not won or (self._owner() or {}).get("token") != token:  # a store without conditional writes
            raise RefusedError(f"run {self.name!r} was started by another process at the same moment")
        self._beat, self._lost = time.monotonic(), None
        self._token = token
        _held[token] = self
        for name in storage.list_names(self.uri):
            if name == SUMS or re.search(r"\.tmp-[0-9a-f]{8}$", name):  # what follows breaks the seal
                storage.delete(self.at(name))

    def release(self) -> None:
        """Give the lock back. No error if it is not held."""
        token, self._token = self._token, None
        self._records.close()
        if token:
            _held.pop(token, None)
            with contextlib.suppress(FileNotFoundError), self._exclusively():  # the folder may be gone
                if (self._owner() or {}).get("token") == token:
                    storage.delete(self.at(LOCK))

    def __enter__(self) -> RunFolder:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def is_locked(self) -> bool:
        """Whether a live process writes here (as far as one can tell)."""
        owner = self._owner()
        return bool(owner) and self._is_alive(owner or {})

    def await_lock(
        self,
        over: Callable[[Mapping[str, Any]], bool | None] = lambda owner: None,
        tell: Callable[[str], None] = lambda text: None,
        dying_s: float = 5.0,
    ) -> None:
        """Wait until nobody writes here; a lock that was left behind goes. RefusedError if its owner lives.

        One on another machine that cannot be asked lives if it renews its lock, and is dead after `stale_s` of silence.
        over: what somebody who knows says of an owner: True (dead), False (alive) or None. dying_s: what a process of
        this machine may take to end after whoever started it.
        """
        first, began, told = self._owner(), time.monotonic(), False
        while (owner := self._owner()) and self._is_alive(owner):
            known = over(owner)
            if known:
                if self._owner() == owner:
                    storage.delete(self.at(LOCK))
                return
            here = owner.get("host") == socket.gethostname()
            if known is False or owner != first or (here and time.monotonic() - began > dying_s):
                raise RefusedError(self._held_by(owner))
            if not told and not here:
                told = True
                left = self.stale_s - (_clock() - owner.get("time", 0.0))
                tell(f"waiting for {_who(owner)}, which has the lock of run {self.name!r}; {left:.0f} s of silence")
            time.sleep(0.5)

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """One process at a time looks at the lock and changes it, or two could take over a dead one's."""
        if not self.is_local:
            yield
            return
        import fcntl

        with open(storage.local_path(self.at(MANIFEST)), "rb+") as file:
            with contextlib.suppress(OSError):  # a file system without flock: O_EXCL alone then
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _owner(self) -> dict[str, Any] | None:
        """The lock's content; None without a lock, {} if its writer died while writing."""
        try:
            return dict(read_json(storage.read_bytes(self.at(LOCK))))
        except DataError:
            return None
        except ValueError:
            return {}

    def _lock_text(self, token: str) -> bytes:
        pid, host = os.getpid(), socket.gethostname()
        owner = {"token": token, "pid": pid, "host": host, "started": _process_start(pid), "time": _clock()}
        return _pretty(owner).encode()

    def _is_alive(self, owner: Mapping[str, Any]) -> bool:
        if owner.get("host") == socket.gethostname():
            if owner.get("pid") == os.getpid() and owner.get("started") == _process_start(os.getpid()):
                return owner.get("token") in _held
            return _process_start(owner.get("pid", -1)) == owner.get("started") is not None
        return _clock() - owner.get("time", 0.0) < self.stale_s

    def _held_by(self, owner: Mapping[str, Any]) -> str:
        text = f"run {self.name!r} is being written by {_who(owner)}"
        if owner.get("host") != socket.gethostname():
            ago = max(0.0, _clock() - owner.get("time", 0.0))
            text += f", seen {ago:.0f} s ago; if that one is dead, wait until {self.stale_s:.0f} s are over"
            text += f" or delete {storage.show(self.at(LOCK))}"
        return text

    def _heartbeat(self) -> None:
        """Renew the time in the lock now and then; piggybacks on the calls a running loop makes anyway."""
        if self._token and time.monotonic() - self._beat > self.stale_s / 10:
            self._beat = time.monotonic()
            owner = self._owner() or {}
            if owner.get("token") == self._token:
                storage.write_bytes(self.at(LOCK), self._lock_text(self._token))
            else:
                self._lost = _who(owner)

    # --------------------------------------------------------------------------------------------- records

    def append(self, record: Record) -> Record:
        """The record with `seq` and `time`, after it is in the file; on disk too, unless its kind is progress."""
        with self._mutex:
            self._passing(self._heartbeat)
            if self._lost:  # we slept for so long that somebody took over
                raise RefusedError(f"run {self.name!r}: the lock was taken over by {self._lost}; stopping here")
            fields = {key: value for key, value in record.items() if key not in ("seq", "time")}
            if record.get("kind") == "event":  # may quote what a library said
                fields = redact(fields)
            full = {"seq": self._records.count(), "time": _clock(), **fields}
            self._records.append([full], sync=record.get("kind") != "progress")
            return full

    def records(self) -> list[Record]:
        """All records. A last line that was torn by a kill is not one."""
        return self._records.read()

    @property
    def num_records(self) -> int:
        """How many records there are. Once asked, they survive a power cut: a checkpoint may count on it."""
        with self._mutex:
            return self._records.count(sync=True)

    def truncate_records(self, n: int) -> None:
        """Keep the first `n` records: a resumed run writes those after its checkpoint once more."""
        with self._mutex:
            self._records.truncate(n)

    def append_ledger(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows that could not be read to ledger.jsonl."""
        if rows:
            ledger = JsonLines(self.at(LEDGER))
            ledger.append([dict(row) for row in rows])
            ledger.close()

    def ledger(self) -> list[dict[str, Any]]:
        return JsonLines(self.at(LEDGER)).read()

    # ---------------------------------------------------------------------------------------------- status

    def write_status(self, status: Mapping[str, Any], force: bool = False) -> bool:
        """Replace status.json, at most once per `min_interval_s` unless `force` or a new state.

        What it does not say stays as this process said it last; `state`, `pid`, `host` and `time` are added. A
        status is a projection: one that cannot be written is a warning, not the end of the run.
        """
        state = status.get("state") or self._status.get("state") or "running"
        if state not in STATES:
            raise ValueError(f"state is {state!r}; known: {', '.join(STATES)}")
        force = force or state != self._status.get("state")
        if not force and time.monotonic() - self._status_time < self.min_interval_s:
            return False
        self._status = {
            **self._status,
            **status,
            "state": state,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": _clock(),
        }
        self._status_time = time.monotonic()
        if "error" in self._status:
            self._status["error"] = redact(self._status["error"])
        text = _pretty(self._status)
        durable = state not in ("created", "running")
        self._passing(self._heartbeat)
        return self._passing(lambda: storage.write_text(self.at(STATUS), text, durable=durable))

    def read_status(self) -> dict[str, Any]:
        """status.json, {} before the first."""
        try:
            return dict(self.read_json(STATUS))
        except DataError:
            return {}

    def state(self) -> str:
        """One of `STATES`. A run whose process is gone is not running."""
        state = str(self.read_status().get("state", "created"))
        if state in ("created", "running"):
            if self.is_locked():
                return "running"
            return "created" if state == "created" else "interrupted"
        return state

    def describe(self) -> str:
        """The state in words: `finished`, `interrupted after epoch 7 of 20`."""
        state, status = self.state(), self.read_status()
        if state in ("created", "finished") or status.get("epoch") is None:
            return state
        of = f" of {status['epochs']}" if status.get("epochs") else ""
        return f"{state} {'in' if state == 'running' else 'after'} epoch {status['epoch']}{of}"

    def request_stop(self, reason: str) -> None:
        """Ask the process that runs it to save and stop."""
        storage.write_text(self.at(STOP), reason.strip() + "\n")

    def stop_requested(self) -> str | None:
        """The reason if a stop was requested. Cheap: looks at most once per `min_interval_s`."""
        if time.monotonic() - self._stop_time >= self.min_interval_s:
            self._stop_time = time.monotonic()
            self._passing(self._look_for_stop)
            self._passing(self._heartbeat)
        return self._stop

    def _look_for_stop(self) -> None:
        found = storage.exists(self.at(STOP))
        self._stop = (storage.read_text(self.at(STOP)).strip() or "requested") if found else None

    def clear_stop(self) -> None:
        storage.delete(self.at(STOP))
        self._stop = None

    def _passing(self, call: Any) -> bool:
        """Whether a call that the run can do without worked; it gets 10 s instead of the usual deadline."""
        try:
            with storage.limits(deadline_s=10.0):
                call()
        except (CounterpoiseError, OSError) as error:
            _log.warning("run %s: %s", self.name, error)
            return False
        return True

    # ---------------------------------------------------------------------------------------- other files

    def write_json(self, name: str, value: Any) -> None:
        storage.write_text(self.at(name), _pretty(value))

    def read_json(self, name: str) -> Any:
        try:
            return read_json(storage.read_bytes(self.at(name)))
        except ValueError as error:
            if isinstance(error, CounterpoiseError):
                raise
            raise RefusedError(f"{storage.show(self.at(name))} is damaged: {error}") from error

    def write_predictions(self, columns: Mapping[str, Any], name: str = PREDICTIONS) -> None:
        """Columns of equal length as Parquet with page checksums; arrays [N, K] become lists of K."""
        storage.write_bytes(self.at(name), columns_bytes(columns))

    def read_predictions(self, name: str = PREDICTIONS) -> dict[str, Any]:
        """Columns as numpy arrays; compared with SHA256SUMS once that lists them, and page checksums verified."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        data = storage.read_bytes(self.at(name))
        recorded = self.sums().get(name)
        if recorded is not None and hashlib.sha256(data).hexdigest() != recorded:
            raise RefusedError(f"{storage.show(self.at(name))} is damaged: it differs from {SUMS}")
        try:
            table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise RefusedError(f"{storage.show(self.at(name))} is damaged: {error}") from error
        columns = {}
        for key in table.column_names:
            column = table[key].combine_chunks()
            if pa.types.is_fixed_size_list(column.type):
                flat = column.flatten().to_numpy(zero_copy_only=False)
                columns[key] = flat.reshape(len(column), column.type.list_size)
            else:
                columns[key] = column.to_numpy(zero_copy_only=False)
        return columns

    def files(self) -> dict[str, int]:
        """Bytes of every file of the run by its path in the folder."""
        return storage.list_files(self.uri)

    def digest(self, name: str) -> str:
        """The sha256 of one file."""
        return storage.sha256(self.at(name))

    def seal(self) -> None:
        """Write SHA256SUMS over what a finished run consists of. Checkpoints carry their own manifests."""
        self._records.close()
        self._write_sums({name: self.digest(name) for name in self._sealed_files()})

    def seal_also(self, *names: str) -> None:
        """Add files to the seal of a run that has one: what was worked out from it after its end."""
        if sums := self.sums():
            self._write_sums(sums | {name: self.digest(name) for name in names})

    def _write_sums(self, sums: Mapping[str, str]) -> None:
        storage.write_text(self.at(SUMS), "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))

    def sums(self) -> dict[str, str]:
        """{file: digest} of SHA256SUMS, {} before the end; RefusedError if a line is none."""
        sums: dict[str, str] = {}
        if not storage.exists(self.at(SUMS)):
            return sums
        for line in storage.read_bytes(self.at(SUMS)).decode(errors="replace").split("\n")[:-1]:
            digest, _, name = line.partition("  ")
            if not name or len(digest) != 64:
                raise RefusedError(f"{storage.show(self.at(SUMS))} is damaged: a line reads {line[:100]!r}")
            sums[name] = digest
        return sums

    def verify(self) -> list[str]:
        """What is wrong with the files of a sealed run and with its checkpoints; [] if all is as it was written."""
        problems = []
        if SUMS in self.files():
            try:
                sums = self.sums()
            except RefusedError as error:
                return [str(error)]
            there = self._sealed_files()
            for name, digest in sums.items():
                if name not in there:
                    problems.append(f"{name}: missing")
                elif self.digest(name) != digest:
                    problems.append(f"{name}: differs from {SUMS}")
            problems += [f"{name}: not in {SUMS}" for name in there if name not in sums]
        else:
            problems.append(f"{SUMS}: missing; the run was not sealed")
        for folder in (self.checkpoints, self.best):
            for name in checkpoint.committed(folder):
                if problem := checkpoint.verify(storage.join(folder, name)):
                    problems.append(problem)
        return problems

    def _sealed_files(self) -> list[str]:
        inside = ("checkpoints/", "best/")
        return [f for f in self.files() if f not in _UNSEALED and ".tmp-" not in f and not f.startswith(inside)]


_held: weakref.WeakValueDictionary[str, RunFolder] = weakref.WeakValueDictionary()  # locks of this process


def check_name(name: str) -> None:
    """ConfigError for what cannot be the name of a run or of a folder of runs."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"run name {name!r}: up to 100 letters, digits, dashes, dots and underscores; "
            "the first is a letter, a digit or an underscore"
        )


def safe_name(text: str) -> str:
    """Any text, such as "aug:lam=0.2", as a part of a folder's name: 60 characters at most."""
    text = re.sub(r"[^A-Za-z0-9_.-]", "", text.replace(":", "-"))
    return text if len(text) <= 60 else f"{text[:52]}-{hashlib.sha256(text.encode()).hexdigest()[:7]}"


def list_runs(root_uri: str) -> list[RunFolder]:
    """The runs of a folder, by name."""
    places = [storage.join(root_uri, name) for name in storage.list_names(root_uri) if _NAME.fullmatch(name)]
    return [RunFolder(uri) for uri in places if storage.exists(storage.join(uri, MANIFEST))]


def find_runs(places: Sequence[str]) -> list[str]:
    """URIs of the runs at some places: runs, or folders with runs up to two levels below."""
    found: dict[str, None] = {}
    for place in (place.rstrip("/") for place in places):
        if storage.exists(storage.join(place, MANIFEST)):
            found[place] = None
            continue
        here = [folder.uri for folder in list_runs(place)]
        below = [storage.join(place, name) for name in storage.list_names(place) if not name.startswith(".")]
        if storage.is_local(place):
            below = [folder for folder in below if os.path.isdir(storage.local_path(folder))]
        found |= dict.fromkeys(here)
        for folder in below:
            if folder not in found:
                found |= dict.fromkeys(run.uri for run in list_runs(folder))
    return list(found)


class JsonLines:
    """A file of JSON lines that one process appends to. A line counts once its newline is written.

    In object storage nothing can be appended: the lines are kept in memory and the whole object is written again,
    at once where `sync` is asked for and else at most every 10 s.
    """

    remote_interval_s = 10.0

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.is_local = storage.is_local(uri)
        self._count: int | None = None  # lines, once this process writes
        self._file: IO[bytes] | None = None
        self._size = 0  # local only
        self._text = b""  # remote only
        self._put_time = float("-inf")
        self._dirty = False

    def read(self) -> list[dict[str, Any]]:
        lines = (self._text if self._count is not None and not self.is_local else self._load()).splitlines()
        rows = []
        for i, line in enumerate(lines, 1):
            try:
                rows.append(read_json(line))
            except ValueError as error:
                raise RefusedError(f"{storage.show(self.uri)}, line {i} is damaged: {error}") from error
        return rows

    def count(self, sync: bool = False) -> int:
        if sync and self._dirty:
            self._flush()
        return self._count if self._count is not None else self._load().count(b"\n")

    def append(self, rows: Iterable[Mapping[str, Any]], sync: bool = True) -> None:
        new = [json.dumps(row, default=_plain).encode() + b"\n" for row in rows]
        self._begin()
        assert self._count is not None
        if self.is_local:
            assert self._file is not None
            data = b"".join(new)
            try:
                if self._file.write(data) < len(data):  # how a disk that is filling up says so
                    raise OSError(errno.ENOSPC, "no space left on device")
            except OSError as error:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
                raise storage.disk_error(self.uri, error, len(data)) from error
            self._size += len(data)
        else:
            self._text += b"".join(new)
        self._count += len(new)
        self._dirty = True
        if sync or (not self.is_local and time.monotonic() - self._put_time > self.remote_interval_s):
            self._flush()

    def truncate(self, n: int) -> None:
        self.close()
        lines = self._load().splitlines(keepends=True)
        if n > len(lines):
            raise RefusedError(
                f"{storage.show(self.uri)} holds {len(lines)} records, the checkpoint was made after {n}: "
                "some are lost; start again under another --name"
            )
        storage.write_bytes(self.uri, b"".join(lines[:n]))

    def close(self) -> None:
        if self._dirty:
            self._flush()
        if self._file:
            self._file.close()
        self._file, self._count, self._text = None, None, b""

    def _load(self) -> bytes:
        """The whole lines; the torn rest after the last newline is left out."""
        try:
            data = storage.read_bytes(self.uri)
        except DataError:
            return b""
        return data[: data.rfind(b"\n") + 1]

    def _begin(self) -> None:
        if self._count is not None:
            return
        whole = self._load()
        if self.is_local:
            path = storage.local_path(self.uri)
            storage.make_folder(os.path.dirname(path))
            try:
                self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (stays open for the whole run)
                self._file.truncate(len(whole))
                self._size = len(whole)
            except OSError as error:
                raise storage.disk_error(path, error) from error
        else:
            self._text = whole
        self._count = whole.count(b"\n")

    def _flush(self) -> None:
        if self.is_local:
            assert self._file is not None
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise storage.disk_error(self.uri, error) from error
        else:
            storage.write_bytes(self.uri, self._text)
            self._put_time = time.monotonic()
        self._dirty = False


# ------------------------------------------------------------------------------------------------ secrets

_SECRET_KEY = re.compile(
    r"secret|token(?!iz)|passw|passphrase|credential|api_?key|access_?key|private_?key|key_?id|authorization|cookie",
    re.IGNORECASE,
)
_PATH_KEY = re.compile(r"(file|path|dir|folder|sock|bundle|_credentials)$", re.IGNORECASE)
_SECRET_TEXT = [
    (re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@\"']+@"), r"\1[redacted]@"),
    (re.compile(r"([?&][a-z_-]*(?:credential|token|signature|secret|key)=)[^&\s\"']+", re.I), r"\1[redacted]"),
    (re.compile(r"(--?[A-Za-z-]*(?:token|password|secret)[A-Za-z-]*=)\S+"), r"\1[redacted]"),
    (re.compile(r"(Bearer )[A-Za-z0-9._~+/=-]{8,}"), r"\1[redacted]"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), "[redacted]"),
    (re.compile(r"\b(?:hf_|ghp_|gho_|ghs_|github_pat_|glsa_|glc_|sk-)[A-Za-z0-9_-]{16,}"), "[redacted]"),
]


def redact(value: Any) -> Any:
    """A copy without secrets.

    Replaced are texts under keys that sound like one, users and passwords in URLs, tokens of known form, and
    the values of environment variables whose names sound like a secret. Numbers stay: `max_tokens` is none.
    """
    return _redacted(value, list(known_secrets().values()))


def known_secrets() -> dict[str, str]:
    """Environment variables whose names sound like a secret; short values and paths to secrets are none."""
    named = {k: v for k, v in os.environ.items() if _SECRET_KEY.search(k) and len(v) >= 12}
    return {k: v for k, v in named.items() if not is_path(k, v)}


def is_path(name: str, value: str) -> bool:
    """Whether a variable names a file that holds a secret, not the secret: keys of AWS may begin with a slash too."""
    return value.startswith("/") and (bool(_PATH_KEY.search(name)) or os.path.exists(value))


def _redacted(value: Any, hidden: Sequence[str], secret: bool = False) -> Any:
    if isinstance(value, str):
        if secret:
            return "[redacted]" if value else value
        for text in hidden:
            value = value.replace(text, "[redacted]")
        return _redacted_text(value)
    if isinstance(value, Mapping):
        return {k: _redacted(v, hidden, secret or bool(_SECRET_KEY.search(str(k)))) for k, v in value.items()}
    if isinstance(value, list | tuple):
        after = [False] + [isinstance(v, str) and v.startswith("-") and bool(_SECRET_KEY.search(v)) for v in value]
        return [_redacted(v, hidden, secret or a) for v, a in zip(value, after, strict=False)]
    return value


def _redacted_text(text: str) -> str:
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return text


def _line_with_secret(text: str) -> int:
    """Number of the first line that holds a secret, 0 if there is none."""
    return next((i for i, line in enumerate(text.splitlines(), 1) if _redacted_text(line) != line), 0)


# ------------------------------------------------------------------------------------------------ helpers


def _clock() -> float:
    return time.time()


def _now() -> str:
    return datetime.fromtimestamp(_clock(), UTC).isoformat(timespec="seconds")


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """numpy and torch numbers and arrays, and tuples of contracts, as JSON values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be written as JSON")


def _who(owner: Mapping[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def _process_start(pid: int) -> str | None:
    """When a process of this machine started, so that a reused pid is told apart; None if it is dead."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot, open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
            return None if fields[0] in "ZX" else f"{boot.read().strip()}:{fields[19]}"
    except OSError:
        pass
    if os.path.isdir("/proc/self"):
        return None
    try:  # no /proc (macOS): the pid alone
        os.kill(pid, 0)
    except PermissionError:
        return "alive"
    except OSError:
        return None
    return "alive"
