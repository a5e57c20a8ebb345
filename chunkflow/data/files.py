"""Data files -> records: the files that a path names, and the objects in them, one a row."""

import glob
import json
import os
import sysconfig
import tokenize
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from chunkflow.data.messages import FORMS_SENTENCE, show


class Record(NamedTuple):
    """A row as its file has it."""

    content: dict
    source: str  # "FILE:LINE"
    file: int  # index into the list of files
    line: int
    size: int  # bytes in the file


def python_files() -> list[str]:
    """The source files of Python's standard library, without installed packages and tests, sorted by path."""
    root = sysconfig.get_paths()["stdlib"]
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths, key=lambda path: Path(path).relative_to(root).as_posix())


def jsonl_files(path: str, section: str = "training") -> list[str]:
    """The sorted files of `path`, a config section's dataset_path: a *.jsonl file, all in a folder at any
    depth, or all that match a pattern. ValueError if it names none, or a file that is not *.jsonl."""
    if not path:
        raise ValueError(
            f"{section}.dataset_path is empty: set it to a *.jsonl file, a folder of them, or a pattern"
        )
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        files = glob.glob(os.path.join(glob.escape(expanded), "**", "*.jsonl"), recursive=True)
        fault = "no *.jsonl file in this folder: only JSONL is read, convert other formats to it"
    else:
        matches = [expanded] if os.path.exists(expanded) else glob.glob(expanded, recursive=True)
        files = [file for file in matches if not os.path.isdir(file)]
        fault = (
            f"no such file or folder, and no file matches it as a pattern: set {section}.dataset_path to"
            " *.jsonl files on this machine (data sets of the Hugging Face hub are not read by name: save"
            " them as JSONL first)"
        )
    if not files:
        raise ValueError(f"{path}: {fault}")
    for file in sorted(files):
        if not file.endswith(".jsonl"):
            raise ValueError(
                f"{file}: only *.jsonl files are read, one JSON object a line: convert it, or narrow the path"
            )
    return sorted(files)


def python_records(files: list[str]) -> Iterator[Record]:
    """One {"text"} for each source file."""
    for index, path in enumerate(files):
        try:
            with tokenize.open(path) as file:  # follows the encoding that the file declares (PEP 263)
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}:1: this file of Python's library cannot be read ({error}): repair it"
            ) from None
        yield Record({"text": text}, f"{path}:1", index, 1, os.path.getsize(path))


def jsonl_records(files: list[str]) -> Iterator[Record]:
    """One for each line that is not blank. ValueError, one sentence with FILE:LINE, for a faulty line."""
    for index, path in enumerate(files):
        try:
            with open(path, "rb") as file:  # bytes, since only \n ends a line
                for number, line in enumerate(file, start=1):
                    content = line.removeprefix(BOM_UTF8).rstrip() if number == 1 else line.rstrip()
                    if not content:
                        continue
                    source = f"{path}:{number}"
                    try:
                        record = _parse_object(content)
                    except ValueError as error:
                        raise ValueError(f"{source}: {error}") from None
                    yield Record(record, source, index, number, len(line))
        except OSError as error:
            raise unreadable(path, error) from None


def unreadable(path: str, error: OSError) -> ValueError:
    return ValueError(f"{path}: cannot be read ({error.strerror}): give it to this user to read")


def _parse_object(line: bytes) -> dict:
    try:
        row = json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not valid JSON ({error.msg}, column {error.colno}): write one JSON object a line"
        ) from None
    except RecursionError:
        raise ValueError(f"the JSON is nested too deeply: {FORMS_SENTENCE}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{show(row)} is not a JSON object: {FORMS_SENTENCE}, write one a line")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON: write null, or remove it")
