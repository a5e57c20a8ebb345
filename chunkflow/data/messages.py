"""A row's chat -> checked messages, in the form that chat templates read."""

import json
from typing import NamedTuple

ROLES = ("system", "user", "assistant", "tool")
CHAT_FORMS = {  # the keys of a message, and the names of ROLES in it
    "messages": ("role", "content", ROLES),
    "conversations": ("from", "value", ("system", "human", "gpt", "tool")),
}


FORMS_SENTENCE = (
    'a row is {"text"}, {"messages"}, {"conversations"}, {"prompt", "completion"} or'
    ' {"input_ids"[, "labels"]}'
)


class Messages(NamedTuple):
    """The chat of a row, checked."""

    form: str  # the row's key for it, for errors
    messages: list[dict]  # as a template gets them
    weights: list[float]  # of the loss on each; 0: no loss
    tools: list[dict] | None


def read_messages(row: dict, form: str) -> Messages:
    """The checked chat of a row: "messages" of {"role", "content"}, or "conversations" of {"from", "value"}
    (ShareGPT's form). A message may have "weight": 0, no loss on it, or 1. ValueError if anything is wrong.
    """
    role_key, content_key, roles = CHAT_FORMS[form]
    rule = f'it must be an object with "{role_key}" and "{content_key}"'
    if not isinstance(row[form], list):
        raise ValueError(
            f'"{form}" is {show(row[form])}: it must be a list of {{"{role_key}", "{content_key}"}} objects'
        )
    if not row[form]:
        raise ValueError(f'"{form}" is an empty list: a sequence has at least one message, remove the row')
    messages, weights = [], []
    for index, message in enumerate(row[form]):
        name = f"{form}[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f"{name} is {show(message)}: {rule}")
        message = {key: value for key, value in message.items() if value is not None or key == content_key}
        if message.get(content_key) is None and message.get("tool_calls"):
            message.pop(content_key, None)  # an assistant that only calls tools
        elif not {role_key, content_key} <= message.keys():
            raise ValueError(f"{name} has the keys {show(list(message))}: {rule}")
        else:
            checked_text(message[content_key], f"{name}.{content_key}")
        role = message.get(role_key)
        if role not in roles:
            raise ValueError(f"{name} has the role {show(role)}: rename it to one of {', '.join(roles)}")
        renamed = {role_key: "role", content_key: "content"}
        message = {renamed.get(key, key): value for key, value in message.items()}
        message["role"] = ROLES[roles.index(role)]
        answer = message["role"] == "assistant"
        weight = message.pop("weight", int(answer))
        if type(weight) not in (int, float) or weight not in (0, 1):
            raise ValueError(f"{name}.weight is {show(weight)}: it must be 0 (no loss on this message) or 1")
        if weight and not answer:
            raise ValueError(
                f"{name}.weight is 1, and there is loss on the assistant's messages only: remove it"
            )
        messages.append(message)
        weights.append(float(weight))
    tools = row.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(
            f"tools is {show(tools)}: it must be a list of objects, as the model's chat template reads them"
        )
    return Messages(form, messages, weights, tools)


def show(value) -> str:
    """A value as JSON, cut to a length that fits into a sentence."""
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def checked_text(text, name: str) -> str:
    """The text, unless it is not a string that can be encoded: ValueError, which calls it `name`."""
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
