"""Files of every kind give the same sequences, whatever their blocks and whoever tokenises them; what is wrong
with a file is a sentence with its place."""

import gzip
import io
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest

from chunkflow.data import blocks, digests, json_files, token_cache, tokenise, workers
from chunkflow.data.blocks import Block, records, split
from chunkflow.data.dataset import open_dataset
from chunkflow.data.digests import content_digest
from chunkflow.data.files import find_files
from chunkflow.data.rows import Row, RowSettings
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.settings.config import load_config
from chunkflow.training.start import check_paths
from tests.helpers.processes import REPO, environment

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = pytest.mark.quick

ROWS = [
    {"text": "naïve \U0001f600 \"quoted\" \\ back\u2028slash\n\ttab ]}, {[ "},
    {"text": "", "score": -1.5e-7, "tags": [{"deep": [[True], []]}, None]},
    {"text": "x" * 700},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    *({"text": f"row {index}", "id": index} for index in range(40)),
    {"messages": [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]},
]  # fmt: skip


def lines(rows=ROWS) -> bytes:
    return b"".join(
        json.dumps(row, ensure_ascii=index % 2 == 0).encode() + b"\n" for index, row in enumerate(rows)
    )


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet(rows=ROWS, **options) -> bytes:
    """With null for what a row does not have."""
    sink = io.BytesIO()
    keys = dict.fromkeys(key for row in rows for key in row)
    pq.write_table(pa.table({key: [row.get(key) for row in rows] for key in keys}), sink, **options)
    return sink.getvalue()


FILES = {
    "lines.jsonl": lines(),
    "lines.json": b"\n" + lines(),
    "compact.json": json.dumps(ROWS, ensure_ascii=False).encode(),
    "indented.json": b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=4).encode() + b"\n\n",
    "lines.jsonl.gz": gzip.compress(lines()),
    "members.jsonl.gz": gzip.compress(lines(ROWS[:20])) + gzip.compress(lines(ROWS[20:])),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "lines.jsonl.zst": zst(lines()),
    "frames.jsonl.zst": zst(lines(ROWS[:20])) + zst(lines(ROWS[20:])),
    "array.json.zst": zst(json.dumps(ROWS).encode()),
}


@pytest.fixture
def small(monkeypatch):
    """Sets the sizes of blocks and of what is read at once."""

    def small(block=500, piece=97):
        monkeypatch.setattr(blocks, "BLOCK", block)
        monkeypatch.setattr(json_files, "PIECE", piece)

    return small


@pytest.fixture
def read(tmp_path):
    def read(path, cache="cache", vocab_size=2048, tokenizer=None):
        kind = "parquet" if str(path).endswith("parquet") else "jsonl"
        cache_dir = str(tmp_path / cache)
        return open_dataset(
            kind, str(path), tokenizer or Tokenizer(), vocab_size=vocab_size, seed=0, cache_dir=cache_dir
        )

    return read


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def sequences(dataset):
    rows = [dataset.row(index, length) for index, length in enumerate(dataset.lengths)]
    return [(tokens.tolist(), labels.tolist()) for tokens, labels, _ in rows]


def contents(kind: str, *paths) -> list[tuple[str, dict]]:
    return [
        (record.source, record.content)
        for block in split(kind, list(map(str, paths)))
        for record in records(block)
    ]


# -------------------------------------------------------------------------------------------------- every kind


@pytest.mark.parametrize("name", FILES)
def test_every_kind_has_the_same_rows(write, small, name):
    path = write(name, FILES[name])
    small()
    assert len(list(split("jsonl", [str(path)]))) > 3
    first = 2 if name == "lines.json" else 1
    assert contents("jsonl", path) == [(f"{path}:{first + index}", row) for index, row in enumerate(ROWS)]


@pytest.mark.parametrize("name", [*FILES, "rows.parquet"])
def test_every_kind_has_the_same_sequences(write, read, name):
    rows = [row for row in ROWS if "text" in row]
    content = {
        "gz": gzip.compress, "zst": zst, "json": bytes, "jsonl": bytes, "parquet": lambda _: parquet(rows),
    }[name.rpartition(".")[2]]  # fmt: skip
    content = content(json.dumps(rows).encode() if ".json" in name and ".jsonl" not in name else lines(rows))
    expected = sequences(read(write("plain.jsonl", lines(rows))))
    dataset = read(write(name, content))
    assert sequences(dataset) == expected and len(expected) == len(rows)
    assert dataset.source(5).endswith(f"{name}:6")


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 16, 17, 64, 1 << 18])
def test_an_array_may_be_cut_anywhere(write, small, piece):
    values = [
        "\\u00e9\\ud83d\\ude00",
        "-1.25e+10",
        "true",
        "null",
        "false",
        '\\\\\\"',
        "12345678901234567890",
    ]
    rows = "".join(
        f'{{ "{index}" : [ {value if value[0] in "-tnf1" else chr(34) + value + chr(34)} , {{}} ] }}{" " * 40},\n'
        for index, value in enumerate(values * 3)
    )
    text = f'[{rows} {{"é😀": "🎉"}} ] '
    path = write("array.json", text.encode())
    small(1, piece)
    assert [row for _, row in contents("jsonl", path)] == json.loads(text)


def test_blocks_of_an_array_are_small_though_its_elements_are_not(write, small):
    """An element is parsed again only when twice as much of it is there, and nothing is held longer than needed."""
    rows = [{"text": "y" * size} for size in (10, 50_000, 10, 10)] + [{"text": "z"}] * 5000
    path = write("array.json", json.dumps(rows).encode())
    small(1000, 500)
    parts = list(split("jsonl", [str(path)]))
    sizes = [len(block.content) for block in parts]
    assert max(sizes) < 50_000 + 1100 and sorted(sizes)[-2] < 1100
    assert parts[-1].done == path.stat().st_size
    assert [row for _, row in contents("jsonl", path)] == rows


def test_blocks_of_parquet_are_small_whatever_its_row_groups(write, small):
    rows = [{"text": "once" * 1000}] * 3000 + [
        {"text": str(index)} for index in range(3000)
    ]  # the first: a dictionary
    path = write("a.parquet", parquet(rows))
    assert pq.ParquetFile(path).num_row_groups == 1
    small(20_000)
    parts = list(split("parquet", [str(path)]))
    assert max(len(block.content) for block in parts) < 45_000
    assert [block.first for block in parts][:3] == [1, 1 + parts[1].first - 1, parts[2].first]
    assert [row for _, row in contents("parquet", path)] == rows
    assert all(a.done <= b.done for a, b in zip(parts, parts[1:])) and parts[-1].done == path.stat().st_size


def test_progress_counts_the_bytes_of_compressed_files(write, small):
    paths = [write(name, FILES[name]) for name in ("lines.jsonl", "lines.jsonl.gz", "array.json.zst")]
    small()
    done = [block.done for block in split("jsonl", list(map(str, paths)))]
    assert done == sorted(done) and done[-1] == sum(path.stat().st_size for path in paths)


def test_values_of_parquet(write, read):
    """Columns of metadata may be of any type."""
    ns = pa.timestamp("ns", tz="Europe/Berlin")
    message = pa.struct(
        [("role", pa.string()), ("content", pa.large_string()), ("at", ns), ("calls", pa.list_(pa.int8()))]
    )
    chat = [
        {"role": "user", "content": "a", "at": 1, "calls": None},
        {"role": "assistant", "content": "b", "at": None, "calls": None},
    ]
    table = pa.table(
        {
            "messages": pa.array([chat, chat[:1] + chat], pa.large_list(message)),
            "dictionary": pa.array(["same", "same"]).dictionary_encode(),
            "far": pa.array([10**9, None], pa.date32()),
            "time": pa.array([1, None], pa.time64("ns")),
            "took": pa.array([1, None], pa.duration("ns")),
            "price": pa.array([Decimal("1.50"), None]),
            "thumbnail": pa.array([b"\xff\x00", None]),
            "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.timestamp("ns"))),
            "vector": pa.array([[1, 2], None], pa.list_(pa.timestamp("ns"), 2)),
            "nothing": pa.nulls(2),
            "struct": pa.array([{"a": {"b": [None]}}, None]),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    path = write("types.parquet", sink.getvalue())
    [(_, first), (_, second)] = contents("parquet", path)
    assert first == {
        "messages": chat, "dictionary": "same", "far": 10**9, "time": 1, "took": 1, "price": Decimal("1.50"),
        "thumbnail": b"\xff\x00", "map": {"k": 1}, "vector": [1, 2], "nothing": None, "struct": {"a": {"b": [None]}},
    }  # fmt: skip
    assert second["map"] is None and len(second["messages"]) == 3
    only_text = pa.table({"text": ["a", "b"], **{name: table[name] for name in table.column_names[1:]}})
    sink = io.BytesIO()
    pq.write_table(only_text, sink)
    assert len(read(write("metadata.parquet", sink.getvalue()))) == 2


def test_empty_files_beside_full_ones(write, read, tmp_path):
    for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.jsonl.zst", "e.json.gz"):
        write(f"in/{name}", gzip.compress(b"") if name.endswith("gz") else b"")
    write("in/f.json", b" [ \n ] ")
    write("in/g.json", b" \n ")
    with pytest.raises(ValueError, match=r"in: there is no sequence in it: choose another"):
        read(tmp_path / "in")
    write("in/h.jsonl", b'{"input_ids": [1]}')
    assert read(tmp_path / "in").source(0) == f"{tmp_path}/in/h.jsonl:1"
    with pytest.raises(ValueError, match=r"none.parquet: there is no sequence in it"):
        read(write("none.parquet", parquet([{"text": "a"}][:0] or [])))


# ------------------------------------------------------------------------------------------------------- faults

GOOD = b'{"text": "a"}'
CUT_GZ, CUT_ZST = gzip.compress(lines(), mtime=0)[:-30], zst(lines())[:-30]
TORN_PARQUET = bytearray(parquet(ROWS[:3]))
TORN_PARQUET[4:24] = b"\xff" * 20
FAULTS = [
    ("a.json", b"[%s, %s,]" % (GOOD, GOOD), 3, "there is a comma before the ]): remove"),
    ("a.json", b"[%s %s]" % (GOOD, GOOD), 2, '("{" where a comma or ] must be)'),
    ("a.json", b"[%s, %s" % (GOOD, GOOD), 3, "the file ends before the array does: it is cut off"),
    ("a.json", b"[%s, " % GOOD, 2, "the file ends before the array does"),
    ("a.json", b"[", 1, "the file ends before the array does"),
    ("a.json", b'[%s, {"text": "b' % GOOD, 2, "not valid JSON (Unterminated string starting at, character 27 of"),
    ("a.json", b'[%s, {"text": nul}]' % GOOD, 2, "not valid JSON (Expecting value, character 27 of the file)"),
    ("a.json", b"[%s, {text: 1}, %s]" % (GOOD, GOOD), 2, "not valid JSON (Expecting property name"),
    ("a.json", b'[%s, {"a": "b\nc"}]' % GOOD, 2, "not valid JSON (Invalid control character"),
    ("a.json", b'[%s, {"a": NaN}]' % GOOD, 2, "NaN is not valid JSON: write null"),
    ("a.json", b"[%s, [1], %s]" % (GOOD, GOOD), 2, "[1] is not a JSON object: a row is"),
    ("a.json", b"[%s, 12345]" % GOOD, 2, "12345 is not a JSON object"),
    ("a.json", b"[%s] [%s]" % (GOOD, GOOD), 2, '"[" follows after the end of the array'),
    ("a.json", b"[%s, " % GOOD + b"[" * 100_000, 2, "nested too deeply"),
    ("a.json", b'[%s, {"text": "\xff"}]' % GOOD, 2, "byte 0xff is not UTF-8: save the file as UTF-8"),
    ("a.json", b'[%s, {"text": "\xc3' % GOOD, 2, "byte 0xc3 is not UTF-8"),
    ("a.json", b'{\n"text": "a"\n}', 1, "write one JSON object a line"),
    ("a.json", b"[%s, {}]" % GOOD, 2, "none of the known keys"),
    ("a.jsonl.gz", CUT_GZ, None, "from here on the compressed file is damaged or cut off (Compressed file ended"),
    ("a.jsonl.gz", lines(), 1, "damaged or cut off (Not a gzipped file"),
    ("a.json.gz", gzip.compress(b"[%s]" % GOOD)[:-4], 2, "damaged or cut off"),
    ("a.jsonl.zst", CUT_ZST, None, "damaged or cut off (Truncated compressed stream)"),
    ("a.jsonl.zst", lines(), 1, "damaged or cut off (ZSTD"),
    ("a.jsonl.zst", zst(GOOD + b"\n{"), 2, "not valid JSON"),
    ("a.parquet", lines(), 1, "the file is no parquet that can be read ("),
    ("a.parquet", b"", 1, "the file is no parquet that can be read ("),
    ("a.parquet", parquet()[:-100], 1, "the file is no parquet that can be read ("),
    ("a.parquet", bytes(TORN_PARQUET), 1, "the file is no parquet that can be read ("),
    ("a.parquet", parquet([{"text": "a"}, {"text": None}, {"text": "c"}]), 2, "text"),
]  # fmt: skip


@pytest.mark.parametrize("case", FAULTS, ids=range(len(FAULTS)))
def test_what_is_wrong_with_a_file_is_one_sentence_with_its_place(write, read, case):
    name, content, place, fragment = case
    path = write(name, content)
    with pytest.raises(ValueError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}:{place or ''}") and fragment in message and "\n" not in message
    assert len(message) < 400 + len(str(path)), message


def test_rows_before_the_fault_come_first(write, small):
    """Of a compressed file that is cut off, and of an array: the rows before, then the place."""
    small(400, 64)
    for name, content in (
        ("a.jsonl.gz", CUT_GZ), ("a.jsonl.zst", CUT_ZST), ("a.json", json.dumps(ROWS).encode()[:-5]),
        ("b.json", json.dumps(ROWS[:-1]).encode()[:-1] + b', {"text": \xff}]'),
    ):  # fmt: skip
        path, found = write(name, content), []
        with pytest.raises(ValueError) as error:
            for block in split("jsonl", [str(path)]):
                found += [record.content for record in records(block)]
        assert found == ROWS[: len(found)]
        assert str(error.value).startswith(f"{path}:{len(found) + 1}: ")
        if name.endswith(".json"):
            assert len(found) == len(ROWS) - 1


def test_text_that_is_not_utf_8_in_parquet_is_found(write):
    bad = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")]
    )
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": bad}), sink)
    path = write("a.parquet", sink.getvalue())
    with pytest.raises(ValueError, match=r"a.parquet:2: a string in this row is not UTF-8: write"):
        contents("parquet", path)


def test_two_columns_of_one_name(write):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), sink)
    with pytest.raises(ValueError, match=r'a.parquet: two columns have the name "text": rename one'):
        contents("parquet", write("a.parquet", sink.getvalue()))


# ------------------------------------------------------------------------------------------- paths and settings


def test_a_folder_gives_the_files_of_its_kind(write, tmp_path):
    names = [
        "b.parquet",
        "a.jsonl",
        "sub/c.json.gz",
        "sub/d.jsonl.zst",
        "sub/e.json",
        "sub/f.txt",
        "sub/x.jsonl/g.parquet",
    ]
    for name in names:
        write(f"in/{name}", b"")
    folder = str(tmp_path / "in")
    assert find_files("jsonl", folder) == [
        f"{folder}/{name}" for name in names if ".json" in name and "x.jsonl" not in name
    ]
    assert find_files("parquet", folder) == [f"{folder}/b.parquet", f"{folder}/sub/x.jsonl/g.parquet"]
    assert find_files("parquet", f"{folder}/**/*.parquet") == find_files("parquet", folder)
    assert find_files("jsonl", f"{folder}/sub/*.json*") == find_files("jsonl", folder)[1:]


@pytest.mark.parametrize(
    "kind, name, path, said",
    [
        ("jsonl", "a.parquet", "in", r'in: no \S+ or \S+ files .* in this folder, but 2 of the \*.parquet files for validation.dataset = "parquet": set that'),
        ("parquet", "a.json", "in", r'in: no \*.parquet files in this folder, but 2 of the .* for validation.dataset = "jsonl": set that'),
        ("jsonl", "a.parquet", "in/a.parquet", r'a.parquet: validation.dataset = "jsonl" reads .*: set validation.dataset = "parquet", or narrow the path'),
        ("parquet", "a.jsonl.gz", "in/*", r'a.jsonl.gz: validation.dataset = "parquet" reads \*.parquet files: set validation.dataset = "jsonl", or narrow'),
        ("parquet", "a.csv", "in", r"in: no \*.parquet files in this folder, but .csv files: convert your data to JSONL"),
        ("parquet", "a.parquet", "", r"validation.dataset_path is empty: set it to one of your \*.parquet files"),
    ],
)  # fmt: skip
def test_files_of_another_kind(write, tmp_path, monkeypatch, kind, name, path, said):
    for folder in ("in", "in/sub"):
        write(f"{folder}/{name}", b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said) as error:
        find_files(kind, path, "validation")
    assert "\n" not in str(error.value)


def test_without_pyarrow(write, monkeypatch):
    names = ("a.parquet", "a.json.zst", "a.jsonl.gz")
    paths = {name: str(write(name, FILES["lines.jsonl.gz"])) for name in names}
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    monkeypatch.setattr("chunkflow.data.files.find_spec", lambda name: None)
    for kind, name in zip(("parquet", "jsonl"), names):
        with pytest.raises(ValueError, match=rf"{name}: .* pyarrow, .*: pip install 'chunkflow\[data\]'"):
            find_files(kind, paths[name])
    assert len(contents("jsonl", *find_files("jsonl", paths["a.jsonl.gz"]))) == len(ROWS)


def test_a_check_looks_at_names_only(write, tmp_path):
    path = write("a.parquet", b"not parquet")
    options = [
        f"--job.dump_folder={tmp_path}",
        "--training.dataset=parquet",
        f"--training.dataset_path={path}",
    ]
    check_paths(load_config(options))
    valid = [
        f"--validation.{option}" for option in ("enable", "dataset=parquet", "dataset_path=none.parquet")
    ]
    with pytest.raises(ValueError, match=r"none.parquet: no such file .* set validation.dataset_path"):
        check_paths(load_config([*options, *valid]))
    with pytest.raises(
        ValueError, match=r'training.dataset = "parquet" has no data: set training.dataset_path'
    ):
        load_config(["--training.dataset=parquet"])


# ---------------------------------------------------------------------------------------------------- processes


def use_workers(monkeypatch, count: int) -> list:
    """That many, and the pids of those that start."""
    pids, start = [], workers.TokenisingProcess.__init__

    def remember(self, settings):
        start(self, settings)
        pids.append(self._process.pid)

    monkeypatch.setattr(token_cache, "worker_count", lambda: count)
    monkeypatch.setattr(workers.TokenisingProcess, "__init__", remember)
    return pids


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def cached(folder: Path) -> dict[str, bytes]:
    [tokens] = folder.glob("*/tokens.bin")
    return {path.name: path.read_bytes() for path in tokens.parent.iterdir()}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_the_cache_is_the_same_whoever_tokenises(write, read, small, monkeypatch, tmp_path, name):
    rows = ROWS[:3] + ROWS[4:-1] if name == "a.parquet" else ROWS
    content = {"a.jsonl": lines(rows), "a.json": json.dumps(rows).encode(), "a.parquet": parquet(rows)}[name]
    path = write(name, content)
    small(300)
    for count in (0, 1, 3):
        pids = use_workers(monkeypatch, count)
        expected = sequences(read(path, cache=str(count)))
        assert len(set(pids)) == (count if count < 2 else len(pids)) and len(pids) <= count
        assert bool(pids) == bool(count) and all(map(is_gone, pids))
        assert len(expected) == len(rows)
    assert cached(tmp_path / "0") == cached(tmp_path / "1") == cached(tmp_path / "3")


def test_columns_that_begin_late(write, read, small, monkeypatch, tmp_path):
    """Labels that differ from tokens, in a block after others."""
    rows = (
        [{"input_ids": [1, 2]}] * 30
        + [{"input_ids": [1, 2], "labels": [-100, 2]}]
        + [{"input_ids": [1, 2]}] * 30
    )
    path = write("a.jsonl", lines(rows))
    small(100)
    use_workers(monkeypatch, 2)
    assert [labels for _, labels in sequences(read(path))] == [row.get("labels", [1, 2]) for row in rows]


@pytest.mark.parametrize("block", [30, 1 << 20])
def test_weights_and_rows_of_several_sequences(write, read, small, monkeypatch, tmp_path, caplog, block):
    """Weights are stored from the first that is not 1 on; the sequences of a row have its line."""
    plain, weighted = {"ids": [[1, 2]]}, {"ids": [[3, 4, 5], [6]], "weights": [0.5, 1.0, 2.0], "weight": 3.0}
    path = write("a.jsonl", lines([plain, plain, weighted, plain]))

    def read_rows(record, settings, notes):
        first, *more = record["ids"]
        notes.add("a note")
        rows = [Row([(first, 1.0)], weights=record.get("weights"), weight=record.get("weight", 1.0))]
        return rows + [Row([(ids, 1.0)]) for ids in more]

    monkeypatch.setattr(tokenise, "read_rows", read_rows)
    small(block)
    with caplog.at_level(logging.INFO):
        dataset = read(path)
    assert "tokenised 4 rows: 5 sequences, 10 tokens" in caplog.text and caplog.text.count("a note") == 1
    weights = [dataset.row(index, length)[2].tolist() for index, length in enumerate(dataset.lengths)]
    assert weights == [[1, 1], [1, 1], [0.5, 1, 2], [1], [1, 1]]
    assert [dataset.weight(index) for index in range(5)] == [1, 1, 3, 1, 1]
    assert [dataset.source(index) for index in range(5)] == [f"{path}:{line}" for line in (1, 2, 3, 3, 4)]
    assert "labels.bin" not in cached(tmp_path / "cache")


def test_little_data_and_one_core_need_no_process(write, read, small, monkeypatch):
    pids = use_workers(monkeypatch, 2)
    read(write("a.jsonl", lines()))
    assert not pids
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert workers.worker_count() == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 6}, raising=False)
    assert workers.worker_count() == 3


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("wrong, said", [
    ([25, 40], r"a.jsonl:25: text is 3"),
    ([25, "cut"], r"a.jsonl:25: text is 3"),
    (["cut"], r"a.jsonl:45: not valid JSON"),
])  # fmt: skip
def test_the_first_error_counts(write, read, small, monkeypatch, tmp_path, count, wrong, said):
    """Also where a later block is faster."""
    rows = [{"text": f"row {index} " * (2000 if index < 26 else 1)} for index in range(1, 45)]
    for row in wrong:
        if row != "cut":
            rows[row - 1] = {"text": 3}
    path = write("a.jsonl", lines(rows) + (b'{"text' if "cut" in wrong else b""))
    small(100)
    pids = use_workers(monkeypatch, count)
    with pytest.raises(ValueError, match=said):
        read(path)
    assert all(map(is_gone, pids)) and len(pids) <= count
    assert not list((tmp_path / "cache").glob("*/")) or [
        entry.name for entry in (tmp_path / "cache").glob("*/")
    ] == ["digests"]


def test_blocks_in_flight_are_bounded(small):
    made, seen = 0, 0

    def many():
        nonlocal made
        for index in range(60):
            made += 1
            yield Block("lines", "x.jsonl", 0, index + 1, b'{"text": "a"}\n', index)

    for done, block in workers.tokenise_blocks(many(), RowSettings(Tokenizer(), 2048), 2):
        assert done == seen and block.sources[1] == seen + 1
        seen += 1
        assert made - seen < max(2 * workers.AHEAD, workers.SMALL + 1)
    assert made == seen == 60


def test_a_killed_worker_is_an_error(write, read, small, monkeypatch):
    path = write("a.jsonl", lines([{"text": f"row {index} " * 3000} for index in range(200)]))
    small(100)
    pids, ask = use_workers(monkeypatch, 2), workers.TokenisingProcess.__call__

    def ask_and_kill(self, block):
        if block.first == 20:
            os.kill(self._process.pid, signal.SIGKILL)
        return ask(self, block)

    monkeypatch.setattr(workers.TokenisingProcess, "__call__", ask_and_kill)
    with pytest.raises(
        ValueError, match=r"a.jsonl:20: the process that tokenised .* has ended \(status -9\), perhaps"
    ):
        read(path)
    assert all(map(is_gone, pids)) and len(pids) == 2


def test_a_worker_that_fails_says_where(small):
    """A fault of the program is no sentence, but must not be lost in another process either."""
    block = Block("lines", "x.jsonl", 0, 1, "text in place of bytes", 0)
    process = workers.TokenisingProcess(RowSettings(Tokenizer(), 2048))
    try:
        with pytest.raises(
            RuntimeError, match=r"(?s)a process that tokenises has failed:.*Traceback.*read_lines"
        ):
            process(block)
        good = block._replace(content=b'{"text": "a"}')
        assert process(good).rows == 1  # it goes on
    finally:
        process.close()


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
from chunkflow.data import blocks, token_cache
from chunkflow.data.dataset import open_dataset
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.data.workers import TokenisingProcess

blocks.BLOCK, start = 1000, TokenisingProcess.__init__
def tell(self, settings):
    start(self, settings)
    print(f"{self._process.pid}\\n", end="", flush=True)  # in one piece: threads print
TokenisingProcess.__init__, token_cache.worker_count = tell, lambda: 2
open_dataset("jsonl", sys.argv[1], Tokenizer(), vocab_size=2048, seed=0)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(write, tmp_path, number):
    path = write("a.jsonl", lines([{"text": f"row {index} " * 100} for index in range(100_000)]))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)], env=environment(tmp_path), cwd=REPO, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        pids = [int(process.stdout.readline()) for _ in range(2)]
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (-number, 1)
    assert errors.count("Traceback") == (number == signal.SIGINT)  # of the one process
    deadline = time.monotonic() + 60
    while not all(map(is_gone, pids)):
        assert time.monotonic() < deadline, "a worker goes on"
        time.sleep(0.02)
    if number == signal.SIGINT:
        assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_worker_imports_no_torch():
    check = "import sys, chunkflow.data.workers; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=REPO, timeout=60)


def test_a_tokenizer_is_the_same_in_a_worker(tmp_path):
    tokenizer = pickle.loads(pickle.dumps(Tokenizer()))
    assert tokenizer.digest == Tokenizer().digest and tokenizer.encode("a b") == Tokenizer().encode("a b")


# ------------------------------------------------------------------------------------------------------ digests


def test_digests_are_remembered_while_a_file_stays_as_it_is(write, tmp_path, monkeypatch):
    path, memory = write("a.jsonl", b"one"), tmp_path / "memory"
    monkeypatch.setattr(digests, "REMEMBERED_BYTES", 3)
    true = content_digest([str(path)], memory)
    assert not memory.exists(), "the file is too young: it may change under the same time stamp"
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 0)
    time.sleep(0.02)  # clocks of files are coarse
    assert content_digest([str(path)], memory) == true
    [entry] = memory.iterdir()
    state, digest = json.loads(entry.read_text())
    entry.write_text(json.dumps([state, "remembered"]))
    assert content_digest([str(path)], memory) != true, "it was read again, though it is known"
    entry.write_text("torn")
    assert content_digest([str(path)], memory) == true
    entry.write_text(json.dumps([state, "remembered"]))
    time.sleep(0.02)
    path.write_bytes(b"two")  # as long, and its time of change set back
    os.utime(path, ns=(state[3], state[3]))
    assert path.stat().st_mtime_ns == state[3]
    time.sleep(0.02)
    changed = content_digest([str(path)], memory)
    path.write_bytes(b"one")
    assert changed != true and content_digest([str(path)], memory) == true


def test_a_file_that_changes_while_its_digest_is_taken(write, tmp_path, monkeypatch):
    path, memory = write("a.jsonl", b"one"), tmp_path / "memory"
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 0)
    monkeypatch.setattr(digests, "REMEMBERED_BYTES", 3)
    time.sleep(0.02)
    make = digests.hashlib.blake2b

    def meanwhile(*arguments, **options):
        if not arguments:  # that of the content
            path.write_bytes(b"another")
        return make(*arguments, **options)

    state = digests._state
    states = iter([state(str(path))])
    monkeypatch.setattr(digests, "_state", lambda file: next(states, None) or state(file))
    monkeypatch.setattr(digests.hashlib, "blake2b", meanwhile)
    content_digest([str(path)], memory)
    assert not memory.exists()


def test_the_log_says_what_was_done(write, read, caplog):
    path = write("a.parquet", parquet(ROWS[:3]))
    with caplog.at_level(logging.INFO, logger="chunkflow.data.token_cache"):
        tokens = sum(read(path).lengths)
        read(path)
    assert caplog.text.count("tokenised") == 1
    sentence = (
        rf"tokenised 3 rows: 3 sequences, {tokens} tokens, in \d+\.\d s \([\d,]+ tokens a second\), into "
    )
    assert re.search(sentence, caplog.text)
