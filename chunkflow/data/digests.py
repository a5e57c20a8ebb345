"""What files have in them, as digests, and whether they changed."""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from chunkflow.data.files import unreadable, write_whole

REMEMBERED_BYTES = 1 << 20  # of a file; smaller ones are read as fast as what is remembered of them
SETTLED_SECONDS = 2  # a file changed later than this may change again under the same time stamp


def text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def content_digest(files: list[str], memory: Path) -> str:
    """Changes with the content and the name of any file, not with their folder.

    What a large file has in it is read once, and remembered in the folder `memory` while its name, size,
    inode and times of change stay as they are. ValueError for a file that cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        digest.update(json.dumps([os.path.basename(path), _digest_of(path, memory)]).encode())
    return digest.hexdigest()


def _digest_of(path: str, memory: Path) -> str:
    remembered, content = memory / f"{text_digest(os.path.abspath(path))}.json", hashlib.blake2b()
    try:
        before = _state(path)
        with suppress(OSError, ValueError, TypeError):
            state, known = json.loads(remembered.read_text())
            if state == before:
                return known
        start = time.time_ns()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
        settled = before == _state(path) and max(before[-2:]) < start - SETTLED_SECONDS * 10**9
    except OSError as error:
        raise ValueError(f"{path}: {unreadable(error)}") from None
    if settled and before[0] >= REMEMBERED_BYTES:
        with suppress(OSError):  # such as a cache that this user may only read
            write_whole(remembered, json.dumps([before, content.hexdigest()]).encode())
    return content.hexdigest()


def _state(path: str) -> list[int]:
    """What changes when a file is written to or replaced, also when its time of change is set back."""
    status = os.stat(path)
    return [status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def stamp(path: str) -> tuple | None:
    """Size, time of change and inode of a file: they tell that it was written to, without reading it."""
    with suppress(OSError):  # a missing file is reported when it is read
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns, status.st_ino
    return None


def changed_file(stamps: dict[str, tuple | None]) -> str:
    return next((path for path, before in stamps.items() if stamp(path) != before), "")
