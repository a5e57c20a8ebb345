"""Preference rows: the two sequences of each pair, what is refused, and pairs in the steps of the loader."""

from __future__ import annotations

import json

import pytest

from chunkflow.data.dataloader import ChunkDataLoader
from chunkflow.data.dataset import open_dataset
from chunkflow.data.mixture import MixedDataset
from chunkflow.data.rows import RowSettings, read_rows
from chunkflow.data.synthetic import ANSWER, VALUES, SyntheticDataset
from chunkflow.data.tokenise import tokenised
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.planning.cost import Cost
from chunkflow.planning.planner import PlanSettings
from tests.test_rows import QA, assistant, folder, sequences, system, tokenizer, user  # noqa: F401

pytestmark = pytest.mark.quick

PROMPT = [system("Be brief."), user("1 + 2?"), assistant("What?"), user("Add.")]
GOOD, BAD = assistant("It is 3."), assistant("Seven, and that is all.")


def pair_of(row, reader, **settings):
    return sequences(row, reader, pairs=True, **settings)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": PROMPT, "chosen": GOOD["content"], "rejected": BAD["content"]},
        {"chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, BAD]},
        {"prompt": "1 + 2?", "chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, BAD], "score_chosen": 9.0},
        {"prompt": PROMPT, "chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, BAD]},
        {"system": "Be brief.", "chosen": [*PROMPT[1:], GOOD], "rejected": [*PROMPT[1:], BAD]},
        {"prompt": PROMPT, "chosen": [GOOD], "rejected": [BAD], "messages": [*PROMPT, GOOD], "id": 7},
    ],
)
def test_all_forms_are_the_prompt_with_each_answer(row, tokenizer):  # noqa: F811
    """Tokens and masks are those of a prompt and a completion."""
    made = pair_of(row, tokenizer)
    expected = [sequences({"prompt": PROMPT, "completion": [answer]}, tokenizer)[0] for answer in (GOOD, BAD)]
    assert made == expected
    for sequence, answer in zip(made, (GOOD, BAD)):
        learnt = [token for token in sequence.labels if token != -100]
        assert tokenizer.pieces(learnt) and "".join(tokenizer.pieces(learnt)).startswith(answer["content"])
        assert sequence.weights is None and sequence.weight == 1


def test_strings_are_a_question_and_an_answer(tokenizer):  # noqa: F811
    row = {"prompt": "1 + 2?", "chosen": "3", "rejected": "4"}
    expected = [sequences({"instruction": "1 + 2?", "output": text}, tokenizer)[0] for text in ("3", "4")]
    assert pair_of(row, tokenizer) == expected
    assert pair_of(row, tokenizer, multi_turn="expand") == expected
    renamed = {"ask": "1 + 2?", "good": "3", "bad": "4"}
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    assert pair_of(renamed, tokenizer, columns=columns) == expected
    plain = Tokenizer()  # has no chat template
    settings = RowSettings(plain, 2048, pairs=True)
    made = list(tokenised(read_rows(row, settings, set()), plain))
    assert "".join(plain.pieces(made[0].tokens)) == "1 + 2?\n3</s>"


def test_equal_answers_and_answers_of_several_turns(tokenizer):  # noqa: F811
    one, other = pair_of({"chosen": QA, "rejected": QA}, tokenizer)
    assert one == other and any(label != -100 for label in one.labels)
    longer = [*QA, user("Sure?"), assistant("Yes.")]
    chosen, rejected = pair_of({"chosen": longer, "rejected": QA}, tokenizer)
    assert rejected == one and chosen.tokens[: len(one.tokens) - 1] == one.tokens[:-1]


REFUSED = [
    ({"prompt": "a", "completion": "b"}, 'the row has no "chosen"'),
    ({"prompt": "a", "completion": "b", "label": True}, 'the row has no "chosen"'),
    ({"prompt": "a", "chosen": "b"}, 'the row has no "rejected"'),
    ({"prompt": "a", "chosen": "b", "rejected": None}, 'the row has no "rejected"'),
    ({"chosen": "b", "rejected": "c"}, 'the row has no "prompt"'),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "weight": 2}, "each preference pair counts the same"),
    ({"chosen": QA, "rejected": [user("Other?"), BAD]}, "no message in common"),
    ({"prompt": "Other?", "chosen": QA, "rejected": QA}, 'prompt is "Other?", and no message of'),
    ({"prompt": "a", "chosen": QA, "rejected": "c"}, 'chosen is a whole chat and rejected is "c"'),
    ({"prompt": "a", "chosen": 3, "rejected": "c"}, "chosen is 3"),
    ({"prompt": PROMPT, "chosen": [GOOD | {"weight": 0.5}], "rejected": [BAD]}, "weight 0.5"),
    ({"prompt": PROMPT, "chosen": [GOOD | {"weight": 0}], "rejected": [BAD]}, "no message of the assistant"),
    ({"prompt": PROMPT, "chosen": [user("?")], "rejected": [BAD]}, "chosen has no message of the assistant"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x.png"]}, 'has "images"'),
]


@pytest.mark.parametrize("row, said", REFUSED)
def test_what_is_refused_is_one_sentence(row, said, tokenizer):  # noqa: F811
    with pytest.raises(ValueError) as refused:
        pair_of(row, tokenizer)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_expanded_answers_of_several_turns_are_refused(tokenizer):  # noqa: F811
    longer = [*QA, user("Sure?"), assistant("Yes.")]
    with pytest.raises(ValueError, match="chosen has 2 turns"):
        pair_of({"chosen": longer, "rejected": QA}, tokenizer, multi_turn="expand")
    with pytest.raises(ValueError, match="preference pairs are text"):
        pair_of({"prompt": "a", "chosen": "b", "rejected": "c"}, None)


# ----------------------------------------------------------------------------------------- pairs in the loader


def write(path, lengths):
    """A pair for each two numbers of words."""
    rows = [
        {"prompt": "x", "chosen": " ".join(["y"] * chosen), "rejected": " ".join(["z"] * rejected)}
        for chosen, rejected in lengths
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(path, cache, **more):
    return open_dataset("jsonl", path, Tokenizer(), vocab_size=2048, seed=0, cache_dir=str(cache), **more)


def loader_of(dataset, **changes):
    settings = PlanSettings(Cost(1.0, 0.0), chunk_size=16)
    options = {"replica": 0, "global_batch_size": 2, "seq_len": 40, "overlong": "error", "shuffle": True}
    return ChunkDataLoader(dataset, settings, seed=0, **options | changes)


LENGTHS = [(3, 5), (30, 2), (4, 50), (7, 7), (2, 60), (9, 1)]


def test_both_answers_are_in_the_same_step(tmp_path):
    dataset = opened(write(tmp_path / "a.jsonl", LENGTHS), tmp_path / "cache", pairs=True)
    assert dataset.pairs and len(dataset) == 12
    loader = loader_of(dataset, seq_len=100)
    seen, cursor = [], 0
    for _ in range(3):
        data = loader.step_at(cursor)
        assert len(data.rows) == 4 and data.cursor == cursor + 2
        assert all(
            chosen % 2 == 0 and rejected == chosen + 1 for chosen, rejected in zip(*[iter(data.rows)] * 2)
        )
        seen += data.rows
        cursor = data.cursor
    assert sorted(seen) == list(range(12)) and loader.step_at(cursor).epoch == 1


def test_overlong_counts_pairs(tmp_path):
    dataset = opened(write(tmp_path / "a.jsonl", LENGTHS), tmp_path / "cache", pairs=True)
    lengths = list(zip(dataset.lengths[::2], dataset.lengths[1::2]))
    long = [pair for pair in lengths if max(pair) > 40]
    assert len(long) == 2
    with pytest.raises(ValueError, match=r"a.jsonl:3: .*longer: 2 of 6 pairs"):
        loader_of(dataset)
    dropping = loader_of(dataset, overlong="drop", once=True, shuffle=False)
    assert dropping.notice == f"dropped 2 pairs ({sum(map(sum, long))} tokens)" and dropping.longest <= 40
    steps = list(dropping)
    assert [row for step in steps for row in step.rows] == [0, 1, 2, 3, 6, 7, 10, 11]
    assert dropping.ledger.dropped == sum(map(sum, long)) and dropping.cursor == 6
    cutting = loader_of(dataset, overlong="truncate", once=True)
    cut = sum(max(0, length - 40) for length in dataset.lengths)
    assert cutting.notice == f"truncated 2 pairs ({cut} tokens)" and cutting.longest == 40
    with pytest.raises(ValueError, match="all 6 pairs are longer"):
        loader_of(dataset, overlong="drop", seq_len=3)


def test_the_first_row_tells_what_the_data_are(tmp_path):
    pairs = write(tmp_path / "a.jsonl", LENGTHS)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    assert opened(pairs, tmp_path / "cache", pairs=None).pairs
    assert not opened(str(tmp_path / "b.jsonl"), tmp_path / "cache", pairs=None).pairs
    with pytest.raises(ValueError, match="a.jsonl:1: .*recipes/dpo.py"):
        opened(pairs, tmp_path / "cache")


def test_sources_of_pairs_mix(tmp_path):
    sources = {
        name: opened(write(tmp_path / f"{name}.jsonl", lengths), tmp_path / "cache", pairs=True)
        for name, lengths in (("one", LENGTHS), ("two", LENGTHS[:3]))
    }
    loader = loader_of(MixedDataset(sources, [1.0, 2.0]), seq_len=100, global_batch_size=4)
    counts, cursor = [0] * 9, 0
    for _ in range(3):
        data = loader.step_at(cursor)
        cursor = data.cursor
        for chosen, rejected in zip(data.rows[::2], data.rows[1::2]):
            assert rejected == chosen + 1
            counts[chosen // 2] += 1
        assert data.source_of == [int(row >= 12) for row in data.rows]
    assert counts == [1] * 6 + [2] * 3


def test_synthetic_pairs_differ_in_their_last_answers_alone():
    data = SyntheticDataset("preference", vocab_size=2048, seed=0, count=50)
    assert data.pairs and len(data) == 100
    for chosen in range(0, 100, 2):
        length = data.lengths[chosen]
        tokens, labels, _ = data.row(chosen, length)
        others, wrong, _ = data.row(chosen + 1, length)
        assert tokens.equal(others) and labels.eq(-100).equal(wrong.eq(-100))
        answered = labels != -100
        assert ((wrong - labels)[answered] % VALUES == 1).all() and wrong.max() < ANSWER + VALUES
        assert data.supervised(chosen, length) == (int(answered[1:].sum()), float(answered[1:].sum()))
