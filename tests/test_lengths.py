"""What plan.py says of the data before it plans: how much each seq_len keeps, and how long sequences are."""

import json
import random

import pytest

from chunkflow.planning.lengths import histogram, retention
from recipes import plan
from tests.helpers.processes import REPO

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_every_sequence(seed):
    rng = random.Random(seed)
    lengths = [round(2 ** rng.uniform(0, 17)) for _ in range(rng.randint(1, 300))]
    seq_len, chunk_size = rng.randint(1, 100_000), rng.choice([512, 2048, 3000])
    kept = retention(lengths, seq_len)
    assert [row.seq_len for row in kept] == sorted({row.seq_len for row in kept} | {seq_len})
    assert any(row.tokens == sum(lengths) for row in kept)
    for limit, rows, tokens, truncated in kept:
        within = [length for length in lengths if length <= limit]
        assert (rows, tokens) == (len(within), sum(within))
        assert truncated == sum(min(length, limit) for length in lengths)
    bins = histogram(lengths, chunk_size)
    assert sum(part.rows for part in bins) == len(lengths)
    assert sum(part.tokens for part in bins) == sum(lengths)
    assert bins[0].rows and bins[-1].rows
    for above, end, rows, tokens in bins:
        inside = [length for length in lengths if above < length <= end]
        assert (rows, tokens) == (len(inside), sum(inside)) and not above < chunk_size < end


def test_they_are_printed_before_a_long_row_is_refused(tmp_path, capsys, monkeypatch):
    data = tmp_path / "data.jsonl"
    lengths = [10, 300, 2500, 5000]
    data.write_text("".join(json.dumps({"input_ids": [7] * length}) + "\n" for length in lengths))
    monkeypatch.chdir(REPO)
    options = ["--training.dataset=jsonl", f"--training.dataset_path={data}", "--training.seq_len=3000"]
    with pytest.raises(SystemExit) as end:
        plan.main(options)
    said = capsys.readouterr()
    assert end.value.code == 1
    rows = [" ".join(line.split()) for line in said.out.splitlines()]
    assert "3,000 3 75.0 % 2,810 36.0 % 5,810 74.4 % <- this config" in rows
    assert "1,025 to 2,048 0 0 0.0 % <- chunkflow.chunk_size" in rows
    assert f"error: {data}:4: 5,000 tokens, but training.seq_len admits 3,000" in said.err
    assert 'to "truncate", which cuts off 2,000 tokens (25.6 % of all), or to "drop", which' in said.err
    assert said.err.rstrip().endswith("leaves out 5,000 (64.0 %)")
    plan.main([*options, "--json", "--training.overlong=drop"])
    report = json.loads(capsys.readouterr().out)
    assert {"seq_len": 3000, "rows": 3, "tokens": 2810, "tokens_truncated": 5810} in report["retention"]
