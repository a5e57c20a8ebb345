"""Records, the objects of data files, -> rows: sequences before they are tokenised, parsed and checked."""

from typing import NamedTuple

from chunkflow.data.chat import RenderedChat, plain_spans
from chunkflow.data.messages import FORMS_SENTENCE, checked_text, read_messages, show
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.planning.chunks import IGNORE

# the keys of each form of a row; the first gives the form its name
FORMS = ["text"], ["messages"], ["conversations"], ["prompt", "completion"], ["input_ids", "labels"]
ID_RULES = {"input_ids": "a token id is at least 0", "labels": "a label is a token id, or -100 for no loss"}
Span = tuple[str | list[int], float]  # text or token ids, and the weight of the loss on them; 0: no loss


class RowSettings(NamedTuple):
    """What the rows of a record depend on, besides the record."""

    tokenizer: Tokenizer | None  # None: only rows of token ids can be read
    vocab_size: int  # the model's: ids must be below
    columns: dict[str, str] = {}  # our key -> the files' name of it
    multi_turn: str = "whole"  # or "expand": one sequence for each supervised turn


class Row(NamedTuple):
    """One sequence before it is tokenised."""

    spans: list[Span]  # the content in order; empty where there is a chat
    labels: list[int] | None = None  # given by the row itself
    weights: list[float] | None = None  # of the loss on each token id, given by the row itself
    chat: RenderedChat | None = None  # the content, if a chat template renders it
    weight: float = 1.0  # of the row: scales the loss on all of it


def read_rows(record: dict, settings: RowSettings, notes: set[str]) -> list[Row]:
    """The sequences of a record: one, or with multi_turn = "expand" one for each supervised turn of a chat.
    ValueError, one sentence, for a faulty record.

    Adds to `notes` what the user should hear once, a sentence each: such as which keys are not read.
    """
    return [_read_row(record, settings.tokenizer, settings.vocab_size)]


def _read_row(row: dict, tokenizer: Tokenizer | None, vocab_size: int) -> Row:
    found = [(form, keys) for form in FORMS if (keys := [key for key in form if key in row])]
    if not found:
        raise ValueError(
            f"the row has none of the known keys (it has {show(list(row))}): {FORMS_SENTENCE}, rename its"
            " keys"
        )
    (form, keys), *others = found
    if others:
        both = f'the row has both "{keys[0]}" and "{others[0][1][0]}"'
        raise ValueError(f"{both}: {FORMS_SENTENCE}, remove or rename one of the two")
    if missing := set(form) - set(keys) - {"labels"}:
        raise ValueError(
            f'the row has "{keys[0]}" without "{missing.pop()}": {FORMS_SENTENCE}, add what is missing'
        )
    name = form[0]
    if name == "input_ids":
        return _read_ids(row, vocab_size)
    if tokenizer is None:
        raise ValueError(
            f'the row has "{name}" and there is no tokenizer: set model.tokenizer_path, or give "input_ids"'
        )
    if name == "text":
        return Row(_text_spans(checked_text(row["text"], "text"), tokenizer))
    if name == "prompt":
        prompt, completion = (checked_text(row[key], key) for key in ("prompt", "completion"))
        return Row([(prompt, 0.0), *_text_spans(completion, tokenizer)[1:]])  # no BOS
    chat = read_messages(row, name)
    return Row([], chat=tokenizer.chat.turns(chat)) if tokenizer.chat else Row(plain_spans(chat))


def _text_spans(text: str, tokenizer: Tokenizer) -> list[Span]:
    bos, eos = ([] if special is None else [special] for special in (tokenizer.bos_id, tokenizer.eos_id))
    return [(bos, 1.0), (text, 1.0), (eos, 1.0)]


def _read_ids(row: dict, vocab_size: int) -> Row:
    ids = _checked_ids(row["input_ids"], "input_ids", vocab_size)
    if not ids:
        raise ValueError('"input_ids" is empty: a sequence has at least one token, remove the row')
    labels = _checked_ids(row["labels"], "labels", vocab_size) if "labels" in row else None
    if labels is not None and len(labels) != len(ids):
        counts = f'"labels" has {len(labels)} entries and "input_ids" {len(ids)}'
        raise ValueError(f"{counts}: give one label a token, -100 for no loss")
    return Row([(ids, 1.0)], labels)


def _checked_ids(ids, name: str, vocab_size: int) -> list[int]:
    """Token ids below `vocab_size`; "labels" may also have -100."""
    if not isinstance(ids, list):
        raise ValueError(f"{name} is {show(ids)}: it must be a list of integers, write token ids")
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) < vocab_size)):
        return ids  # much faster than looking at each
    for index, token in enumerate(ids):
        if type(token) is not int:  # true and false are no integers here
            raise ValueError(
                f"{name}[{index}] is {show(token)}: every entry must be an integer, write token ids"
            )
        if token >= vocab_size:
            raise ValueError(f"{name}[{index}]: {beyond_vocabulary(token, vocab_size)}")
        if token < 0 and (token != IGNORE or name != "labels"):
            raise ValueError(f"{name}[{index}] is {token}: {ID_RULES[name]}, correct it")
    return ids


def beyond_vocabulary(token: int, vocab_size: int) -> str:
    """The error sentence for a token id that the model does not have."""
    return (
        f"token id {token} is not in the model's vocabulary of {vocab_size} (0 to {vocab_size - 1}): choose"
        " the tokenizer (model.tokenizer_path) that belongs to the model, or a model with more ids"
    )
