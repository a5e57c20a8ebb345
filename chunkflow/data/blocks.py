"""Data files -> blocks, small and readable apart from each other -> records, one a row.

Splitting is quick, so that one process can do it for many: lines are not looked into, of a JSON array only
the bounds of its elements are looked for, and parquet's columns stay as they are.
"""

import ast
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

from chunkflow.data.files import size_of
from chunkflow.data.json_files import read_array, read_lines, split_json
from chunkflow.data.parquet_files import read_parquet, split_parquet

BLOCK = 1 << 20  # bytes or characters


class Block(NamedTuple):
    """Some rows of a file, one after the other."""

    kind: str  # a key of READ
    path: str
    file: int  # index into the list of files
    first: int  # number of its first line or row, from 1
    content: bytes | str
    done: int  # bytes of all files up to the end of the block


class Record(NamedTuple):
    """A row as its file has it."""

    content: dict
    source: str  # "FILE:LINE" or "FILE:ROW"
    line: int


def split(dataset: str, files: list[str]) -> Iterator[Block]:
    """The blocks of the files of a dataset, "python_stdlib", "jsonl" or "parquet", in order.

    ValueError, one sentence with FILE:LINE, where one cannot be split; the blocks of all rows before that
    place come first.
    """
    before = 0
    for index, path in enumerate(files):
        for kind, first, content, position in SPLIT[dataset](path, BLOCK):
            yield Block(kind, path, index, first, content, before + position)
        before += size_of(path)


def records(block: Block) -> Iterator[Record]:
    """ValueError, one sentence with FILE:LINE, at the first faulty row; those before it come first."""
    for line, content in READ[block.kind](block.path, block.first, block.content):
        yield Record(content, f"{block.path}:{line}", line)


def _split_python(path: str, size: int) -> Iterator[tuple[str, int, str, int]]:
    """Whoever reads the block opens the file."""
    yield "python", 1, "", size_of(path)


def _read_python(path: str, first: int, content: str) -> Iterator[tuple[int, dict]]:
    """Each top-level function and class, with its decorators, is a row."""
    try:
        with tokenize.open(path) as file:  # follows the encoding that the file declares (PEP 263)
            text = file.read()
        module = ast.parse(text)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path}:1: this file of Python's library cannot be read ({error}): repair it"
        ) from None
    lines = text.split("\n")
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            line = min(part.lineno for part in (node, *node.decorator_list))
            yield line, {"text": "\n".join(lines[line - 1 : node.end_lineno]) + "\n"}


SPLIT = {"python_stdlib": _split_python, "jsonl": split_json, "parquet": split_parquet}
READ = {"python": _read_python, "lines": read_lines, "array": read_array, "parquet": read_parquet}
