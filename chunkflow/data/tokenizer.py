"""Text <-> token ids, by a tokenizer.json of Hugging Face or a sentencepiece model, with its chat template.

The shipped sentencepiece model, `python_2048.model`, has 2048 ids, 256 of them single bytes, so that it can
encode any text. Its training, on Python's standard library, takes seconds, is not random, and is repeated by

    import sentencepiece, tokenize
    from chunkflow.data.files import python_files

    with open("python_2048.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(tokenize.open(path).read() for path in python_files()), max_sentence_length=1
            << 24, model_writer=model, model_type="bpe", vocab_size=2048, character_coverage=0.9999,
            byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True, unk_id=0,
            bos_id=1, eos_id=2, pad_id=-1)
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from chunkflow.data.chat import ChatTemplate, RenderedChat, plain_spans
from chunkflow.data.digests import text_digest
from chunkflow.data.messages import Messages
from chunkflow.data.shipped_templates import SHIPPED, any_of, built_in, check_tokens, template_text

SHIPPED_MODEL = Path(__file__).with_name("python_2048.model")
SPACE_MARK = "\u2581"  # "▁", which sentencepiece writes for a space
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REMEDY = (
    "set model.tokenizer_path to a tokenizer.json, a sentencepiece model (tokenizer.model), or a folder"
    " with one of them"
)
EncodedChat = tuple[list[int], list[tuple[int, int]]]  # ids, and the characters [start, end) of each


class Tokenizer:
    """A tokenizer from a file, or a folder with tokenizer.json (preferred) or tokenizer.model; "": the one
    shipped. `chat_template`: as training.chat_template, a file or the name of a shipped one, in place of the
    folder's own. ValueError, one sentence with the file, if anything cannot be read.

    Also read from the file's folder: tokenizer_config.json (bos_token, eos_token, chat_template, special
    tokens), special_tokens_map.json, added_tokens.json, and chat_template.jinja, which wins over
    chat_template, as in transformers.

    `vocab_size`: one more than the largest id. `bos_id` and `eos_id`: None if it has none. `chat`: the
    chosen chat template, else the folder's, else the built-in one for its special tokens, else None: plain
    ChatML; `chosen_template`: the text of the chosen one, or "". `digest` changes with all that changes the
    tokens of a row.
    """

    def __init__(self, path: str = "", chat_template: str = ""):
        self._arguments = path, chat_template
        file = _tokenizer_file(Path(path).expanduser()) if path else SHIPPED_MODEL
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(f"{file}: the tokenizer cannot be read ({error.strerror}): {REMEDY}") from None
        config = file.with_name("tokenizer_config.json")
        settings = _read_json(file.with_name("special_tokens_map.json")) | _read_json(config)
        if file.suffix == ".json":
            self._codec = HuggingFaceCodec(file, content)
        else:
            self._codec = SentencePieceCodec(file, content, _added_tokens(file, settings))
        self.vocab_size: int = self._codec.vocab_size
        special = self._codec.special
        named = {name: _token_text(settings[name], name, config) for name in NAMED_TOKENS if name in settings}
        tokens = {name: text for name, text in (self._codec.tokens | named).items() if text is not None}
        self.bos_id: int | None = self._id(tokens, "bos_token", config)
        self.eos_id: int | None = self._id(tokens, "eos_token", config)
        self.chosen_template = template_text(chat_template)
        sources, origin = {"default": self.chosen_template}, f"the chat template {chat_template}"
        if not chat_template:
            sources, origin = _templates(file, settings)
        shipped = built_in(special) if not sources else chat_template if chat_template in SHIPPED else ""
        if shipped:
            check_tokens(shipped, special)
            sources, origin = {"default": template_text(shipped)}, f'the shipped chat template "{shipped}"'
            tokens = {"bos_token": "", "eos_token": ""} | tokens
        self.chat = ChatTemplate(sources, tokens, special, origin, bool(shipped)) if sources else None
        self._special_texts = {number: text for text, number in special.items()}
        templates = self.chat and self.chat.sources
        parts = [hashlib.blake2b(content).hexdigest(), special, tokens, templates]
        self.digest = text_digest(json.dumps(parts))

    def __reduce__(self):
        return Tokenizer, self._arguments  # a worker process reads the files itself

    def _id(self, tokens: dict[str, str], name: str, config: Path) -> int | None:
        text = tokens.get(name)
        number = None if text is None else self._codec.special.get(text, self._codec.id(text))
        if number is None and text is not None:
            raise ValueError(
                f'{config}: {name} is "{text}", which the tokenizer does not have: correct one of the two'
            )
        return number

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS and EOS. The text of a special token in it becomes that token with a
        tokenizer.json, as in transformers; with sentencepiece it is ordinary text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return self._codec.encode_batch(texts)

    def encode_chats(self, chats: list[RenderedChat]) -> list[EncodedChat]:
        """The ids of each rendered chat, special tokens included, and the characters of each id."""
        return self._codec.encode_chats(chats)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, without BOS and EOS."""
        return self._codec.decode([number for number in ids if number not in (self.bos_id, self.eos_id)])

    def question(self, content: str) -> tuple[list[int], list[int]]:
        """The ids of a user's message with the prompt for an answer, by the chat template; and the ids that
        end the answer, none if the template ends it without a special token."""
        question, answer = {"role": "user", "content": content}, {"role": "assistant", "content": "answer"}
        if self.chat is None:
            spans = plain_spans(Messages("messages", [question, answer], [0.0, 0.0], None))
            *prompt, _, end, _ = self.encode_batch([text for text, _ in spans])
            return sum(prompt, []), end
        asked = self.chat.render([question], add_generation_prompt=True)
        after_answer = self.chat.render([question, answer]).rpartition(answer["content"])[2]
        chats = [RenderedChat(text, [], "messages") for text in (asked, after_answer)]
        (prompt, _), (end, _) = self.encode_chats(chats)
        return prompt, [number for number in end if number in self._special_texts][:1]

    def stream(self, ids: Iterable[int], previous: list[int]) -> Iterator[str]:
        """The text of `ids`, which follow the ids `previous`, piece by piece as they come. A character of
        several ids comes with the last of them."""
        window, emitted = previous, len(self.decode(previous))
        for number in ids:
            window = [*window, number]
            text = self.decode(window)
            if text.endswith("\ufffd") and len(window) <= 8:
                continue
            yield text[emitted:]
            window, emitted = [number], len(self.decode([number]))
        yield self.decode(window)[emitted:]

    def pieces(self, ids: list[int]) -> Iterator[str]:
        """The text that each id adds, or a special token's name. A character of several ids comes with the
        last of them."""
        # decoded again from `start`, since a token may read otherwise after another; `done` ids are yielded
        start = done = 0
        for index, number in enumerate(ids):
            if number in self._special_texts:
                yield self._special_texts[number]
                start, done = index, index + 1
                continue
            before, text = self._codec.decode(ids[start:done]), self._codec.decode(ids[start : index + 1])
            if text.endswith("\ufffd") and index + 1 < len(ids) and index - done < 8:
                yield ""
                continue
            yield text[len(before) :]
            start, done = done, index + 1


class HuggingFaceCodec:
    """A tokenizer.json, read by the package tokenizers."""

    tokens: dict[str, str] = {}  # it does not say which token is BOS or EOS

    def __init__(self, file: Path, content: bytes):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                f"{file}: a tokenizer.json is read by the package tokenizers, which is not installed: pip"
                " install 'chunkflow[hf]', or set model.tokenizer_path to a sentencepiece model"
            ) from None
        try:
            self._model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises nothing narrower
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{file}: this file is not a tokenizer.json of Hugging Face ({reason}): {REMEDY}"
            ) from None
        # The file may have settings of its last use. The post-processor would add BOS and EOS, and cut white
        # space off the offsets.
        self._model.no_truncation()
        self._model.no_padding()
        self._model.post_processor = None
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.vocab_size:
            raise ValueError(f"{file}: this tokenizer has no tokens: {REMEDY}")
        added = sorted(self._model.get_added_tokens_decoder().items())
        self.special: dict[str, int] = {token.content: number for number, token in added if token.special}

    def id(self, text: str) -> int | None:
        return self._model.token_to_id(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_chats(self, chats: list[RenderedChat]) -> list[EncodedChat]:
        encodings = self._model.encode_batch([chat.text for chat in chats], add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)


class SentencePieceCodec:
    """A sentencepiece model, and tokens added to it: text -> id."""

    def __init__(self, file: Path, content: bytes, added: dict[str, int]):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise ValueError(
                f"{file}: a sentencepiece model is read by the package sentencepiece, which is not installed:"
                " pip install sentencepiece, or set model.tokenizer_path to a tokenizer.json"
            ) from None
        try:
            self._model = SentencePieceProcessor(model_proto=content, num_threads=_threads())
        except RuntimeError:
            content = b""
        if not content:  # sentencepiece reports no error for an empty file
            raise ValueError(f"{file}: this file is not a sentencepiece model: {REMEDY}")
        model, size = self._model, self._model.get_piece_size()
        control = {model.id_to_piece(number): number for number in range(size) if model.is_control(number)}
        self.special: dict[str, int] = control | added
        self.vocab_size = max([size - 1, *added.values()]) + 1
        self._special_texts = {number: text for text, number in self.special.items()}
        self._special = re.compile(f"({any_of(self.special)})")
        named = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
        self.tokens = {name: model.id_to_piece(number) for name, number in named.items() if number >= 0}
        # Sentencepiece reads a real "▁" as a space (its issue 863). A model with bytes can spell it in three
        # ids, unless it puts a space in front of every text, and so after the "▁" too.
        spelled = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        adds_space = model.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        self._space_mark_ids = spelled if model.decode(spelled) == SPACE_MARK and not adds_space else None
        self._continuing = _without_added_space(content) if adds_space else None

    def id(self, text: str) -> int | None:
        number = self._model.piece_to_id(text)
        return number if self._model.id_to_piece(number) == text else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        parts = [[text] if self._space_mark_ids is None else text.split(SPACE_MARK) for text in texts]
        encoded = iter(self._model.encode([part for of_text in parts for part in of_text]))
        batch = []
        for of_text in parts:
            ids = next(encoded)
            for _ in of_text[1:]:
                ids = ids + self._space_mark_ids + next(encoded)
            batch.append(ids)
        return batch

    def encode_chats(self, chats: list[RenderedChat]) -> list[EncodedChat]:
        return [self._encode_chat(chat) for chat in chats]

    def _encode_chat(self, chat: RenderedChat) -> EncodedChat:
        """Splits the text at special tokens and at both ends of turns, and encodes each part by itself."""
        ids, offsets, start = [], [], 0
        bounds = [0, *(cut for turn in chat.turns for cut in (turn.start, turn.end)), len(chat.text)]
        for first, last in zip(bounds, bounds[1:]):
            for part in self._special.split(chat.text[first:last]):
                if part in self.special:
                    new = [self.special[part]]
                elif start == 0 or self._continuing is None:
                    new = self.encode_batch([part])[0]
                else:
                    new = self._continuing.encode(part)
                ids += new
                offsets += [(start, start + len(part))] * len(new)
                start += len(part)
        return ids, offsets

    def decode(self, ids: list[int]) -> str:
        parts, model, run = [], self._model, []
        for number in ids:
            if number in self._special_texts:
                parts += [model.decode(run), self._special_texts[number]]
                model, run = self._continuing or model, []
            else:
                run.append(number)
        return "".join([*parts, model.decode(run)])


def _without_added_space(content: bytes):
    """The SentencePieceProcessor for text that follows other text: it puts no space in front."""
    # the second needs protobuf, which tensorboard brings
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    model.normalizer_spec.add_dummy_prefix = False
    return SentencePieceProcessor(model_proto=model.SerializeToString())


def _threads() -> int:
    """1 where the package tokenizers is told so, as worker processes are; -1: as many as there are cores."""
    return 1 if os.environ.get("TOKENIZERS_PARALLELISM") == "false" else -1


def tokenizer_files(folder: Path) -> list[Path]:
    """Those of a folder, the preferred one first."""
    return [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]


def _tokenizer_file(path: Path) -> Path:
    found = tokenizer_files(path)
    if path.is_dir() and not found:
        raise ValueError(
            f"{path}: there is neither a tokenizer.json nor a tokenizer.model in this folder: {REMEDY}"
        )
    return found[0] if found else path


def _read_json(file: Path) -> dict:
    """The object in a JSON file; empty if there is no such file."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ValueError(f"{file}: this file cannot be read ({reason}): repair it, or take it away") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: this file does not hold one JSON object: repair it, or take it away")
    return content


def _token_text(value, name: str, file: Path) -> str | None:
    """A token as a string, or as transformers writes it with its settings."""
    text = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(text, str):
        raise ValueError(f"{file}: {name} is {json.dumps(value)}: it must be a string or null, correct it")
    return text


def _added_tokens(file: Path, settings: dict) -> dict[str, int]:
    """Text -> id of the tokens that the file's folder adds to a sentencepiece model."""
    config, added = file.with_name("tokenizer_config.json"), _read_json(file.with_name("added_tokens.json"))
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        text = _token_text(token, f"added_tokens_decoder.{number}", config)
        added[text] = int(number) if number.isdecimal() else number
    for text, number in added.items():
        if type(number) is not int or number < 0 or not text:
            given = f"the added token {json.dumps(text)} has the id {json.dumps(number)}"
            raise ValueError(f"{config}: {given}: write a token id")
    return added


def _templates(file: Path, settings: dict) -> tuple[dict[str, str], str]:
    """The chat templates of a folder by name, if it has any, and what to call them in errors."""
    jinja, config = file.with_name("chat_template.jinja"), file.with_name("tokenizer_config.json")
    if jinja.exists():
        try:
            return {"default": jinja.read_bytes().decode()}, f"the chat template {jinja}"
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{jinja}: the chat template cannot be read ({error}): repair it, or take it away"
            ) from None
    given = settings.get("chat_template")
    if given is None or given == []:
        return {}, ""
    if isinstance(given, list) and all(isinstance(entry, dict) for entry in given):
        templates = {entry.get("name"): entry.get("template") for entry in given}
    else:
        templates = {"default": given}
    all_text = all(isinstance(text, str) for pair in templates.items() for text in pair)
    if not all_text or "default" not in templates:
        rule = 'it must be a string, or a list of {"name", "template"} with a "default"'
        raise ValueError(f"{config}: chat_template is {json.dumps(given)[:60]}: {rule}, correct it")
    return templates, f"the chat template of {config}"
