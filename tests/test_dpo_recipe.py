"""recipes/dpo.py as its users run it: step by step the textbook loop, the same on every layout, resumed to the
last bit; references computed once; sentences for wrong input."""

import json
import random

import pytest
import torch

from chunkflow.data.dataset import open_dataset
from chunkflow.data.order import Order
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.planning.cost import Cost
from chunkflow.settings.config import load_config
from chunkflow.settings.options import Dpo
from chunkflow.training.model_sizes import model_args
from chunkflow.training.parallel import init_weights
from tests.helpers.processes import REPO, assert_same_curves, run, small_assets, train, untimed
from tests.test_preference import textbook

RECIPE = {"TRAIN_FILE": str(REPO / "recipes" / "dpo.py")}
TOKENIZER = f"--model.tokenizer_path={REPO / 'chunkflow' / 'data' / 'python_2048.model'}"
FIGURES = ("loss", "reward_margin", "reward_accuracy", "chosen_logp", "rejected_logp")
WORDS = [
    "for",
    "while",
    "return",
    "def",
    "class",
    "import",
    "self",
    "None",
    "True",
    "False",
    "x",
    "y",
    "z",
    "1",
    "2",
    "3",
    "with",
    "open",
    "as",
    "try",
]


def write_pairs(path, count=18, seed=0):
    """Prompts of a few and of hundreds of tokens; one answer in three is its pair's other, too."""
    rng = random.Random(seed)

    def text(words):
        return " ".join(rng.choice(WORDS) for _ in range(words))

    with open(path, "w") as file:
        for number in range(count):
            prompt, chosen = text(rng.choice([3, 10, 30, 150])), f"{text(rng.randint(1, 30))} good"
            rejected = chosen if number % 3 == 2 else f"{text(rng.randint(1, 30))} bad"
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data and the options of a small model, in fp64."""
    folder = tmp_path_factory.mktemp("pairs")
    data = write_pairs(folder / "pairs.jsonl")
    return data, [
        small_assets(folder / "model"),
        TOKENIZER,
        "--training.dtype=float64",
        "--optimizer.lr=1e-2",
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, place):
    """The curve of whole sequences in one process."""
    data, options = place
    return train(tmp_path_factory.mktemp("run"), "run", data, *options, "--chunkflow.no_enable", **RECIPE)


def same(rows, reference):
    assert_same_curves(rows, reference, 1e-8, 1e-8)
    for row, expected in zip(rows, reference):
        for figure in FIGURES:
            assert row[figure] == pytest.approx(expected[figure], rel=1e-8, abs=1e-9), (row["step"], figure)


@pytest.mark.proves("one process + no_enable + DPO")
def test_the_curve_is_that_of_the_textbook_loop(tmp_path, place, reference):
    """Whole sequences, autograd through both models, torch's own optimizer."""
    data, options = place
    config = load_config([*options, "--optimizer.name=AdamW"])
    family, args = model_args(config.model, 8192, 2048)
    policy, frozen = (family.Transformer(args).double() for _ in range(2))
    for model in (policy, frozen):
        init_weights(model, 0)
    dataset = open_dataset(
        "jsonl", str(data), Tokenizer(), vocab_size=2048, seed=0, cache_dir=str(tmp_path), pairs=True
    )
    settings, order = config.optimizer, Order([len(dataset) // 2], [1.0], 0, True)
    optimizer = torch.optim.AdamW(
        policy.parameters(), betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay
    )
    cost = Cost.of_model(args)
    for step, row in enumerate(reference):
        sequences = []
        for pair in (order.row(6 * step + place) for place in range(6)):
            for number in (2 * pair, 2 * pair + 1):
                tokens, labels, _ = dataset.row(number, dataset.lengths[number])
                sequences.append((tokens, torch.cat([labels[1:], torch.tensor([-100])])))
        loss, _, _, _ = textbook(policy, frozen, sequences, Dpo())
        assert abs(row["loss"] - loss) <= 1e-8 * loss
        lengths = [len(tokens) for tokens, _ in sequences]
        useful = sum(2 * cost.forward(length) + cost.backward(length) for length in lengths)
        assert row["tflops"] * 1e12 * row["seconds"] == pytest.approx(useful, rel=1e-9), "of both phases"
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        assert abs(row["grad_norm"] - norm.item()) <= 1e-8 * norm
        optimizer.param_groups[0]["lr"] = row["lr"]
        optimizer.step()


@pytest.mark.proves("one process + DPO + k > 1", "always/stages x ranks + DPO", "never + DPO + kv_offload")
@pytest.mark.parametrize(
    "processes, options",
    [
        (1, ["--chunkflow.k=2"]),
        (2, ["--chunkflow.chunk_size=32"]),
        (2, ["--parallelism.fsdp_reshard_after_forward=never", "--chunkflow.kv_offload=host"]),
        (4, ["--parallelism.pipeline_parallel_degree=2"]),
    ],
)
def test_every_layout_has_the_same_curve(tmp_path, place, reference, processes, options):
    data, always = place
    rows = train(tmp_path, "run", data, *always, *options, processes=processes, **RECIPE)
    same(rows, reference)
    assert rows[0]["reward_margin"] == rows[0]["reward_accuracy"] == 0, "at first it is the reference"


@pytest.mark.proves("one process + DPO + validation + resume")
def test_a_resumed_run_is_the_undisturbed_one_to_the_last_bit(tmp_path, place):
    """Also where what the references were is lost, or is not enough: it comes from the initial weights."""
    data, options = place
    options = [
        *options,
        "--checkpoint.enable",
        "--lr_scheduler.decay_ratio=0.0",
        "--training.global_batch_size=3",
    ]
    validation = ["--validation.enable", f"--validation.dataset_path={data}", "--validation.freq=2"]
    first = train(tmp_path, "whole", data, *options, *validation, "--training.steps=5", **RECIPE)
    cache = tmp_path / "cache"
    kept = {path: path.read_bytes() for path in cache.glob("references-*")}
    assert len(kept) == 1, "training and validation have the same pairs here"
    for path in kept:
        path.unlink()
    train(tmp_path, "parts", data, *options, "--training.steps=2", **RECIPE)
    (few,) = (path.read_bytes() for path in kept)
    assert torch.frombuffer(bytearray(few), dtype=torch.float64).isfinite().sum() == 2 * 6
    resumed = train(tmp_path, "parts", data, *options, "--training.steps=5", **RECIPE)
    assert untimed(resumed) == untimed(first)
    validated = [
        json.loads(line) for line in (tmp_path / "whole" / "validation.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in validated] == [2, 4, 5]
    assert all({"reward_margin", "reward_accuracy", "loss"} <= row.keys() for row in validated)
    # The same once more finds them in the file.
    done = run(
        tmp_path, f"--job.dump_folder={tmp_path / 'again'}", "--training.dataset=jsonl",
        f"--training.dataset_path={data}", *options, "--training.steps=1", **RECIPE,
    )  # fmt: skip
    assert done.returncode == 0 and "Reference log-probabilities" not in done.stdout, done.stdout[-3000:]


@pytest.mark.proves("one process + DPO + LoRA + no_enable", "always + DPO + LoRA")
def test_adapters_have_the_base_as_reference(tmp_path, place):
    data, options = place
    options = [
        *options,
        "--lora.rank=4",
        "--optimizer.lr=3e-2",
        "--checkpoint.enable",
        "--checkpoint.interval=2",
    ]
    whole = train(tmp_path, "whole", data, *options, "--chunkflow.no_enable", **RECIPE)
    for path in (tmp_path / "cache").glob("references-*"):
        path.unlink()
    chunked = train(tmp_path, "chunks", data, *options, processes=2, **RECIPE)
    same(chunked, whole)
    assert chunked[0]["reward_margin"] == 0 < chunked[-1]["reward_margin"]
    # Another reference than at the start: adapters of a run, over their base.
    start = f"--checkpoint.initial_load_path={tmp_path / 'whole' / 'checkpoint' / 'step-4'}"
    further = train(tmp_path, "further", data, *options, start, "--training.steps=1", **RECIPE)
    assert further[0]["reward_margin"] > 0


def test_it_learns_and_says_so(tmp_path):
    """The rejected answer of each pair is the chosen one backwards: accuracy and margin rise."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rng = random.Random(0)
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for _ in range(48):
            prompt, count = " ".join(rng.choices(WORDS, k=rng.randint(1, 20))), rng.randint(2, 6)
            pair = {
                "chosen": " ".join(["def", "class"] * count),
                "rejected": " ".join(["class", "def"] * count),
            }
            file.write(json.dumps({"prompt": prompt} | pair) + "\n")
    options = [small_assets(tmp_path / "model"), TOKENIZER, "--optimizer.lr=2e-2", "--training.steps=15"]
    options += [
        "--metrics.enable_tensorboard",
        "--training.mixed_precision_param=float32",
        "--dpo.beta=0.5",
        "--training.global_batch_size=8",
    ]
    rows = train(tmp_path, "run", tmp_path / "pairs.jsonl", *options, **RECIPE)
    assert rows[-1]["reward_accuracy"] == 1 and rows[-1]["loss"] < 0.4 and rows[-1]["reward_margin"] > 1
    events = EventAccumulator(str(tmp_path / "run" / "tb")).Reload()
    names = "reward_margin reward_accuracy chosen_logp rejected_logp chosen_reward rejected_reward"
    assert {f"dpo/{name}" for name in names.split()} <= set(events.Tags()["scalars"])


def test_wrong_input_is_a_sentence(tmp_path, place):
    data, options = place
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    jsonl = ["--training.dataset=jsonl", f"--training.dataset_path={data}"]
    for recipe, more, status, said in (
        ("dpo", [], 2, 'training.dataset = "python_stdlib" has no preference pairs'),
        ("dpo", ["--training.dataset=synthetic"], 2, "has no preference pairs"),
        ("dpo", [*jsonl, "--training.loss_weighting=sequence"], 2, "set dpo.length_normalised"),
        ("dpo", [*jsonl, "--dpo.beta=0"], 2, "greater than 0"),
        ("dpo", [*jsonl, "--dpo.label_smoothing=0.5"], 2, "less than 0.5"),
        ("dpo", [*jsonl[:1], f"--training.dataset_path={chats}"], 1, "chats.jsonl:1: the row has no"),
        ("dpo", [*jsonl, "--training.seq_len=60"], 1, "of 18 pairs"),
        ("finetune", jsonl, 1, "preference training (recipes/dpo.py)"),
        (
            "finetune",
            ["--training.dataset=synthetic", "--training.dataset_path=preference"],
            2,
            "train on them with recipes/dpo.py",
        ),
    ):
        done = run(
            tmp_path, f"--job.dump_folder={tmp_path / 'wrong'}", *options[:2], *more,
            TRAIN_FILE=str(REPO / "recipes" / f"{recipe}.py"),
        )  # fmt: skip
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
        assert done.returncode == status and said in line, (more, done.stdout)
