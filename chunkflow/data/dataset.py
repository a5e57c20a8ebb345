"""Data sets: text files and JSONL -> tokens on disk, memory-mapped; read once by whichever process comes
first.

Every dataset has `len(dataset)`; `dataset.lengths`, a list of tokens per sequence; `dataset.row(index,
length)`, tokens and labels of the first `length` tokens, as int64 tensors; `dataset.supervised(index,
length)`, how many targets those have; `dataset.source(index)`, "FILE:LINE". Labels are aligned with tokens
(the label of a token is the token itself or -100: no loss); the shift by one happens in the dataloader.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import logging
import mmap
import os
import shutil
import sysconfig
import time
import tokenize
from array import array
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch.hub import tqdm  # the real one where it is installed, else torch's small stand-in

from chunkflow.data.chat import RenderedChat, checked_text, labels_of, plain_spans, read_messages, show
from chunkflow.data.synthetic import SyntheticDataset
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.execution.loss import IGNORE

logger = logging.getLogger(__name__)

CACHE_FORMAT = (
    2  # to be raised whenever the same files and tokenizer give other tokens, or other files in the cache
)
BATCH_CHARACTERS = 1 << 20  # tokenised at once; bounds the memory that tokenising takes

FORMS = {  # of a row, and the keys of each
    "text": ("text",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "input_ids": ("input_ids", "labels"),
}
FORMS_SENTENCE = (
    'a row is {"text"}, {"messages"}, {"conversations"}, {"prompt", "completion"} or'
    ' {"input_ids"[, "labels"]}'
)


class Row(NamedTuple):
    """One sequence before it is tokenised."""

    spans: list[tuple[str | list[int], bool]]  # in order: text or ready ids, and whether they are supervised
    labels: list[int] | None = None  # where the row brings its own
    chat: RenderedChat | None = None  # in place of spans, where a template makes one text of all
    file: int = 0  # index into the list of files
    line: int = 1
    size: int = 0  # bytes in the file


def open_dataset(
    name: str,
    path: str,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    seed: int,
    cache_dir: str | None = None,
    section: str = "training",
) -> TokenDataset | SyntheticDataset:
    """The dataset "python_stdlib", "jsonl" or "synthetic" (training.dataset) at `path`
    (training.dataset_path), or those of another `section`.

    Text is tokenised at the first call, into `cache_dir` (None: $CHUNKFLOW_CACHE, $XDG_CACHE_HOME/chunkflow
    or ~/.cache/chunkflow); several processes may call at once. Without a tokenizer only ready token ids can
    be read. `vocab_size` is the model's: an id that is not below it is an error. `seed` matters to
    "synthetic" alone.

    Raises ValueError, one sentence with FILE:LINE where there is one, for whatever is wrong with the data.
    """
    if name == "synthetic":
        return SyntheticDataset(path or "lmsys", vocab_size=vocab_size, seed=seed)
    if name == "python_stdlib":
        if path:
            raise ValueError(
                f'{section}.dataset_path is "{path}" and python_stdlib takes none: remove it, or set'
                f" {section}.dataset"
            )
        if tokenizer is None:
            raise ValueError("python_stdlib is text and there is no tokenizer: set model.tokenizer_path")
        files, read = python_files(), _python_rows
    elif name == "jsonl":
        files, read = jsonl_files(path, section), _jsonl_rows
    else:
        raise ValueError(f'{section}.dataset is "{name}": choose "python_stdlib", "jsonl" or "synthetic"')
    before = _stamps(files)
    content = _content_digest(files)
    key = _cache_key(name, content, tokenizer)
    folder = (Path(cache_dir).expanduser() if cache_dir else cache_folder()) / key
    meta = _read_meta(folder) or _build_once(folder, files, read, tokenizer, vocab_size)
    if meta["rows"] == 0:
        place = path or sysconfig.get_paths()["stdlib"]
        raise ValueError(
            f"{place}: there is no sequence in it: choose another {section}.dataset or {section}.dataset_path"
        )
    if changed := _changed(before):  # between its digest and its tokens, perhaps
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(
            f"{changed}: the file changed while it was read: start again when nothing writes to it"
        )
    identity = {
        "training.dataset": name,
        "content (digest)": content,
        "tokenizer (digest)": tokenizer.digest if tokenizer else None,
        "sequences": meta["rows"],
        "tokens": meta["tokens"],
    }
    dataset = TokenDataset(folder, files, identity, before)
    if meta["largest_id"] >= vocab_size:  # the cache may have been made for a larger model
        raise ValueError(
            f"{dataset.source(meta['largest_id_row'])}: {_beyond(meta['largest_id'], vocab_size)}"
        )
    return dataset


class TokenDataset:
    """Sequences in memory-mapped files that the processes of a machine share."""

    def __init__(self, folder: Path, files: list[str], identity: dict[str, object], stamps: dict[str, tuple]):
        self._files, self._stamps = files, stamps
        self.identity = identity  # what the sequences depend on
        self._tokens = _map(folder / "tokens.bin", "i")
        self._labels = None  # every label is its token
        if (folder / "labels.bin").exists():
            self._labels = _map(folder / "labels.bin", "i")
        self._offsets = _map(folder / "offsets.bin", "q")
        self._sources = _map(folder / "sources.bin", "q")
        offsets = self._offsets.tolist()
        self.lengths = [end - start for start, end in zip(offsets, offsets[1:])]

    def __len__(self) -> int:
        return len(self.lengths)

    def source(self, index: int) -> str:
        return f"{self._files[self._sources[2 * index]]}:{self._sources[2 * index + 1]}"

    def changed_file(self) -> str:
        """A file that is no longer as it was read, or ""; its sequences stay as they were, since training
        reads the cache."""
        return _changed(self._stamps)

    def row(self, index: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels (int64, aligned) of the first `length` tokens."""
        tokens = self._slice(self._tokens, index, length)
        return tokens, tokens.clone() if self._labels is None else self._slice(self._labels, index, length)

    def supervised(self, index: int, length: int) -> int:
        """How many of the first `length` tokens are a target. The first never is: no token comes before
        it."""
        if self._labels is None:
            return length - 1
        return int((self._slice(self._labels, index, length)[1:] != IGNORE).sum())

    def _slice(self, mapped: memoryview, index: int, length: int) -> torch.Tensor:
        start = self._offsets[index]
        # A copy of these few bytes: torch shares memory with writable buffers only, and the map is not
        # writable.
        return torch.frombuffer(bytearray(mapped[start : start + length]), dtype=torch.int32).long()


def _map(path: Path, code: str) -> memoryview:
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast(code)


# ------------------------------------------------------------------------------------------------------ files


def python_files() -> list[str]:
    """The sources of the interpreter's own library, without installed packages and tests, sorted by their
    path in it."""
    root = sysconfig.get_paths()["stdlib"]
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths, key=lambda path: Path(path).relative_to(root).as_posix())


def jsonl_files(path: str, section: str = "training") -> list[str]:
    """The files that the section's dataset_path stands for, sorted: a *.jsonl file, those of a folder at any
    depth, or a pattern.

    Raises ValueError where there are none, or one is of another kind.
    """
    if not path:
        raise ValueError(
            f"{section}.dataset_path is empty: set it to a *.jsonl file, a folder of them, or a pattern"
        )
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        files = glob.glob(os.path.join(glob.escape(expanded), "**", "*.jsonl"), recursive=True)
        if not files:
            raise ValueError(
                f"{path}: no *.jsonl file in this folder: only JSONL is read, convert other formats to it"
            )
    elif os.path.exists(expanded):
        files = [expanded]
    else:
        files = [file for file in glob.glob(expanded, recursive=True) if not os.path.isdir(file)]
        if not files:
            raise ValueError(
                f"{path}: no such file or folder, and no file matches it as a pattern: set"
                f" {section}.dataset_path to *.jsonl files on this machine (data sets of the Hugging Face hub"
                " are not read by name: save them as JSONL first)"
            )
    files.sort()
    for file in files:
        if not file.endswith(".jsonl"):
            raise ValueError(
                f"{file}: only *.jsonl files are read, one JSON object a line: convert it, or narrow the path"
            )
    return files


# ------------------------------------------------------------------------------------------------------- rows


def _python_rows(files: list[str], tokenizer: Tokenizer, vocab_size: int) -> Iterator[Row]:
    """One file, one sequence: all of it supervised."""
    for index, path in enumerate(files):
        try:
            with tokenize.open(path) as file:  # follows the encoding that the file declares (PEP 263)
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}:1: this file of Python's library cannot be read ({error}): repair it"
            ) from None
        yield Row(_text_spans(text, tokenizer), file=index, size=os.path.getsize(path))


def _jsonl_rows(files: list[str], tokenizer: Tokenizer | None, vocab_size: int) -> Iterator[Row]:
    for index, path in enumerate(files):
        try:
            with open(path, "rb") as file:  # bytes: no character but \n ends a line
                for number, line in enumerate(file, start=1):
                    content = line.removeprefix(BOM_UTF8).rstrip() if number == 1 else line.rstrip()
                    if not content:
                        continue
                    try:
                        row = _parse_line(content, tokenizer, vocab_size)
                    except ValueError as error:
                        raise ValueError(f"{path}:{number}: {error}") from None
                    yield row._replace(file=index, line=number, size=len(line))
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be read ({error.strerror}): give it to this user to read"
            ) from None


def _parse_line(line: bytes, tokenizer: Tokenizer | None, vocab_size: int) -> Row:
    """A line of JSONL, in any of the forms of a row. The errors are completed with FILE:LINE by the
    caller."""
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
    forms = [(form, [key for key in keys if key in row]) for form, keys in FORMS.items()]
    forms = [(form, keys) for form, keys in forms if keys]
    if not forms:
        raise ValueError(
            f"the row has none of the known keys (it has {show(list(row))}): {FORMS_SENTENCE}, rename its"
            " keys"
        )
    form, keys = forms[0]
    if len(forms) > 1:
        other = forms[1][1][0]
        raise ValueError(
            f'the row has both "{keys[0]}" and "{other}": {FORMS_SENTENCE}, remove or rename one of the two'
        )
    missing = {"prompt", "completion"} - set(keys) if form == "prompt" else {form} - set(keys)
    if missing:
        raise ValueError(
            f'the row has "{keys[0]}" without "{missing.pop()}": {FORMS_SENTENCE}, add what is missing'
        )
    if form == "input_ids":
        ids = _checked_ids(row["input_ids"], "input_ids", vocab_size)
        if not ids:
            raise ValueError('"input_ids" is empty: a sequence has at least one token, remove the row')
        if "labels" not in row:
            return Row([(ids, True)])
        labels = _checked_ids(row["labels"], "labels", vocab_size)
        if len(labels) != len(ids):
            counts = f'"labels" has {len(labels)} entries and "input_ids" {len(ids)}'
            raise ValueError(f"{counts}: give one label a token, -100 for no loss")
        return Row([(ids, True)], labels)
    if tokenizer is None:
        raise ValueError(
            f'the row has "{form}" and there is no tokenizer: set model.tokenizer_path, or give "input_ids"'
        )
    if form == "text":
        return Row(_text_spans(checked_text(row["text"], "text"), tokenizer))
    if form == "prompt":
        prompt, completion = (checked_text(row[key], key) for key in ("prompt", "completion"))
        return Row([(prompt, False), (completion, True), (_one(tokenizer.eos_id), True)])
    chat = read_messages(row, form)
    return Row(plain_spans(chat)) if tokenizer.chat is None else Row([], chat=tokenizer.chat.turns(chat))


def _one(special: int | None) -> list[int]:
    """BOS or EOS, where the tokenizer has it."""
    return [] if special is None else [special]


def _text_spans(text: str, tokenizer: Tokenizer) -> list[tuple[str | list[int], bool]]:
    return [(_one(tokenizer.bos_id), True), (text, True), (_one(tokenizer.eos_id), True)]


def _checked_ids(ids, name: str, vocab_size: int) -> list[int]:
    """Token ids below `vocab_size`; where they are labels, -100 is one more."""
    if not isinstance(ids, list):
        raise ValueError(f"{name} is {show(ids)}: it must be a list of integers, write token ids")
    if not set(map(type, ids)) <= {int}:  # true and false are no integers here
        place = next(place for place, token in enumerate(ids) if type(token) is not int)
        raise ValueError(
            f"{name}[{place}] is {show(ids[place])}: every entry must be an integer, write token ids"
        )
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return ids
    for place, token in enumerate(ids):
        if token >= vocab_size:
            raise ValueError(f"{name}[{place}]: {_beyond(token, vocab_size)}")
        if token < 0 and not (token == IGNORE and name == "labels"):
            rule = (
                "a label is a token id, or -100 for no loss"
                if name == "labels"
                else "a token id is at least 0"
            )
            raise ValueError(f"{name}[{place}] is {token}: {rule}, correct it")
    return ids


def _beyond(token: int, vocab_size: int) -> str:
    return (
        f"token id {token} is not in the model's vocabulary of {vocab_size} (0 to {vocab_size - 1}): choose"
        " the tokenizer (model.tokenizer_path) that belongs to the model, or a model with more ids"
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON: write null, or remove it")


# ------------------------------------------------------------------------------------------------ token cache


def cache_folder() -> Path:
    """Where tokens are kept unless a caller says otherwise."""
    if os.environ.get("CHUNKFLOW_CACHE"):
        return Path(os.environ["CHUNKFLOW_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "chunkflow"


def _content_digest(files: list[str]) -> str:
    """Changes with the content and the name of any file, not with their folder."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        content = hashlib.blake2b()
        try:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    content.update(block)
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be read ({error.strerror}): give it to this user to read"
            ) from None
        digest.update(json.dumps([os.path.basename(path), content.hexdigest()]).encode())
    return digest.hexdigest()


def _cache_key(name: str, content: str, tokenizer: Tokenizer | None) -> str:
    parts = [CACHE_FORMAT, name, tokenizer.digest if tokenizer else None, content]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _stamps(files: list[str]) -> dict[str, tuple]:
    """What tells that a file was written to, without reading it."""
    stamps = {}
    for path in files:
        with suppress(OSError):  # gone: a reader will say so
            status = os.stat(path)
            stamps[path] = status.st_size, status.st_mtime_ns, status.st_ino
    return stamps


def _changed(stamps: dict[str, tuple]) -> str:
    now = _stamps(list(stamps))
    return next((path for path, stamp in stamps.items() if now.get(path) != stamp), "")


def _read_meta(folder: Path) -> dict | None:
    """What is known about a complete cache; None if there is none, or one whose files have not the size they
    should have."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if all((folder / name).stat().st_size == size for name, size in meta["bytes"].items()):
            return meta
    except (OSError, ValueError):
        pass
    return None


def _build_once(
    folder: Path, files: list[str], read: Callable, tokenizer: Tokenizer | None, vocab_size: int
) -> dict:
    """Tokenises the files into `folder`, or waits until another process has. A cache appears whole, by a
    rename, or not."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process is tokenising the dataset: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when its holder ends, in whatever way
            if meta := _read_meta(folder):
                return meta
            temporary = Path(f"{folder}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
            temporary.mkdir()
            start = time.perf_counter()
            try:
                size = sum(map(os.path.getsize, files))
                with tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", mininterval=1) as bar:
                    rows = _tokenised(read(files, tokenizer, vocab_size), files, tokenizer, bar)
                    meta = _write_cache(temporary, rows, files, vocab_size)
                shutil.rmtree(folder, ignore_errors=True)  # incomplete, or it would have been used
                os.rename(temporary, folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            _fsync(folder.parent)
    except OSError as error:
        raise ValueError(
            f"{folder.parent}: the token cache cannot be written ({error.strerror}): set CHUNKFLOW_CACHE to a"
            " folder with room that this user may write to"
        ) from None
    seconds = time.perf_counter() - start
    logger.info(
        f"tokenised {meta['rows']:,} sequences ({meta['tokens']:,} tokens) in {seconds:.1f} s into {folder}"
    )
    return meta


def _tokenised(
    rows: Iterable[Row], files: list[str], tokenizer: Tokenizer | None, bar
) -> Iterator[tuple[Row, list[int], list[int]]]:
    """Each row with its tokens and labels; texts are handed to the tokenizer in batches."""
    batch, characters = [], 0
    for row in rows:
        batch.append(row)
        characters += sum(len(content) for content, _ in row.spans) + (len(row.chat.text) if row.chat else 0)
        if characters >= BATCH_CHARACTERS:
            yield from _tokenised_batch(batch, files, tokenizer)
            bar.update(sum(row.size for row in batch))
            batch, characters = [], 0
    yield from _tokenised_batch(batch, files, tokenizer)
    bar.update(sum(row.size for row in batch))


def _tokenised_batch(
    batch: list[Row], files: list[str], tokenizer: Tokenizer | None
) -> Iterator[tuple[Row, list[int], list[int]]]:
    texts = [content for row in batch for content, _ in row.spans if isinstance(content, str)]
    encoded = iter(tokenizer.encode_batch(texts) if texts else [])
    chats = [row.chat for row in batch if row.chat]
    encoded_chats = iter(tokenizer.encode_chats(chats) if chats else [])
    for row in batch:
        tokens, labels = [], row.labels or []
        if row.chat:
            tokens, offsets = next(encoded_chats)
            try:
                labels = labels_of(row.chat, tokens, offsets)
            except ValueError as error:
                raise ValueError(f"{files[row.file]}:{row.line}: {error}") from None
        for content, supervised in row.spans:
            ids = next(encoded) if isinstance(content, str) else content
            tokens += ids
            if row.labels is None:
                labels += ids if supervised else [IGNORE] * len(ids)
        yield row, tokens, labels


def _write_cache(
    folder: Path, rows: Iterable[tuple[Row, list[int], list[int]]], files: list[str], vocab_size: int
) -> dict:
    """Writes tokens.bin and, if any label is not its token, labels.bin (int32); offsets.bin, where each
    sequence starts and the last one ends, and sources.bin, (file, line) of each (int64); then meta.json,
    which is returned."""
    count = total = 0
    largest_id, largest_id_row = -1, 0
    with ExitStack() as stack:
        tokens_file, offsets_file, sources_file = (
            stack.enter_context(open(folder / name, "wb"))
            for name in ("tokens.bin", "offsets.bin", "sources.bin")
        )
        written = [tokens_file, offsets_file, sources_file]
        labels_file = None
        array("q", [0]).tofile(offsets_file)
        for row, tokens, labels in rows:
            source = f"{files[row.file]}:{row.line}"
            if not tokens:
                raise ValueError(
                    f"{source}: the text is empty, and the tokenizer has no BOS or EOS to add: remove the row"
                )
            if max(max(tokens), max(labels)) > largest_id:
                largest_id, largest_id_row = max(max(tokens), max(labels)), count
                if largest_id >= vocab_size:
                    raise ValueError(f"{source}: {_beyond(largest_id, vocab_size)}")
            if labels_file is None and labels != tokens:
                tokens_file.flush()
                shutil.copyfile(
                    folder / "tokens.bin", folder / "labels.bin"
                )  # every label so far is its token
                labels_file = stack.enter_context(open(folder / "labels.bin", "ab"))
                written.append(labels_file)
            array("i", tokens).tofile(tokens_file)
            if labels_file:
                array("i", labels).tofile(labels_file)
            count += 1
            total += len(tokens)
            array("q", [total]).tofile(offsets_file)
            array("q", [row.file, row.line]).tofile(sources_file)
        for file in written:
            file.flush()
            os.fsync(file.fileno())
    meta = {
        "rows": count,
        "tokens": total,
        "largest_id": largest_id,
        "largest_id_row": largest_id_row,
        "bytes": {Path(file.name).name: os.path.getsize(file.name) for file in written},
    }
    with open(folder / "meta.json", "w") as file:
        json.dump(meta, file)
        file.flush()
        os.fsync(file.fileno())
    _fsync(folder)
    return meta


def _fsync(folder: Path) -> None:
    """Makes the names in a folder durable, as fsync of a file does its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
