"""Text <-> token ids, by a sentencepiece model.

The shipped model, `python_2048.model`, has 2048 ids (256 of them single bytes, so that nothing is ever unknown) and was
trained on the sources of Python's own library. Training takes seconds, draws nothing at random, and is repeated by

    import sentencepiece, tokenize
    from chunkflow.data.dataset import python_files

    with open("python_2048.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(tokenize.open(path).read() for path in python_files()), max_sentence_length=1 << 24,
            model_writer=model, model_type="bpe", vocab_size=2048, character_coverage=0.9999, byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, split_digits=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sentencepiece import SentencePieceProcessor

SHIPPED_MODEL = Path(__file__).with_name("python_2048.model")
SPACE_MARK = "\u2581"  # "▁", which sentencepiece writes for a space


class Tokenizer:
    """A sentencepiece model. `bos_id` and `eos_id` are None where the model has none; `digest` changes with its content.

    Raises ValueError where `path` (of the model file; "": the shipped model) is not a sentencepiece model.
    """

    def __init__(self, path: str = ""):
        path = Path(path).expanduser() if path else SHIPPED_MODEL
        remedy = "set model.tokenizer_path to a sentencepiece model (tokenizer.model), which is what is read"
        if path.suffix == ".json":
            raise ValueError(f"{path}: tokenizer.json files are not read: {remedy}")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: the tokenizer cannot be read ({error.strerror}): {remedy}") from None
        try:
            self._model = SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            content = b""
        if not content:  # an empty file is taken for no file by sentencepiece
            raise ValueError(f"{path}: this file is not a sentencepiece model: {remedy}")
        self.digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        self.vocab_size: int = self._model.get_piece_size()
        self.bos_id: int | None = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.eos_id: int | None = self._model.eos_id() if self._model.eos_id() >= 0 else None
        # Sentencepiece takes a real "▁" for a space and gives back a space (its issue 863). A model that has bytes can spell
        # the real one, in three ids. Not so a model that puts a space in front of every text: it would add one behind too.
        spelled = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        has_bytes = self._model.decode(spelled) == SPACE_MARK
        adds_space = self._model.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        self._space_mark_ids = spelled if has_bytes and not adds_space else None

    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone: no BOS, no EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, computed on all cores."""
        parts = [[text] if self._space_mark_ids is None else text.split(SPACE_MARK) for text in texts]
        encoded = iter(self._model.encode([part for of_text in parts for part in of_text]))
        batch = []
        for of_text in parts:
            ids = next(encoded)
            for _ in of_text[1:]:
                ids = ids + self._space_mark_ids + next(encoded)
            batch.append(ids)
        return batch

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; BOS and EOS leave no trace in it."""
        return self._model.decode(ids)
