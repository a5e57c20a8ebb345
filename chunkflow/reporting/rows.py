"""Files of rows that survive a kill, a full disk and a resume: metrics.jsonl and validation.jsonl."""

import json
import logging
import math
import os
from pathlib import Path

logger = logging.getLogger(__name__)


class RowsFile:
    """Appends one JSON object a line. Rows that a full disk refuses are kept, and written with the next row
    for which there is room."""

    def __init__(self, path: Path, last_step: int):
        """Opens the file, and removes a torn last line and the rows after `last_step`."""
        keep_rows(path, last_step)
        self.path, self.waiting = path, b""
        self.file = open(path, "ab", buffering=0)

    def write(self, row: dict[str, float]) -> None:
        """Appends a row; null stands for numbers that JSON does not have (nan, infinity)."""
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self.waiting += json.dumps(row, allow_nan=False).encode() + b"\n"
        size = os.fstat(self.file.fileno()).st_size
        try:
            rest = memoryview(self.waiting)
            while rest:
                rest = rest[self.file.write(rest) :]
            self.waiting = b""
        except OSError as error:
            os.ftruncate(self.file.fileno(), size)  # no torn line in the middle
            remedy = "make room; the rows are kept until then"
            logger.warning(f"{self.path} could not be written ({error.strerror}): {remedy}")

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def keep_rows(path: Path, last_step: int) -> None:
    """Removes a torn last line, and the rows after `last_step`: in a new file that replaces the old one."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if _step(line) <= last_step]
    if len(kept) < len(lines):
        removed = len(lines) - len(kept)
        logger.info(f"{path}: removed {removed} lines that are torn or beyond step {last_step}")
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _step(line: bytes) -> float:
    """The step of a row; infinite for a line that was not written to its end."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
