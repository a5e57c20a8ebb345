"""The token cache: the sequences of a dataset on disk, tokenised once, by whichever process comes first.

A folder of tokens.bin and, if any label is not its token, labels.bin (int32); if any weight is not 1,
weights.bin, of the loss on each token, and row_weights.bin, of each sequence (float64); offsets.bin, the
start of each sequence and the end of the last, and sources.bin, the file and line of each (int64); meta.json.
"""

import fcntl
import json
import logging
import os
import shutil
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from torch.hub import tqdm  # the real one if it is installed, else torch's small replacement

from chunkflow.data.blocks import split
from chunkflow.data.files import size_of
from chunkflow.data.rows import RowSettings
from chunkflow.data.tokenise import TokenBlock
from chunkflow.data.workers import tokenise_blocks, worker_count

logger = logging.getLogger(__name__)

CACHE_FORMAT = 5  # to be raised when the same rows and tokenizer give other tokens, or other cache files

LINE_SECONDS = 5  # between lines of the log that tell how far tokenising is


def read_meta(folder: Path) -> dict | None:
    """The meta.json of a complete cache; None if it is missing, or a file has another size than it says."""
    with suppress(OSError, ValueError):
        meta = json.loads((folder / "meta.json").read_text())
        if all((folder / name).stat().st_size == size for name, size in meta["bytes"].items()):
            return meta
    return None


def build_once(folder: Path, dataset: str, files: list[str], settings: RowSettings) -> dict:
    """Tokenises the rows of files of a `dataset`, as in `blocks.split`, into `folder`, or waits until another
    process has; returns the cache's meta.json. A rename makes the complete cache appear."""
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
            blocks = tokenise_blocks(split(dataset, files), settings, worker_count())
            try:
                with closing(blocks), _progress(sum(map(size_of, files))) as show:
                    meta = _write_cache(temporary, blocks, show)
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
        f"tokenised {meta['rows']:,} rows: {meta['sequences']:,} sequences, {meta['tokens']:,} tokens, in"
        f" {seconds:.1f} s ({meta['tokens'] / seconds:,.0f} tokens a second), into {folder}"
    )
    return meta


@contextmanager
def _progress(size: int) -> Iterator[Callable[[int], None]]:
    """The function that tells how many of `size` bytes are done: to a bar on a terminal, elsewhere to the
    log, a line every few seconds."""
    start = told = time.monotonic()
    with tqdm(
        total=size,
        unit="B",
        unit_scale=True,
        desc="tokenising",
        mininterval=1,
        disable=not sys.stderr.isatty(),
    ) as bar:
        shown = 0

        def show(done: int) -> None:
            nonlocal shown, told
            bar.update(done - shown)
            shown, now = done, time.monotonic()
            if not sys.stderr.isatty() and done and now - told >= LINE_SECONDS:
                left, told = (now - start) * (size - done) / done, now
                logger.info(f"tokenising: {done / size:.0%}, {left:.0f} s left")

        yield show
        show(size)


def _write_cache(folder: Path, blocks: Iterator[tuple[int, TokenBlock]], show: Callable[[int], None]) -> dict:
    """Writes the files, and nothing for a token or sequence in Python; returns the content of meta.json."""
    meta = {"rows": 0, "sequences": 0, "tokens": 0, "largest_id": -1, "largest_id_row": 0}
    notes, columns = set(), {}
    with ExitStack() as stack:

        def column(name: str, mode: str = "wb"):
            columns[name] = stack.enter_context(open(folder / f"{name}.bin", mode))
            return columns[name]

        tokens, offsets, sources = map(column, ("tokens", "offsets", "sources"))
        array("q", [0]).tofile(offsets)
        for done, block in blocks:
            # the others begin with the first that is needed: until then all was as without them
            if block.labels is not block.tokens and "labels" not in columns:
                tokens.flush()
                shutil.copyfile(folder / "tokens.bin", folder / "labels.bin")
                column("labels", "ab")
            if block.weights and "weights" not in columns:
                _write_ones(column("weights"), meta["tokens"])
            if block.row_weights and "row_weights" not in columns:
                _write_ones(column("row_weights"), meta["sequences"])
            block.tokens.tofile(tokens)
            block.sources.tofile(sources)
            array("q", map(meta["tokens"].__add__, block.ends)).tofile(offsets)
            if "labels" in columns:
                block.labels.tofile(columns["labels"])
            for name, values, count in (
                ("weights", block.weights, len(block.tokens)),
                ("row_weights", block.row_weights, len(block.ends)),
            ):
                if values:
                    values.tofile(columns[name])
                elif name in columns:
                    _write_ones(columns[name], count)
            if block.largest_id > meta["largest_id"]:
                meta["largest_id"] = block.largest_id
                meta["largest_id_row"] = meta["sequences"] + block.largest_id_row
            meta["rows"] += block.rows
            meta["sequences"] += len(block.ends)
            meta["tokens"] += len(block.tokens)
            notes |= block.notes
            show(done)
    meta["notes"] = sorted(notes)
    meta["bytes"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / "meta.json").write_text(json.dumps(meta))
    for path in [*folder.iterdir(), folder]:
        _sync(path)
    return meta


def _write_ones(file, count: int) -> None:
    ones = array("d", [1.0]) * min(count, 1 << 16)
    while count:
        ones[:count].tofile(file)
        count -= min(count, len(ones))


def _sync(path: Path) -> None:
    """Makes a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
