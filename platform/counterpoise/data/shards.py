"""Writing the Parquet shards of a split: small row groups, page checksums, plain column types."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from counterpoise import storage
from counterpoise.contracts import DataError
from counterpoise.plain import read_json

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One written file."""

    file: str
    rows: int
    sha256: str


def infer_schema(row: Mapping[str, Any]) -> Any:
    """Plain Arrow types for the values of one row."""
    import numpy as np
    import pyarrow as pa

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, bool):
            return pa.bool_()
        for kind, arrow in ((bytes, pa.binary()), (str, pa.string()), (int, pa.int64()), (float, pa.float64())):
            if isinstance(value, kind) or (isinstance(value, np.generic) and isinstance(value.item(), kind)):
                return arrow
        if isinstance(value, list | tuple) and value:
            item = plain(name, value[0])
            return pa.list_(pa.float32() if item == pa.float64() else item)
        raise DataError(f"column '{name}': no plain Parquet type for {type(value).__name__}; give a schema")

    return pa.schema([(name, plain(name, value)) for name, value in row.items()])


def write_shards(
    rows: Sequence[Mapping[str, Any]],
    out: str,
    split: str,
    *,
    num_shards: int = 1,
    row_group_size: int = 64,
    schema: Any = None,
) -> list[Shard]:
    """Write `rows` as `{split}-00000-of-0000N.parquet` into the folder `out` (local or s3://), whole files only."""
    if not rows:
        raise DataError(f"split {split}: no rows to write")
    if not 1 <= num_shards <= len(rows):
        raise DataError(f"split {split}: num_shards is {num_shards}; it must lie in 1..{len(rows)}")
    schema = infer_schema(rows[0]) if schema is None else schema
    shards = []
    for number in range(num_shards):
        part = rows[number * len(rows) // num_shards : (number + 1) * len(rows) // num_shards]
        data = parquet_bytes(part, schema, row_group_size)
        name = f"{split}-{number:05d}-of-{num_shards:05d}.parquet"
        storage.write_bytes(storage.join(out, name), data)
        shards.append(Shard(name, len(part), hashlib.sha256(data).hexdigest()))
    return shards


def parquet_bytes(rows: Sequence[Mapping[str, Any]], schema: Any, row_group_size: int) -> bytes:
    """A Parquet file of `rows`, with page checksums, and statistics of light columns only."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    media = {f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_nested(f.type)}
    light = [f.name for f in schema if f.name not in media]
    table = pa.Table.from_pylist([dict(r) for r in rows], schema=schema)
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        row_group_size=row_group_size,
        write_page_checksum=True,
        store_schema=False,
        use_dictionary=light,
        write_statistics=light,
    )
    return buffer.getvalue()


def columns_bytes(columns: Mapping[str, Any]) -> bytes:
    """A Parquet file of columns of equal length, with page checksums; arrays [N, K] become lists of K."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {}
    for key, column in columns.items():
        if isinstance(column, np.ndarray) and column.ndim == 2:
            flat = pa.array(np.ascontiguousarray(column).reshape(-1))
            arrays[key] = pa.FixedSizeListArray.from_arrays(flat, column.shape[1])
        else:
            arrays[key] = pa.array(column)
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def write_manifest(out: str, shards: Mapping[str, Sequence[Shard]], **facts: Any) -> None:
    """Write `manifest.json`: every shard with its rows and SHA-256, and `facts` about how they were made."""
    content = {**facts, "splits": {split: [asdict(s) for s in files] for split, files in shards.items()}}
    storage.write_bytes(storage.join(out, MANIFEST), (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: str) -> dict[str, Any] | None:
    """The folder's manifest, or None if it has none."""
    place = storage.join(folder, MANIFEST)
    if not storage.exists(place):
        return None
    try:
        content = read_json(storage.read_bytes(place))
    except ValueError:
        raise DataError(f"{place}: not readable as JSON; prepare the corpus again") from None
    if not isinstance(content, dict):
        raise DataError(f"{place}: not a manifest; prepare the corpus again")
    return content
