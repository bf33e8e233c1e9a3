import contextlib
import errno
import http.server
import os
import threading
import time

import pytest
import torch

from counterpoise import storage
from counterpoise.contracts import ConfigError, DataError, RefusedError, ResourceError
from counterpoise.engine import checkpoint
from counterpoise.engine.run import RunFolder, list_runs

# --------------------------------------------------------------------------------------------------- local


def test_what_is_written_is_read(tmp_path):
    uri = storage.join(str(tmp_path), "a", "b.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"12345")
    storage.write_text(storage.join(str(tmp_path), "a", "ä.txt"), "grün")
    assert storage.read_bytes(uri) == b"12345"
    assert storage.read_bytes(f"file://{tmp_path}/a/b.bin") == b"12345"
    assert storage.read_text(f"{tmp_path}/a/ä.txt") == "grün"
    assert storage.size(uri) == 5
    assert storage.list_names(f"{tmp_path}/a") == ["b.bin", "ä.txt"]
    assert storage.list_files(str(tmp_path)) == {"a/b.bin": 5, "a/ä.txt": 5}
    assert storage.list_names(f"{tmp_path}/none") == []
    assert storage.list_files(f"{tmp_path}/none") == {}
    with storage.open_input(uri) as file:
        file.seek(2)
        assert file.read() == b"345"
    storage.delete(f"{tmp_path}/a")
    storage.delete(f"{tmp_path}/a")
    assert not storage.exists(f"{tmp_path}/a")


def test_only_one_of_two_writers_makes_a_new_file(tmp_path):
    uri = f"{tmp_path}/lock"
    assert storage.write_new(uri, b"1")
    assert not storage.write_new(uri, b"2")
    assert storage.read_bytes(uri) == b"1"
    assert storage.list_names(str(tmp_path)) == ["lock"]


def test_errors_are_one_line_and_name_the_place(tmp_path):
    with pytest.raises(DataError, match=r"none\.txt: there is no such file"):
        storage.read_bytes(f"{tmp_path}/none.txt")
    with pytest.raises(ResourceError, match="Is a directory"):
        storage.read_bytes(str(tmp_path))
    with pytest.raises(ConfigError, match="nonsense"):
        storage.read_bytes("nonsense://a/b")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not text"):
        storage.read_text(f"{tmp_path}/binary")


def test_a_full_disk_keeps_the_old_content_and_says_what_is_free(tmp_path, monkeypatch):
    uri = f"{tmp_path}/a"
    storage.write_bytes(uri, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write_file", full)
    with pytest.raises(ResourceError, match=r"/a: disk full; 1,000 bytes needed, [\d,]+ free"):
        storage.write_bytes(uri, bytes(1000))
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_names(str(tmp_path)) == ["a"]


def test_places_are_shown_without_passwords():
    assert storage.show("s3://key:secret@bucket/x") == "s3://bucket/x"
    assert storage.show("s3://bucket/a@b") == "s3://bucket/a@b"


# ------------------------------------------------------------------------------------------ S3 that works


def use_server(monkeypatch, endpoint: str) -> None:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.s3
def test_object_storage_behaves_like_a_folder(bucket):
    uri = storage.join(bucket, "a", "b.bin")
    assert not storage.exists(uri)
    assert storage.list_names(f"{bucket}/a") == []
    assert storage.list_files(f"{bucket}/a") == {}
    storage.write_bytes(uri, b"12345")
    storage.write_bytes(f"{bucket}/a/empty", b"")
    storage.write_bytes(f"{bucket}/a/c/d", b"1")
    assert storage.read_bytes(uri) == b"12345"
    assert storage.read_bytes(f"{bucket}/a/empty") == b""
    assert storage.size(uri) == 5
    assert storage.list_names(f"{bucket}/a") == ["b.bin", "c", "empty"]
    assert storage.list_files(f"{bucket}/a") == {"b.bin": 5, "c/d": 1, "empty": 0}
    with storage.open_input(uri) as file:
        file.seek(2)
        assert file.read() == b"345"
    assert storage.write_new(f"{bucket}/new", b"1")
    assert not storage.write_new(f"{bucket}/new", b"2")
    assert storage.read_bytes(f"{bucket}/new") == b"1"
    with pytest.raises(DataError, match=r"s3://.*/none: there is no such file"):
        storage.read_bytes(f"{bucket}/none")
    with pytest.raises(DataError, match="it is a folder"):
        storage.read_bytes(f"{bucket}/a")
    storage.delete(f"{bucket}/a")
    storage.delete(f"{bucket}/a")
    assert storage.list_files(f"{bucket}/a") == {}


@pytest.mark.s3
def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_is_now(bucket, monkeypatch):
    uri, later, size = f"{bucket}/status.json", [b"another length", b"and another one"], storage._remote_size
    storage.write_bytes(uri, b"first")

    def asked(uri):
        found = size(uri)
        if later:
            storage.write_bytes(uri, later.pop(0))
        return found

    monkeypatch.setattr(storage, "_remote_size", asked)
    assert storage.read_bytes(uri) == b"and another one"
    monkeypatch.setattr(storage, "_remote_size", lambda uri: size(uri) + 1)
    with pytest.raises(ResourceError, match="15 bytes came, 16 were announced"):
        storage.read_bytes(uri)


@pytest.mark.s3
def test_parquet_is_read_through_open_input(bucket):
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": list(range(100_000))}), sink)
    storage.write_bytes(f"{bucket}/x.parquet", sink.getvalue().to_pybytes())
    with storage.open_input(f"{bucket}/x.parquet") as file:
        assert pq.read_table(file)["a"].to_pylist() == list(range(100_000))


@pytest.mark.s3
def test_checkpoints_in_object_storage(bucket, monkeypatch):
    folder = f"{bucket}/run/checkpoints"
    for step in range(4):
        weights = {"model": {"w": torch.full((3,), float(step))}}
        checkpoint.save(folder, f"step-{step:08d}", weights, {"step": step})
    assert checkpoint.committed(folder) == ["step-00000002", "step-00000003"]
    assert storage.list_names(folder) == ["LATEST", "step-00000002", "step-00000003"]
    assert checkpoint.save(folder, "step-00000003", {}, {"again": True}).endswith("/step-00000003-2")

    class Killed(BaseException):
        pass

    def kill(operation):
        if operation == "commit":
            raise Killed

    monkeypatch.setattr(checkpoint, "_before", kill)
    with pytest.raises(Killed):
        checkpoint.save(folder, "step-00000009", {}, {})
    found = checkpoint.latest(folder)
    assert (found.name, found.state) == ("step-00000003-2", {"again": True})

    fallbacks = []
    storage.write_bytes(f"{folder}/step-00000003-2/state.json", b'{"again": trUe}')
    found = checkpoint.latest(folder, lambda *said: fallbacks.append(said))
    assert found.name == "step-00000003"
    assert torch.equal(found.tensors["model"]["w"], torch.full((3,), 3.0))
    assert fallbacks[0][0] == "step-00000003-2"
    assert "state.json is damaged" in fallbacks[0][1]


@pytest.mark.s3
def test_runs_in_object_storage(bucket):
    run = RunFolder.create(f"{bucket}/runs", "a", experiment_text="seed: 1\n", provenance={}, manifest={})
    with pytest.raises(RefusedError, match=r"run 'a' exists in s3://.*created"):
        RunFolder.create(f"{bucket}/runs", "a", experiment_text="", provenance={}, manifest={})
    with run:
        for kind in ("start", "epoch", "epoch"):
            run.append({"kind": kind})
        run.write_status({"epoch": 2, "epochs": 3})
        assert not run.write_status({"epoch": 3, "epochs": 3})
        other = RunFolder.open(run.uri)
        assert [r["seq"] for r in other.records()] == [0, 1, 2]
        assert other.describe() == "running in epoch 2 of 3"
        with pytest.raises(RefusedError, match="being written by process"):
            other.acquire()
        other.request_stop("enough")
        assert run.stop_requested() == "enough"
    run = RunFolder.open(run.uri)
    assert run.describe() == "interrupted after epoch 2 of 3"
    with run:
        run.truncate_records(2)
        run.clear_stop()
        assert run.append({"kind": "end"})["seq"] == 2
        run.append_ledger([{"split": "train"}])
        run.append_ledger([{"split": "test"}])
        run.write_status({"state": "finished"})
        run.seal()
    assert [r["kind"] for r in run.records()] == ["start", "epoch", "end"]
    assert [row["split"] for row in run.ledger()] == ["train", "test"]
    assert run.verify() == []
    assert [r.name for r in list_runs(f"{bucket}/runs")] == ["a"]


# ------------------------------------------------------------------------------------------ S3 that fails


@contextlib.contextmanager
def failing_server(behave):
    """An S3 server with one object of 1000 bytes. behave(handler, n) answers the n-th request; True: as it should."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            requests.append(f"{self.command} {self.path}")
            with contextlib.suppress(OSError):
                if self.command == "PUT":
                    self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if behave(self, len(requests)):
                    self.say(200, b"x" * 1000)

        do_GET = do_HEAD = do_PUT = answer

        def say(self, status, body, announced=None):
            self.send_response(status)
            self.send_header("Content-Length", str(announced or len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def error_body(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()


def drip(handler, _):
    if handler.command == "HEAD":
        return True
    handler.say(200, b"", announced=1000)
    for _ in range(100):
        handler.wfile.write(b"x")
        time.sleep(0.1)


def hang(_handler, _n):
    time.sleep(4)


def short(handler, _):
    if handler.command == "HEAD":
        return True
    handler.say(200, b"x" * 10, announced=1000)
    handler.close_connection = True


def slow_down(handler, _):
    handler.say(503, error_body("SlowDown"))


@pytest.mark.s3
@pytest.mark.parametrize("behave", [drip, hang, short, slow_down], ids=lambda f: f.__name__)
def test_a_server_that_misbehaves_is_given_up_within_the_deadline(behave, monkeypatch):
    well = True
    quick = {"read_s": 0.4, "backoff_s": 0.1, "backoff_max_s": 0.2, "attempts": 4}
    with failing_server(lambda handler, n: True if well else behave(handler, n)) as (endpoint, requests):
        use_server(monkeypatch, endpoint)
        with storage.limits(**quick | {"deadline_s": 30.0, "attempts": 20}):  # a client that is there and connected
            assert storage.read_bytes("s3://bucket/key") == b"x" * 1000
        well = False
        requests.clear()
        start = time.monotonic()
        with (
            storage.limits(**quick, deadline_s=1.5),
            pytest.raises(ResourceError, match=r"s3://bucket/key: .*failed after"),
        ):
            storage.read_bytes("s3://bucket/key")
        assert time.monotonic() - start < 4.0  # the deadline of HEAD and that of GET
        assert 1 <= len(requests) <= 10


@pytest.mark.s3
def test_a_short_outage_is_ridden_out_without_multiplied_retries(monkeypatch):
    def twice(handler, n):
        return n > 2 or slow_down(handler, n)

    with failing_server(twice) as (endpoint, requests):
        use_server(monkeypatch, endpoint)
        with storage.limits(backoff_s=0.05, backoff_max_s=0.05):
            assert storage.read_bytes("s3://bucket/key") == b"x" * 1000
    assert [r.split()[0] for r in requests][:3] == ["HEAD"] * 3
    assert len(requests) <= 5


@pytest.mark.s3
def test_denied_access_is_not_tried_again_and_names_the_variables(monkeypatch):
    with failing_server(lambda handler, _: handler.say(403, error_body("AccessDenied"))) as (endpoint, requests):
        use_server(monkeypatch, endpoint)
        with pytest.raises(ResourceError, match=r"access denied.*AWS_ACCESS_KEY_ID") as caught:
            storage.read_bytes("s3://bucket/key")
    assert len(requests) == 1
    assert "test-secret" not in str(caught.value)


@pytest.mark.s3
def test_without_credentials_the_error_says_which_to_set(monkeypatch, tmp_path):
    use_server(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ResourceError, match=r"no credentials; set AWS_ACCESS_KEY_ID.* or AWS_PROFILE"):
        storage.read_bytes("s3://bucket/key")


def test_a_file_system_without_coroutines_has_a_deadline_too():
    class Slow:
        async_impl = False

        def info(self, path):
            time.sleep(2)

    with pytest.raises(TimeoutError):
        storage._within(0.1, Slow(), "info", "x")
    storage.write_bytes("memory://a/b", b"1")
    assert storage.read_bytes("memory://a/b") == b"1"
