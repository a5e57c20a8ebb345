"""The chat templates in templates/, by name, and what else training.chat_template may be.

All of them keep every turn as it is, whatever follows, and mark what the model writes. Those named after a
family write what the family's own template does, wherever that keeps the chat.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).with_name("templates")
# The special tokens that each needs.
_CHATML, _LLAMA = ("<|im_start|>", "<|im_end|>"), ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SHIPPED = {"chatml": _CHATML, "llama3": _LLAMA, "llama3.1": _LLAMA, "qwen2.5": _CHATML, "qwen3": _CHATML}
# A tokenizer without a chat template gets the first of these whose special tokens it has. Llama 3's follows
# the model card: white space around a content is removed, a tool is called "ipython".
BUILT_IN = ("chatml", "llama3")
# What tells that a template is the own one of the family that a shipped template is made for.
FAMILIES = {
    "qwen2.5": ("<|im_start|>", "created by Alibaba Cloud"),
    "qwen3": ("<|im_start|>", "</think>"),
    "llama3.1": ("<|start_header_id|>", "Cutting Knowledge Date"),
}
OTHER_CALLS = "<function="  # how later Qwen models write calls


def any_of(texts: Iterable[str]) -> str:
    """A regular expression for any of the texts, longer ones first; without texts it matches nothing."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"\b\B"


def check_tokens(name: str, special: Iterable[str]) -> None:
    """ValueError if a tokenizer, whose special tokens are given, lacks one that a shipped template writes."""
    if missing := set(SHIPPED[name]) - set(special):
        raise ValueError(
            f'training.chat_template = "{name}" needs the special token {min(missing)}, which the tokenizer'
            " does not have: choose the template of the model's family, or a file"
        )


def template_text(given: str) -> str:
    """The text of the shipped template, or file, that training.chat_template names; "" for "". ValueError if
    it is neither."""
    if not given:
        return ""
    try:
        file = FOLDER / f"{given}.jinja" if given in SHIPPED else Path(given).expanduser()
        return file.read_bytes().decode()
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(given, SHIPPED, n=1)
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(
            f'training.chat_template = "{given}" is no shipped template, and no file that can be read'
            f" ({reason}): name a file, or one of {', '.join(SHIPPED)}"
            + (f' (did you mean "{near[0]}"?)' if near else "")
        ) from None


def built_in(special: Iterable[str]) -> str:
    """The name of the template for a tokenizer without one; "" if it has no special tokens for chats."""
    return next((name for name in BUILT_IN if set(SHIPPED[name]) <= set(special)), "")


def fitting_template(source: str, special: Iterable[str]) -> str:
    """The name of the shipped template for the family that a template is of; "" if there is none."""
    for name, texts in FAMILIES.items():
        if all(text in source for text in texts) and OTHER_CALLS not in source:
            return name if set(SHIPPED[name]) <= set(special) else ""
    return ""
