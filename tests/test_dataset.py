import ast
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import textwrap
import tokenize
from pathlib import Path

import pytest
import torch

from chunkflow.data import files as files_module
from chunkflow.data import tokenise
from chunkflow.data.dataset import open_dataset
from chunkflow.data.files import LEFT_OUT, find_files, python_files
from chunkflow.data.tokenizer import Tokenizer

pytestmark = pytest.mark.quick


class CountingTokenizer(Tokenizer):
    """Remembers how many characters it was handed at a time."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def encode_batch(self, texts):
        self.batches.append(sum(map(len, texts)))
        return super().encode_batch(texts)


@pytest.fixture
def tokenizer():
    return CountingTokenizer()


@pytest.fixture
def write(tmp_path):
    """Writes rows (objects, or lines as they are) to a JSONL file."""

    def write(*rows, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
        path.write_bytes(b"".join((row.encode() if isinstance(row, str) else row) + b"\n" for row in rows))
        return path

    return write


@pytest.fixture
def read(tmp_path, tokenizer):
    def read(path, tokenizer=tokenizer, vocab_size=2048, name="jsonl"):
        return open_dataset(
            name, str(path), tokenizer, vocab_size=vocab_size, seed=0, cache_dir=str(tmp_path / "cache")
        )

    return read


def leftovers(tmp_path):
    """Suffixes of what is in the cache, but for remembered digests."""
    return [entry.suffix for entry in (tmp_path / "cache").iterdir() if entry.name != "digests"]


def rows_of(dataset):
    """[(tokens, labels)] of whole sequences."""
    rows = [dataset.row(index, dataset.lengths[index]) for index in range(len(dataset))]
    assert all(tensor.dtype == torch.int64 and tensor.dim() == 1 for row in rows for tensor in row[:2])
    return [(tokens.tolist(), labels.tolist()) for tokens, labels, _ in rows]


# -------------------------------------------------------------------------------------------------- row forms


def test_text(write, read, tokenizer):
    text = "naïve: \U0001f600\r\n\tcode"
    [(tokens, labels)] = rows_of(read(write({"text": text})))
    assert tokens == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert labels == tokens


def test_prompt_and_completion(write, read, tokenizer):
    [(tokens, labels)] = rows_of(read(write({"prompt": "Add 1 and 2: ", "completion": "3"})))
    prompt, completion = tokenizer.encode("Add 1 and 2: "), tokenizer.encode("3")
    assert tokens == [*prompt, *completion, tokenizer.eos_id]
    assert labels == [-100] * len(prompt) + [*completion, tokenizer.eos_id]


def test_messages(write, read, tokenizer):
    turns = [
        ("system", "Be brief."),
        ("user", "1 + 2?"),
        ("assistant", "3"),
        ("tool", "ok"),
        ("assistant", "So it is."),
    ]
    [(tokens, labels)] = rows_of(
        read(write({"messages": [{"role": role, "content": content} for role, content in turns]}))
    )
    expected_tokens, expected_labels = [], []
    for role, content in turns:
        before, after = tokenizer.encode(f"<|im_start|>{role}\n"), tokenizer.encode("\n")
        answer = tokenizer.encode(content) + tokenizer.encode("<|im_end|>")
        expected_tokens += before + answer + after
        expected_labels += [-100] * len(before)
        expected_labels += answer if role == "assistant" else [-100] * len(answer)
        expected_labels += [-100] * len(after)
    assert tokens == expected_tokens and labels == expected_labels
    rendered = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 +"
        " 2?<|im_end|>\n<|im_start|>assistant\n3<|im_end|>"
    )
    assert tokenizer.decode(tokens).startswith(rendered)
    assert tokenizer.decode([label for label in labels if label >= 0]) == "3<|im_end|>So it is.<|im_end|>"


def test_ready_tokens(write, read):
    rows = [
        {"input_ids": [5, 6, 7]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]},
        {"input_ids": [1], "labels": [-100]},
        {"input_ids": [3, 4], "labels": [3, 2047]},  # a label need not be its token
    ]
    dataset = read(write(*rows), tokenizer=None)
    assert rows_of(dataset) == [
        ([5, 6, 7], [5, 6, 7]),
        ([5, 6, 7], [-100, 6, -100]),
        ([1], [-100]),
        ([3, 4], [3, 2047]),
    ]
    supervised = [dataset.supervised(index, length) for index, length in enumerate(dataset.lengths)]
    assert supervised == [(2, 2.0), (1, 1.0), (0, 0.0), (1, 1.0)]
    assert dataset.supervised(1, 1) == (0, 0.0) and dataset.supervised(0, 2) == (1, 1.0)


def test_blank_lines_metadata_and_sources(write, read):
    path = write(
        {"id": 1, "text": "a", "source": None}, "", " \t\r", {"text": "b", "n": [1.5]}, '{"text": "\u2028"}\r'
    )
    dataset = read(path)
    assert [dataset.source(index) for index in range(len(dataset))] == [
        f"{path}:{line}" for line in (1, 4, 5)
    ]
    assert len(dataset) == len(dataset.lengths) == 3 and all(
        type(length) is int for length in dataset.lengths
    )


def test_a_byte_order_mark_and_no_line_end_at_the_end(tmp_path, read):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input_ids": [1]}\r\n{"input_ids": [2]}')
    assert [tokens for tokens, _ in rows_of(read(path))] == [[1], [2]]


def test_a_text_may_be_empty_where_there_are_bos_and_eos(write, read, tokenizer):
    assert rows_of(read(write({"text": ""}))) == [([tokenizer.bos_id, tokenizer.eos_id],) * 2]
    tokenizer = CountingTokenizer()
    tokenizer.bos_id = tokenizer.eos_id = None
    tokenizer.digest = "another"
    with pytest.raises(
        ValueError, match=r"data.jsonl:2: the text is empty, and the tokenizer has no BOS or EOS to add"
    ):
        read(write({"text": "a"}, {"text": ""}), tokenizer=tokenizer)


def test_rows_are_prefixes_and_do_not_share_memory(write, read):
    dataset = read(write({"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6], "labels": [-100, 6]}))
    tokens, labels, _ = dataset.row(0, 3)
    assert tokens.tolist() == labels.tolist() == [1, 2, 3]
    tokens.fill_(9)
    assert labels.tolist() == [1, 2, 3] and dataset.row(0, 4)[0].tolist() == [1, 2, 3, 4]


# ----------------------------------------------------------------------------------------------------- errors

BAD_ROWS = [
    ("{", "not valid JSON (", "column 2): write one JSON object a line"),
    ('{"text": "a"} {"text": "b"}', "not valid JSON (Extra data, column 15)"),
    ('{"text": "a"', "not valid JSON"),
    (b'{"text": "\xff"}', "byte 11 of the line is not UTF-8: save the file as UTF-8"),
    ('{"text": "a", "score": NaN}', "NaN is not valid JSON: write null"),
    ('{"input_ids": [-Infinity]}', "-Infinity is not valid JSON"),
    ("[" * 100_000, "nested too deeply"),
    ("[1, 2]", "[1, 2] is not a JSON object: a row is"),
    ('"text"', '"text" is not a JSON object'),
    ("null", "null is not a JSON object"),
    ("{}", "none of the known keys (it has []): a row is"),
    ('{"Text": "a"}', 'none of the known keys (it has ["Text"]): a row is'),
    ('{"text": "a", "input_ids": [1]}', 'has both "text" and "input_ids": a row is'),
    ('{"messages": [], "completion": "a"}', 'has "completion" beside "messages", which is not read'),
    ('{"text": "a", "labels": [1]}', 'has "labels" beside "text", which is not read'),
    ('{"prompt": "a"}', 'has "prompt" without "completion"'),
    ('{"completion": "a"}', 'has "completion" without "prompt"'),
    ('{"labels": [1]}', 'has "labels" without "input_ids"'),
    ('{"text": 3}', "text is 3: it must be a string"),
    ('{"text": null}', "text is null: it must be a string"),
    ('{"text": ["' + "a" * 200 + '"]}', 'text is ["' + "a" * 55 + "...: it must be a string"),
    ('{"text": "a\\ud800"}', "text has \\ud800 at position 1, which is half a character"),
    ('{"prompt": "a", "completion": {}}', "completion is {}: it must be a string"),
    ('{"prompt": false, "completion": ""}', "prompt is false: it must be a string"),
    ('{"messages": "hello"}', '"messages" is "hello": it must be a list of {"role", "content"} objects'),
    ('{"messages": []}', '"messages" is an empty list'),
    ('{"messages": ["hello"]}', 'messages[0] is "hello": it must be an object with "role" and "content"'),
    ('{"messages": [{"role": "user"}]}', 'messages[0] has the keys ["role"]: it must be an object with'),
    (
        '{"messages": [{"role": "user", "content": "a", "nick": "x"}]}',
        'messages[0] has "nick", which the plain ChatML of a tokenizer',
    ),
    (
        '{"messages": [{"role": "user", "content": ""}, {"role": "bard", "content": "b"}]}',
        'messages[1] has the role "bard": rename',
    ),
    ('{"messages": [{"role": [], "content": "a"}]}', "messages[0] has the role []"),
    ('{"messages": [{"role": "user", "content": null}]}', "messages[0].content is null: it must be a string"),
    ('{"input_ids": []}', '"input_ids" is empty: a sequence has at least one token, remove'),
    ('{"input_ids": "1 2"}', 'input_ids is "1 2": it must be a list of integers'),
    ('{"input_ids": [1, 2.0]}', "input_ids[1] is 2.0: every entry must be an integer"),
    ('{"input_ids": [true]}', "input_ids[0] is true: every entry must be an integer"),
    ('{"input_ids": [1, [2]]}', "input_ids[1] is [2]: every entry must be an integer"),
    ('{"input_ids": [1, -1]}', "input_ids[1] is -1: a token id is at least 0"),
    ('{"input_ids": [-100]}', "input_ids[0] is -100: a token id is at least 0"),
    (
        '{"input_ids": [2048]}',
        "input_ids[0]: token id 2048 is not in the model's vocabulary of 2048 (0 to 2047): choose",
    ),
    (
        '{"input_ids": [99999999999999999999]}',
        "token id 99999999999999999999 is not in the model's vocabulary",
    ),
    (
        '{"input_ids": [1, 2], "labels": [1]}',
        '"labels" has 1 entries and "input_ids" 2: give one label a token',
    ),
    ('{"input_ids": [1], "labels": "2"}', 'labels is "2": it must be a list of integers'),
    ('{"input_ids": [1], "labels": [false]}', "labels[0] is false: every entry must be an integer"),
    (
        '{"input_ids": [1, 2], "labels": [1, -1]}',
        "labels[1] is -1: a label is a token id, or -100 for no loss",
    ),
    (
        '{"input_ids": [1, 2], "labels": [-100, 2048]}',
        "labels[1]: token id 2048 is not in the model's vocabulary",
    ),
]


@pytest.mark.parametrize("case", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_wrong_row_is_one_sentence_with_its_line(write, read, tmp_path, case):
    line, *fragments = case
    path = write({"text": "good"}, "", line, {"text": "good"}, "{ a later error")
    with pytest.raises(ValueError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}:3: ") and "\n" not in message and len(message) < 400 + len(str(path))
    assert all(fragment in message for fragment in fragments)
    assert leftovers(tmp_path) == [".lock"]  # nothing half-written stays


@pytest.mark.parametrize("row", [{"text": "a"}, {"messages": []}, {"prompt": "a", "completion": "b"}])
def test_text_without_a_tokenizer(write, read, row):
    with pytest.raises(
        ValueError,
        match=r"data.jsonl:2: the row has .* there is no tokenizer: set model.tokenizer_path, or give",
    ):
        read(write({"input_ids": [1]}, row), tokenizer=None)


def test_a_tokenizer_larger_than_the_model(write, read, tokenizer):
    small, large = {"input_ids": [1, 2]}, {"text": "$ ^ & and other rare things"}
    with pytest.raises(
        ValueError, match=r"data.jsonl:2: token id \d+ is not in the model's vocabulary of 300 "
    ):
        read(write(small, large), vocab_size=300)
    # the same where the tokens are there already
    dataset = read(write(small, large, small))
    largest = max(rows_of(dataset)[1][0])
    assert len(read(write(small, large, small), vocab_size=largest + 1)) == 3
    with pytest.raises(
        ValueError, match=rf"data.jsonl:2: token id {largest} is not in the model's vocabulary of {largest} "
    ):
        read(write(small, large, small), vocab_size=largest)


def test_the_bound_holds_for_labels_too(write, read):
    path = write({"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [1, 500]})
    read(path)
    with pytest.raises(
        ValueError, match=r"data.jsonl:2: token id 500 is not in the model's vocabulary of 500 "
    ):
        read(path, vocab_size=500)


def test_wrong_names_and_paths(write, read, tmp_path):
    def refused(path, pattern, name="jsonl"):
        with pytest.raises(ValueError, match=pattern) as error:
            read(path, name=name)
        assert "\n" not in str(error.value)

    (tmp_path / "empty").mkdir()
    kinds = r"\*.jsonl and \*.json files \(also .gz and .zst\)"
    refused("", rf"training.dataset_path is empty: set it to one of your {kinds}, a folder")
    refused(tmp_path / "nothing.jsonl", r"nothing.jsonl: no such file or folder")
    refused("tatsu-lab/alpaca", r"tatsu-lab/alpaca: no such file .* hub are not read by name: save them")
    refused(tmp_path / "*.nothing", r"no file matches it as a pattern")
    refused(tmp_path / "empty", r"empty: no \*.jsonl or \*.json files .* in this folder: convert your data")
    for kind in ("csv", "txt.gz", "jsonl.bz2"):
        sentence = (
            rf'data.{kind}: training.dataset = "jsonl" reads {kinds}: convert your data to JSONL .* narrow'
        )
        refused(write({"text": "a"}, name=f"data.{kind}"), sentence)
    refused(tmp_path / "data.*", r'data.csv: training.dataset = "jsonl" reads')
    refused(write("", " ", name="blank.jsonl"), r"blank.jsonl: there is no sequence in it: choose another")
    refused(
        "somewhere",
        r'training.dataset_path is "somewhere" and python_stdlib takes none: remove it',
        name="python_stdlib",
    )
    refused(
        "", r'training.dataset is "c4": choose "python_stdlib", "jsonl", "parquet" or "synthetic"', name="c4"
    )
    with pytest.raises(
        ValueError, match="python_stdlib is text and there is no tokenizer: set model.tokenizer_path"
    ):
        read("", name="python_stdlib", tokenizer=None)


def test_a_cache_that_cannot_be_written(write, tokenizer, tmp_path):
    path = write({"text": "words and more words\n" * 20_000})
    (tmp_path / "file").write_text("")
    sentence = r": the token cache cannot be written \(.+\): set CHUNKFLOW_CACHE to a folder with room"
    with pytest.raises(ValueError, match=sentence):
        open_dataset(
            "jsonl", str(path), tokenizer, vocab_size=2048, seed=0, cache_dir=str(tmp_path / "file" / "cache")
        )
    # a full disk, as near as a test can come: no file beyond 64 KiB
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(ValueError, match=sentence):
            open_dataset(
                "jsonl", str(path), tokenizer, vocab_size=2048, seed=0, cache_dir=str(tmp_path / "cache")
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert leftovers(tmp_path) == [".lock"]  # what was written makes room again
    assert (
        len(
            open_dataset(
                "jsonl", str(path), tokenizer, vocab_size=2048, seed=0, cache_dir=str(tmp_path / "cache")
            )
        )
        == 1
    )


# ------------------------------------------------------------------------------------------------------ files


def test_files_folders_and_patterns(write, read, tmp_path):
    for place, name in enumerate(
        ["b.jsonl", "a.jsonl", "sub/deep/c.jsonl", "sub/.hidden/x.jsonl", "sub/readme.txt"]
    ):
        write({"input_ids": [place]}, name=f"in [1]/{name}")
    folder = tmp_path / "in [1]"
    assert find_files("jsonl", str(folder)) == [
        str(folder / name) for name in ("a.jsonl", "b.jsonl", "sub/deep/c.jsonl")
    ]
    assert find_files("jsonl", str(folder / "b.jsonl")) == [str(folder / "b.jsonl")]
    pattern = str(tmp_path / "in*" / "**" / "[bc].jsonl")
    assert find_files("jsonl", pattern) == [str(folder / name) for name in ("b.jsonl", "sub/deep/c.jsonl")]
    assert [tokens for tokens, _ in rows_of(read(folder))] == [[1], [0], [2]]
    assert read(folder).source(2) == f"{folder / 'sub/deep/c.jsonl'}:1"


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    cache = tmp_path_factory.mktemp("stdlib")
    return open_dataset("python_stdlib", "", Tokenizer(), vocab_size=2048, seed=0, cache_dir=str(cache))


def test_the_library_is_real_and_long_tailed(stdlib):
    lengths = sorted(stdlib.lengths)
    assert len(lengths) > 4000 and sum(lengths) > 2_000_000
    assert lengths[len(lengths) // 2] < 512 and sum(length > 8192 for length in lengths) < 0.01 * len(lengths)
    assert sum(length > 16384 for length in lengths) >= 3


def test_the_library_holds_functions_and_classes_whole_in_order(stdlib):
    root = Path(sysconfig.get_paths()["stdlib"])
    places = [stdlib.source(index).rpartition(":")[::2] for index in range(len(stdlib))]
    places = [(Path(path).relative_to(root).as_posix(), int(line)) for path, line in places]
    assert places == sorted(places)
    paths = {path for path, _ in places}
    assert not LEFT_OUT & {part for path in paths for part in Path(path).parts}
    assert {"abc.py", "json/decoder.py", "asyncio/tasks.py"} <= paths
    tokenizer = Tokenizer()
    for index in range(0, len(stdlib), 250):
        tokens, labels, _ = stdlib.row(index, stdlib.lengths[index])
        path, line = places[index]
        with tokenize.open(root / path) as file:
            source = file.read()
        text = tokenizer.decode(tokens.tolist())
        assert "\n".join(source.split("\n")[line - 1 :]).startswith(text.removesuffix("\n"))
        (node,) = ast.parse(text).body
        assert ast.dump(node) in map(ast.dump, ast.parse(source).body)  # the whole of one
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id) and torch.equal(tokens, labels)
        assert stdlib.supervised(index, len(tokens)) == (len(tokens) - 1, len(tokens) - 1)


def test_python_files_in_their_own_encoding(tmp_path, read, monkeypatch, tokenizer):
    root = tmp_path / "library"
    for folder in ("test", "package/tests", "site-packages"):
        (root / folder).mkdir(parents=True)
        (root / folder / "left_out.py").write_text("def one():\n    pass\n")
    latin = "# coding: latin-1\nimport os\n\n@first\n# why\n@second(\n  os)\ndef name():\n    return 'é'\nclass B: x = 2"
    (root / "package" / "latin.py").write_bytes(latin.encode("latin-1"))
    (root / "package.py").write_text('"""\ndef no():\n"""\nasync def one():\n\n  return 1\n')
    monkeypatch.setattr(files_module.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    assert python_files() == [str(root / "package.py"), str(root / "package" / "latin.py")]
    dataset = read("", name="python_stdlib")
    assert [tokenizer.decode(row[0]) for row in rows_of(dataset)] == [
        "async def one():\n\n  return 1\n",
        "@first\n# why\n@second(\n  os)\ndef name():\n    return 'é'\n",
        "class B: x = 2\n",
    ]
    assert [dataset.source(index).rpartition(":")[2] for index in range(3)] == ["4", "4", "10"]
    for content in (
        b"name = '\xe9'\n",
        b"# coding: klingon\n",
        b"\n" * 9 + b"# a coding too late to be declared: \xe9",
        b"def one(:\n",
    ):
        (root / "package.py").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"package.py:1: this file of Python's library cannot be read \(.+\): repair"
        ):
            read("", name="python_stdlib")


# ------------------------------------------------------------------------------------------------------ cache


def test_the_cache_is_keyed_by_content_name_and_tokenizer(write, read, tokenizer, tmp_path):
    first = rows_of(read(write({"text": "one"})))
    assert len(tokenizer.batches) == 1
    assert rows_of(read(write({"text": "one"}))) == first
    assert len(tokenizer.batches) == 1  # read from the cache
    moved = read(write({"text": "one"}, name="elsewhere/data.jsonl"))
    assert len(tokenizer.batches) == 1 and moved.source(0) == f"{tmp_path}/elsewhere/data.jsonl:1"
    assert rows_of(read(write({"text": "two"}))) != first
    assert len(tokenizer.batches) == 2  # other content, same size
    read(write({"text": "one"}, name="other.jsonl"))
    assert len(tokenizer.batches) == 3
    other = CountingTokenizer()
    other.digest = "another"
    read(write({"text": "one"}), tokenizer=other)
    assert len(other.batches) == 1


def test_one_file_in_two_is_another_dataset(write, read, tmp_path):
    write({"input_ids": [1]}, {"input_ids": [2]}, name="one/a.jsonl")
    write(name="one/b.jsonl")
    write({"input_ids": [1]}, name="two/a.jsonl")
    write({"input_ids": [2]}, name="two/b.jsonl")
    assert [read(tmp_path / folder).source(1).rsplit("/", 1)[1] for folder in ("one", "two")] == [
        "a.jsonl:2",
        "b.jsonl:1",
    ]


def test_where_the_cache_is(write, tokenizer, tmp_path, monkeypatch):
    path = write({"text": "a"})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "own"))
    folders = {"CHUNKFLOW_CACHE": "own", "XDG_CACHE_HOME": "xdg/chunkflow", "HOME": "home/.cache/chunkflow"}
    for variable, folder in folders.items():  # the first that is set counts
        open_dataset("jsonl", str(path), tokenizer, vocab_size=2048, seed=0)
        assert len(list((tmp_path / folder).glob("*/tokens.bin"))) == 1
        monkeypatch.delenv(variable)


def cache_folder(tmp_path):
    [tokens] = (tmp_path / "cache").glob("*/tokens.bin")
    return tokens.parent


def test_tokens_are_mapped_and_small(write, read, tmp_path):
    dataset = read(write({"input_ids": list(range(1000))}, {"input_ids": [1]}))
    folder = cache_folder(tmp_path)
    assert (folder / "tokens.bin").stat().st_size == 4 * 1001
    assert not (folder / "labels.bin").exists()  # every label is its token
    maps = Path("/proc/self/maps").read_text().splitlines()
    # no write permission is asked for, so that a cache of another user will do
    assert [line.split()[1] for line in maps if str(folder / "tokens.bin") in line] == ["r--s"]
    assert dataset._tokens.dtype == torch.int32


def test_labels_are_stored_from_the_first_that_differs(write, read, tmp_path):
    rows = [{"input_ids": [1, 2]}, {"input_ids": [3], "labels": [3]}]
    rows += [{"input_ids": [4, 5], "labels": [-100, 5]}, {"input_ids": [6]}]
    dataset = read(write(*rows))
    assert (cache_folder(tmp_path) / "labels.bin").stat().st_size == 4 * 6
    assert [labels for _, labels in rows_of(dataset)] == [[1, 2], [3], [-100, 5], [6]]


@pytest.mark.parametrize("damage", ["short", "long", "missing", "meta", "no meta", "empty meta"])
def test_a_damaged_cache_is_made_anew(write, read, tmp_path, damage):
    path = write({"text": "some text"}, {"prompt": "a", "completion": "b"})
    expected = rows_of(read(path))
    folder = cache_folder(tmp_path)
    tokens, meta = folder / "tokens.bin", folder / "meta.json"
    if damage == "short":
        tokens.write_bytes(tokens.read_bytes()[:-4])
    elif damage == "long":
        tokens.write_bytes(tokens.read_bytes() + b"\0\0\0\0")
    elif damage == "missing":
        (folder / "labels.bin").unlink()
    elif damage == "no meta":
        meta.unlink()
    else:
        meta.write_text("" if damage == "empty meta" else meta.read_text()[:-10])
    again = CountingTokenizer()
    assert rows_of(read(path, tokenizer=again)) == expected
    assert len(again.batches) == 1
    assert rows_of(read(path, tokenizer=again)) == expected
    assert len(again.batches) == 1


def test_a_file_that_changes_while_it_is_read(write, tmp_path, tokenizer):
    path = write({"text": "one"}, {"text": "two"})

    class Meanwhile(CountingTokenizer):
        def encode_batch(self, texts):
            write(
                {"text": "one"}, {"text": "two"}, {"text": "three"}
            )  # by somebody else, after its digest was taken
            return super().encode_batch(texts)

    def read(tokenizer):
        return open_dataset(
            "jsonl", str(path), tokenizer, vocab_size=2048, seed=0, cache_dir=str(tmp_path / "cache")
        )

    with pytest.raises(ValueError, match=r"data.jsonl: the file changed while it was read: start again"):
        read(Meanwhile())
    assert leftovers(tmp_path) == [".lock"], "nothing is left under the old content's name"
    write({"text": "one"}, {"text": "two"})
    dataset = read(tokenizer)
    assert len(dataset) == 2 and dataset.changed_file() == ""
    write({"text": "one"}, {"text": "two"}, {"text": "three"})
    assert dataset.changed_file() == str(path)


def test_text_goes_to_the_tokenizer_in_small_batches(write, read, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 5000)
    rows = [{"prompt": f"{index} " * (index % 90), "completion": "b"} for index in range(1000)]
    dataset = read(write(*rows))
    assert len(tokenizer.batches) > 10 and max(tokenizer.batches) < 5000 + 400
    expected = [tokenizer.encode(row["prompt"]) for row in rows]
    assert [
        tokens[:-2] for tokens, _ in rows_of(dataset)
    ] == expected  # no row is lost, doubled or moved between batches


PROGRAM = """
import logging, os, signal, sys, time
from pathlib import Path
from chunkflow.data import dataset, tokenise
from chunkflow.data.tokenizer import Tokenizer

logging.basicConfig(level=logging.INFO, stream=sys.stdout)
folder, index, processes, kill = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
tokenise.BATCH_CHARACTERS = 1000
batches = 0

class Slow(Tokenizer):
    def encode_batch(self, texts):
        global batches
        batches += 1
        if batches == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return super().encode_batch(texts)

Path(folder, f"ready{index}").touch()
while len(list(Path(folder).glob("ready*"))) < processes:
    time.sleep(0.001)
opened = dataset.open_dataset("jsonl", folder + "/data.jsonl", Slow(), vocab_size=2048, seed=0, cache_dir=folder + "/cache")
print("sum", sum(int(opened.row(i, n)[0].sum()) for i, n in enumerate(opened.lengths)))
"""


def start(folder, index, processes, kill=0):
    arguments = [
        sys.executable,
        "-c",
        textwrap.dedent(PROGRAM),
        str(folder),
        str(index),
        str(processes),
        str(kill),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)


def test_processes_at_once_tokenise_once(write, read, tmp_path):
    path = write(*({"text": f"text number {index} " * 5} for index in range(300)))
    processes = [start(tmp_path, index, 2) for index in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(output.count("tokenised 300 rows: 300 sequences,") for output in outputs) == 1
    assert sum(output.count("another process is tokenising the dataset") for output in outputs) == 1
    expected = sum(sum(tokens) for tokens, _ in rows_of(read(path)))
    assert all(output.splitlines()[-1] == f"sum {expected}" for output in outputs)


def test_killed_half_way_and_started_again(write, read, tmp_path, tokenizer):
    path = write(*({"text": f"text number {index} " * 5} for index in range(300)))
    process = start(tmp_path, 0, 1, kill=5)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    [left] = (tmp_path / "cache").glob("*.tmp")
    assert sorted(leftovers(tmp_path)) == [".lock", ".tmp"]
    dataset = read(path)
    assert len(dataset) == 300 and not left.exists()
    assert rows_of(dataset)[299][0][1:-1] == tokenizer.encode("text number 299 " * 5)


def test_the_progress_is_told(write, read, capsys, caplog, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO, logger="chunkflow.data.token_cache"):
        read(write({"text": "a"}))
    assert "tokenised 1 rows: 1 sequences, 3 tokens, in" in caplog.text
    assert "100%" in capsys.readouterr().err
