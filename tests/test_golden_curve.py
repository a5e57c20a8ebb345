"""20 steps of the recipe in fp64, as they were: what no test of equality sees, since both sides would move.

Where a change of the numbers is meant (an initialisation, an order of the data, a schedule of the rate), the
failure shows the new ones for golden_curve.json, and the commit says why. Other numbers by accident are drift.
"""

import json
from pathlib import Path

from tests.helpers.processes import small_assets, train, write_rows

GOLDEN = Path(__file__).parent / "golden_curve.json"
LENGTHS = [30, 7, 200, 64, 65, 1, 128, 90, 12, 300, 45, 63, 18, 150, 33, 80, 5, 101, 27, 230]


def test_the_curve_of_20_steps_is_what_it_was(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", LENGTHS, seed=3)
    rows = train(
        tmp_path, "run", data, small_assets(tmp_path / "model"),
        "--training.dtype=float64", "--training.steps=20", "--lr_scheduler.decay_ratio=0.5",
        "--optimizer.lr=3e-3", "--debug.seed=7", "--metrics.no_enable_tensorboard",
    )  # fmt: skip
    names = ("loss", "grad_norm", "lr", "tokens", "supervised_tokens", "chunks", "recomputed_chunks")
    curve = {name: [row[name] for row in rows] for name in names}
    golden = json.loads(GOLDEN.read_text())
    for name in names:
        # CPUs differ in the last bits of exp and of sums, which 20 steps of AdamW may carry to 1e-9.
        tolerance = 1e-6 if name in ("loss", "grad_norm", "lr") else 0
        for step, (now, then) in enumerate(zip(curve[name], golden[name], strict=True), start=1):
            same = abs(now - then) <= tolerance * abs(then)
            assert same, f"{name} of step {step} was {then}, now the curve is\n{json.dumps(curve)}"
