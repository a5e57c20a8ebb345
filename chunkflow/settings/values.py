"""One key and its value: which keys there are, what each admits, and the sentence for what it does not."""

import difflib
import math
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from chunkflow.settings.answers import ANSWERS, NOTHING_ASKED, VALUE_ANSWERS
from chunkflow.settings.faults import ConfigError
from chunkflow.settings.keys import KEYS, KINDS, SECTIONS, Key, show, split
from chunkflow.settings.options import Rule


def answer(name: str) -> str | None:
    """The answer to a key of torchtitan's or of a later version, else that to its section, else None."""
    while name and name not in ANSWERS:
        name = split(name)[0]
    return ANSWERS.get(name)


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a key that is not there has a value that needs nothing, so that it may stand in a config."""
    return any(type(value) is type(each) and value == each for each in NOTHING_ASKED.get(name, ()))


def known(name: str, dashes: str, where: str = "", is_table: bool = False) -> Key:
    """The key of that name; else ConfigError with the most helpful sentence. `where`: file and line.
    `is_table`: in the file it is a table."""
    if name in KEYS:
        return KEYS[name]
    if sentence := answer(name):
        raise ConfigError(f"{where}{dashes}{name} {sentence}")
    if name in SECTIONS:
        example = next(key for key in KEYS if key.startswith(name + "."))
        raise ConfigError(
            f"{where}{dashes}{name} is a section: set one of its keys, such as {dashes}{example}"
        )
    same = [key for key in KEYS if split(key)[1] == split(name)[1]]
    close = same[:1] or difflib.get_close_matches(name, SECTIONS if is_table else KEYS, n=1)
    remedy = f"did you mean {dashes}{close[0]}?" if close else "see --help for all keys"
    raise ConfigError(f"{where}unknown {'section' if is_table else 'key'} {dashes}{name}: {remedy}")


def checked(name: str, value: Any, where: str = "", key: Key | None = None) -> Any:
    """The value in the key's type; ConfigError if the key does not admit it. `key`: if not the name's."""
    key = key or KEYS[name]
    if value is None and key.optional:
        return None
    if value in key.words:
        return value
    value = _typed(name, value, key.type, where, key.words)
    admits = key.field.metadata["admits"]
    if isinstance(admits, Rule):
        if not admits.holds(value):
            raise ConfigError(f"{where}{name} = {show(value)} is out of range: choose a value {admits.words}")
    elif isinstance(admits, dict):
        for inner in value:
            if inner not in admits:
                raise ConfigError(f"{where}unknown key {name}.{inner}: {suggest(inner, admits)}")
        return {inner: _typed(f"{name}.{inner}", value[inner], admits[inner], where) for inner in value}
    elif admits:
        for item in value if key.type is list else [value]:
            if item not in admits:
                sentence = VALUE_ANSWERS.get(f"{name}={item}") or VALUE_ANSWERS.get(f"{name}=*")
                sentence = sentence or f"is not admitted: {suggest(item, admits)}"
                raise ConfigError(f"{where}{name} = {show(item)} {sentence}")
    return value


def _typed(name: str, value: Any, kind: type, where: str, words: tuple[str, ...] = ()) -> Any:
    """The value; ConfigError if it is of another type, which with `words` is not all that the key admits. A
    whole number becomes a float where one is due."""
    if kind is float and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    good = type(value) is kind and (kind is not float or math.isfinite(value))
    if not good or (kind is list and not all(type(item) is str for item in value)):
        raise _wrong_type(name, show(value), kind, where, words)
    return value


def _wrong_type(
    name: str, shown: str, kind: type, where: str = "", words: tuple[str, ...] = ()
) -> ConfigError:
    called, example = KINDS[kind]
    nor, others = ("neither ", " nor " + " nor ".join(map(show, words))) if words else ("not ", "")
    return ConfigError(f"{where}{name} = {shown} is {nor}{called}{others}: write it like {name} = {example}")


def suggest(word: str, choices: Any) -> str:
    close = difflib.get_close_matches(word, choices, n=1)
    meant = f" (did you mean {show(close[0])}?)" if close else ""
    return f"choose {'one of ' if len(choices) > 1 else ''}{', '.join(map(show, choices))}{meant}"


def from_text(name: str, text: str) -> Any:
    key = KEYS[name]
    if key.optional and text.lower() == "none":
        return None
    if key.type is str or text in key.words:
        return text
    if key.type is list:
        return [item.strip() for item in text.split(",")] if text else []
    try:
        if key.type in (int, float):
            return key.type(text)
        return tomllib.loads(f"value = {text.lower() if key.type is bool else text}")["value"]
    except ValueError:
        raise _wrong_type(name, text, key.type, "", key.words) from None


def toml_value(text: str) -> Any:
    """The value of a key that is not there, from the command line; text where it is no other TOML value."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text
