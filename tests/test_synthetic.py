import os
import subprocess
import sys

import pytest
import torch

from chunkflow.data.dataset import open_dataset
from chunkflow.data.synthetic import (
    ANSWER,
    KEYS,
    QUERY,
    VALUES,
    VOCABULARY,
    SyntheticDataset,
    synthetic_lengths,
)

pytestmark = pytest.mark.quick


def share(lengths, condition):
    return sum(map(condition, lengths)) / len(lengths)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lmsys_lengths(seed):
    lengths = synthetic_lengths("lmsys", 100_000, seed)
    assert share(lengths, lambda length: length < 4096) > 0.99
    assert share(lengths, lambda length: length > 32768) == pytest.approx(0.00013, abs=0.00001)
    assert 240_000 < max(lengths) <= 300_000


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_llama3_lengths(seed):
    lengths = synthetic_lengths("llama3_sft", 100_000, seed)
    short, long = (
        [length for length in lengths if length < 8192],
        [length for length in lengths if length >= 8192],
    )
    assert len(long) / len(lengths) == pytest.approx(0.0011, abs=0.00002)
    assert sum(short) / len(short) < 1000
    assert sum(long) / len(long) == pytest.approx(37_000, rel=0.05)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prolong_lengths(seed):
    lengths = synthetic_lengths("prolong", 100_000, seed)
    long = [length for length in lengths if length > 60_000]
    assert max(long) == 65_536 and sum(long) / sum(lengths) == pytest.approx(0.6, abs=0.02)
    assert share(lengths, lambda length: length < 2048) > 0.9


def test_lengths_follow_the_seed():
    lengths = synthetic_lengths("lmsys", 100_000, 3)
    assert lengths == synthetic_lengths("lmsys", 100_000, 3)
    assert lengths != synthetic_lengths("lmsys", 100_000, 4)
    # shuffled: the long ones are not all at one end
    long = [index for index, length in enumerate(lengths) if length > 8192]
    assert min(long) < 20_000 and max(long) > 80_000


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_few_lengths(count):
    lengths = synthetic_lengths("llama3_sft", count, 0)
    assert len(lengths) == count and all(16 <= length <= 131_072 for length in lengths)


def test_lengths_need_no_torch():
    code = (
        "import sys, chunkflow.data.synthetic as s; s.synthetic_lengths('lmsys', 10, 0); assert 'torch'"
        " not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)


@pytest.fixture(scope="module")
def dataset():
    return SyntheticDataset("lmsys", vocab_size=2048, seed=5, count=2000)


def picks(dataset):
    """The shortest, the longest, and a few others."""
    order = sorted(range(len(dataset)), key=dataset.lengths.__getitem__)
    return [*order[:3], *order[::250], *order[-3:]]


def test_the_header_predicts_every_label_and_nothing_else_can(dataset):
    """An oracle that reads the header: target t is labels[t + 1], and the answer to the question that stands
    at t."""
    for index in picks(dataset):
        length = dataset.lengths[index]
        tokens, labels = (tensor.tolist() for tensor in dataset.row(index, length)[:2])
        assert len(tokens) == len(labels) == length
        header = min(KEYS, length // 2)
        facts = dict(divmod(token, VALUES) for token in tokens[:header])
        assert len(facts) == header  # keys are distinct
        assert all(token < QUERY for token in tokens[:header])
        assert all(QUERY <= token < ANSWER for token in tokens[header:])  # no answer ever stands in the input
        assert labels[: header + 1] == [-100] * (header + 1)
        assert labels[header + 1 :] == [ANSWER + facts[token - QUERY] for token in tokens[header:-1]]
        targets = sum(label != -100 for label in labels[1:])
        assert dataset.supervised(index, length) == (targets, targets)


def test_long_sequences_ask_for_all_keys_and_all_answers_occur(dataset):
    longest = max(range(len(dataset)), key=dataset.lengths.__getitem__)
    tokens, labels, _ = dataset.row(longest, dataset.lengths[longest])
    assert tokens[-1000:].unique().numel() == KEYS
    assert sorted(tokens[:KEYS].div(VALUES, rounding_mode="floor").tolist()) == list(range(KEYS))
    assert labels[KEYS + 1 :].unique().numel() > VALUES // 2
    assert tokens[:KEYS].tolist() != sorted(tokens[:KEYS].tolist())  # the header is in random order


def test_a_shorter_row_is_the_beginning_of_the_full_one(dataset):
    for index in picks(dataset):
        full = dataset.row(index, dataset.lengths[index])
        for length in {1, 2, dataset.lengths[index] // 2, dataset.lengths[index] - 1}:
            part = dataset.row(index, length)
            assert all(torch.equal(a, b[:length]) for a, b in zip(part[:2], full[:2]))
            assert dataset.supervised(index, length)[0] == int((part[1][1:] != -100).sum())


def test_rows_follow_seed_and_index(dataset):
    same, other = (SyntheticDataset("lmsys", vocab_size=VOCABULARY, seed=seed, count=2000) for seed in (5, 6))
    assert torch.equal(dataset.row(7, 16)[0], same.row(7, 16)[0])
    assert not torch.equal(dataset.row(7, 16)[0], dataset.row(8, 16)[0])
    assert not torch.equal(dataset.row(7, 16)[0], other.row(7, 16)[0])
    assert dataset.row(7, 16)[0].dtype == dataset.row(7, 16)[1].dtype == torch.int64


def test_opened_by_name(tmp_path):
    lmsys = open_dataset("synthetic", "", None, vocab_size=2048, seed=0, cache_dir=str(tmp_path))
    assert len(lmsys) == 100_000 and lmsys.lengths == synthetic_lengths("lmsys", 100_000, 0)
    assert lmsys.source(0) == "synthetic/lmsys:1"
    llama = open_dataset("synthetic", "llama3_sft", None, vocab_size=2048, seed=0, cache_dir=str(tmp_path))
    assert llama.lengths == synthetic_lengths("llama3_sft", 100_000, 0)
    assert list(tmp_path.iterdir()) == []  # nothing is cached


def test_wrong_settings_are_sentences():
    with pytest.raises(
        ValueError,
        match=r'training.dataset_path is "c4": the synthetic dataset is "lmsys", "llama3_sft", "agent", "prolong" or "preference"',
    ):
        open_dataset("synthetic", "c4", None, vocab_size=2048, seed=0)
    with pytest.raises(ValueError, match=r"vocabulary of 583 ids is too small .* uses 584: choose"):
        open_dataset("synthetic", "", None, vocab_size=583, seed=0)
