"""Files on local disk and in object storage behind one small set of functions.

A place is a plain path or a URI that fsspec knows (`s3://bucket/prefix`). Credentials and endpoints come from
the environment (`AWS_*`, `AWS_ENDPOINT_URL_S3`), never from an argument, so that they cannot reach a log or a
config.

S3 clients do not protect from a slow server: one that drips a few bytes per second holds them for ever. So
every remote operation, with all its retries, has a deadline of ours (base plus size over a least throughput),
and ours is the only layer that retries: botocore and s3fs try once. What may pass (no connection, silence, 5xx, 429)
is tried up to 8 times within 60 s and a second per megabyte, with random pauses that double up to 10 s; see `Limits`.
Training waits longer, and says so (`patience`). What will not pass (no such bucket, access denied, no credentials, no
S3 server) is said at once. Local paths skip all of that.

Errors: `DataError` for what is not there, `ResourceError` for what cannot be reached, read or written. Both
name the place, and the server where it matters, and carry no credentials.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import fsspec

from counterpoise.contracts import ConfigError, CounterpoiseError, DataError, ResourceError


@dataclass(frozen=True)
class Limits:
    """How long one remote operation may take, with all its tries, and how often it is tried."""

    deadline_s: float = 60.0  # of an operation without payload
    bytes_per_s: float = 1e6  # the slowest server we wait for; size / bytes_per_s is added to the deadline
    attempts: int = 8
    connect_s: float = 10.0
    read_s: float = 20.0  # silence on a connection
    backoff_s: float = 0.5  # first pause between tries at most; doubles, with full jitter
    backoff_max_s: float = 10.0
    outage_pause_s: float = 30.0  # give or take a third: between further tries, where an outage is waited out
    patient: bool = True  # whether it is, where `patience` says so

    def seconds(self, num_bytes: int) -> float:
        return self.deadline_s + num_bytes / self.bytes_per_s


LIMITS = Limits()
OUTAGE_S = 300.0  # so long training waits for a server that has gone away
_PIECE = 1 << 24  # bytes of a file that are read at once to be hashed
_LOOKS = 3  # at a file that others replace between our asking for its size and for its content
_limits: ContextVar[Limits] = ContextVar("storage_limits", default=LIMITS)
_patience_s = 0.0  # of all threads of this process
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def limits(**changes: float) -> Iterator[Limits]:
    """Other limits within a `with` block of this thread: `with limits(deadline_s=5): ...`; no patience there."""
    token = _limits.set(replace(_limits.get(), **{"patient": False, **changes}))  # type: ignore[arg-type]
    try:
        yield _limits.get()
    finally:
        _limits.reset(token)


@contextlib.contextmanager
def patience(seconds: float = OUTAGE_S) -> Iterator[None]:
    """Within a `with` block, operations of all threads of this process wait so long for a server that is away.

    After the usual tries they go on with one in half a minute or so, and a warning each. Operations within `limits`
    do not wait: whoever set those has no time.
    """
    global _patience_s
    before, _patience_s = _patience_s, seconds
    try:
        yield
    finally:
        _patience_s = before


# -------------------------------------------------------------------------------------------------- places


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])


def show(uri: str) -> str:
    """The place as it may be printed: without user name and password."""
    return re.sub(r"://[^/\s]*@", "://", uri)


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that holds `uri`, and the path of `uri` on it."""
    try:
        if uri.startswith(("s3://", "s3a://")):
            fs, path = fsspec.core.url_to_fs(uri, **_s3_options())
            fs.retries = 1  # s3fs has a retry layer of its own above botocore's
            return fs, path
        fs, path = fsspec.core.url_to_fs(uri)
        return fs, path
    except ImportError as error:
        raise ResourceError(f"{show(uri)}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{show(uri)}: {error}; give a path or s3://bucket/prefix") from error


def local_path(uri: str) -> str:
    """The absolute path of a local place."""
    assert is_local(uri), f"{show(uri)} is not local"
    return str(filesystem(uri)[1])


def _endpoint() -> tuple[str, str]:
    """The variable that names the server of object storage, and its value; both empty for Amazon's."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if value := os.environ.get(name):
            return name, value
    return "", ""


def _s3_options() -> dict[str, Any]:
    now = _limits.get()
    return {
        # Part of the instance's cache key here, so that a changed environment gives another client.
        "endpoint_url": _endpoint()[1] or None,
        "use_listings_cache": False,
        "config_kwargs": {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": now.connect_s,
            "read_timeout": now.read_s,
        },
    }


# ------------------------------------------------------------------------------------------------- reading


def exists(uri: str) -> bool:
    if is_local(uri):
        return os.path.exists(local_path(uri))
    try:
        _info(uri)
    except DataError:
        return False
    return True


def size(uri: str) -> int:
    """Bytes of a file."""
    if is_local(uri):
        with _local_errors(uri):
            return os.path.getsize(local_path(uri))
    return _remote_size(uri)


def read_bytes(uri: str) -> bytes:
    if is_local(uri):
        with _local_errors(uri), open(local_path(uri), "rb") as file:
            return file.read()
    for _ in range(_LOOKS):
        num_bytes = _remote_size(uri)
        if num_bytes == 0:
            return b""
        data = bytes(_remote(uri, "cat_file", num_bytes=num_bytes))
        if len(data) == num_bytes:
            return data
    raise ResourceError(f"{show(uri)}: {len(data):,} bytes came, {num_bytes:,} were announced")


def read_text(uri: str) -> str:
    try:
        return read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{show(uri)} is not text: {error}") from error


def sha256(uri: str) -> str:
    """The SHA-256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with _local_errors(uri), open_ranges(uri) as file:
        while data := file.read(_PIECE):
            digest.update(data)
    return digest.hexdigest()


def open_input(uri: str) -> BinaryIO:
    """A readable, seekable file for pyarrow and its like. Remote ones read ranges, each with a deadline."""
    if is_local(uri):
        with _local_errors(uri):
            return open(local_path(uri), "rb")
    return io.BufferedReader(_RemoteFile(uri), buffer_size=1 << 20)


def open_ranges(uri: str) -> io.RawIOBase:
    """As `open_input`, but nothing is read beyond what is asked for: for readers that plan what they read."""
    if is_local(uri):
        with _local_errors(uri):
            return io.FileIO(local_path(uri))
    return _RemoteFile(uri)


def glob(pattern: str) -> list[str]:
    """Places that match a pattern with *, ? or [], sorted; local ones as absolute paths."""
    if is_local(pattern):
        fs, path = filesystem(pattern)
        with _local_errors(pattern):
            return sorted(str(match) for match in fs.glob(path))
    fs, _ = filesystem(pattern)
    try:
        return sorted(str(fs.unstrip_protocol(match)) for match in _remote(pattern, "glob"))
    except DataError:
        return []


def list_names(uri: str) -> list[str]:
    """Names (without the folder) of the entries of a folder, sorted; empty if there is no such folder."""
    if is_local(uri):
        with _local_errors(uri):
            try:
                return sorted(os.listdir(local_path(uri)))
            except FileNotFoundError:
                return []
    path = filesystem(uri)[1].rstrip("/")
    try:
        entries = _remote(uri, "ls", detail=False)
    except DataError:
        return []
    return sorted(e.rstrip("/").rsplit("/", 1)[-1] for e in entries if e.rstrip("/") != path)


def list_files(uri: str) -> dict[str, int]:
    """Bytes of every file below a folder by relative path, sorted; empty if there is no such folder."""
    if is_local(uri):
        top, found = local_path(uri), {}
        for folder, _, names in os.walk(top):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):  # another process removes and renames meanwhile
                    found[os.path.relpath(path, top).replace(os.sep, "/")] = os.path.getsize(path)
        return dict(sorted(found.items()))
    path = filesystem(uri)[1].rstrip("/") + "/"
    entries = _remote(uri, "find", detail=True)
    return {n[len(path) :]: int(e["size"] or 0) for n, e in sorted(entries.items()) if n.startswith(path)}


def free_bytes(uri: str) -> int | None:
    """Free space for files at a local place, on the nearest folder that exists; None for object storage."""
    if not is_local(uri):
        return None
    path = local_path(uri)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


# ------------------------------------------------------------------------------------------------- writing


def make_folder(uri: str) -> None:
    """Make a folder and those above it; object storage has none."""
    if is_local(uri):
        with _local_errors(uri):
            os.makedirs(local_path(uri), exist_ok=True)


def write_bytes(uri: str, data: bytes, durable: bool = True) -> None:
    """Write a whole file so that readers see the old content or the new, never a part.

    durable: on return the content also survives a power cut (costs an fsync of the file and of its folder).
    """
    if not is_local(uri):  # a PUT is atomic
        _remote(uri, "pipe_file", data, num_bytes=len(data))
        return
    path = local_path(uri)
    with _local_errors(uri, len(data)):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
        try:
            write_file(temporary, data, durable)
            os.replace(temporary, path)
        except Exception:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
        if durable:
            sync_folder(os.path.dirname(path))


def write_text(uri: str, text: str, durable: bool = True) -> None:
    write_bytes(uri, text.encode(), durable)


def write_new(uri: str, data: bytes) -> bool:
    """Write a file only if there is none: True for exactly one of several writers.

    `data` should be unique to the writer: a retried PUT that had succeeded unnoticed is known by its content.
    A server that does not know conditional writes overwrites; then nobody is told False.
    """
    if is_local(uri):
        path = local_path(uri)
        with _local_errors(uri, len(data)):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
            try:
                write_file(temporary, data)
                os.link(temporary, path)  # unlike O_EXCL and a write, never leaves a part
            except FileExistsError:
                return False
            finally:
                with contextlib.suppress(OSError):
                    os.remove(temporary)
            sync_folder(os.path.dirname(path))
            return True
    if exists(uri):
        return False
    try:
        _remote(uri, "pipe_file", data, num_bytes=len(data), mode="create")
    except FileExistsError:
        return read_bytes(uri) == data
    return True


def delete(uri: str) -> None:
    """Remove a file or a folder with all it holds; it is no error if there is none."""
    if is_local(uri):
        path = local_path(uri)
        with _local_errors(uri), contextlib.suppress(FileNotFoundError):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.remove(path)
        return
    with contextlib.suppress(DataError):
        _remote(uri, "rm", recursive=True)


def write_file(path: str, data: bytes, durable: bool = True) -> None:
    """Write a local file in place: for names nobody reads yet."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def sync_folder(path: str) -> None:
    """Make renames and new names in a local folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse fsync of a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _local_errors(uri: str, needed: int = 0) -> Iterator[None]:
    """Say in one line what the operating system refused; `FileExistsError` passes."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{uri}: there is no such file") from error
    except FileExistsError:
        raise
    except OSError as error:
        raise disk_error(uri, error, needed) from error


def disk_error(uri: str, error: OSError, needed: int = 0) -> ResourceError:
    """A failed local read or write as an error for the user; for a full disk with needed and free bytes."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{uri}: disk full; {needed:,} bytes needed, {free_bytes(uri):,} free")
    return ResourceError(f"{uri}: {error.strerror or error}")


# -------------------------------------------------------------------------------------------------- remote


class _RemoteFile(io.RawIOBase):
    """Byte ranges of one object as a raw file: of the object as it was when it was opened, or none."""

    def __init__(self, uri: str) -> None:
        info = _file_info(uri)
        self._uri, self._size, self._position = uri, int(info["size"] or 0), 0
        self._etag = info.get("ETag")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        start = self._position
        end = self._size if size is None or size < 0 else min(start + size, self._size)
        if start >= end:
            return b""
        operation, more = ("range", {"etag": self._etag}) if self._etag else ("cat_file", {})
        data = bytes(_remote(self._uri, operation, num_bytes=end - start, start=start, end=end, **more))
        if len(data) != end - start:
            raise ResourceError(f"{show(self._uri)}: {len(data):,} bytes came, {end - start:,} were asked for")
        self._position = end
        return data

    def readall(self) -> bytes:
        return self.read()


def _info(uri: str) -> Any:
    info = _remote(uri, "info")
    if "text/html" in str(info.get("ContentType")) and not uri.endswith((".html", ".htm")):
        raise ResourceError(f"{show(uri)}: a web page comes in its place{_advice()}")
    return info


def _file_info(uri: str) -> Any:
    info = _info(uri)
    if info.get("type") == "directory":
        raise DataError(f"{show(uri)}: there is no such file (it is a folder)")
    return info


def _remote_size(uri: str) -> int:
    return int(_file_info(uri)["size"] or 0)


def _remote(uri: str, operation: str, *args: Any, num_bytes: int = 0, **options: Any) -> Any:
    """One operation of the remote file system, tried again while it fails in passing, within one deadline."""
    import tenacity

    now = _limits.get()
    allowed = now.seconds(num_bytes)  # of one try; of all, unless we are patient
    patient = now.patient and _patience_s > allowed
    limit = _patience_s if patient else allowed
    end = time.monotonic() + limit
    stop = tenacity.stop_before_delay(limit)
    pause = tenacity.wait_random_exponential(multiplier=now.backoff_s, max=now.backoff_max_s)
    long_pause = tenacity.wait_random(now.outage_pause_s * 2 / 3, now.outage_pause_s * 4 / 3)
    retrying = tenacity.Retrying(
        stop=stop if patient else stop | tenacity.stop_after_attempt(now.attempts),
        wait=tenacity.wait_chain(*[pause] * (now.attempts - 1), long_pause),
        before_sleep=lambda state: _tell(uri, now, state, limit),
        retry=tenacity.retry_if_exception(_is_transient),
        reraise=True,
    )
    tries = 0

    def attempt() -> Any:
        nonlocal tries
        tries += 1
        fs, path = filesystem(uri)
        return _within(min(allowed, end - time.monotonic()), fs, operation, path, *args, **options)

    try:
        return retrying(attempt)
    except (CounterpoiseError, FileExistsError):
        raise
    except FileNotFoundError as error:
        if "NoSuchBucket" in _codes(error):
            raise ResourceError(
                f"{show(uri)}: there is no bucket {_bucket(uri)}{_at_server()}; make it, or correct its name or "
                f"{_server_variable()}"
            ) from error
        raise DataError(f"{show(uri)}: there is no such file") from error
    except PermissionError as error:
        said = ", ".join(sorted(_codes(error) - {"403"})) or str(error)
        raise ResourceError(
            f"{show(uri)}: access denied{_at_server()} ({show(said)}); check AWS_PROFILE, or AWS_ACCESS_KEY_ID, "
            f"AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, and that the key may use the bucket {_bucket(uri)}"
        ) from error
    except Exception as error:
        tried = f"{operation.replace('_file', '')} failed after {tries} {'try' if tries == 1 else 'tries'}"
        raise _remote_error(uri, error, f"{tried}, deadline {limit:.0f} s") from error


def _tell(uri: str, now: Limits, state: Any, limit: float) -> None:
    """Warn while an outage is waited out: else nothing would be heard of it for minutes."""
    if state.attempt_number >= now.attempts:
        cause = _remote_error(uri, state.outcome.exception(), f"away for {state.seconds_since_start:.0f} s")
        _log.warning("%s; next try in %.0f s, given up after %.0f s", cause, state.upcoming_sleep, limit)


def _remote_error(uri: str, error: Exception, tried: str) -> CounterpoiseError:
    """What went wrong with a server, as an error that says what to change."""
    kind, text = type(error).__name__, show(" ".join(str(error).split()))
    kinds = {type(e).__name__ for e in _chain(error)}
    if kind == "ProfileNotFound":
        return ConfigError(
            f"{show(uri)}: AWS_PROFILE is '{os.environ.get('AWS_PROFILE', '')}', which is neither in ~/.aws/config nor "
            "in ~/.aws/credentials; change or unset it"
        )
    if "Credentials" in kind:
        return ResourceError(
            f"{show(uri)}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE "
            "(and AWS_ENDPOINT_URL_S3 for a server that is not Amazon's)"
        )
    if "Invalid endpoint" in text:
        name, value = _endpoint()
        return ConfigError(f"{show(uri)}: {name} is '{show(value)}'; give a URL such as https://s3.example.org")
    if kinds & {"gaierror", "ClientConnectorDNSError"}:
        return ResourceError(f"{show(uri)}: {tried}: the name of its server is not known to DNS{_advice()}")
    if kind in ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionRefusedError"):
        return ResourceError(f"{show(uri)}: {tried}: cannot connect{_advice()}")
    if _codes(error) & {"PreconditionFailed", "412"}:
        return DataError(f"{show(uri)}: was replaced while it was read; start again when nothing writes there")
    if kind == "ResponseParserError" or _codes(error) & {"", "404", "405"}:
        return ResourceError(f"{show(uri)}: {tried}: what answers is no S3 server{_advice()}")
    if isinstance(error, TimeoutError) or kind in ("ReadTimeoutError", "FSTimeoutError"):
        return ResourceError(f"{show(uri)}: {tried}: no answer{_advice()}, or try again later")
    return ResourceError(f"{show(uri)}: {tried}: {kind}: {text}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        yield here
        here = here.__cause__ or here.__context__


def _codes(error: BaseException) -> set[str]:
    """Codes that the server gave, such as NoSuchBucket; an empty one for an answer that is not S3's."""
    answers = (getattr(e, "response", None) for e in _chain(error))
    return {str(a.get("Error", {}).get("Code", "")) for a in answers if isinstance(a, dict)}


def _bucket(uri: str) -> str:
    return show(uri).partition("://")[2].partition("/")[0]


def _at_server() -> str:
    value = _endpoint()[1]
    return f" at {show(value)}" if value else " at Amazon S3"


def _server_variable() -> str:
    return _endpoint()[0] or "AWS_ENDPOINT_URL_S3, if the server is not Amazon's"


def _advice() -> str:
    name, value = _endpoint()
    if name:
        return f"; {name} is {show(value)}: check that this is the address of the S3 server, and that it runs"
    return "; check the network, or set AWS_ENDPOINT_URL_S3 if the server is not Amazon's"


def _within(seconds: float, fs: Any, operation: str, path: str, *args: Any, **options: Any) -> Any:
    """The operation's result, or TimeoutError when the time is over, whatever the server does."""
    if seconds <= 0:
        raise TimeoutError
    future: concurrent.futures.Future[Any]
    if fs.async_impl:  # s3fs: the coroutine is cancelled and its connection closed
        call = functools.partial(_range, fs) if operation == "range" else getattr(fs, "_" + operation)
        coroutine = call(path, *args, **options)
        future = asyncio.run_coroutine_threadsafe(coroutine, fs.loop)
    else:  # a thread cannot be stopped, only left behind
        future = concurrent.futures.Future()
        work = functools.partial(getattr(fs, operation), path, *args, **options)
        threading.Thread(target=_fulfil, args=(future, work), daemon=True).start()
    try:
        return future.result(seconds)
    except concurrent.futures.CancelledError as error:
        raise TimeoutError from error
    finally:
        future.cancel()


async def _range(fs: Any, path: str, start: int, end: int, etag: str) -> bytes:
    """Bytes of an S3 object that has not been replaced since it was opened; s3fs's `cat_file` would not look."""
    bucket, key, _ = fs.split_path(path)
    asked = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{end - 1}", "IfMatch": etag}
    answer = await fs._call_s3("get_object", **asked)
    async with answer["Body"] as body:
        return bytes(await body.read())


def _fulfil(future: concurrent.futures.Future[Any], call: Callable[[], Any]) -> None:
    try:
        value = call()
    except BaseException as error:
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            future.set_exception(error)
    else:
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            future.set_result(value)


# Class names, so that neither botocore nor aiohttp is imported for local paths.
_TRANSIENT = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "FSTimeoutError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseParserError",
    "ResponseStreamingError",
    "ServerDisconnectedError",
}
_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"}


def _is_transient(error: BaseException) -> bool:
    """Whether trying again may help: connections, timeouts and 5xx, never 403 or 404."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or response.get("Error", {}).get("Code") in _TRANSIENT_CODES
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    return any(cls.__name__ in _TRANSIENT for cls in type(error).__mro__)
