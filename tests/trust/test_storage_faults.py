"""Shards on a server that misbehaves: read all the same if that passes in time, else an error within the deadline."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import write_corpus
from tests.test_storage import error_body, use_server
from tests.trust.faults import chance, keep

from counterpoise import storage
from counterpoise.contracts import CounterpoiseError, DataError
from counterpoise.data.loader import LocalData
from counterpoise.data.options import DataOptions
from counterpoise.engine.watchdog import Deadlines

pytestmark = [pytest.mark.s3, pytest.mark.filterwarnings("default")]  # servers and clients warn of their own

Fault = Callable[["Answer", bytes], bool]  # answers a GET of some bytes, or returns True: as it should be answered


class Answer(http.server.BaseHTTPRequestHandler):
    """S3 as far as reading goes: HEAD, and GET with Range and If-Match, of the files of a folder."""

    protocol_version = "HTTP/1.1"
    store: Store

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        store = self.store
        with store.lock:
            store.requests[f"{self.command} {self.path}"] += 1
            store.asked += 1
            number = store.asked
        with contextlib.suppress(OSError):
            file = store.folder / self.path.split("?")[0].removeprefix("/bucket/")
            if not file.is_file():
                self.say(404, error_body("NoSuchKey"))
                return
            data = file.read_bytes()
            tag = f'"{hashlib.md5(data).hexdigest()}"'
            if self.headers.get("If-Match") not in (None, tag):
                self.say(412, error_body("PreconditionFailed"))
                return
            status, part = 200, data
            if wanted := self.headers.get("Range"):
                first, last = wanted.removeprefix("bytes=").split("-")
                status, part = 206, data[int(first) : int(last) + 1]
            if store.fault is not None and store.hits(self.command, number):
                store.landed.append(f"{self.command} {self.path} #{number}")
                if not store.fault(self, part):
                    return
            self.say(status, part, tag)

    def say(self, status: int, body: bytes, tag: str = "", announced: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.send_header("Last-Modified", formatdate(0, usegmt=True))
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Store:
    """What a server holds, how it misbehaves, and what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.Lock()
        self.requests: Counter[str] = Counter()
        self.landed: list[str] = []
        self.asked = 0
        self.fault: Fault | None = None
        self.hits: Callable[[str, int], bool] = lambda command, number: command == "GET"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served")
    write_corpus(place, modalities=("strong",), media=True, rows={"train": 32, "valid": 16, "test": 16})
    card = (place / "corpus.yaml").read_text()
    for split in ("train", "valid", "test"):  # by name: nothing is listed here
        names = ", ".join(f"{split}-0000{i}-of-00002.parquet" for i in range(2))
        card = card.replace(f"{split}-*.parquet", f"[{names}]")
    (place / "corpus.yaml").write_text(card)
    return place


@pytest.fixture
def store(served: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    made = Store(served)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Answer,), {"store": made}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    use_server(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def rows(place: str) -> list[dict[str, Any]]:
    data = LocalData(place, batch_size=16, options=DataOptions(cache="off", decode_threads=1))
    try:
        return [*data.train_batches(1), *data.batches("test")]
    finally:
        data.close()


def same(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> bool:
    return len(one) == len(two) and all(
        all(np.array_equal(a[k], b[k]) for k in a) for a, b in zip(one, two, strict=True)
    )


def slow_down(answer: Answer, part: bytes) -> bool:
    answer.say(503, error_body("SlowDown"))
    return False


def internal(answer: Answer, part: bytes) -> bool:
    answer.say(500, error_body("InternalError"))
    return False


def reset(answer: Answer, part: bytes) -> bool:
    answer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    answer.connection.close()
    answer.close_connection = True
    return False


def short(answer: Answer, part: bytes) -> bool:
    answer.say(206, part[: len(part) // 2], announced=len(part))
    answer.close_connection = True
    return False


def hang(answer: Answer, part: bytes) -> bool:
    time.sleep(3)
    return False


def drip(answer: Answer, part: bytes) -> bool:
    """Two bytes a second or so: never silent for long."""
    answer.say(206, b"", announced=len(part))
    for _ in range(60):
        answer.wfile.write(b"x")
        time.sleep(0.1)
    return False


def expired(answer: Answer, part: bytes) -> bool:
    answer.say(403, error_body("ExpiredToken"))
    return False


def gone(answer: Answer, part: bytes) -> bool:
    answer.say(404, error_body("NoSuchKey"))
    return False


PASSING: list[Fault] = [slow_down, internal, reset, short]
LASTING: list[tuple[Fault, str]] = [
    (slow_down, "failed after 3 tries"),
    (reset, "failed after"),
    (short, "failed after"),
    (hang, "no answer"),
    (drip, "no answer"),
    (expired, "access denied"),
    (gone, "no such file"),
]
QUICK = {"deadline_s": 2.0, "read_s": 0.5, "connect_s": 0.5, "attempts": 3, "backoff_s": 0.02, "backoff_max_s": 0.05}


@pytest.mark.parametrize("fault", PASSING, ids=lambda f: f.__name__)
def test_a_fault_that_passes_changes_no_bit(fault: Fault, store: Store, served: Path) -> None:
    """Every request has a fault of one in five, as a seed says."""
    draw = chance("6", fault.__name__)
    unlucky = {n for n in range(1, 2000) if draw.random() < 0.2}
    store.fault, store.hits = fault, lambda command, number: command == "GET" and number in unlucky
    with storage.limits(backoff_s=0.01, backoff_max_s=0.02):
        found = rows("s3://bucket/corpus.yaml")
    survived = same(found, rows(str(served / "corpus.yaml")))
    keep("6 object store", fault.__name__, {"requests": store.landed} if store.landed else None, survived)
    assert survived


@pytest.mark.parametrize(("fault", "said"), LASTING, ids=[f.__name__ for f, _ in LASTING])
def test_a_fault_that_stays_is_an_error_within_the_deadline(fault: Fault, said: str, store: Store) -> None:
    """From the first range of the first shard on; nothing waits for the server, and nothing multiplies tries."""
    with storage.limits(**{**QUICK, "deadline_s": 30.0, "attempts": 20}):
        storage.size("s3://bucket/corpus.yaml")  # a client that is there: the deadline is of the server
    with storage.limits(**QUICK):
        store.requests.clear()
        store.fault, store.hits = fault, lambda command, number: command == "GET" and number > 6
        began = time.monotonic()
        with pytest.raises(CounterpoiseError) as caught:
            rows("s3://bucket/corpus.yaml")
        took = time.monotonic() - began
    keep(
        "6 object store",
        f"{fault.__name__} for ever",
        {"requests": store.landed} if store.landed else None,
        True,
        recover_s=took,
    )
    assert said in str(caught.value) and "s3://bucket/" in str(caught.value) and "\n" not in str(caught.value)
    assert took < 12.0, "one operation has 2 s and its size; the machine may be busy"
    # aiohttp asks once more by itself where a connection that it kept turns out to be gone
    assert len(store.landed) <= 3 * (2 if fault is reset else 1), "one layer of tries"
    assert max(store.requests.values()) <= 10


@pytest.mark.parametrize("fault", [slow_down, reset, hang], ids=lambda f: f.__name__)
def test_training_waits_for_a_server_that_is_away_and_says_so(
    fault: Fault, store: Store, served: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Away for longer than the usual tries take: an error where nobody is patient, the same rows where somebody is."""
    away_s = 4.0
    short = {**QUICK, "deadline_s": 1.0, "outage_pause_s": 0.3}
    with storage.limits(**{**QUICK, "deadline_s": 30.0, "attempts": 20}):
        storage.size("s3://bucket/corpus.yaml")
    began = time.monotonic()
    store.fault, store.hits = fault, lambda command, number: time.monotonic() < began + away_s
    with storage.limits(**short), storage.patience(60.0), pytest.raises(CounterpoiseError, match="failed after"):
        rows("s3://bucket/corpus.yaml")
    assert not caplog.records and time.monotonic() < began + away_s
    with storage.limits(**short, patient=True), storage.patience(60.0):
        found = rows("s3://bucket/corpus.yaml")
    recovered = time.monotonic() - began - away_s
    survived = same(found, rows(str(served / "corpus.yaml")))
    where = {"requests": store.landed} if store.landed else None
    keep("6 object store", f"outage, {fault.__name__}", where, survived, recover_s=recovered)
    assert survived and 0 < recovered < 20
    assert all("away for" in r.message and "next try in" in r.message for r in caplog.records) and caplog.records


def test_without_our_deadline_a_server_that_drips_holds_the_client(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the same read by the file object of the library itself."""
    store.fault = drip
    fs, path = storage.filesystem("s3://bucket/test-00000-of-00002.parquet")
    done = threading.Event()

    def read() -> None:
        with contextlib.suppress(Exception), fs.open(path, "rb", cache_type="none") as file:
            file.read(1000)
        done.set()

    with storage.limits(**QUICK):
        threading.Thread(target=read, daemon=True).start()
        held = not done.wait(4.0)
    where = {"requests": store.landed} if store.landed else None
    keep("6 object store", "control: the library's own file", where, not held, control=True)
    assert held


def test_a_shard_that_is_replaced_while_it_is_read_is_noticed(store: Store, served: Path) -> None:
    name = "test-00001-of-00002.parquet"
    whole = (served / name).read_bytes()
    try:
        file = storage.open_ranges(f"s3://bucket/{name}")
        assert file.read(4) == b"PAR1"
        (served / name).write_bytes(whole[::-1])
        with pytest.raises(DataError, match=r"was replaced while it was read"):
            file.read(4)
    finally:
        (served / name).write_bytes(whole)
    keep("6 object store", "wrong ETag", {"request": "GET"}, True)


def test_ranges_are_read_as_they_are_asked_for(store: Store, served: Path) -> None:
    """No more than what is wanted, and one request for each: shards are read by planned ranges."""
    name = "train-00000-of-00002.parquet"
    whole = (served / name).read_bytes()
    with storage.open_ranges(f"s3://bucket/{name}") as file:
        file.seek(100)
        assert file.read(50) == whole[100:150] and file.tell() == 150
        assert file.read() == whole[150:] and file.read(1) == b""
    assert sum(store.requests.values()) == 3
    assert storage.sha256(f"s3://bucket/{name}") == hashlib.sha256(whole).hexdigest()
    with pytest.raises(DataError, match="no such file"):
        storage.open_ranges("s3://bucket/none")


def test_an_operation_ends_after_a_minute_and_a_second_per_megabyte() -> None:
    assert storage.LIMITS.seconds(0) == 60.0 and storage.LIMITS.seconds(10_000_000) == 70.0
    assert storage.LIMITS.attempts <= 10 and storage.LIMITS.read_s < storage.LIMITS.deadline_s
    # What training waits for, it tries so often at most: and `Deadlines` of the watchdog are longer.
    assert storage.LIMITS.attempts + storage.OUTAGE_S / (storage.LIMITS.outage_pause_s * 2 / 3) <= 24
    assert min(Deadlines().read, Deadlines().rest) > 2 * storage.OUTAGE_S
