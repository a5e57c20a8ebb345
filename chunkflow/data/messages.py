"""A row's chat -> checked messages, in the one form that chat templates read, whatever form the data has."""

import json
from typing import NamedTuple

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function": "tool",
}
PLAIN, PLAIN_ROLES = {"role", "content"}, ("system", "user", "assistant", "tool")
SYSTEM = ("system", "system_prompt")  # of a row, beside its messages
CALL_ROLES = ("function_call", "tool_call")  # the content is the call
ALIASES = {
    "from": "role",
    "value": "content",
    "reasoning": "reasoning_content",
    "thinking": "reasoning_content",
}

# What a message may have besides, without a meaning for its text: read by nothing, listed once.
_METADATA = """
    name id uuid message_id parent_id openai_id turn_identifier turn turn_id index idx timestamp created
    created_at date model model_name generator provider source dataset language country state header hashed_ip
    ip toxic redacted openai_moderation detoxify_moderation moderation score scores rating reward label
    finish_reason stop_reason usage token_count token_counter num_tokens tokens temperature top_p logprobs
    system_fingerprint agent message_type tool_call_ids cache_control metadata
"""
_WEIGHT_NAMES = "train training trainable loss loss_weight loss_mask mask masked train_on_turn"
_UNREAD = """
    tools functions function function_call function_calls arguments parameters documents images image videos
    video audio audios text type messages chosen rejected
"""
METADATA = frozenset(_METADATA.split())
WEIGHT_NAMES = frozenset(_WEIGHT_NAMES.split())  # in other systems
UNREAD = frozenset(_UNREAD.split())  # refused here, since templates mention these words for other things
NOT_READ_IN_MESSAGES = "not read in messages: "

FORMS_SENTENCE = (
    'a row is {"text"}, {"messages"}, {"conversations"}, {"prompt", "completion"}, {"instruction", "output"}'
    ' or {"input_ids"[, "labels" or "loss_mask"]} (docs/data.md has all forms)'
)
MESSAGES_RULE = 'a list of {"role", "content"} objects (or {"from", "value"})'
MESSAGE_RULE = 'it must be an object with "role" and "content", or "from" and "value"'


class Messages(NamedTuple):
    """The chat of a row, checked."""

    form: str  # what the row calls it, for errors
    messages: list[dict]  # as a template gets them
    weights: list[float]  # of the loss on each; 0: no loss
    tools: list[dict] | None


def read_messages(row: dict, form: str, notes: set[str] | None = None) -> Messages:
    """The checked chat of a row without nulls: its list of messages under `form`, after the row's system
    prompt, with its tools. ValueError, one sentence, if anything is wrong.

    A message is {"role", "content"} or {"from", "value"}, with perhaps "reasoning_content", "tool_calls",
    "tool_call_id", a tool's "name", and "weight", a number >= 0, of the loss on an assistant's message (0:
    none). Keys that are not read are added to `notes`.
    """
    return chat_of(row, form, *checked_messages(row[form], form, set() if notes is None else notes))


def chat_of(row: dict, form: str, messages: list[dict], weights: list[float]) -> Messages:
    """The messages after the row's system prompt, with its tools."""
    system = one_of(row, SYSTEM)
    if system:
        system = checked_text(system, "system")
        if not messages or messages[0]["role"] != "system":
            form = f"system + {form}"  # whose places errors count
            messages, weights = [{"role": "system", "content": system}, *messages], [0.0, *weights]
        elif messages[0].get("content") != system:
            raise ValueError(
                f"the row has the system prompt {show(system)} and {form}[0] another,"
                f" {show(messages[0].get('content'))}: a chat has one, remove one of the two"
            )
    return Messages(form, messages, weights, read_tools(row))


def checked_messages(value, form: str, notes: set[str]) -> tuple[list[dict], list[float]]:
    """The messages as a template gets them, and the weight of the loss on each."""
    given = value
    if isinstance(value, str):
        value = parsed(value, f'"{form}"', MESSAGES_RULE)
    if not isinstance(value, list):
        raise ValueError(f'"{form}" is {show(given)}: it must be {MESSAGES_RULE}')
    if not value:
        raise ValueError(f'"{form}" is an empty list: a sequence has at least one message, remove the row')
    messages, weights = [], []
    for index, message in enumerate(value):
        name = f"{form}[{index}]"
        message, weight = _read_message(message, name, notes)
        answer = message["role"] == "assistant"
        if weight and not answer:
            raise ValueError(
                f"{name}.weight is {weight:g}, and there is loss on the assistant's messages only: remove it"
            )
        messages.append(message)
        weights.append(float(answer) if weight is None else weight)
    return messages, weights


def _read_message(given, name: str, notes: set[str]) -> tuple[dict, float | None]:
    """A message as a template gets it, and its weight if it has one."""
    if not isinstance(given, dict):
        raise ValueError(f"{name} is {show(given)}: {MESSAGE_RULE}")
    if given.keys() == PLAIN and given["role"] in PLAIN_ROLES and isinstance(given["content"], str):
        checked_text(given["content"], f"{name}.content")
        return given, None  # as most are
    message = {}
    for key, value in given.items():
        if value is None:
            continue
        key = ALIASES.get(key, key)
        if key in message and message[key] != value:
            raise ValueError(f'{name} has two keys for "{key}", which differ: remove one of the two')
        message[key] = value if isinstance(value, str) else without_nulls(value)
    if "role" not in message:
        raise ValueError(f"{name} has the keys {show(list(given))}: {MESSAGE_RULE}")
    said = message["role"]
    if not isinstance(said, str) or said not in ROLES:
        raise ValueError(
            f"{name} has the role {show(said)}: rename it to one of system, user, assistant, tool (also read:"
            f" {', '.join(role for role in ROLES if ROLES[role] != role)})"
        )
    role = message["role"] = ROLES[said]
    if said in CALL_ROLES:
        if "tool_calls" in message:
            raise ValueError(f'{name} has the role "{said}" and "tool_calls": remove one of the two')
        message["tool_calls"] = _said_calls(message.pop("content", None), name, said)
    elif calls := message.pop("tool_calls", None):
        if role != "assistant":
            raise ValueError(f'{name} has "tool_calls" and the role "{said}": only an assistant calls tools')
        message["tool_calls"] = _calls(calls, f"{name}.tool_calls")
    theirs = "value" if "value" in given else "content"
    if message.get("content") in (None, []) and message.get("tool_calls"):
        message.pop("content", None)  # an assistant that only calls tools
    elif "content" in message:
        message["content"] = joined(message["content"], f"{name}.{theirs}", notes)
    elif theirs in given:
        raise ValueError(f"{name}.{theirs} is null: it must be a string, write it or remove the message")
    else:
        raise ValueError(f"{name} has the keys {show(list(given))}: {MESSAGE_RULE}")
    for key in message.keys() - {"role", "content", "tool_calls", "weight"}:
        _read_other(message, key, name, notes)
    weight = message.pop("weight", None)
    return message, None if weight is None else checked_weight(weight, f"{name}.weight", "this message")


def _read_other(message: dict, key: str, name: str, notes: set[str]) -> None:
    """Keeps a key that is read, takes out what is empty or metadata, refuses what has a meaning."""
    value = message[key]
    if key in WEIGHT_NAMES:
        raise ValueError(f'{name} has "{key}", which is not read: write "weight" in its place, 0 for no loss')
    role = message["role"]
    if value in ("", [], {}):
        del message[key]
    elif key == "reasoning_content" and role != "assistant":
        raise ValueError(f'{name} has "{key}" and the role "{role}": only an assistant reasons, remove it')
    elif key in ("reasoning_content", "tool_call_id") or (key == "name" and role == "tool"):
        checked_text(value, f"{name}.{key}")
    elif key in UNREAD:
        remedy = 'write "tool_calls" in its place' if key.startswith("function_call") else "remove it"
        raise ValueError(f'{name} has "{key}", which is not read in a message: {remedy}')
    elif key in METADATA or _repeats(message, key):
        del message[key]
        notes.add(f"{NOT_READ_IN_MESSAGES}{key}")


def _repeats(message: dict, key: str) -> bool:
    """Whether it is SWE-agent's copy of a part of the content, or of the call."""
    value, content = message[key], message.get("content", "")
    copied = key in ("thought", "action") and isinstance(value, str) and value.strip() in content
    return copied or (key == "action" and "tool_calls" in message)


def joined(content, name: str, notes: set[str]) -> str:
    """The text of a content: a string, or a list of text parts, with nothing between them."""
    if isinstance(content, str):
        return checked_text(content, name)
    if not isinstance(content, list):
        raise ValueError(f"{name} is {show(content)}: it must be a string, or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        text, others = part, set()
        if isinstance(part, dict) and part.get("type", "text") == "text":
            text, others = part.get("text"), part.keys() - {"type", "text"}
        if not isinstance(text, str) or others - {"cache_control"}:
            raise ValueError(
                f'{name}[{index}] is {show(part)}: only text is trained, {{"type": "text", "text"}}, remove'
                " it or the row"
            )
        if others:
            notes.add(f"{NOT_READ_IN_MESSAGES}cache_control")
        texts.append(text)
    return checked_text("".join(texts), name)


# ------------------------------------------------------------------------------------------ tools and calls


TOOLS_RULE = "it must be a list of objects, as the model's chat template reads them"


def read_tools(row: dict) -> list[dict] | None:
    """The row's tools: a list of objects, or that as a JSON string. An empty one is none."""
    tools = row.get("tools")
    if isinstance(tools, str):  # what is in it is text: nulls too are as they were written
        tools = parsed(tools, "tools", "a list of objects") if tools.strip() else None
    else:
        tools = without_nulls(tools)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"tools is {show(tools)}: {TOOLS_RULE}")
    tools = [parsed(tool, "a tool", "an object") if isinstance(tool, str) else tool for tool in tools]
    if wrong := [tool for tool in tools if not isinstance(tool, dict)]:
        raise ValueError(f"tools has {show(wrong[0])}: {TOOLS_RULE}")
    return tools


CALL_RULE = 'a call is {"name", "arguments"}, or that under "function", with a JSON object as arguments'


def _said_calls(content, name: str, role: str) -> list[dict]:
    """The calls of a message whose role says that its content is one, or a list of them."""
    if isinstance(content, str):
        content = parsed(
            content, f"{name}.content", f'the call of the role "{role}", {{"name", "arguments"}}'
        )
    calls = [content] if isinstance(content, dict) else content
    if not calls:
        raise ValueError(f'{name} has the role "{role}" and no call as its content: {CALL_RULE}')
    return _calls(calls, f"{name}.content")


def _calls(calls, name: str) -> list[dict]:
    """Calls of tools in the form that templates read."""
    if isinstance(calls, str):
        calls = parsed(calls, name, "a list of calls")
    if not isinstance(calls, list):
        raise ValueError(f"{name} is {show(calls)}: it must be a list of calls, {CALL_RULE}")
    return [_call(call, f"{name}[{index}]") for index, call in enumerate(calls)]


def _call(given, name: str) -> dict:
    if not isinstance(given, dict):
        raise ValueError(f"{name} is {show(given)}: {CALL_RULE}")
    call = given
    if "function" not in call:  # its name and arguments are not under a key of their own
        function = {key: value for key, value in call.items() if key in ("name", "arguments")}
        call = {"type": "function"} | {key: value for key, value in call.items() if key not in function}
        call["function"] = function
    function = call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{name} is {show(given)}: {CALL_RULE}")
    others = call.keys() - {"id", "type", "function", "index"} | function.keys() - {"name", "arguments"}
    if others:
        raise ValueError(f'{name} has "{min(others)}", which is not read: {CALL_RULE}, remove it')
    if call.get("type", "function") != "function":
        raise ValueError(f'{name} has the type {show(call["type"])}: only "function" is read, {CALL_RULE}')
    arguments = function.get("arguments", "")
    if isinstance(arguments, str):
        place = f"{name}.function.arguments"
        arguments = parsed(arguments, place, "an object") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{name} has the arguments {show(arguments)}: {CALL_RULE}")
    return call | {"function": function | {"arguments": arguments}}


# ------------------------------------------------------------------------------------------------- values


def without_nulls(value):
    """The value without the keys, at any depth, that are null: parquet has one for each that is missing."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def parsed(text: str, name: str, rule: str):
    """The value that a string holds as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise ValueError(
            f"{name} is {show(text)}: it must be {rule}, or that as a JSON string (not valid JSON: {reason}),"
            " correct it"
        ) from None


def one_of(row: dict, keys: tuple[str, ...]):
    """The value of the one of these keys of a row that is there and not empty; None without one."""
    found = [key for key in keys if row.get(key) not in (None, "", [])]
    if len(found) > 1 and row[found[0]] != row[found[1]]:
        raise ValueError(f'the row has both "{found[0]}" and "{found[1]}": remove one of the two')
    return row[found[0]] if found else None


def checked_weight(weight, name: str, what: str) -> float:
    """A weight of the loss, of `what`."""
    if type(weight) not in (int, float) or not 0 <= weight <= 1e300:  # true and false are no numbers here
        raise ValueError(
            f"{name} is {show(weight)}: it must be a finite number of at least 0 (0: no loss on {what}),"
            " write one or remove it"
        )
    return float(weight)


def show(value) -> str:
    """A value as JSON, cut to a length that fits into a sentence."""
    shown = json.dumps(value, ensure_ascii=False, default=repr)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def checked_text(text, name: str) -> str:
    """The text, unless it is not a string that can be encoded: ValueError, which calls it `name`."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is {show(text)}: it must be a string, write it as one")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"{name} has {lone} at position {error.start}, which is half a character: repair it"
        ) from None
    return text
