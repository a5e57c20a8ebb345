"""Which data files a path names; files that are written whole."""

import glob
import os
import sysconfig
from collections import Counter
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

PARQUET = (".parquet",)
JSON = tuple(kind + packed for kind in (".jsonl", ".json") for packed in ("", ".gz", ".zst"))
SUFFIXES = {"jsonl": JSON, "parquet": PARQUET}  # of the files that training.dataset = KIND reads
NAMED = {"jsonl": "*.jsonl and *.json files (also .gz and .zst)", "parquet": "*.parquet files"}
CONVERT = "convert your data to JSONL (one object a line) or parquet"


# Of Python's library: installed packages, tests, what programs wrote (tables of characters, texts of help).
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def python_files() -> list[str]:
    """The source files that people wrote for Python's standard library, without tests, sorted by path."""
    root = sysconfig.get_paths()["stdlib"]
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - LEFT_OUT
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths, key=lambda path: Path(path).relative_to(root).as_posix())


def find_files(kind: str, path: str, section: str = "training") -> list[str]:
    """The sorted files of `path`, the dataset_path of a config's section with dataset = `kind`, "jsonl" or
    "parquet": a file, all of the kind in a folder at any depth, or all that match a pattern.

    ValueError, one sentence, if it names none, or a file of another kind, or if the package that reads them
    is not installed. Looks at names only.
    """
    if not path:
        raise ValueError(
            f"{section}.dataset_path is empty: set it to one of your {NAMED[kind]}, a folder of them, or a"
            " pattern"
        )
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        inside = glob.glob(os.path.join(glob.escape(expanded), "**", "*"), recursive=True)
        files = [file for file in inside if file.endswith(SUFFIXES[kind]) and not os.path.isdir(file)]
        fault = f"no {NAMED[kind].replace(' and', ' or')} in this folder{_what_else(inside, kind, section)}"
    else:
        matches = [expanded] if os.path.exists(expanded) else glob.glob(expanded, recursive=True)
        files = [file for file in matches if not os.path.isdir(file)]
        fault = (
            f"no such file or folder, and no file matches it as a pattern: set {section}.dataset_path to"
            f" {NAMED[kind]} on this machine (data sets of the Hugging Face hub are not read by name: save"
            " them first, with hf download --repo-type dataset)"
        )
    if not files:
        raise ValueError(f"{path}: {fault}")
    for file in sorted(files):
        if not file.endswith(SUFFIXES[kind]):
            other = next((other for other in SUFFIXES if file.endswith(SUFFIXES[other])), None)
            remedy = f'set {section}.dataset = "{other}"' if other else CONVERT
            raise ValueError(
                f'{file}: {section}.dataset = "{kind}" reads {NAMED[kind]}: {remedy}, or narrow the path'
            )
        if file.endswith((".zst", ".parquet")) and not find_spec("pyarrow"):
            raise ValueError(
                f"{file}: this file is read by the package pyarrow, which is not installed: pip install"
                " 'chunkflow[data]'"
            )
    return sorted(files)


def _what_else(files: list[str], kind: str, section: str) -> str:
    """The end of a sentence about files of which none is of this kind: what they are, and what to do."""
    for other, suffixes in SUFFIXES.items():
        count = sum(file.endswith(suffixes) for file in files)
        if other != kind and count:
            return f', but {count:,} of the {NAMED[other]} for {section}.dataset = "{other}": set that'
    common = Counter(Path(file).suffix for file in files if Path(file).suffix).most_common(1)
    found = f", but {common[0][0]} files" if common else ""
    return f"{found}: {CONVERT}"


def size_of(path: str) -> int:
    """In bytes; 0 for a missing file, which is reported when it is read."""
    with suppress(OSError):
        return os.path.getsize(path)
    return 0


def sync(path: Path) -> None:
    """Waits until the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file, which appears whole or not at all, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror}): give it to this user to read"
