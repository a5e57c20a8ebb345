"""Parquet files -> blocks in Arrow's stream format -> objects. Pyarrow is imported where it is needed, since
not all users have it."""

from collections.abc import Iterator

from chunkflow.data.files import size_of, unreadable
from chunkflow.data.messages import show

MOST_ROWS = 1000  # that are read at once, whatever their size may be
BUFFER = 1 << 18  # bytes of each column


def split_parquet(path: str, size: int) -> Iterator[tuple[str, int, bytes, int]]:
    """Blocks of about `size` bytes, at least one row: "parquet", the number of its first row, its content,
    and about how many bytes of the file end with it. No row group is held whole, nor as Python's objects.

    ValueError, one sentence with FILE:ROW, where it cannot be split; all rows before that place come first.
    """
    from pyarrow import ArrowException, parquet

    row, bytes_of_file = 1, size_of(path)
    try:
        with parquet.ParquetFile(path, buffer_size=BUFFER) as file:
            names = file.schema_arrow.names
            if doubled := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{path}: two columns have the name {show(doubled.pop())}: rename one")
            rows = file.metadata.num_rows
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                at_once = size * about.num_rows // max(1, about.total_byte_size)
                at_once = max(1, min(at_once, MOST_ROWS))
                for batch in file.iter_batches(at_once, row_groups=[group], use_threads=False):
                    for part in _parts(batch, size):
                        row += part.num_rows
                        yield (
                            "parquet",
                            row - part.num_rows,
                            _to_bytes(part),
                            bytes_of_file * (row - 1) // rows,
                        )
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise ValueError(f"{path}:{row}: {unreadable(error)}") from None
        reason = show(" ".join(str(error).split()))
        raise ValueError(
            f"{path}:{row}: from here on the file is no parquet that can be read ({reason}): get it again"
        ) from None


def _parts(batch, size: int) -> Iterator:
    """The batch in parts of about `size` bytes: a row group's size says little about a single row's, and
    nothing where values repeat. Columns of such values are unfolded, or each part would have them all."""
    import pyarrow

    columns = [
        column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    batch = pyarrow.RecordBatch.from_arrays(columns, batch.schema.names)
    parts = min(max(1, round(batch.nbytes / size)), batch.num_rows)
    for part in range(parts):
        start, end = (batch.num_rows * bound // parts for bound in (part, part + 1))
        yield batch.slice(start, end - start)


def _to_bytes(batch) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def read_parquet(path: str, first: int, content: bytes) -> Iterator[tuple[int, dict]]:
    import pyarrow

    with pyarrow.ipc.open_stream(content) as stream:
        yield from _read_batch(stream.read_next_batch(), path, first)


def _read_batch(batch, path: str, first: int) -> Iterator[tuple[int, dict]]:
    names, columns = batch.schema.names, []
    try:
        for column in batch.columns:
            plain = _without_times(column.type)
            column = column if plain == column.type else column.cast(plain)
            columns.append(column.to_pylist(maps_as_pydicts="lossy"))
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            remedy = "write text as UTF-8"
            raise ValueError(f"{path}:{first}: a string in this row is not UTF-8: {remedy}") from None
        for row in range(batch.num_rows):  # one by one, to find it
            yield from _read_batch(batch.slice(row, 1), path, first + row)
    else:
        rows = zip(*columns) if columns else [()] * batch.num_rows
        for number, values in enumerate(rows, first):
            yield number, dict(zip(names, values))


def _without_times(kind):
    """The Arrow type with integers in place of times, not all of which Python has: nanoseconds, the year
    10,000. They are nothing that is trained on."""
    import pyarrow as pa

    if pa.types.is_temporal(kind):
        return pa.int64() if kind.bit_width == 64 else pa.int32()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_times(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_without_times(kind.key_type), _without_times(kind.item_type))
    for test, make in (
        (pa.types.is_list, pa.list_),
        (pa.types.is_large_list, pa.large_list),
        (pa.types.is_fixed_size_list, lambda field: pa.list_(field, kind.list_size)),
    ):
        if test(kind):
            return make(kind.value_field.with_type(_without_times(kind.value_type)))
    return kind
