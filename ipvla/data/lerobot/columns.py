"""Columns of parquet files as arrays, texts and pictures, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ipvla.data.source import Feature

#: How Hugging Face's datasets keeps pictures in parquet.
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def numbers(column: Any, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """A column of T scalars or (nested) lists, as [T, *shape]. ValueError if that is not what it holds."""
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    rows = len(values)
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or _is_fixed(values.type):
        values = values.flatten()
    return np.asarray(values.to_numpy(zero_copy_only=False)).astype(dtype).reshape(rows, *shape)


def texts(column: Any) -> tuple[str, ...]:
    """A column of T texts; equal ones share their memory, and nulls are ""."""
    encoded = column.combine_chunks().dictionary_encode()
    known = [text or "" for text in encoded.dictionary.to_pylist()]
    return tuple("" if i is None else known[i] for i in encoded.indices.to_pylist())


def pictures(column: Any) -> tuple[list[bytes | None], list[str | None]]:
    """A column of T pictures: the encoded bytes of each, or else the path of its file."""
    values = column.combine_chunks()
    return values.field("bytes").to_pylist(), values.field("path").to_pylist()


def array_of_numbers(values: npt.NDArray[Any], feature: Feature) -> Any:
    """[T, *shape] as lerobot stores it: scalars for shapes () and [1], lists of fixed size for vectors."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    if feature.shape in ((), (1,)):
        return flat
    for size in reversed(feature.shape):
        flat = pa.FixedSizeListArray.from_arrays(flat, size)
    return flat


def array_of_pictures(encoded: Sequence[bytes]) -> Any:
    """T files' contents as Hugging Face's datasets keeps pictures."""
    return pa.array([{"bytes": each, "path": None} for each in encoded], _PICTURE)


def _is_fixed(kind: Any) -> bool:
    return bool(pa.types.is_fixed_size_list(kind))
