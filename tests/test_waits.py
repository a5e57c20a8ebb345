"""How long ranks wait for one another, against the time limit of collectives."""

import pytest
import torch

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.data.synthetic import SyntheticDataset
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings, plan_step
from chunkflow.planning.waits import longest_wait
from chunkflow.settings.config import load_config
from chunkflow.settings.options import Comm
from chunkflow.training import build
from tests.helpers.processes import run, write_rows
from tests.test_presets import PRESETS, comment

LINEAR = Cost(2.0, 0.0)  # FLOPs a token, without attention


def wait(lengths, **settings):
    settings = PlanSettings(LINEAR, **settings)
    return longest_wait(plan_step(lengths, settings), settings, flops=2.0)  # a token's forward takes a second


def test_waits_of_plans_whose_times_are_known():
    # Forward and backward of a token take 3 s, so the replica with 100 of them ends 240 s later than the
    # other; one chunk of 40 is the most there is between two of ZeRO-3's slots: its backward takes 80 s.
    assert wait([100, 20], replicas=2, chunk_size=100) == 240
    assert wait([100, 20], replicas=2, chunk_size=40, lockstep=True) == 80
    assert wait([100], chunk_size=100) == 0, "one rank waits for nobody"
    # An idle replica runs one token, 3 s, while the other recomputes one of its two chunks.
    assert wait([100], replicas=2, chunk_size=50) == 350 - 3
    # The first of two equal stages waits while the only chunk is on the second: forward 10, backward 20. The
    # second ends 20 s earlier than the first, and waits 10 s for the input.
    half = {"stages": (Cost(1.0, 0.0),) * 2, "pipeline_ranks": 2}
    settings = PlanSettings(LINEAR, chunk_size=10, **half)
    assert longest_wait(plan_step([10], settings), settings, flops=1.0) == 30


def loader_of(name):
    """A preset, the settings of its plans, and its loader, with lengths like LMSys-Chat-1M's."""
    synthetic = [
        "--training.dataset=synthetic",
        "--training.dataset_path=lmsys",
        "--training.overlong=truncate",
    ]
    config = load_config(["--job.config_file", str(PRESETS[name]), *synthetic])
    spec = build.model_spec(config)
    ranks = int(comment(name)[0]["NGPU"])
    settings = build.plan_settings(config, spec, ranks // config.parallelism.pipeline_parallel_degree)
    dataset = SyntheticDataset("lmsys", vocab_size=spec.args.vocab_size, seed=0)
    return config, settings, build.open_loader(config.training, dataset, settings, 0, 0)


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_comes_near_the_time_limit(name):
    """With the longest sequence in the batch that it admits, and at a rate that is low for its GPUs."""
    config, settings, loader = loader_of(name)
    assert isinstance(loader, ChunkDataLoader) and loader.longest == config.training.seq_len
    _, lengths, _, _ = loader.batch_at(0)
    lengths[lengths.index(max(lengths))] = loader.longest
    seconds = longest_wait(plan_step(lengths, settings), settings, flops=200e12)
    alone = settings.replicas == settings.pipeline_ranks == 1
    assert seconds == 0 if alone else seconds > 1
    assert 3 * seconds < config.comm.train_timeout_seconds == 1800
    build.check_waits(config.comm, loader, settings, torch.device("cuda"))


def test_a_time_limit_that_waits_will_exceed_is_refused():
    _, settings, loader = loader_of("llama3_1_8b_128k_pipeline")
    settings = settings._replace(spread_over=1)  # nobody helps the replica with the longest sequence
    short = Comm(train_timeout_seconds=20)
    build.check_waits(short, loader, settings, torch.device("cpu"))  # nothing is known of a CPU's speed
    with pytest.raises(ValueError) as refused:
        build.check_waits(short, loader, settings, torch.device("cuda"))
    said = str(refused.value)
    assert (
        said.startswith("comm.train_timeout_seconds = 20 is less than three times")
        and "131,072 tokens" in said
    )
    needed = int(said.rpartition(" ")[2])
    build.check_waits(Comm(train_timeout_seconds=needed), loader, settings, torch.device("cuda"))
    with pytest.raises(ValueError):
        build.check_waits(Comm(train_timeout_seconds=needed - 1), loader, settings, torch.device("cuda"))


SEEMS_TO_HAVE_A_GPU = """
import torch
from chunkflow.training import build, parallel
from recipes import finetune

make = parallel.init_processes
parallel.init_processes = lambda *more: make(*more)._replace(device=torch.device("cuda"))
build.longest_wait = lambda *more: 4e4
finetune.main()
"""


def test_the_recipe_refuses_it_before_the_model_is_built(tmp_path):
    recipe, data = tmp_path / "recipe.py", write_rows(tmp_path / "rows.jsonl", [90, 7])
    recipe.write_text(SEEMS_TO_HAVE_A_GPU)
    options = ["--training.dataset=jsonl", f"--training.dataset_path={data}", f"--job.dump_folder={tmp_path}"]
    done = run(tmp_path, *options, TRAIN_FILE=str(recipe), seconds=60)
    assert done.returncode == 1 and "size:" not in done.stdout, done.stdout
    (sentence,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert "comm.train_timeout_seconds = 1800" in sentence and sentence.endswith("set it to at least 120000")
