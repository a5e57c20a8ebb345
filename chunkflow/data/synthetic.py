"""Generated sequences: published length statistics, and content that only long-range attention can predict.

The lengths follow published statistics (ChunkFlow, section 2; Llama 3, table 7; trajectories of agents), to
study plans and speed without the data. The content is a look-up task. The first tokens, the header, are
facts: key j has value v_j, each key once, one token a fact. Every later token asks for a key, and its target
is the value, which only the header tells: a position 200,000 tokens into a sequence still has to attend to
it.
"""

import hashlib
import random
from bisect import bisect_right
from math import exp, log

from chunkflow.planning.chunks import IGNORE

DEFAULT_COUNT = 100_000
KEYS, VALUES = 64, 8
# token ids, from 0: FACT(j, v) = 8 j + v, then QUERY(j), then ANSWER(v)
QUERY = KEYS * VALUES
ANSWER = QUERY + KEYS
VOCABULARY = ANSWER + VALUES

# Points (share of sequences that are shorter, length in tokens) of each mixture; between them the logarithm
# of the length is linear in the share. LMSys-Chat-1M: over 99 % < 4K, 0.013 % > 32K, longest about 300K.
# Llama 3's SFT data: 99.89 % short (< 1K on average), 0.11 % long (37K on average). Agents: trajectories of
# coding agents as in CoderForge, 30 % < 32K, 92.5 % < 64K, 99.9 % < 128K, longest 184K. ProLong's
# first stage: 60 % of the tokens are books and repositories in pieces of exactly 64K, the rest is text of the
# web, most of it short. Preference: made up, pairs of answers to short questions and to questions on
# documents of up to 64K.
MIXTURES = {
    "lmsys": [(0.0, 16), (0.5, 320), (0.9, 1024), (0.995, 4096), (0.99987, 32768), (1.0, 300_000)],
    "llama3_sft": [(0.0, 16), (0.5, 480), (0.9, 1536), (0.9989, 8192), (0.99945, 21_000), (1.0, 131_072)],
    "agent": [
        *((0.0, 8000), (0.0007, 16_384), (0.3, 32_768), (0.5, 38_000), (0.76, 49_152), (0.925, 65_536)),
        *((0.993, 98_304), (0.999, 131_072), (1.0, 184_000)),
    ],
    "prolong": [
        *((0.0, 32), (0.5, 450), (0.9, 1800), (0.977, 16_384), (0.978, 65_536), (1.0, 65_536)),
    ],
    "preference": [
        *((0.0, 64), (0.5, 450), (0.9, 1500), (0.97, 8192), (0.99, 32_768), (0.9995, 65_536), (1.0, 65_536)),
    ],
}
NAMES = ", ".join(f'"{name}"' for name in list(MIXTURES)[:-1]) + ' or "preference"'
LONGEST_ANSWER = 512  # tokens, of a pair


def synthetic_lengths(mix: str, count: int, seed: int) -> list[int]:
    """`count` lengths (tokens) of a mixture of MIXTURES; ValueError for another.

    One length is drawn in each of `count` equal shares of the mixture, then all are shuffled: a hundred
    thousand have the published statistics with any seed.
    """
    if mix not in MIXTURES:
        raise ValueError(f'training.dataset_path is "{mix}": the synthetic dataset is {NAMES}, choose one')
    shares, logarithms = zip(*((share, log(length)) for share, length in MIXTURES[mix]))
    generator = random.Random(f"{mix}/{seed}")
    lengths = []
    for index in range(count):
        share = (index + generator.random()) / count
        right = min(bisect_right(shares, share), len(shares) - 1)
        part = (share - shares[right - 1]) / (shares[right] - shares[right - 1])
        lengths.append(round(exp(logarithms[right - 1] + part * (logarithms[right] - logarithms[right - 1]))))
    generator.shuffle(lengths)
    return lengths


class SyntheticDataset:
    """`count` sequences of mixture `mix`, each generated when it is read, from (seed, index) alone.

    "preference" has so many pairs instead: sequences 2p and 2p + 1 are the same questions, of which the last
    ones are answered rightly in the first and wrongly in the second; the loss is on these answers.
    """

    def __init__(self, mix: str, *, vocab_size: int, seed: int, count: int = DEFAULT_COUNT):
        if vocab_size < VOCABULARY:
            raise ValueError(
                f"the model's vocabulary of {vocab_size} ids is too small for the synthetic dataset, which"
                f" uses {VOCABULARY}: choose a model (model.flavor) with at least as many"
            )
        self.lengths, self.pairs = synthetic_lengths(mix, count, seed), mix == "preference"
        if self.pairs:
            self.lengths = [length for length in self.lengths for _ in range(2)]
        self._mix, self._seed = mix, seed
        self.identity: dict[str, object] = {  # all that the sequences depend on
            "training.dataset": "synthetic",
            "training.dataset_path": mix,
            "sequences": count,
            "its seed": seed,
        }

    def changed_file(self) -> str:
        return ""  # there are no files

    def __len__(self) -> int:
        return len(self.lengths)

    def source(self, index: int) -> str:
        return f"synthetic/{self._mix}:{index + 1}"

    def row(self, index: int, length: int):
        """The first `length` tokens and their labels (int64, aligned): -100 on the header and first query; no
        weights."""
        import torch  # here, so that plans of synthetic lengths can be made without it

        full = self.lengths[index]
        number, wrong = divmod(index, 2) if self.pairs else (index, 0)
        digest = hashlib.blake2b(f"{self._seed}/{number}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        header = min(KEYS, full // 2)
        keys = torch.randperm(KEYS, generator=generator)[:header]
        values = torch.randint(VALUES, (header,), generator=generator)
        asked = torch.randint(header, (full - header,), generator=generator)  # which fact of the header
        tokens = torch.cat([keys * VALUES + values, QUERY + keys[asked]])
        labels = torch.full_like(tokens, IGNORE)
        labels[header + 1 :] = ANSWER + (values[asked[:-1]] + wrong) % VALUES  # after each query its answer
        labels[: self._first_target(index)] = IGNORE
        return tokens[:length], labels[:length], None

    def weight(self, index: int) -> float:
        return 1.0

    def supervised(self, index: int, length: int) -> tuple[int, float]:
        """How many of the first `length` tokens are a target, and the sum of their weights."""
        targets = max(0, length - self._first_target(index))
        return targets, float(targets)

    def _first_target(self, index: int) -> int:
        full = self.lengths[index]
        first = min(KEYS, full // 2) + 1
        return max(first, full - LONGEST_ANSWER) if self.pairs else first
