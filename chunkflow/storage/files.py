"""Folders that appear whole or not at all, a run's lock, and checksums of files."""

import fcntl
import logging
import shutil
import time
import zlib
from pathlib import Path

from chunkflow.data.files import sync

logger = logging.getLogger(__name__)

_locks = []  # open files, which hold their locks until the process ends


def claim_folder(dump_folder: str, config_toml: str, locked: bool) -> None:
    """Makes a run's folder and writes its config.toml. If `locked`, keeps other runs out until this
    process ends; ValueError if one is writing to it."""
    folder = Path(dump_folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w") if locked else None
    for attempt in range(20) if locked else ():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # a run that was killed may need a moment to be gone
            if attempt == 19:
                remedy = "end it, or name another folder"
                raise ValueError(
                    f"another run is writing to job.dump_folder = {dump_folder!r}: {remedy}"
                ) from None
            time.sleep(0.5)
        except OSError as error:
            remedy = "take care that only one run writes to this folder"
            logger.warning(f"{lock.name} cannot be locked ({error.strerror}): {remedy}")
            break
    (folder / "config.toml").write_text(config_toml)
    _locks.append(lock)


def checksum(path: Path) -> dict[str, int]:
    """A file's size and CRC-32, as a manifest records them."""
    size = crc32 = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size += len(block)
            crc32 = zlib.crc32(block, crc32)
    return {"bytes": size, "crc32": crc32}


def check_files(folder: Path, recorded: dict[str, dict[str, int]]) -> None:
    """ValueError for the first file whose size or checksum is not as recorded in a checkpoint's manifest."""
    remedy = f"copy it again, or remove {folder} to go on from an earlier checkpoint"
    for name, before in recorded.items():
        path = folder / name
        try:
            now = checksum(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}): {remedy}") from None
        if now["bytes"] != before["bytes"]:
            sizes = f"has {now['bytes']:,} bytes, but was written with {before['bytes']:,}"
            raise ValueError(f"{path} {sizes}: {remedy}")
        if now != before:
            raise ValueError(f"{path} is damaged, its checksum is another than when it was written: {remedy}")


def make_empty(folder: Path) -> None:
    """Makes an empty folder; removes what had that name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def publish(temporary: Path, target: Path) -> None:
    """Syncs a complete folder and renames it to `target`, which it replaces."""
    for path in [*temporary.iterdir(), temporary]:
        sync(path)
    replaced = _set_aside(target) if target.exists() else None
    temporary.rename(target)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)
    sync(target.parent)


def remove(folder: Path) -> None:
    """Removes a folder, renamed first so that a kill never leaves half of it under its name. A folder that
    cannot be removed stays, with a warning."""
    try:
        shutil.rmtree(_set_aside(folder), ignore_errors=True)
    except OSError as error:
        logger.warning(f"{folder} could not be removed ({error.strerror}): remove it by hand")


def _set_aside(folder: Path) -> Path:
    renamed = folder.with_name(folder.name + ".removing")
    shutil.rmtree(renamed, ignore_errors=True)
    return folder.rename(renamed)
