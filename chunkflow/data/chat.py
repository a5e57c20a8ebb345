"""Chats -> text, by the tokenizer's chat template or a built-in one, and which characters have a loss.

The loss is on what the model is to generate: an assistant message's content and the token that ends its turn.
The template is rendered for the messages before the turn, with the prompt that asks for an answer, and for
the messages up to the turn: the turn is the difference, if both are a beginning of the whole rendered chat.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterable
from datetime import datetime
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from jinja2 import nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chunkflow.data.messages import Messages, checked_text, show
from chunkflow.planning.chunks import IGNORE

# A tokenizer without a chat template gets the first of these that needs only special tokens it has. Llama 3's
# follows the model card: white space around a content is removed, a tool is called "ipython".
BUILT_IN = {
    "chatml.jinja": ("<|im_start|>", "<|im_end|>"),
    "llama3.jinja": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


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
            if not re.search(rf"\b{re.escape(key)}\b", template):
                raise ValueError(f'{chat.form}[{index}] has "{key}", which {origin} does not read: remove it')
    if chat.tools and "tools" not in template:
        raise ValueError(f'the row has "tools", which {origin} does not read: remove them')


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
    renders what is between them."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class ChatTemplate:
    """A Hugging Face chat template (Jinja): untrusted code, so it runs in jinja2's immutable sandbox.

    `sources`: the templates by name, "default" and perhaps "tool_use", for rows with tools. `tokens`: the
    text of "bos_token" and the like. `special`: the texts of all special tokens. `origin` names the template
    in errors. ValueError if a template is not valid.
    """

    def __init__(self, sources: dict[str, str], tokens: dict[str, str], special: Iterable[str], origin: str):
        self.sources, self._tokens, self._origin = sources, tokens, origin
        self._special = re.compile(any_of(special))
        now = datetime.now()  # once, since all renderings of a chat must show the same time
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": now.strftime}
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
        template = self._compiled[self._name(tools)]
        values = {"messages": messages, "tools": tools, "documents": None, **self._tokens}
        try:
            return template.render(values, add_generation_prompt=add_generation_prompt)
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
        that the model is never to write."""
        check_keys(chat, self.sources[self._name(chat.tools)], self._origin)
        text = checked_text(self.render(chat.messages, chat.tools), "the rendered chat")
        turns = [self._turn(chat, text, index) for index, weight in enumerate(chat.weights) if weight]
        return RenderedChat(text, turns, chat.form)

    def _turn(self, chat: Messages, text: str, index: int) -> Turn:
        messages, name = chat.messages, f"{chat.form}[{index}]"
        try:
            before = self.render(messages[:index], chat.tools, add_generation_prompt=True)
            after = text if index + 1 == len(messages) else self.render(messages[: index + 1], chat.tools)
        except ValueError as error:
            raise ValueError(f"{name}: up to here {error}") from None
        remedy = 'give it "weight": 0 (no loss on it), or use a template (chat_template.jinja) that keeps it'
        if not text.startswith(after):
            raise ValueError(
                f"{name}: {self._origin} renders the messages up to here otherwise once more follow (it"
                f" changes or drops earlier text): {remedy}, or make a row that ends with it"
            )
        if not after.startswith(before):
            missing = before[len(commonprefix([before, after])) :]
            raise ValueError(
                f"{name}: {self._origin} does not begin this turn with the prompt that it asks for an answer"
                f" with ({show(missing)} is missing): {remedy}"
            )
        answer, content = after[len(before) :], messages[index].get("content", "").strip()
        knows_prompt = "add_generation_prompt" in self.sources[self._name(chat.tools)]
        if not knows_prompt and not answer.lstrip().startswith(content):
            raise ValueError(
                f"{name}: {self._origin} does not say where the answer begins in {show(answer)} (it knows no"
                f" add_generation_prompt): {remedy}"
            )
        start, limit = len(before), len(after)
        # the turn ends with its last special token, unless more than white space follows it
        end = max((found.end() for found in self._special.finditer(text, start, limit)), default=limit)
        end = limit if text[end:limit].strip() else end
        return Turn(index, start, end, limit, chat.weights[index])


def built_in_template(tokens: dict[str, str], special: Iterable[str]) -> ChatTemplate | None:
    """The built-in template that the special tokens are made for; None if there is none."""
    for name, markers in BUILT_IN.items():
        if set(markers) <= set(special):
            source = (Path(__file__).with_name("templates") / name).read_text(encoding="utf-8")
            tokens = {"bos_token": "", "eos_token": ""} | tokens
            return ChatTemplate({"default": source}, tokens, special, "the built-in chat template")
    return None


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
        before, first = (
            last,
            bisect_left(offsets, (turn.start,), last),
        )  # in text order: no look at each token
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


def any_of(texts: Iterable[str]) -> str:
    """A regular expression for any of the texts, longer ones first; without texts it matches nothing."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"\b\B"
