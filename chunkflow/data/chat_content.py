"""What of a chat's messages is in the rendered text: what a template left out, and an empty reasoning block
that it put in."""

import json
import re
from bisect import bisect_left

from chunkflow.data.messages import Messages, show

EMPTY_BLOCK = re.compile(r"<(\w+)>\s*</\1>(\s*)")
BEHIND_HEADER = re.compile(r"(?:\s*<\|\w+\|>\w*)*\s*" + EMPTY_BLOCK.pattern)  # <|im_start|>assistant
OPENING = re.compile(r"<\w+>\s*\Z")
LONGEST_OPENING = 40  # characters


def lost_text(chat: Messages, text: str, spans: dict[int, tuple[int, int]]) -> tuple[int, str] | None:
    """A message and, in words, what of it is not in the rendered text; None if all is there. `spans`: the
    characters [start, end) of the turns with loss.

    Messages are looked for in their order. Only what is no assistant's may stand elsewhere, since some
    templates move the system's. Reasoning of turns without loss may be missing: templates drop it.
    """
    place, starts = 0, [*sorted(start for start, _ in spans.values()), len(text)]
    for index, message in enumerate(chat.messages):
        answer, learnt = message["role"] == "assistant", index in spans
        start, end = spans.get(index, (place, starts[bisect_left(starts, place)] if answer else len(text)))
        for key, part in _parts(message, learnt):
            found = _find(text, part, start, end)
            if found < 0 and (answer or _find(text, part, 0, len(text)) < 0):
                beside = " beside its tool_calls" if key == "content" and message.get("tool_calls") else ""
                return index, f"its {key}{beside} ({show(part)})"
            if found >= 0 and message["role"] != "system":
                place = max(place, found + len(part))
        place = end if learnt else place
    return None


def behind_empty_block(message: dict, text: str, start: int, end: int) -> int:
    """Where the loss on a turn, text[start:end], begins: behind an empty reasoning block that the template
    puts in front and the message does not have; else `start`. It may begin in the prompt for the answer."""
    opening = OPENING.search(text, max(0, start - LONGEST_OPENING), start)
    block = BEHIND_HEADER.match(text, opening.start() if opening else start, end)
    content = message.get("content") or ""
    own = EMPTY_BLOCK.match(content.lstrip())
    if not block or (own and own[1] == block[1]):
        return start
    if any(_find(text, part, block.start(2), end) < 0 for _, part in _parts(message, True)):
        return start  # it is part of the message, which may have such tags itself
    if content := content.lstrip("\n"):  # its own white space is not the block's
        found = text.find(content, block.start(2), block.end() + len(content))
        return found if found >= 0 else block.end()
    return block.end()


def _parts(message: dict, whole: bool) -> list[tuple[str, str]]:
    """The texts of a message that must not be lost, with the key each is of. `whole`: reasoning too, which
    templates drop from earlier turns of the assistant."""
    content = message.get("content") or ""
    if message["role"] == "assistant":
        contents = re.split("</?think>", content) if whole else [content.rpartition("</think>")[2]]
    else:
        contents = [content]
    parts = [("content", part) for part in contents]
    if whole:
        parts = [("reasoning_content", message.get("reasoning_content") or ""), *parts]
        for call in message.get("tool_calls") or []:
            function = call.get("function", call) if isinstance(call, dict) else {}
            parts.append(("tool_calls", str(function.get("name", "")) if isinstance(function, dict) else ""))
    return [(key, part.strip()) for key, part in parts if isinstance(part, str) and part.strip()]


def _find(text: str, part: str, start: int, end: int) -> int:
    """The first place of a part, as it is or as JSON, in text[start:end]; -1 if it is not there."""
    places = [text.find(form, start, end) for form in {part, json.dumps(part, ensure_ascii=False)[1:-1]}]
    return min((place for place in places if place >= 0), default=-1)
