"""What is wrong in a config, collected so that all of it is said at once."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """Settings are wrong. The message has a line for each fault, one sentence: value, rule, remedy."""


def add(faults: dict[str, str], sentence: str, key: str = "", follows: bool = False) -> None:
    """Enters a sentence into `faults`: sentence -> `key`, the setting at fault; "" if that is not known.

    `follows`, and without a key: a sentence that names a setting at fault already is left out. That setting
    has its default meanwhile, so the sentence may be about a value that nobody chose.
    """
    named = (
        re.search(rf"(?<![\w.]){re.escape(wrong)}(?!\w)", sentence) for wrong in faults.values() if wrong
    )
    if (key and not follows) or not any(named):
        faults.setdefault(sentence, key)


@contextmanager
def collected(faults: dict[str, str], key: str = "") -> Iterator[None]:
    """Adds the sentences of a ValueError inside to the faults."""
    try:
        yield
    except ValueError as error:
        for sentence in str(error).split("\n"):
            add(faults, sentence, key)


def refuse(faults: dict[str, str]) -> None:
    """ConfigError if there are faults."""
    if faults:
        raise ConfigError("\n".join(faults))
