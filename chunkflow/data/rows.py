"""Data files -> rows: the files that a path names, and their rows, parsed and checked."""

import glob
import json
import os
import sysconfig
import tokenize
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from chunkflow.data.chat import RenderedChat, checked_text, plain_spans, read_messages, show
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.execution.loss import IGNORE

# the keys of each form of a row; the first gives the form its name
FORMS = ["text"], ["messages"], ["conversations"], ["prompt", "completion"], ["input_ids", "labels"]
FORMS_SENTENCE = (
    'a row is {"text"}, {"messages"}, {"conversations"}, {"prompt", "completion"} or'
    ' {"input_ids"[, "labels"]}'
)
ID_RULES = {"input_ids": "a token id is at least 0", "labels": "a label is a token id, or -100 for no loss"}
Span = tuple[str | list[int], bool]  # text or token ids, and whether there is loss on them


class Row(NamedTuple):
    """One sequence before it is tokenised."""

    spans: list[Span]  # the content in order; empty where there is a chat
    labels: list[int] | None = None  # given by the row itself
    chat: RenderedChat | None = None  # the content, if a chat template renders it
    source: str = ""  # "FILE:LINE"
    file: int = 0  # index into the list of files
    line: int = 1
    size: int = 0  # bytes in the file


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


def python_rows(files: list[str], tokenizer: Tokenizer, vocab_size: int) -> Iterator[Row]:
    """One row for each source file, with loss on all of it."""
    for index, path in enumerate(files):
        try:
            with tokenize.open(path) as file:  # follows the encoding that the file declares (PEP 263)
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}:1: this file of Python's library cannot be read ({error}): repair it"
            ) from None
        yield Row(_text_spans(text, tokenizer), source=f"{path}:1", file=index, size=os.path.getsize(path))


def jsonl_rows(files: list[str], tokenizer: Tokenizer | None, vocab_size: int) -> Iterator[Row]:
    """One row for each line that is not blank. ValueError, one sentence with FILE:LINE, for a faulty row."""
    for index, path in enumerate(files):
        try:
            with open(path, "rb") as file:  # bytes, since only \n ends a line
                for number, line in enumerate(file, start=1):
                    content = line.removeprefix(BOM_UTF8).rstrip() if number == 1 else line.rstrip()
                    if not content:
                        continue
                    try:
                        row = _read_row(_parse_object(content), tokenizer, vocab_size)
                    except ValueError as error:
                        raise ValueError(f"{path}:{number}: {error}") from None
                    yield row._replace(source=f"{path}:{number}", file=index, line=number, size=len(line))
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


def _read_row(row: dict, tokenizer: Tokenizer | None, vocab_size: int) -> Row:
    found = [(form, keys) for form in FORMS if (keys := [key for key in form if key in row])]
    if not found:
        raise ValueError(
            f"the row has none of the known keys (it has {show(list(row))}): {FORMS_SENTENCE}, rename its"
            " keys"
        )
    (form, keys), *others = found
    if others:
        both = f'the row has both "{keys[0]}" and "{others[0][1][0]}"'
        raise ValueError(f"{both}: {FORMS_SENTENCE}, remove or rename one of the two")
    if missing := set(form) - set(keys) - {"labels"}:
        raise ValueError(
            f'the row has "{keys[0]}" without "{missing.pop()}": {FORMS_SENTENCE}, add what is missing'
        )
    name = form[0]
    if name == "input_ids":
        return _read_ids(row, vocab_size)
    if tokenizer is None:
        raise ValueError(
            f'the row has "{name}" and there is no tokenizer: set model.tokenizer_path, or give "input_ids"'
        )
    if name == "text":
        return Row(_text_spans(checked_text(row["text"], "text"), tokenizer))
    if name == "prompt":
        prompt, completion = (checked_text(row[key], key) for key in ("prompt", "completion"))
        return Row([(prompt, False), *_text_spans(completion, tokenizer)[1:]])  # no BOS
    chat = read_messages(row, name)
    return Row([], chat=tokenizer.chat.turns(chat)) if tokenizer.chat else Row(plain_spans(chat))


def _text_spans(text: str, tokenizer: Tokenizer) -> list[Span]:
    bos, eos = ([] if special is None else [special] for special in (tokenizer.bos_id, tokenizer.eos_id))
    return [(bos, True), (text, True), (eos, True)]


def _read_ids(row: dict, vocab_size: int) -> Row:
    ids = _checked_ids(row["input_ids"], "input_ids", vocab_size)
    if not ids:
        raise ValueError('"input_ids" is empty: a sequence has at least one token, remove the row')
    labels = _checked_ids(row["labels"], "labels", vocab_size) if "labels" in row else None
    if labels is not None and len(labels) != len(ids):
        counts = f'"labels" has {len(labels)} entries and "input_ids" {len(ids)}'
        raise ValueError(f"{counts}: give one label a token, -100 for no loss")
    return Row([(ids, True)], labels)


def _checked_ids(ids, name: str, vocab_size: int) -> list[int]:
    """Token ids below `vocab_size`; "labels" may also have -100."""
    if not isinstance(ids, list):
        raise ValueError(f"{name} is {show(ids)}: it must be a list of integers, write token ids")
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) < vocab_size)):
        return ids  # much faster than looking at each
    for index, token in enumerate(ids):
        if type(token) is not int:  # true and false are no integers here
            raise ValueError(
                f"{name}[{index}] is {show(token)}: every entry must be an integer, write token ids"
            )
        if token >= vocab_size:
            raise ValueError(f"{name}[{index}]: {beyond_vocabulary(token, vocab_size)}")
        if token < 0 and (token != IGNORE or name != "labels"):
            raise ValueError(f"{name}[{index}] is {token}: {ID_RULES[name]}, correct it")
    return ids


def beyond_vocabulary(token: int, vocab_size: int) -> str:
    """The error sentence for a token id that the model does not have."""
    return (
        f"token id {token} is not in the model's vocabulary of {vocab_size} (0 to {vocab_size - 1}): choose"
        " the tokenizer (model.tokenizer_path) that belongs to the model, or a model with more ids"
    )
