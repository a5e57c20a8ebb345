"""Chats -> text, by the tokenizer's chat template, a file or a shipped one, and which characters have a loss.

The loss is on what the model is to generate: an assistant message's content and the token that ends its turn,
not an empty reasoning block that the template puts before it. Where that is, `{% generation %}` in the
template says. Without it the template is rendered for the messages before the turn, with the prompt that asks
for an answer, and for the messages up to the turn: the turn is the difference, if both are a beginning of the
whole rendered chat.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import lru_cache, partial
from os.path import commonprefix
from typing import NamedTuple

from jinja2 import nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chunkflow.data.chat_content import behind_empty_block, lost_text
from chunkflow.data.messages import Messages, checked_text, show
from chunkflow.data.shipped_templates import any_of, fitting_template
from chunkflow.planning.chunks import IGNORE

DICT_ATTRIBUTES = frozenset(dir(dict))
SPACE = re.compile(r"\s*")


class Turn(NamedTuple):
    """One assistant message with loss, in characters of the rendered chat."""

    message: int
    start: int
    end: int  # after the token that ends the turn
    limit: int  # after what else the template writes, such as a line break: no loss on it
    weight: float  # of the loss, greater than 0


class RenderedChat(NamedTuple):
    text: str
    turns: list[Turn]
    form: str


def check_keys(chat: Messages, template: str, origin: str) -> None:
    """ValueError if the chat has a key that the template's source does not mention, so that nothing is
    dropped silently. `origin` names the template."""
    for index, message in enumerate(chat.messages):
        # which call a tool answers follows from the order
        others = {"role", "content", "tool_call_id"} | ({"name"} if message["role"] == "tool" else set())
        for key in sorted(message.keys() - others):
            if not _mentions(template, key):
                raise ValueError(
                    f'{chat.form}[{index}] has "{key}", which {origin} does not read: remove it, or set'
                    " training.chat_template to one that does"
                )
    if chat.tools and "tools" not in template:
        raise ValueError(
            f'the row has "tools", which {origin} does not read: remove them, or set'
            " training.chat_template to one that does"
        )


@lru_cache(maxsize=1024)
def _mentions(template: str, key: str) -> bool:
    return re.search(rf"\b{re.escape(key)}\b", template) is not None


def one_turn_each(chat: Messages) -> list[Messages]:
    """The chat up to each of its turns with loss, with loss on that turn only; the chat itself if it has
    none."""
    ends = [index for index, weight in enumerate(chat.weights) if weight]
    return [
        chat._replace(messages=chat.messages[: end + 1], weights=[0.0] * end + [chat.weights[end]])
        for end in ends
    ] or [chat]


def plain_spans(chat: Messages) -> list[tuple[str, float]]:
    """ChatML for a tokenizer without special tokens for chats, as (text, weight of the loss on it):
    `<|im_start|>role`, a line break, the content, `<|im_end|>`, a line break. Each text is to be tokenised
    by itself, so that no token belongs to two of them."""
    check_keys(chat, "", "the plain ChatML of a tokenizer without a chat template")
    spans = []
    for message, weight in zip(chat.messages, chat.weights):
        header, content = f"<|im_start|>{message['role']}\n", message["content"]
        spans += [(header, 0.0), (content, weight), ("<|im_end|>", weight), ("\n", 0.0)]
    return spans


class Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`, which some templates put around what the model writes:
    `render` says where that is. As in transformers, it must not stand in a macro or a block that is set."""

    tags = {"generation"}

    def __init__(self, environment):
        super().__init__(environment)
        self._length, self._spans = 0, []

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(line)

    def _generated(self, caller) -> str:
        written = caller()
        self._spans.append((self._length, written))
        return written

    def render(self, template, values: dict) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the characters [start, end) of what is marked in it; no spans if a mark cannot be
        placed."""
        pieces, self._length, self._spans = [], 0, []
        for piece in template.generate(values):
            pieces.append(piece)
            self._length += len(piece)
        text = "".join(pieces)
        if not all(text.startswith(written, start) for start, written in self._spans):
            return text, []
        return text, [(start, start + len(written)) for start, written in self._spans]


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja2's, faster where templates spend their time: reading keys of messages."""

    def getattr(self, obj, attribute: str):
        if (
            type(obj) is dict and attribute not in DICT_ATTRIBUTES
        ):  # jinja2 would catch an AttributeError first
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


class ChatTemplate:
    """A Hugging Face chat template (Jinja): untrusted code, so it runs in jinja2's immutable sandbox.

    `sources`: the templates by name, "default" and perhaps "tool_use", for rows with tools. `tokens`: the
    text of "bos_token" and the like. `special`: the texts of all special tokens. `origin` names the template
    in errors. `keeps_turns`: it is known to render messages alike whatever follows. ValueError if a template
    is not valid.
    """

    def __init__(
        self,
        sources: dict[str, str],
        tokens: dict[str, str],
        special: Iterable[str],
        origin: str,
        keeps_turns: bool = False,
    ):
        self.sources, self._tokens, self._origin = sources, tokens, origin
        self._special, self._keeps_turns = re.compile(any_of(special)), keeps_turns
        self._closing = re.compile(rf"(?:{any_of(special)})\s*\Z")
        fitting = fitting_template(sources["default"], special)
        self._other = (
            f'a shipped one, "{fitting}"' if fitting and not keeps_turns else "a file, or a shipped one"
        )
        now = datetime.now()  # once, since all renderings of a chat must show the same time
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": now.strftime}
        self._generation: Generation = environment.extensions[Generation.identifier]
        try:
            self._compiled = {name: environment.from_string(source) for name, source in sources.items()}
        except TemplateSyntaxError as error:
            raise ValueError(
                f"{origin} is not valid Jinja (line {error.lineno}: {error.message}): repair it"
            ) from None

    def render(
        self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a chat, as transformers renders it. `add_generation_prompt`: append the prompt that
        asks for an answer."""
        return self._render(self._compiled[self._name(tools)].render, messages, tools, add_generation_prompt)

    def _render(self, way: Callable, messages: list[dict], tools: list[dict] | None, ask: bool = False):
        """What `way` makes of the template's variables. ValueError for what the template's code raises."""
        values = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": ask}
        try:
            return way(values | self._tokens)
        except Exception as error:  # whatever the template's code does
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{self._origin} cannot render the messages ({reason}): correct them, or the template"
            ) from None

    def _name(self, tools: list[dict] | None) -> str:
        return "tool_use" if tools and "tool_use" in self.sources else "default"

    def turns(self, chat: Messages) -> RenderedChat:
        """The text of a chat and the turns with loss in it. ValueError if the template renders a turn
        otherwise when more messages follow (some drop earlier reasoning), since the loss would be on a text
        that the model is never to write; and if it leaves something out."""
        name = self._name(chat.tools)
        check_keys(chat, self.sources[name], self._origin)
        marking = partial(self._generation.render, self._compiled[name])
        text, spans = self._render(marking, chat.messages, chat.tools)
        checked_text(text, "the rendered chat")
        answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        marked = dict(zip(answers, spans)) if len(spans) == len(answers) else {}
        turns = [
            self._turn(chat, text, index, marked.get(index))
            for index, weight in enumerate(chat.weights)
            if weight
        ]
        spans = {turn.message: (turn.start, turn.limit) for turn in turns}
        if lost := lost_text(chat, text, spans):
            index, what = lost
            raise ValueError(
                f"{chat.form}[{index}]: {self._origin} leaves out {what}: remove it, or set"
                f" training.chat_template to a template that keeps it ({self._other})"
            )
        starts = [behind_empty_block(chat.messages[index], text, *spans[index]) for index in spans]
        turns = [turn._replace(start=start) for turn, start in zip(turns, starts)]
        return RenderedChat(text, turns, chat.form)

    def _turn(self, chat: Messages, text: str, index: int, marked: tuple[int, int] | None) -> Turn:
        after = "" if marked and self._keeps_turns else self._text_after(chat, text, index)
        if marked:
            start, end = marked
            if not self._closing.search(text, start, end) and (closing := self._special.match(text, end)):
                end = closing.end()  # the token that ends a turn belongs to it, marked or not
            return Turn(index, start, end, SPACE.match(text, end).end(), chat.weights[index])
        start, limit = self._answer_start(chat, after, index), len(after)
        # the turn ends with its last special token, unless more than white space follows it
        end = max((found.end() for found in self._special.finditer(text, start, limit)), default=limit)
        end = limit if text[end:limit].strip() else end
        return Turn(index, start, end, limit, chat.weights[index])

    def _up_to(self, chat: Messages, index: int, end: int, add_generation_prompt: bool = False) -> str:
        try:
            return self.render(chat.messages[:end], chat.tools, add_generation_prompt)
        except ValueError as error:
            raise ValueError(f"{chat.form}[{index}]: up to here {error}") from None

    def _text_after(self, chat: Messages, text: str, index: int) -> str:
        """The text up to a turn, its own included: the beginning of the whole text."""
        end = index + 1
        after = text if end == len(chat.messages) else self._up_to(chat, index, end)
        if not text.startswith(after):
            raise ValueError(
                f"{chat.form}[{index}]: {self._origin} renders the chat up to here in another way once"
                " more messages follow (it changes or drops earlier text, such as reasoning): set"
                f" training.chat_template to a template that keeps every turn ({self._other}), or"
                ' training.multi_turn = "expand"'
            )
        return after

    def _answer_start(self, chat: Messages, after: str, index: int) -> int:
        """Where a turn begins in the text up to it: behind the prompt that asks for an answer."""
        before, name = self._up_to(chat, index, index, add_generation_prompt=True), f"{chat.form}[{index}]"
        remedy = f'give it "weight": 0 (no loss on it), or set training.chat_template ({self._other})'
        if not after.startswith(before):
            missing = before[len(commonprefix([before, after])) :]
            raise ValueError(
                f"{name}: {self._origin} does not begin this turn with the prompt that it asks for an answer"
                f" with ({show(missing)} is missing): {remedy}"
            )
        answer, content = after[len(before) :], chat.messages[index].get("content", "").strip()
        knows_prompt = "add_generation_prompt" in self.sources[self._name(chat.tools)]
        if not knows_prompt and not answer.lstrip().startswith(content):
            raise ValueError(
                f"{name}: {self._origin} does not say where the answer begins in {show(answer)} (it knows no"
                f" add_generation_prompt): {remedy}"
            )
        return len(before)


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """transformers' filter: unlike Jinja's, it does not escape characters for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def labels_of(
    chat: RenderedChat, ids: list[int], offsets: list[tuple[int, int]]
) -> tuple[list[int], list[float] | None]:
    """The label of each token, its id within a turn, else -100; and the weight of the loss on each, None if
    all are 1. `offsets`: the characters [start, end) of each token. ValueError if a token is partly in a
    turn."""
    labels, last = [IGNORE] * len(ids), 0
    weights = [1.0] * len(ids) if any(turn.weight != 1 for turn in chat.turns) else None
    for turn in chat.turns:
        before = last
        first = bisect_left(offsets, (turn.start,), last)  # in text order: no look at each token
        if first > before and offsets[first - 1][1] > turn.start:
            raise ValueError(_inside(chat, turn, "begins", offsets[first - 1]))
        last = bisect_left(offsets, (turn.end,), first)
        # up to the limit, since the special tokens of some tokenizers include the white space after them
        if last > first and offsets[last - 1][1] > turn.limit:
            raise ValueError(_inside(chat, turn, "ends", offsets[last - 1]))
        labels[first:last] = ids[first:last]
        if weights:
            weights[first:last] = [turn.weight] * (last - first)
    return labels, weights


def _inside(chat: RenderedChat, turn: Turn, verb: str, span: tuple[int, int]) -> str:
    return (
        f"{chat.form}[{turn.message}]: its text {verb} inside the token {show(chat.text[slice(*span)])}, so"
        " that its loss cannot be told from that of its neighbour: remove white space around its content, or"
        ' give it "weight": 0'
    )
