"""The token cache: the sequences of a dataset on disk, tokenised once, by whichever process comes first.

A folder of tokens.bin and, if any label is not its token, labels.bin (int32); if any weight is not 1,
weights.bin, of the loss on each token, and row_weights.bin, of each sequence (float64); offsets.bin, the
start of each sequence and the end of the last, and sources.bin, the file and line of each (int64); meta.json.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from torch.hub import tqdm  # the real one if it is installed, else torch's small replacement

from chunkflow.data.files import Record, unreadable
from chunkflow.data.rows import RowSettings, beyond_vocabulary, read_rows
from chunkflow.data.tokenise import Sequence, tokenised

logger = logging.getLogger(__name__)

CACHE_FORMAT = 3  # to be raised when the same rows and tokenizer give other tokens, or other cache files
BATCH_CHARACTERS = 1 << 20  # tokenised at once; bounds the memory that tokenising takes


def content_digest(files: list[str]) -> str:
    """Changes with the content and the name of any file, not with their folder."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        content = hashlib.blake2b()
        try:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    content.update(block)
        except OSError as error:
            raise unreadable(path, error) from None
        digest.update(json.dumps([os.path.basename(path), content.hexdigest()]).encode())
    return digest.hexdigest()


def stamp(path: str) -> tuple | None:
    """Size, time of change and inode of a file: they tell that it was written to, without reading it."""
    with suppress(OSError):  # a missing file is reported when it is read
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns, status.st_ino
    return None


def changed_file(stamps: dict[str, tuple | None]) -> str:
    return next((path for path, before in stamps.items() if stamp(path) != before), "")


def read_meta(folder: Path) -> dict | None:
    """The meta.json of a complete cache; None if it is missing, or a file has another size than it says."""
    with suppress(OSError, ValueError):
        meta = json.loads((folder / "meta.json").read_text())
        if all((folder / name).stat().st_size == size for name, size in meta["bytes"].items()):
            return meta
    return None


def build_once(folder: Path, records: Iterable[Record], settings: RowSettings, size: int) -> dict:
    """Tokenises the records, of files with `size` bytes, into `folder`, or waits until another process has;
    returns the cache's meta.json. A rename makes the complete cache appear."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process is tokenising the dataset: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when that process ends, in whatever way
            if meta := read_meta(folder):
                return meta
            temporary = Path(f"{folder}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # from a process that was killed
            temporary.mkdir()
            start = time.perf_counter()
            try:
                with tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", mininterval=1) as bar:
                    meta = _write_cache(temporary, records, settings, bar)
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


def _sequences(
    records: Iterable[Record], settings: RowSettings, notes: set[str], bar
) -> Iterator[tuple[Record, Sequence]]:
    """Each record with each of its sequences. Text is tokenised about BATCH_CHARACTERS at a time."""
    batch, characters = [], 0
    for record in records:
        try:
            for row in read_rows(record.content, settings, notes):
                batch.append((record, row))
                characters += sum(len(content) for content, _ in row.spans)
                characters += len(row.chat.text) if row.chat else 0
        except ValueError as error:
            raise ValueError(f"{record.source}: {error}") from None
        if characters >= BATCH_CHARACTERS:
            yield from _tokenised(batch, settings, bar)
            batch, characters = [], 0
    yield from _tokenised(batch, settings, bar)


def _tokenised(batch, settings: RowSettings, bar) -> Iterator[tuple[Record, Sequence]]:
    for (record, _), sequence in zip(batch, tokenised([row for _, row in batch], settings.tokenizer)):
        if isinstance(sequence, ValueError):
            raise ValueError(f"{record.source}: {sequence}")
        yield record, sequence
    bar.update(sum(record.size for record, _ in batch))


def _write_cache(folder: Path, records: Iterable[Record], settings: RowSettings, bar) -> dict:
    """Writes the files; returns the content of meta.json."""
    largest_id, largest_id_row, labels_differ, weighted, notes = -1, 0, False, False, set()
    offsets, sources, row_weights = array("q", [0]), array("q"), array("d")
    names = "tokens.bin", "labels.bin", "weights.bin"
    tokens_file, labels_file, weights_file = (open(folder / name, "wb") for name in names)
    with tokens_file, labels_file, weights_file:
        for record, sequence in _sequences(records, settings, notes, bar):
            tokens, labels, weights, weight = sequence
            if not tokens:
                fault = "the text is empty, and the tokenizer has no BOS or EOS to add: remove the row"
                raise ValueError(f"{record.source}: {fault}")
            largest = max(max(tokens), max(labels))
            if largest >= settings.vocab_size:
                raise ValueError(f"{record.source}: {beyond_vocabulary(largest, settings.vocab_size)}")
            if largest > largest_id:
                largest_id, largest_id_row = largest, len(offsets) - 1
            labels_differ = labels_differ or labels != tokens
            array("i", tokens).tofile(tokens_file)
            array("i", labels).tofile(labels_file)
            if weights is not None and not weighted:  # those before had none
                weighted = True
                array("d", [1.0] * offsets[-1]).tofile(weights_file)
            if weighted:
                array("d", weights or [1.0] * len(tokens)).tofile(weights_file)
            offsets.append(offsets[-1] + len(tokens))
            sources.extend((record.file, record.line))
            row_weights.append(weight)
    (folder / "offsets.bin").write_bytes(offsets)
    (folder / "sources.bin").write_bytes(sources)
    if any(weight != 1 for weight in row_weights):
        (folder / "row_weights.bin").write_bytes(row_weights)
    if not labels_differ:
        os.remove(folder / "labels.bin")
    if not weighted:
        os.remove(folder / "weights.bin")
    meta = {
        "rows": len(offsets) - 1,
        "tokens": offsets[-1],
        "largest_id": largest_id,
        "largest_id_row": largest_id_row,
        "notes": sorted(notes),
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
