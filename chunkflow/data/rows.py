"""Records, the objects of data files, -> rows: sequences before they are tokenised, parsed and checked."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from chunkflow.data.chat import RenderedChat, one_turn_each, plain_spans
from chunkflow.data.messages import (
    FORMS_SENTENCE,
    NOT_READ_IN_MESSAGES,
    SYSTEM,
    Messages,
    chat_of,
    checked_messages,
    checked_text,
    checked_weight,
    one_of,
    read_messages,
    show,
)
from chunkflow.data.preference import has_answers, with_each_answer
from chunkflow.data.tokenizer import Tokenizer
from chunkflow.planning.chunks import IGNORE

CHATS = ("messages", "conversations", "conversation", "trajectory", "dialog")
# a question and its answer; all but the first are one turn of a chat
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),  # Alpaca
    ("instruction", "response"),  # Dolly
    ("question", "response"),  # OpenOrca
    ("question", "solution"),
    ("question", "generated_solution"),  # OpenMathInstruct
    ("question", "answer"),
    ("problem", "solution"),  # NuminaMath
    ("problem", "generated_solution"),
)
FORMS = (*((key,) for key in CHATS), *PAIRS, ("text",), ("content",), ("input_ids",))  # the first one is read
FORM_KEYS = {key for form in FORMS for key in form}
_FORM_SETS = [(form, frozenset(form)) for form in FORMS]
PARTNERS = {
    "prompt": "completion",
    "completion": "prompt",
    "instruction": "output",
    "output": "instruction",
    "question": "answer",
    "answer": "question",
    "problem": "solution",
    "solution": "problem",
    "labels": "input_ids",
    "loss_mask": "input_ids",
}
IDS_KEYS = {"input_ids", "labels", "loss_mask", "attention_mask", "position_ids"}
CONTEXT = ("input", "context")
REASONING = ("reasoning", "thinking", "reasoning_content")

# Keys that say what is to be trained, and how: an error wherever they are not read. All others are metadata.
_PREFERENCE = "judged answers are for preference training (recipes/dpo.py), remove it or the row"
_JUDGED = "true or false of one answer is for KTO, which is not there (recipes/dpo.py reads pairs), remove it"
_TEXT_ONLY = "only text is trained, remove it or the row"
_OTHER_WEIGHT = 'write "weight", or name it in training.columns'
_OTHER_MASK = 'write "loss_mask", or name it in training.columns'
_PACKED = "packed sequences are not read, give each one a row of its own"
MEANING = {
    "chosen": _PREFERENCE,
    "rejected": _PREFERENCE,
    "chat_template_kwargs": "templates get no arguments, remove it and choose one by training.chat_template",
    "chat_template": "set training.chat_template, and remove it",
    "functions": 'write "tools", or name it in training.columns',
    "tool_calls": "write the call as an assistant's message, or remove it",
    "history": 'write a chat ("messages"), or remove it',
    "documents": "write them into the messages, or remove it",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _TEXT_ONLY),
    **dict.fromkeys(("sample_weight", "loss_weight", "weights"), _OTHER_WEIGHT),
    **dict.fromkeys(("completion_mask", "assistant_masks", "assistant_mask"), _OTHER_MASK),
    **dict.fromkeys(("segment_ids", "seq_lengths", "cu_seqlens"), _PACKED),
    **dict.fromkeys(("labels", "loss_mask", "input_ids", "attention_mask", "position_ids"), ""),
    **dict.fromkeys(("completion", "tools", *SYSTEM), ""),
}
# in a row of a question and its answer these have a meaning too
MEANING_BESIDE = {1: frozenset(MEANING), 2: frozenset((*MEANING, *CONTEXT, *REASONING))}
# a container that an agent worked in, such as docker.io/user/name:tag, which data sets call "image", too
CONTAINER = re.compile(r"[\w.-]+(?=[/:])(?:/[\w.-]+)*(?:[:@][\w.:-]+)?")
PICTURE = re.compile(r"\.(?:png|jpe?g|gif|webp|bmp|tiff?|svg)\Z", re.IGNORECASE)
ID_RULES = {"input_ids": "a token id is at least 0", "labels": "a label is a token id, or -100 for no loss"}
NOT_READ = "not read: "
Span = tuple[str | list[int], float]  # text or token ids, and the weight of the loss on them; 0: no loss


class RowSettings(NamedTuple):
    """What the rows of a record depend on, besides the record."""

    tokenizer: Tokenizer | None  # None: only rows of token ids can be read
    vocab_size: int  # the model's: ids must be below
    columns: dict[str, str] = {}  # our key -> the files' name of it
    multi_turn: str = "whole"  # or "expand": one sequence for each supervised turn
    pairs: bool = False  # rows of a prompt and two answers: two sequences of each, the chosen one first


class Row(NamedTuple):
    """One sequence before it is tokenised."""

    spans: list[Span]  # the content in order; empty where there is a chat
    labels: list[int] | None = None  # given by the row itself
    weights: list[float] | None = None  # of the loss on each token id, given by the row itself
    chat: RenderedChat | None = None  # the content, if a chat template renders it
    weight: float = 1.0  # of the row: scales the loss on all of it


def read_rows(record: dict, settings: RowSettings, notes: set[str]) -> list[Row]:
    """The sequences of a record: one, or with multi_turn = "expand" one for each supervised turn of a chat;
    two of a pair. ValueError, one sentence, for a faulty record.

    Adds to `notes` what the user should hear once, a sentence each: such as a key that is not read.
    `summed_up` makes a few of them.
    """
    row = _renamed(record, settings.columns) if settings.columns else record
    row = {key: value for key, value in row.items() if value is not None}
    if settings.pairs:
        return _read_preference(row, settings, notes)
    form = _form(row, record, settings.columns)
    weight = checked_weight(row["weight"], "weight", "this row") if "weight" in row else 1.0
    name, tokenizer = form[0], settings.tokenizer
    if name == "input_ids":
        _check_others(row, form, IDS_KEYS, notes)
        return [_read_ids(row, settings.vocab_size)._replace(weight=weight)]
    if tokenizer is None:
        raise ValueError(
            f'the row has "{name}" and there is no tokenizer: set model.tokenizer_path, or give "input_ids"'
        )
    if name in CHATS:
        _check_others(row, form, {name, "tools", *SYSTEM}, notes)
        return _chat_rows(read_messages(row, name, notes), settings, weight)
    if len(form) == 2:
        return _read_pair(row, form, settings, weight, notes)
    _check_others(row, form, {name}, notes)
    return [Row(_text_spans(checked_text(row[name], name), tokenizer), weight=weight)]


def holds_pairs(record: dict, columns: dict[str, str]) -> bool:
    """Whether a record is a preference row."""
    return has_answers({key: record.get(columns.get(key, key)) for key in ("chosen", "rejected")})


def summed_up(notes: Iterable[str]) -> list[str]:
    """The sentences of `notes`, sorted, with all keys that are not read in one."""
    kinds = NOT_READ, NOT_READ_IN_MESSAGES
    sentences = {note for note in notes if not note.startswith(kinds)}
    for kind in kinds:
        keys = sorted(note.removeprefix(kind) for note in notes if note.startswith(kind))
        more = f" and {len(keys) - 50} more" if len(keys) > 50 else ""
        sentences |= {f"{kind}{', '.join(keys[:50])}{more}"} if keys else set()
    return sorted(sentences)


# ----------------------------------------------------------------------------------------------------- forms


def _renamed(record: dict, columns: dict[str, str]) -> dict:
    """The record with our names for its keys."""
    row = dict(record)
    values = {}
    for ours, theirs in columns.items():
        if theirs not in row:
            twice = theirs in record
            raise ValueError(
                f'training.columns names "{theirs}" for "{ours}"'
                + (", and for another key too" if twice else f", and the row has {show(list(record))}")
                + ": write the name of one of the row's keys"
            )
        values[ours] = row.pop(theirs)
    for ours in values:
        if row.get(ours) is not None:
            raise ValueError(
                f'the row has both "{ours}" and "{columns[ours]}", which training.columns names for it:'
                " remove one of the two"
            )
    return row | values


def _form(row: dict, record: dict, columns: dict[str, str]) -> tuple[str, ...]:
    """The form to read: the first of FORMS that the row has, one with a key of training.columns first."""
    keys = row.keys()
    found = [form for form, needed in _FORM_SETS if keys >= needed]
    if len(found) > 1 and ("input_ids",) in found:
        both = f'the row has both "{found[0][0]}" and "input_ids"'
        raise ValueError(f"{both}: {FORMS_SENTENCE}, remove or rename one of the two")
    if found:
        return next((form for form in found if columns.keys() & set(form)), found[0])
    _refuse_meaning(row, {"chosen", "rejected"}, "")
    null = [key for form in FORMS for key in form if key in record and key not in row]
    if null:
        kind = "list" if null[0] in (*CHATS, "input_ids") else "string"
        raise ValueError(f"{null[0]} is null: it must be a {kind}, write it")
    for key, partner in PARTNERS.items():
        if key in row:
            raise ValueError(
                f'the row has "{key}" without "{partner}": {FORMS_SENTENCE}, add what is missing or name it'
                " in training.columns"
            )
    raise ValueError(
        f"the row has none of the known keys (it has {show(list(record))}): {FORMS_SENTENCE}, rename its keys"
        " or name them in training.columns"
    )


def _check_others(row: dict, form: tuple[str, ...], read: set[str], notes: set[str]) -> None:
    """ValueError for a key with a meaning that is not read; others are noted."""
    others = row.keys() - read
    others.discard("weight")
    if not others:
        return
    meaning = others & MEANING_BESIDE[len(form)]
    if "prompt" in others:  # a whole form beside the one that is read
        meaning.discard("completion")
    if "image" in meaning and _names_a_container(row):
        meaning.discard("image")
    _refuse_meaning(row, meaning, f' beside "{form[0]}"')
    for key in others - meaning:
        beside = f'"{form[0]}" is read, and "{key}" beside it is not'
        notes.add(beside if key in FORM_KEYS else f"{NOT_READ}{key}")


def _names_a_container(row: dict) -> bool:
    """Whether "image" is the name of a container and not a picture, or a path of one."""
    image = row["image"]
    named = isinstance(image, str) and len(image) < 256 and CONTAINER.fullmatch(image)
    return bool(named) and not PICTURE.search(image) and "<image>" not in str(row)


def _refuse_meaning(row: dict, keys: set[str], beside: str) -> None:
    for key in sorted(keys):
        if row.get(key) not in (None, "", [], {}):
            remedy = MEANING.get(key) or "remove it, or name the keys to read in training.columns"
            raise ValueError(f'the row has "{key}"{beside}, which is not read: {remedy}')


# ----------------------------------------------------------------------------------------------------- chats


def _chat_rows(chat: Messages, settings: RowSettings, weight: float) -> list[Row]:
    chats = one_turn_each(chat) if settings.multi_turn == "expand" else [chat]
    if template := settings.tokenizer.chat:
        return [Row([], chat=template.turns(one), weight=weight) for one in chats]
    return [Row(plain_spans(one), weight=weight) for one in chats]


def _read_pair(
    row: dict, form: tuple[str, str], settings: RowSettings, weight: float, notes: set[str]
) -> list[Row]:
    """A question and its answer: of strings, or of lists of messages."""
    question, answer = form
    if isinstance(row.get("label"), bool):  # KTO's: whether the answer is a good one
        raise ValueError(f'the row has "label" beside "{question}": {_JUDGED}')
    lists = isinstance(row[question], list) or isinstance(row[answer], list)
    if lists:
        _check_others(row, form, {*form, "tools", *SYSTEM}, notes)
        return _chat_rows(_message_lists(row, form, notes), settings, weight)
    completion, eos = checked_text(row[answer], answer), _text_spans("", settings.tokenizer)[2]
    if answer == "completion":
        _check_others(row, form, {*form}, notes)
        prompt = checked_text(row[question], question)
        return [Row([(prompt, 0.0), (completion, 1.0), eos], weight=weight)]
    template = settings.tokenizer.chat
    _check_others(row, form, {*form, *CONTEXT, *SYSTEM} | ({"tools"} if template else set()), notes)
    parts = [row[question], one_of(row, CONTEXT) or ""]
    asked = "\n\n".join(checked_text(part, name) for part, name in zip(parts, (question, "input")) if part)
    if template:
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": completion}]
        return _chat_rows(chat_of(row, f"{question} + {answer}", messages, [0.0, 1.0]), settings, weight)
    system = checked_text(one_of(row, SYSTEM) or "", "system")
    prompt = f"{system}\n\n{asked}\n" if system else f"{asked}\n"
    return [Row([(prompt, 0.0), (completion, 1.0), eos], weight=weight)]


def _read_preference(row: dict, settings: RowSettings, notes: set[str]) -> list[Row]:
    """The chosen and the rejected answer after their prompt, with loss on the answer."""
    if settings.tokenizer is None:
        raise ValueError("preference pairs are text and there is no tokenizer: set model.tokenizer_path")
    made = []
    for form, one in with_each_answer(row, notes):
        rows = _read_pair(one, form, settings, 1.0, notes)
        if len(rows) > 1:
            raise ValueError(
                f'{form[1]} has {len(rows)} turns of the assistant, and training.multi_turn = "expand" would'
                ' make a sequence of each: set "whole"'
            )
        turns = [turn.weight for turn in rows[0].chat.turns] if rows[0].chat else []
        weights = {*turns, *(weight for _, weight in rows[0].spans)}
        if not weights <= {0, 1}:
            raise ValueError(
                f"{form[1]} has messages of weight {max(weights):g}, and a log-probability counts each token"
                " once: write 1, or 0 for no loss on one"
            )
        if 1 not in weights:
            raise ValueError(f"{form[1]} has no message of the assistant with loss: write one")
        made += rows
    return made


def _message_lists(row: dict, form: tuple[str, str], notes: set[str]) -> Messages:
    """Messages as the question and as the answer; either may be a string, the one message of its role. The
    loss is on the answer's."""
    asked, answered = (
        checked_messages(
            [{"role": role, "content": row[key]}] if isinstance(row[key], str) else row[key], key, notes
        )
        for key, role in zip(form, ("user", "assistant"))
    )
    for index, given in enumerate(row[form[0]]):
        if isinstance(given, dict) and given.get("weight"):
            raise ValueError(
                f"{form[0]}[{index}].weight is {show(given['weight'])}, and there is loss on the {form[1]}"
                " only: remove it"
            )
    return chat_of(row, " + ".join(form), asked[0] + answered[0], [0.0] * len(asked[0]) + answered[1])


def _text_spans(text: str, tokenizer: Tokenizer) -> list[Span]:
    bos, eos = ([] if special is None else [special] for special in (tokenizer.bos_id, tokenizer.eos_id))
    return [(bos, 1.0), (text, 1.0), (eos, 1.0)]


# ------------------------------------------------------------------------------------------------- token ids


def _read_ids(row: dict, vocab_size: int) -> Row:
    ids = _checked_ids(row["input_ids"], "input_ids", vocab_size)
    if not ids:
        raise ValueError('"input_ids" is empty: a sequence has at least one token, remove the row')
    for key in ("labels", "loss_mask", "attention_mask", "position_ids"):
        if key in row and isinstance(row[key], list) and len(row[key]) != len(ids):
            raise ValueError(
                f'"{key}" has {len(row[key])} entries and "input_ids" {len(ids)}: give one '
                + ("label a token, -100 for no loss" if key == "labels" else "entry a token")
            )
    if "attention_mask" in row and (mask := row["attention_mask"]) != [1] * len(ids):
        raise ValueError(
            f"attention_mask is {show(mask)}: padding is not read, it must be a list of 1, remove it and the"
            " padding"
        )
    if "position_ids" in row and (positions := row["position_ids"]) != list(range(len(ids))):
        raise ValueError(
            f"position_ids is {show(positions)}: positions are counted from 0, one sequence a row, remove it"
            " or give each sequence a row of its own"
        )
    labels = _checked_ids(row["labels"], "labels", vocab_size) if "labels" in row else None
    if "loss_mask" not in row:
        return Row([(ids, 1.0)], labels)
    if labels is not None:
        raise ValueError('the row has both "labels" and "loss_mask": each says where the loss is, remove one')
    return _masked(ids, row["loss_mask"])


def _masked(ids: list[int], mask) -> Row:
    """`mask`: the weight of the loss on each token; 0 or false: none."""
    if not isinstance(mask, list):
        raise ValueError(f"loss_mask is {show(mask)}: it must be a list of 0 and 1, or of weights, write one")
    for index, weight in enumerate(mask):
        if type(weight) is not bool and (type(weight) not in (int, float) or not 0 <= weight <= 1e300):
            raise ValueError(
                f"loss_mask[{index}] is {show(weight)}: it must be 0, 1 or another finite weight of at least"
                " 0, correct it"
            )
    labels = [token if weight else IGNORE for token, weight in zip(ids, mask)]
    weights = [float(weight) or 1.0 for weight in mask] if set(mask) - {0, 1} else None
    return Row([(ids, 1.0)], labels, weights)


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
