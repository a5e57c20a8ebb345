"""Datasets: rows -> tokens on disk, memory-mapped; tokenised once, by whichever process comes first.

Every dataset has `len(dataset)`; `dataset.lengths`, tokens of each sequence; `dataset.row(index, length)`,
the first `length` tokens and their labels, as int64 tensors; `dataset.supervised(index, length)`, how many
targets these have; `dataset.source(index)`, "FILE:LINE"; `dataset.identity`, all that the sequences depend
on. A token's label is the token itself, or -100: no loss. The dataloader shifts labels by one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
import sysconfig
import time
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch.hub import tqdm  # the real one if it is installed, else torch's small replacement

from chunkflow.data import rows
from chunkflow.data.chat import labels_of
from chunkflow.data.synthetic import SyntheticDataset
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.execution.loss import IGNORE

logger = logging.getLogger(__name__)

CACHE_FORMAT = 2  # to be raised when the same rows and tokenizer give other tokens, or other cache files
BATCH_CHARACTERS = 1 << 20  # tokenised at once; bounds the memory that tokenising takes


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
    """The dataset "python_stdlib", "jsonl" or "synthetic" at `path`: dataset and dataset_path of the config's
    `section`. ValueError, one sentence, with FILE:LINE for a faulty row.

    Text is tokenised at the first call, into `cache_dir` (None: $CHUNKFLOW_CACHE, $XDG_CACHE_HOME/chunkflow
    or ~/.cache/chunkflow); several processes may call at once. Without a tokenizer only rows of token ids can
    be read. Ids must be below `vocab_size`, the model's. `seed` is for "synthetic" only.
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
        files, read = rows.python_files(), rows.python_rows
    elif name == "jsonl":
        files, read = rows.jsonl_files(path, section), rows.jsonl_rows
    else:
        raise ValueError(f'{section}.dataset is "{name}": choose "python_stdlib", "jsonl" or "synthetic"')
    stamps = {path: _stamp(path) for path in files}
    content = _content_digest(files)
    key = json.dumps([CACHE_FORMAT, name, tokenizer.digest if tokenizer else None, content])
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache_dir = cache_dir or os.environ.get("CHUNKFLOW_CACHE") or f"{user_cache}/chunkflow"
    folder = Path(cache_dir).expanduser() / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    meta = _read_meta(folder) or _build_once(folder, files, read, tokenizer, vocab_size)
    if meta["rows"] == 0:
        raise ValueError(
            f"{path or sysconfig.get_paths()['stdlib']}: there is no sequence in it: choose another"
            f" {section}.dataset or {section}.dataset_path"
        )
    if changed := _changed(stamps):  # perhaps after its digest was taken and before its rows were read
        shutil.rmtree(folder, ignore_errors=True)
        fault = "the file changed while it was read: start again when nothing writes to it"
        raise ValueError(f"{changed}: {fault}")
    identity = {
        "training.dataset": name,
        "content (digest)": content,
        "tokenizer (digest)": tokenizer.digest if tokenizer else None,
        "sequences": meta["rows"],
        "tokens": meta["tokens"],
    }
    dataset = TokenDataset(folder, files, identity, stamps)
    if meta["largest_id"] >= vocab_size:  # the cache may have been made for a larger model
        source = dataset.source(meta["largest_id_row"])
        raise ValueError(f"{source}: {rows.beyond_vocabulary(meta['largest_id'], vocab_size)}")
    return dataset


class TokenDataset:
    """The sequences of a token cache: memory-mapped files, which the processes of a machine share."""

    def __init__(
        self, folder: Path, files: list[str], identity: dict[str, object], stamps: dict[str, tuple | None]
    ):
        self._files, self._stamps = files, stamps
        self.identity = identity
        self._tokens = _map(folder / "tokens.bin", torch.int32)
        self._labels = self._tokens
        if (folder / "labels.bin").exists():
            self._labels = _map(folder / "labels.bin", torch.int32)
        self._offsets = _map(folder / "offsets.bin", torch.int64)
        self._sources = _map(folder / "sources.bin", torch.int64).view(-1, 2)
        self.lengths: list[int] = self._offsets.diff().tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def source(self, index: int) -> str:
        """The sequence's "FILE:LINE"."""
        file, line = self._sources[index].tolist()
        return f"{self._files[file]}:{line}"

    def changed_file(self) -> str:
        """A file that changed since it was read, or "". The sequences do not: the cache has them."""
        return _changed(self._stamps)

    def row(self, index: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the first `length` tokens and of their labels (int64, aligned)."""
        start = int(self._offsets[index])
        return self._tokens[start : start + length].long(), self._labels[start : start + length].long()

    def supervised(self, index: int, length: int) -> int:
        """How many of the first `length` tokens are a target. The first never is: none comes before it."""
        if self._labels is self._tokens:
            return length - 1
        start = int(self._offsets[index])
        return int((self._labels[start + 1 : start + length] != IGNORE).sum())


def _map(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """A file as a tensor that must not be written to."""
    # Not torch.from_file: it maps with write permission, which Linux refuses to files larger than memory.
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)


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
            raise rows.unreadable(path, error) from None
        digest.update(json.dumps([os.path.basename(path), content.hexdigest()]).encode())
    return digest.hexdigest()


def _stamp(path: str) -> tuple | None:
    """Size, time of change and inode of a file: they tell that it was written to, without reading it."""
    with suppress(OSError):  # a missing file is reported when it is read
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns, status.st_ino
    return None


def _changed(stamps: dict[str, tuple | None]) -> str:
    return next((path for path, stamp in stamps.items() if _stamp(path) != stamp), "")


def _read_meta(folder: Path) -> dict | None:
    """The meta.json of a complete cache; None if it is missing, or a file has another size than it says."""
    with suppress(OSError, ValueError):
        meta = json.loads((folder / "meta.json").read_text())
        if all((folder / name).stat().st_size == size for name, size in meta["bytes"].items()):
            return meta
    return None


def _build_once(
    folder: Path, files: list[str], read: Callable, tokenizer: Tokenizer | None, vocab_size: int
) -> dict:
    """Tokenises the files into `folder`, or waits until another process has; returns the cache's meta.json.
    A rename makes the complete cache appear."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process is tokenising the dataset: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when that process ends, in whatever way
            if meta := _read_meta(folder):
                return meta
            temporary = Path(f"{folder}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # from a process that was killed
            temporary.mkdir()
            start = time.perf_counter()
            try:
                size = sum(map(os.path.getsize, files))
                with tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", mininterval=1) as bar:
                    batches = _batches(read(files, tokenizer, vocab_size))
                    meta = _write_cache(temporary, batches, tokenizer, vocab_size, bar)
                shutil.rmtree(folder, ignore_errors=True)  # incomplete, or it would have been used
                os.rename(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            _sync(folder.parent)
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


def _batches(all_rows: Iterable[rows.Row]) -> Iterator[list[rows.Row]]:
    """The rows in lists of about BATCH_CHARACTERS characters or token ids."""
    batch, characters = [], 0
    for row in all_rows:
        batch.append(row)
        characters += sum(len(content) for content, _ in row.spans) + (len(row.chat.text) if row.chat else 0)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _tokenised(batch: list[rows.Row], tokenizer: Tokenizer | None) -> Iterator[tuple]:
    """Each row with its tokens and its labels, two lists of integers."""
    texts = [content for row in batch for content, _ in row.spans if isinstance(content, str)]
    encoded = iter(tokenizer.encode_batch(texts) if texts else [])
    chats = [row.chat for row in batch if row.chat]
    encoded_chats = iter(tokenizer.encode_chats(chats) if chats else [])
    for row in batch:
        tokens, labels = [], []
        if row.chat:
            tokens, offsets = next(encoded_chats)
            try:
                labels = labels_of(row.chat, tokens, offsets)
            except ValueError as error:
                raise ValueError(f"{row.source}: {error}") from None
        for content, supervised in row.spans:
            ids = next(encoded) if isinstance(content, str) else content
            tokens += ids
            labels += ids if supervised else [IGNORE] * len(ids)
        yield row, tokens, labels if row.labels is None else row.labels


def _write_cache(
    folder: Path, batches: Iterable[list[rows.Row]], tokenizer: Tokenizer | None, vocab_size: int, bar
) -> dict:
    """Writes tokens.bin and, if any label is not its token, labels.bin (int32); offsets.bin, the start of
    each sequence and the end of the last, and sources.bin, the file and line of each (int64); then meta.json.
    Returns the content of the last."""
    largest_id, largest_id_row, labels_differ = -1, 0, False
    offsets, sources = array("q", [0]), array("q")
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "labels.bin", "wb") as labels_file:
        for batch in batches:
            for row, tokens, labels in _tokenised(batch, tokenizer):
                if not tokens:
                    fault = "the text is empty, and the tokenizer has no BOS or EOS to add: remove the row"
                    raise ValueError(f"{row.source}: {fault}")
                largest = max(max(tokens), max(labels))
                if largest >= vocab_size:
                    raise ValueError(f"{row.source}: {rows.beyond_vocabulary(largest, vocab_size)}")
                if largest > largest_id:
                    largest_id, largest_id_row = largest, len(offsets) - 1
                labels_differ = labels_differ or labels != tokens
                array("i", tokens).tofile(tokens_file)
                array("i", labels).tofile(labels_file)
                offsets.append(offsets[-1] + len(tokens))
                sources.extend((row.file, row.line))
            bar.update(sum(row.size for row in batch))
    (folder / "offsets.bin").write_bytes(offsets)
    (folder / "sources.bin").write_bytes(sources)
    if not labels_differ:
        os.remove(folder / "labels.bin")
    meta = {
        "rows": len(offsets) - 1,
        "tokens": offsets[-1],
        "largest_id": largest_id,
        "largest_id_row": largest_id_row,
        "bytes": {path.name: path.stat().st_size for path in folder.iterdir()},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    for path in [*folder.iterdir(), folder]:
        _sync(path)
    return meta


def _sync(path: Path) -> None:
    """Makes a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
