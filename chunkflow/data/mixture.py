"""Several datasets as one: the sources of [[training.sources]]."""

from bisect import bisect_right
from itertools import accumulate, chain

import torch

from chunkflow.data.dataset import TokenDataset
from chunkflow.data.synthetic import SyntheticDataset

MOST_ROWS = 2**31  # of an epoch, whose order is in memory


class MixedDataset:
    """The rows of each source, one source after the other; a dataset as dataset.py describes it.

    `sources`: by name, in the order of the config; an epoch passes each row of a source `weights` times.
    ValueError where these make an epoch of no size for a computer's memory.
    """

    def __init__(self, sources: dict[str, TokenDataset | SyntheticDataset], weights: list[float]):
        self.names, self._sources = list(sources), list(sources.values())
        self.pairs = all(getattr(dataset, "pairs", False) for dataset in self._sources)
        self.source_weights, self.counts = weights, [len(dataset) for dataset in self._sources]
        self._offsets = [0, *accumulate(self.counts)]
        self.lengths: list[int] = list(chain.from_iterable(dataset.lengths for dataset in self._sources))
        rows = sum(weight * count for weight, count in zip(weights, self.counts))
        if rows > MOST_ROWS:
            raise ValueError(
                f"the weights of training.sources make an epoch of {rows:.2g} sequences, and at most"
                f" {MOST_ROWS:,} are possible: divide all weights by the same number"
            )
        self.identity: dict[str, object] = {"training.sources": self.names} | {
            f"{key} of {name}": value
            for name, dataset, weight in zip(self.names, self._sources, weights)
            for key, value in ({"weight": weight} | dataset.identity).items()
        }

    def __len__(self) -> int:
        return len(self.lengths)

    def source_of(self, index: int) -> int:
        """The number of the source that a row belongs to."""
        return bisect_right(self._offsets, index) - 1

    def _at(self, index: int) -> tuple[TokenDataset | SyntheticDataset, int]:
        """The dataset that has a row, and which of its rows it is."""
        source = self.source_of(index)
        return self._sources[source], index - self._offsets[source]

    def source(self, index: int) -> str:
        dataset, row = self._at(index)
        return dataset.source(row)

    def changed_file(self) -> str:
        return next(filter(None, (dataset.changed_file() for dataset in self._sources)), "")

    def row(self, index: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        dataset, row = self._at(index)
        return dataset.row(row, length)

    def weight(self, index: int) -> float:
        dataset, row = self._at(index)
        return dataset.weight(row)

    def supervised(self, index: int, length: int) -> tuple[int, float]:
        dataset, row = self._at(index)
        return dataset.supervised(row, length)
