"""Files on local disk and in object storage behind one small set of functions.

A place is a plain path or a URI that fsspec knows (`s3://bucket/prefix`). Credentials and endpoints come from the
environment (`AWS_*`, `AWS_ENDPOINT_URL_S3`), never from an argument, so that they cannot reach a log or a config.
"""

from __future__ import annotations

import os
import uuid

import fsspec


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that holds `uri`, and the path of `uri` on it."""
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, path


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    return bytes(fs.cat_file(path))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file so that readers see the old content or the new, never a part."""
    fs, path = filesystem(uri)
    if not is_local(uri):  # a PUT is atomic
        fs.pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def list_names(uri: str) -> list[str]:
    """Names (without the folder) of the entries of a folder, sorted; empty if there is no such folder."""
    fs, path = filesystem(uri)
    if not fs.exists(path):
        return []
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
