"""[[training.sources]]: what is refused, the order of rows, ledgers by source, exact resume."""

import json
import math
import random
import re
import signal
from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest

from chunkflow.data.dataloader import ChunkDataLoader, Ledger
from chunkflow.data.dataset import open_dataset
from chunkflow.data.mixture import MixedDataset
from chunkflow.data.order import Order
from chunkflow.data.synthetic import VOCABULARY, SyntheticDataset
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings
from chunkflow.settings.config import ConfigError, load_config
from chunkflow.settings.keys import flat, to_toml
from chunkflow.storage.manifest import check_data
from chunkflow.training import build
from chunkflow.training.start import check_paths
from tests.helpers.kill_loop import KillLoop, outcome
from tests.helpers.processes import REPO, run, wait_for_rows, write_rows

quick = pytest.mark.quick

TWO = """
[[training.sources]]
dataset = "jsonl"
dataset_path = "data/code.jsonl"
weight = 0.5

[[training.sources]]
dataset = "jsonl"
dataset_path = "data/chat.jsonl"
name = "chat"
columns = { prompt = "question" }
"""


def config_of(folder, text, *options):
    path = folder / "run.toml"
    path.write_text(text)
    return load_config([f"--job.config_file={path}", *options])


# ---- settings


@quick
def test_sources_are_read_named_and_saved(tmp_path):
    config = config_of(tmp_path, "[training]\nsteps = 3\n" + TWO + "[debug]\nseed = 1\n")
    first, second = config.training.sources
    assert (first.name, first.weight, first.columns) == ("code.jsonl", 0.5, None)
    assert (second.name, second.weight, second.columns) == ("chat", 1.0, {"prompt": "question"})
    text = to_toml(config)
    assert text.count("[[training.sources]]\n") == 2 and "[training]\ndataset" not in text
    assert config_of(tmp_path, text) == config
    assert flat(config)["training.sources"][1]["columns"] == {"prompt": "question"}
    json.dumps(flat(config))
    inline = 'training = { sources = [{ dataset = "synthetic", weight = 2 }] }'
    (alone,) = config_of(tmp_path, inline).training.sources
    assert (alone.name, alone.weight, type(alone.weight)) == ("synthetic", 2.0, float)
    folder = '[[training.sources]]\ndataset = "jsonl"\ndataset_path = "data/math/"\n'
    assert config_of(tmp_path, folder).training.sources[0].name == "math"


JSONL = '[[training.sources]]\ndataset = "jsonl"\ndataset_path = "a.jsonl"\n'
BROKEN = [
    (JSONL + "weigth = 2\n", 4, 'unknown key training.sources[0].weigth: choose one of "dataset",'),
    (JSONL + "weigth = 2\n", 4, 'did you mean "weight"?'),
    (JSONL + "\n" + JSONL + "weight = 0\n", 8, "training.sources[1].weight = 0.0 is out of range: choose a"),
    (JSONL + "weight = -1.5\n", 4, "training.sources[0].weight = -1.5 is out of range"),
    (JSONL + "weight = 'two'\n", 4, 'sources[0].weight = "two" is not a finite number: write it like'),
    (JSONL + "weight = nan\n", 4, "is not a finite number"),
    (JSONL + "name = 3\n", 4, "training.sources[0].name = 3 is not a string"),
    (JSONL + "columns = { promt = 'q' }\n", 4, "unknown key training.sources[0].columns.promt: choose"),
    ("[[training.sources]]\ndataset = 'jsnl'\n", 2, '"synthetic" (did you mean "jsonl"?)'),
    ("[[training.source]]\ndataset = 'jsonl'\n", 1, "unknown key training.source: did you mean training.sources?"),
    ("[training.sources]\ndataset = 'jsonl'\n", 1, "training.sources is not a list of tables: write [[training"),
    ("[training]\nsources = ['a.jsonl']\n", 2, "training.sources is not a list of tables"),
    ("[training]\nsources = [{ weight = 'x' }]\n", 2, "training.sources[0].weight"),
    (JSONL + JSONL, None, 'training.sources[1] and training.sources[0] are both called "a.jsonl": give'),
    ("[[training.sources]]\nweight = 1\n", None, 'training.sources[0] has no dataset: set one in it, such as'),
    (
        "[[training.sources]]\ndataset = 'jsonl'\n",
        None,
        'training.sources[0].dataset = "jsonl" has no data: set training.sources[0].dataset_path',
    ),
    (
        "[[training.sources]]\ndataset = 'synthetic'\ndataset_path = 'long'\n",
        None,
        'training.sources[0].dataset_path = "long" is not known to',
    ),
    (
        "[training]\ndataset = 'python_stdlib'\n" + JSONL,
        None,
        'training.dataset = "python_stdlib" is not read beside training.sources: remove it, or the tables',
    ),
    ("[training]\ndataset_path = 'b'\n" + JSONL, None, 'training.dataset_path = "b" is not read beside'),
    ("[validation]\nenable = true\n" + JSONL, None, "validation.dataset is unset, and with training.sources"),
]  # fmt: skip


@quick
@pytest.mark.parametrize("text, line, words", BROKEN)
def test_what_is_wrong_is_one_sentence(tmp_path, text, line, words):
    with pytest.raises(ConfigError) as error:
        config_of(tmp_path, text)
    sentence = str(error.value)
    assert words in sentence and "\n" not in sentence
    if line:
        assert sentence.startswith(f"{tmp_path / 'run.toml'}:{line}: "), sentence


@quick
@pytest.mark.parametrize("option", ["--training.sources=[]", "--training.sources.weight=2"])
def test_there_are_no_sources_on_the_command_line(option):
    with pytest.raises(
        ConfigError, match=r"has no place on the command line: write \[\[training.sources\]\]"
    ):
        load_config([option])


@quick
def test_a_dataset_on_the_command_line_does_not_replace_sources(tmp_path):
    with pytest.raises(ConfigError, match='training.dataset = "synthetic" is not read beside'):
        config_of(tmp_path, TWO, "--training.dataset=synthetic")


@quick
def test_the_path_of_each_source_is_checked(tmp_path):
    write_rows(tmp_path / "code.jsonl", [3])
    config = config_of(tmp_path, TWO.replace("data/", f"{tmp_path}/"), f"--job.dump_folder={tmp_path}")
    with pytest.raises(ValueError, match=r"chat.jsonl: .*set training.sources\[1\].dataset_path"):
        check_paths(config)
    write_rows(tmp_path / "chat.jsonl", [3])
    check_paths(config)


# ---- order


def epochs_of(order, count):
    """The rows of each of the first epochs."""
    ends = [order.passed(epoch) for epoch in range(count + 1)]
    return [[order.row(cursor) for cursor in range(*pair)] for pair in zip(ends, ends[1:])]


@quick
@pytest.mark.parametrize("count, seed", [(1, 0), (7, 0), (100, 3)])
def test_one_source_of_weight_1_has_the_order_of_a_plain_dataset(count, seed):
    """The order of a dataset as it always was: resumed runs depend on it."""
    for epoch, rows in enumerate(epochs_of(Order([count], [1.0], seed, True), 3)):
        expected = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(expected)
        assert rows == expected
    assert epochs_of(Order([count], [1.0], seed, False), 2) == [list(range(count))] * 2


@quick
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("case", range(12))
def test_each_row_of_a_source_is_passed_weight_times(case, shuffle):
    """Whatever the weights, after every epoch: a source is as far as it should be to the row, no row is a pass
    ahead of another, and within a pass none comes twice."""
    rng = random.Random(case)
    counts = [rng.randint(1, 40) for _ in range(rng.randint(1, 4))]
    weights = [rng.choice([0.01, 0.29, 1 / 3, 0.5, 1.0, 1.5, 2.0, 2.7, 1e-5]) for _ in counts]
    order = Order(counts, weights, case, shuffle)
    begins = [sum(counts[:source]) for source in range(len(counts))]
    taken = [[] for _ in counts]  # the rows of each source, in the order in which they came
    cursor = 0
    for epoch, rows in enumerate(epochs_of(order, 25)):
        places = range(cursor, cursor + len(rows))
        assert {order.epoch(place) for place in places} <= {epoch}
        cursor += len(rows)
        for source, (count, weight) in enumerate(zip(counts, weights)):
            own = [row for row in rows if begins[source] <= row < begins[source] + count]
            written = Fraction(str(weight)) * count
            assert len(own) == math.floor((epoch + 1) * written) - math.floor(epoch * written)
            taken[source] += own
            passes, rest = divmod(len(taken[source]), count)
            times = Counter(taken[source])
            assert all(times[begins[source] + row] in (passes, passes + 1) for row in range(count))
            assert sum(times[row] == passes + 1 for row in times) == rest
    if not shuffle:
        for source, count in enumerate(counts):
            assert taken[source] == [begins[source] + place % count for place in range(len(taken[source]))]


@quick
def test_weights_count_as_they_are_written():
    """As floats 0.29 x 100 is less than 29, and 3 x 0.1 more than 0.3."""
    assert [len(rows) for rows in epochs_of(Order([100], [0.29], 0, True), 3)] == [29, 29, 29]
    assert Order([10], [0.1], 0, True).passed(3) == 3


@quick
def test_halves_are_random_and_make_a_whole():
    order = Order([1000, 10], [0.5, 1.0], 0, True)
    first, second, third, _ = epochs_of(order, 4)
    halves = [[row for row in rows if row < 1000] for rows in (first, second, third)]
    assert sorted(halves[0] + halves[1]) == list(range(1000))
    assert 100 < len(set(halves[0]) & set(range(500))) < 400, "not the first half of the file"
    assert set(halves[2]) != set(halves[0]), "each pass is cut anew"
    places = [place for place, row in enumerate(first) if row >= 1000]
    assert len(places) == 10 and max(places) - min(places) > 100, "sources are shuffled together"


@quick
def test_any_cursor_is_found_directly():
    order = Order([10_000, 3, 70], [0.29, 1e-6, 3.0], 0, False)
    rng = random.Random(0)
    for cursor in [0, 1, *(rng.randrange(10**12) for _ in range(200)), 10**12, 10**18 + 1]:
        epoch = order.epoch(cursor)
        assert order.passed(epoch) <= cursor < order.passed(epoch + 1)
        assert 0 <= order.row(cursor) < 10_073
    # an epoch may be empty: 3 rows with weight 1e-6 come once in 333,334 epochs
    alone = Order([3], [1e-6], 0, True)
    assert alone.epoch(0) == 333_333 and alone.passed(333_333) == 0
    assert sorted(alone.row(cursor) for cursor in range(3)) == [0, 1, 2]


@quick
def test_the_order_depends_on_no_earlier_call():
    order, expected = Order([30, 7], [0.4, 2.0], 5, True), []
    for rows in epochs_of(order, 6):
        expected += rows
    cursors = list(range(len(expected)))
    random.Random(1).shuffle(cursors)
    assert all(order.row(cursor) == expected[cursor] for cursor in cursors)
    assert expected[:26] != epochs_of(Order([30, 7], [0.4, 2.0], 6, True), 1)[0], "another seed"


# ---- the mixed dataset and its loader

CODE, CHAT = [100, 20, 64, 5, 70, 31, 7, 12, 1, 48], [9, 40, 33, 50, 3]


@pytest.fixture
def data(tmp_path):
    return {
        "code": write_rows(tmp_path / "code.jsonl", CODE),
        "chat": write_rows(tmp_path / "chat.jsonl", CHAT, seed=1),
    }


def opened(path, cache):
    return open_dataset("jsonl", str(path), None, vocab_size=2048, seed=0, cache_dir=str(cache))


@pytest.fixture
def mixed(data, tmp_path):
    sources = {name: opened(path, tmp_path / "cache") for name, path in data.items()}
    return MixedDataset(sources, [0.5, 2.0])


def loader_of(dataset, replicas=1, replica=0, **changes):
    settings = PlanSettings(Cost(2.0, 0.0), replicas, chunk_size=32)
    options = {"global_batch_size": 3, "seq_len": 100, "overlong": "error", "shuffle": True, "seed": 4}
    return ChunkDataLoader(dataset, settings, replica=replica, **options | changes)


@quick
def test_the_rows_of_all_sources_one_after_the_other(mixed, data, tmp_path):
    assert len(mixed) == 15 and mixed.lengths == CODE + CHAT
    assert [mixed.source_of(row) for row in (0, 9, 10, 14)] == [0, 0, 1, 1]
    assert mixed.source(9) == f"{data['code']}:10" and mixed.source(10) == f"{data['chat']}:1"
    chat = opened(data["chat"], tmp_path / "cache")
    for got, expected in zip(mixed.row(11, 20)[:2], chat.row(1, 20)[:2]):
        assert got.equal(expected)
    assert mixed.supervised(11, 40) == chat.supervised(1, 40) and mixed.weight(11) == 1.0
    assert mixed.changed_file() == ""
    data["chat"].write_text(data["chat"].read_text() + "\n")
    assert mixed.changed_file() == str(data["chat"])


@quick
def test_a_loader_of_one_source_is_that_of_the_dataset(data, tmp_path):
    plain = opened(data["code"], tmp_path / "cache")
    alone = loader_of(MixedDataset({"code": plain}, [1.0]))
    assert alone.sources == ["code"]
    for step, expected in islice(zip(alone, loader_of(plain)), 9):
        assert (step.rows, step.cursor, step.epoch) == (expected.rows, expected.cursor, expected.epoch)
        assert step.source_of == [0, 0, 0] and expected.source_of == []


@quick
def test_all_replicas_follow_one_order_from_any_cursor(mixed):
    one, *two = [loader_of(mixed), loader_of(mixed, 2, 0), loader_of(mixed, 2, 1)]
    cursor, rows = 0, []
    for step in islice(one, 20):
        for loader in [*two, loader_of(mixed)]:
            other = loader.step_at(cursor)
            assert (other.rows, other.epoch, other.ledgers) == (step.rows, step.epoch, step.ledgers)
            assert other.source_of == step.source_of == [int(row >= 10) for row in step.rows]
        cursor = step.cursor
        rows += step.rows
    assert Counter(rows) == Counter([*range(10)] * 2 + [*range(10, 15)] * 8), "4 epochs of 15"


@quick
def test_ledgers_add_up(mixed):
    """Of a loader that drops what is over 48 tokens, taken apart by hand; and its state goes on."""
    loader, resumed = (loader_of(mixed, overlong="drop", seq_len=48) for _ in range(2))
    expected, cursor = [Ledger(), Ledger()], 0
    for step in islice(loader, 8):
        while cursor < step.cursor:
            row = loader.order.row(cursor)
            cursor += 1
            ledger, length = expected[row >= 10], mixed.lengths[row]
            ledger.read += length
            if length > 48:
                ledger.dropped += length
            else:
                targets, _ = mixed.supervised(row, length)
                ledger.trained += targets
                ledger.masked += length - targets
        assert loader.ledgers == expected
    assert loader.ledger_by_source == {"code": expected[0], "chat": expected[1]}
    total = loader.ledger
    assert total.read == expected[0].read + expected[1].read and expected[1].dropped > 0 < expected[0].masked
    assert total.read == total.trained + total.masked + total.truncated + total.dropped
    resumed.restore(json.loads(json.dumps(loader.state)))
    assert (resumed.cursor, resumed.ledgers) == (loader.cursor, loader.ledgers)
    assert next(iter(resumed)).rows == next(iter(loader)).rows


@quick
def test_checkpoints_from_before_sources_load(data, tmp_path):
    loader = loader_of(opened(data["code"], tmp_path / "cache"))
    ledger = {"read": 9, "trained": 4, "masked": 3, "truncated": 2, "dropped": 0}
    loader.restore({"cursor": 5, "ledger": ledger})
    assert loader.cursor == 5 and vars(loader.ledger) == ledger and loader.ledger_by_source == {}


@quick
def test_overlong_rows_are_counted_by_source(mixed):
    assert (
        loader_of(mixed, overlong="drop", seq_len=64).notice
        == 'dropped 2 sequences (170 tokens): 2 of "code"'
    )
    notice = 'truncated 5 sequences (132 tokens): 4 of "code", 1 of "chat"'
    assert loader_of(mixed, overlong="truncate", seq_len=40).notice == notice
    with pytest.raises(ValueError, match=r"code.jsonl:1: 100 tokens, but training.seq_len admits 64"):
        loader_of(mixed, seq_len=64)


@quick
def test_a_source_of_which_nothing_is_left_is_refused(data, tmp_path):
    sources = {"chat": opened(data["chat"], tmp_path / "cache")}
    sources["long"] = opened(write_rows(tmp_path / "long.jsonl", [80, 90]), tmp_path / "cache")
    with pytest.raises(ValueError, match='all 2 sequences of "long" are longer .* to at least 80'):
        loader_of(MixedDataset(sources, [1.0, 1.0]), overlong="drop", seq_len=64)


@quick
def test_weights_that_no_memory_holds_are_refused():
    synthetic = SyntheticDataset("lmsys", vocab_size=VOCABULARY, seed=0, count=100)
    with pytest.raises(ValueError, match=r"an epoch of 1e\+11 sequences.*: divide all weights"):
        MixedDataset({"a": synthetic}, [1e9])


@quick
def test_other_sources_are_other_data(mixed, tmp_path):
    code, chat = (opened(tmp_path / f"{name}.jsonl", tmp_path / "cache") for name in ("code", "chat"))

    def refusal(before, now):
        recorded = json.loads(json.dumps(loader_of(before).identity))
        check_data({"data": recorded}, loader_of(before).identity, tmp_path)
        with pytest.raises(ValueError) as error:
            check_data({"data": recorded}, loader_of(now).identity, tmp_path)
        return str(error.value)

    both = "training.sources was ['code', 'chat'] there and is"
    weights = MixedDataset({"code": code, "chat": chat}, [0.5, 1.0])
    assert "weight of chat was 2.0 there and is 1.0 here: restore it, or set" in refusal(mixed, weights)
    turned = MixedDataset({"chat": chat, "code": code}, [2.0, 0.5])
    assert f"{both} ['chat', 'code'] here" in refusal(mixed, turned)
    assert f"{both} ['code'] here" in refusal(mixed, MixedDataset({"code": code}, [0.5]))
    more = MixedDataset({"code": code, "chat": chat, "more": chat}, [0.5, 2.0, 1.0])
    assert f"{both} ['code', 'chat', 'more'] here" in refusal(mixed, more)
    assert f"{both} unset here" in refusal(mixed, code)
    assert "training.dataset was 'jsonl' there and is unset here" in refusal(code, mixed)
    exchanged = MixedDataset({"code": chat, "chat": chat}, [0.5, 2.0])
    assert "content (digest) of code was" in refusal(mixed, exchanged)


def test_sources_are_opened_with_their_columns(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    asked = []
    monkeypatch.setattr(build, "open_dataset", lambda *a, **b: asked.append(b) or open_dataset(*a, **b))
    (tmp_path / "code.jsonl").write_text('{"code": "abc"}\n{"code": "defgh"}\n')
    (tmp_path / "chat.jsonl").write_text('{"question": "a", "completion": "b"}\n')
    text = TWO.replace("data/", f"{tmp_path}/") + "[training.columns]\ntext = 'code'\n"
    config = config_of(tmp_path, text)
    with caplog.at_level("INFO"):
        dataset = build.open_data(config, build.model_spec(config), 0)
    assert [given["columns"] for given in asked] == [{"text": "code"}, {"prompt": "question"}]
    assert dataset.names == ["code.jsonl", "chat"] and dataset.source(2) == f"{tmp_path}/chat.jsonl:1"
    code, chat = sum(dataset.lengths[:2]) / 2, dataset.lengths[2]
    share = f"50.0 % of an epoch's sequences, {100 * chat / (code + chat):.1f} % of its tokens"
    assert f"Source chat: weight 1, {share}" in caplog.text
    (tmp_path / "chat.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"choose another training.sources\[1\].dataset or"):
        build.open_data(config, build.model_spec(config), 0)


# ---- runs


def mixture(tmp_path, weight=2.0):
    """The option of a config file whose sources drop a row; the other settings are KillLoop's."""
    path = tmp_path / f"run_{weight}.toml"
    path.write_text(
        "[training]\nseq_len = 80\noverlong = 'drop'\n[[training.sources]]\ndataset = 'jsonl'\nweight = 0.5\n"
        f"dataset_path = '{tmp_path}/code.jsonl'\n[[training.sources]]\ndataset = 'jsonl'\nweight = {weight}\n"
        f"dataset_path = '{tmp_path}/chat.jsonl'\nname = 'chat'\n"
    )
    return f"--job.config_file={path}"


@pytest.mark.proves("one process/always + resume")
def test_a_mixture_killed_and_stopped_is_bitwise_the_undisturbed_run(tmp_path, data):
    """On one process and on two ranks: losses, ledgers by source, the last checkpoint's tensors. Then other
    weights are refused."""
    loop = KillLoop(tmp_path, 9, data=[mixture(tmp_path)])
    for layout in ("one process", "two ranks"):
        loop.run(layout, kills=2)
    assert loop.kills == 4
    one, two = (outcome(tmp_path / f"{slug}_undisturbed", 9) for slug in ("one_process", "two_ranks"))

    stopped = tmp_path / "stopped"
    job = loop.start("two ranks", stopped, "disabled")
    wait_for_rows(stopped, 3, lambda: job.poll() is None)
    job.signal(signal.SIGTERM)
    assert set(job.wait(120)) == {75}
    assert loop.finish("two ranks", stopped) == two

    assert one[1] == two[1], "the same data on one process and on two ranks"
    assert [row["tokens"] for row in one[0]] == [row["tokens"] for row in two[0]]
    assert [row["loss"] for row in one[0]] == pytest.approx([row["loss"] for row in two[0]], rel=1e-3)
    total, by_source = one[1]
    assert {name: sum(ledger[name] for ledger in by_source.values()) for name in total} == total
    assert by_source["code.jsonl"]["dropped"] > 0 == by_source["chat"]["dropped"]
    said = (tmp_path / "one_process_undisturbed.log").read_text()
    assert (
        re.search("tokens of chat +read", said)
        and 'dropped 1 sequences (100 tokens): 1 of "code.jsonl"' in said
    )

    loop.steps, loop.data = 12, [mixture(tmp_path, weight=1.0)]
    assert loop.start("one process", tmp_path / "one_process", "disabled").wait(120) == [1]
    said = (tmp_path / "one_process.log").read_text()
    assert "weight of chat was 2.0 there and is 1.0 here: restore it, or set checkpoint.exclude" in said


def test_plan_and_preview_know_sources(tmp_path, data):
    options = [mixture(tmp_path), f"--job.dump_folder={tmp_path}", "--training.global_batch_size=3"]
    preview, plan = (
        run(tmp_path, *given, TRAIN_FILE=str(REPO / "recipes" / name)).stdout
        for name, given in (("preview.py", options), ("plan.py", [*options, "--json"]))
    )
    assert f"{tmp_path}/chat.jsonl:" in preview and " (chat): " in preview
    assert json.loads(plan.splitlines()[-1])["steps"] == 5, "an epoch of 15 sequences"
