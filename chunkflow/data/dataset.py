"""Datasets: rows -> tokens on disk, memory-mapped; tokenised once, by whichever process comes first.

Every dataset has `len(dataset)`; `dataset.lengths`, tokens of each sequence; `dataset.row(index, length)`,
the first `length` tokens, their labels (int64) and the weights of the loss on them (float64; None: all 1);
`dataset.weight(index)`, which scales the loss on all of a sequence; `dataset.supervised(index, length)`, how
many targets of a weight above 0 the first `length` tokens have, and the sum of these weights;
`dataset.source(index)`, "FILE:LINE"; `dataset.identity`, all that the sequences depend on. A token's label is
the token itself, or -100: no loss; its weight belongs to its label. The dataloader shifts both by one. Where
`dataset.pairs` is true, sequences 2p and 2p + 1 are the chosen and the rejected answer of preference pair p.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import shutil
import sysconfig
import warnings
from pathlib import Path

import torch

from chunkflow.data.blocks import records, split
from chunkflow.data.digests import changed_file, content_digest, stamp, text_digest
from chunkflow.data.files import find_files, python_files
from chunkflow.data.rows import RowSettings, beyond_vocabulary, holds_pairs, summed_up
from chunkflow.data.synthetic import SyntheticDataset
from chunkflow.data.token_cache import CACHE_FORMAT, build_once, read_meta
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.planning.chunks import IGNORE

logger = logging.getLogger(__name__)


def open_dataset(
    name: str,
    path: str,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    seed: int,
    cache_dir: str | None = None,
    section: str = "training",
    columns: dict[str, str] | None = None,
    multi_turn: str = "whole",
    pairs: bool | None = False,
) -> TokenDataset | SyntheticDataset:
    """The dataset "python_stdlib", "jsonl", "parquet" or "synthetic" at `path`: dataset and dataset_path of
    the config's `section`. ValueError, one sentence, with FILE:LINE for a faulty row.

    Text is tokenised at the first call, into `cache_dir` (None: $CHUNKFLOW_CACHE, $XDG_CACHE_HOME/chunkflow
    or ~/.cache/chunkflow); several processes may call at once. Without a tokenizer only rows of token ids can
    be read. Ids must be below `vocab_size`, the model's. `seed` is for "synthetic" only. `columns`,
    `multi_turn` and `pairs`: as in RowSettings; `pairs` None: as the first row is.
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
        files = python_files()
    elif name in ("jsonl", "parquet"):
        files = find_files(name, path, section)
    else:
        known = '"python_stdlib", "jsonl", "parquet" or "synthetic"'
        raise ValueError(f'{section}.dataset is "{name}": choose {known}')
    cache = Path(cache_dir).expanduser() if cache_dir else cache_folder()
    if pairs is None:
        first = next((record for block in split(name, files) for record in records(block)), None)
        pairs = first is not None and holds_pairs(first.content, columns or {})
    stamps = {path: stamp(path) for path in files}
    content = content_digest(files, cache / "digests")
    settings = RowSettings(tokenizer, vocab_size, columns or {}, multi_turn, pairs)
    ways = [columns or {}, multi_turn, *(["pairs"] if pairs else [])]
    key = json.dumps([CACHE_FORMAT, name, tokenizer.digest if tokenizer else None, content, ways])
    folder = cache / text_digest(key)
    meta = read_meta(folder) or build_once(folder, name, files, settings)
    if meta["sequences"] == 0:
        raise ValueError(
            f"{path or sysconfig.get_paths()['stdlib']}: there is no sequence in it: choose another"
            f" {section}.dataset or {section}.dataset_path"
        )
    if changed := changed_file(stamps):  # perhaps after its digest was taken and before its rows were read
        shutil.rmtree(folder, ignore_errors=True)
        fault = "the file changed while it was read: start again when nothing writes to it"
        raise ValueError(f"{changed}: {fault}")
    for note in summed_up(meta["notes"]):
        logger.info(note)
    identity = {
        "training.dataset": name,
        "content (digest)": content,
        "tokenizer (digest)": tokenizer.digest if tokenizer else None,
        "sequences": meta["sequences"],
        "tokens": meta["tokens"],
    }
    if columns:
        identity["training.columns"] = columns
    if multi_turn != "whole":
        identity["training.multi_turn"] = multi_turn
    if pairs:
        identity["preference pairs"] = meta["sequences"] // 2
    dataset = TokenDataset(folder, files, identity, stamps, pairs)
    if meta["largest_id"] >= vocab_size:  # the cache may have been made for a larger model
        source = dataset.source(meta["largest_id_row"])
        raise ValueError(f"{source}: {beyond_vocabulary(meta['largest_id'], vocab_size)}")
    return dataset


def cache_folder() -> Path:
    """$CHUNKFLOW_CACHE, $XDG_CACHE_HOME/chunkflow or ~/.cache/chunkflow."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("CHUNKFLOW_CACHE") or f"{user_cache}/chunkflow").expanduser()


class TokenDataset:
    """The sequences of a token cache: memory-mapped files, which the processes of a machine share."""

    def __init__(
        self,
        folder: Path,
        files: list[str],
        identity: dict[str, object],
        stamps: dict[str, tuple | None],
        pairs: bool = False,
    ):
        self._files, self._stamps = files, stamps
        self.identity, self.pairs = identity, pairs
        self._tokens = _map(folder / "tokens.bin", torch.int32)
        self._labels = self._tokens
        if (folder / "labels.bin").exists():
            self._labels = _map(folder / "labels.bin", torch.int32)
        self._offsets = _map(folder / "offsets.bin", torch.int64)
        self._sources = _map(folder / "sources.bin", torch.int64).view(-1, 2)
        self._weights, self._row_weights = (
            _map(path, torch.float64) if path.exists() else None
            for path in (folder / "weights.bin", folder / "row_weights.bin")
        )
        self.lengths: list[int] = self._offsets.diff().tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def source(self, index: int) -> str:
        """The sequence's "FILE:LINE"."""
        file, line = self._sources[index].tolist()
        return f"{self._files[file]}:{line}"

    def changed_file(self) -> str:
        """A file that changed since it was read, or "". The sequences do not: the cache has them."""
        return changed_file(self._stamps)

    def row(self, index: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Copies of the first `length` tokens, their labels (int64, aligned) and the weights of the loss on
        them (float64; None: all 1)."""
        start = int(self._offsets[index])
        part = slice(start, start + length)
        weights = None if self._weights is None else self._weights[part].clone()
        return self._tokens[part].long(), self._labels[part].long(), weights

    def weight(self, index: int) -> float:
        """Scales the loss on all of a sequence."""
        return 1.0 if self._row_weights is None else float(self._row_weights[index])

    def supervised(self, index: int, length: int) -> tuple[int, float]:
        """How many of the first `length` tokens are a target, and the sum of their weights (without the
        sequence's). The first never is: none comes before it; nor is one of weight 0, or in a sequence of
        weight 0."""
        if self.weight(index) == 0:
            return 0, 0.0
        if self._labels is self._tokens and self._weights is None:
            return length - 1, float(length - 1)
        start = int(self._offsets[index])
        part = slice(start + 1, start + length)
        targets = self._labels[part] != IGNORE
        if self._weights is None:
            return int(targets.sum()), float(targets.sum())
        weights = self._weights[part]
        targets &= weights > 0
        return int(targets.sum()), float(weights[targets].sum())


def _map(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """A file as a tensor that must not be written to."""
    # Not torch.from_file: it maps with write permission, which Linux refuses to files larger than memory.
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)
