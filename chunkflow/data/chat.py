"""Chats -> text, and which characters of it the assistant wrote: by the model's own template, or by a
built-in one.

The loss belongs to what the model is to generate: an assistant's content and the token that ends its turn.
Where a turn begins and ends is read off the template itself: what it renders for the messages before the turn
(with the prompt that asks for an answer) and for the messages up to the turn, which both have to be the
beginning of what it renders for all.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import NamedTuple

from jinja2 import nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chunkflow.execution.loss import IGNORE

ROLES = ("system", "user", "assistant", "tool")
NOTHING = r"\b\B"  # a pattern that no text matches
SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant", "tool": "tool"}

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
# Llama 3's model card: contents without surrounding white space, and what tools answer under the name
# "ipython".
LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set role = 'ipython' if message.role == 'tool' else message.role -%}
{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}
"""
# A system message opens the first user's turn. (Mistral's own later templates move it to the last one: what
# follows a turn would then change what stands before it.)
MISTRAL = """\
{{- bos_token -}}
{%- set waiting = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set waiting.system = waiting.system + message.content + '\n\n' -%}
{%- elif message.role == 'user' -%}
{{ '[INST] ' + waiting.system + message.content + '[/INST]' }}{%- set waiting.system = '' -%}
{%- elif message.role == 'tool' -%}{{ '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}
{%- else -%}{{ ' ' + message.content + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
# What a tokenizer without a template gets: the first whose tokens are all special tokens of it.
BUILT_IN = (
    (CHATML, ("<|im_start|>", "<|im_end|>")),
    (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    (MISTRAL, ("[INST]", "[/INST]")),
)


class Messages(NamedTuple):
    """A row's messages, checked."""

    form: str  # the key that they stand under, for errors
    messages: list[dict]  # as a template gets them
    trained: list[bool]  # whether there is loss on each
    tools: list[dict] | None


class Turn(NamedTuple):
    """One assistant message with loss, in characters of the rendered chat."""

    message: int
    start: int
    end: int  # behind the token that ends the turn
    # behind what the template puts there before the next message, such as a line break: no loss on it
    limit: int


class RenderedChat(NamedTuple):
    text: str
    turns: list[Turn]
    form: str

    @property
    def cuts(self) -> list[int]:
        """Where tokens have to end, for a tokenizer that can be told."""
        return [place for turn in self.turns for place in (turn.start, turn.end)]


# ---------------------------------------------------------------------------------------------------- reading


def read_messages(row: dict, form: str) -> Messages:
    """The chat of a row under "messages" ({"role", "content"}) or "conversations" ({"from", "value"}, as
    ShareGPT has them).

    A message may carry "weight": 0, no loss on it, or 1. ValueError, one sentence, for whatever is wrong.
    """
    given, (role_key, content_key) = (
        row[form],
        ("role", "content") if form == "messages" else ("from", "value"),
    )
    rule = f'it must be an object with "{role_key}" and "{content_key}"'
    if not isinstance(given, list):
        raise ValueError(
            f'"{form}" is {show(given)}: it must be a list of {{"{role_key}", "{content_key}"}} objects'
        )
    if not given:
        raise ValueError(f'"{form}" is an empty list: a sequence has at least one message, remove the row')
    messages, trained = [], []
    for place, message in enumerate(given):
        name = f"{form}[{place}]"
        if not isinstance(message, dict):
            raise ValueError(f"{name} is {show(message)}: {rule}")
        message = {key: value for key, value in message.items() if value is not None or key == content_key}
        if message.get(content_key) is None and message.get("tool_calls"):
            message.pop(content_key, None)  # an assistant that only calls tools
        elif not {role_key, content_key} <= message.keys():
            raise ValueError(f"{name} has the keys {show(list(message))}: {rule}")
        else:
            checked_text(message[content_key], f"{name}.{content_key}")
        role, roles = message.get(role_key), ROLES if form == "messages" else tuple(SHAREGPT_ROLES)
        if role not in roles:
            raise ValueError(f"{name} has the role {show(role)}: rename it to one of {', '.join(roles)}")
        if form == "conversations":
            renamed = {"from": "role", "value": "content"}
            message = {renamed.get(key, key): value for key, value in message.items()} | {
                "role": SHAREGPT_ROLES[role]
            }
        answer = message["role"] == "assistant"
        weight = message.pop("weight", int(answer))
        if type(weight) not in (int, float) or weight not in (0, 1):
            raise ValueError(f"{name}.weight is {show(weight)}: it must be 0 (no loss on this message) or 1")
        if weight and not answer:
            raise ValueError(
                f"{name}.weight is 1, and there is loss on the assistant's messages only: remove it"
            )
        messages.append(message)
        trained.append(weight == 1)
    tools = row.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(
            f"tools is {show(tools)}: it must be a list of objects, as the model's chat template reads them"
        )
    return Messages(form, messages, trained, tools)


def check_keys(chat: Messages, template: str, origin: str) -> None:
    """That nothing of a chat goes unread: every key of it is one that the template mentions.

    Which call a tool answers is no text, and known from the order.
    """
    for place, message in enumerate(chat.messages):
        others = {"role", "content", "tool_call_id"} | ({"name"} if message["role"] == "tool" else set())
        for key in sorted(message.keys() - others):
            if not re.search(rf"\b{re.escape(key)}\b", template):
                raise ValueError(f'{chat.form}[{place}] has "{key}", which {origin} does not read: remove it')
    if chat.tools and "tools" not in template:
        raise ValueError(f'the row has "tools", which {origin} does not read: remove them')


def plain_spans(chat: Messages) -> list[tuple[str, bool]]:
    """ChatML for a tokenizer that has no special tokens for chats: `<|im_start|>role`, a line break, the
    content, `<|im_end|>`, a line break, as (text, whether there is loss on it).

    Each span is to be tokenised by itself, so that no token has a part in two of them.
    """
    check_keys(chat, "", "the plain ChatML of a tokenizer without a chat template")
    spans = []
    for message, trained in zip(chat.messages, chat.trained):
        header, content = f"<|im_start|>{message['role']}\n", message["content"]
        spans += [(header, False), (content, trained), ("<|im_end|>", trained), ("\n", False)]
    return spans


# -------------------------------------------------------------------------------------------------- templates


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, by which some templates mark what the model writes, renders
    its content."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(
            line
        )


class ChatTemplate:
    """A Jinja template of the Hugging Face kind, which is code of a stranger: it runs in jinja2's immutable
    sandbox.

    `templates`: by name, "default" and perhaps "tool_use", which rows with tools get. `tokens`: what
    "bos_token" and the like stand for. `special`: the texts of all special tokens. ValueError where a
    template is not valid; `origin` names it there.
    """

    def __init__(self, templates: dict[str, str], tokens: dict[str, str], special: list[str], origin: str):
        self._sources, self._tokens, self._origin = templates, tokens, origin
        self._special = re.compile(
            "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or NOTHING
        )
        now = datetime.now()  # one moment for all: two renderings must not differ by the clock
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": now.strftime}
        try:
            self._compiled = {name: environment.from_string(source) for name, source in templates.items()}
        except TemplateSyntaxError as error:
            raise ValueError(
                f"{origin} is not valid Jinja (line {error.lineno}: {error.message}): repair it"
            ) from None

    def render(
        self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a chat, as transformers renders it; with `add_generation_prompt` up to where the
        assistant writes."""
        compiled = self._compiled[self._name(tools)]
        try:
            return compiled.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except Exception as error:  # whatever the stranger's code does
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{self._origin} cannot render the messages ({reason}): correct them, or the template"
            ) from None

    def _name(self, tools: list[dict] | None) -> str:
        return "tool_use" if tools and "tool_use" in self._sources else "default"

    def turns(self, chat: Messages) -> RenderedChat:
        """The text of a chat and the turns with loss in it.

        ValueError where the template does not render a turn in the whole chat as it does when the turn is the
        last, because it drops earlier reasoning, say: the loss would be on what the model is never to write.
        """
        messages, tools = chat.messages, chat.tools
        source = self._sources[self._name(tools)]
        check_keys(chat, source, self._origin)
        text = self.render(messages, tools)
        checked_text(text, "the rendered chat")
        turns = []
        for place, trained in enumerate(chat.trained):
            if not trained:
                continue
            try:
                before = self.render(messages[:place], tools, add_generation_prompt=True)
                after = text if place + 1 == len(messages) else self.render(messages[: place + 1], tools)
            except ValueError as error:
                raise ValueError(f"{chat.form}[{place}]: up to here {error}") from None
            remedy = (
                'give it "weight": 0 (no loss on it), or use a template (chat_template.jinja) that keeps it'
            )
            if not text.startswith(after):
                raise ValueError(
                    f"{chat.form}[{place}]: {self._origin} renders the messages up to here otherwise once"
                    f" more follow (it changes or drops earlier text): {remedy}, or make a row that ends with"
                    " it"
                )
            if not after.startswith(before):
                raise ValueError(
                    f"{chat.form}[{place}]: {self._origin} does not begin this turn with the prompt that it"
                    f" asks for an answer with ({show(_difference(before, after))} is missing): {remedy}"
                )
            content = messages[place].get("content", "").strip()
            if "add_generation_prompt" not in source and not after[len(before) :].lstrip().startswith(
                content
            ):
                raise ValueError(
                    f"{chat.form}[{place}]: {self._origin} does not say where the answer begins in"
                    f" {show(after[len(before) :])} (it knows no add_generation_prompt): {remedy}"
                )
            turns.append(
                Turn(place, len(before), self._end_of_turn(text, len(before), len(after)), len(after))
            )
        return RenderedChat(text, turns, chat.form)

    def _end_of_turn(self, text: str, start: int, limit: int) -> int:
        """Behind the last special token of text[start:limit], unless more than white space follows it."""
        end = limit
        for found in self._special.finditer(text, start, limit):
            end = found.end()
        return limit if text[end:limit].strip() else end


def built_in_template(tokens: dict[str, str], special: list[str]) -> ChatTemplate | None:
    """The one that the special tokens are made for; None if they are made for none."""
    tokens = {"bos_token": "", "eos_token": ""} | tokens
    for source, markers in BUILT_IN:
        if set(markers) <= set(special):
            return ChatTemplate({"default": source}, tokens, special, "the built-in chat template")
    return None


def _difference(before: str, after: str) -> str:
    """What `before` has behind the part that both begin with."""
    same = next(
        (place for place, (one, other) in enumerate(zip(before, after)) if one != other),
        min(len(before), len(after)),
    )
    return before[same:]


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as it is, where Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise ValueError(message)


# ----------------------------------------------------------------------------------------------------- labels


def labels_of(chat: RenderedChat, ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
    """The label of each token: itself within a turn, else -100. `offsets`: the characters that each token
    stands for.

    ValueError where a token lies partly in a turn.
    """
    labels, token = [IGNORE] * len(ids), 0
    for turn in chat.turns:
        while token < len(ids) and offsets[token][0] < turn.start:
            if offsets[token][1] > turn.start:
                raise ValueError(_inside(chat, turn, "begins", offsets[token]))
            token += 1
        while token < len(ids) and offsets[token][0] < turn.end:
            # It may reach beyond the end, up to the limit: some tokenizers take white space into the special
            # token before.
            if offsets[token][1] > turn.limit:
                raise ValueError(_inside(chat, turn, "ends", offsets[token]))
            labels[token] = ids[token]
            token += 1
    return labels


def _inside(chat: RenderedChat, turn: Turn, verb: str, span: tuple[int, int]) -> str:
    return (
        f"{chat.form}[{turn.message}]: its text {verb} inside the token {show(chat.text[slice(*span)])}, so"
        " that its loss"
        " cannot be told from that of its neighbour: remove white space around its content, or give it"
        ' "weight": 0'
    )


# ------------------------------------------------------------------------------------------------------ words


def show(value) -> str:
    """A value as JSON has it, cut to a length that fits into a sentence."""
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def checked_text(text, name: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{name} is {show(text)}: it must be a string, write it in quotes")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"{name} has {lone} at position {error.start}, which is half a character: repair it"
        ) from None
    return text
