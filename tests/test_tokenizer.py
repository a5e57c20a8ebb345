import ast
import io
import textwrap

import pytest
import sentencepiece

from chunkflow.data import tokenizer as tokenizer_module
from chunkflow.data.tokenizer import SHIPPED_MODEL, Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A model of another make: a space in front of every text, no BOS, no EOS, no bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from", "and some more words"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=40,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("models") / "other.model"
    path.write_bytes(model.getvalue())
    return path


TEXTS = [
    "",
    " ",
    "\n",
    "def f(x):\n\treturn x  # tab\n",
    "    four\n        eight\n\n\n  two \n \n",
    "windows\r\nline\rends\r\n",
    " leading and trailing   ",
    "naïve Ωmega 漢字 \U0001f600 e\u0301 \u202eright\u202c",
    "\u2028\u2029\x85\ufeff\ufffd\uffff\U0010ffff",
    "nul \0 and bell \x07",
    "<s></s><unk><0x0A><|im_start|> \u2047",
    "\u2581",  # what sentencepiece writes for a space
    " \u2581\u2581 a\u2581 b \u2581",
    "x" * 5000,
    "0123456789 3.14 0xFF",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids


def test_every_byte_and_every_plane_comes_back(tokenizer):
    text = "".join(map(chr, [*range(0x800), *range(0x2500, 0x2600), *range(0xD7F0, 0xD800), *range(0xE000, 0x110000, 997)]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_the_shipped_model(tokenizer):
    assert tokenizer.vocab_size == 2048
    assert tokenizer.bos_id is not None and tokenizer.eos_id is not None and tokenizer.bos_id != tokenizer.eos_id
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a"), tokenizer.eos_id]) == "a"
    assert SHIPPED_MODEL.stat().st_size < 100_000
    code = "class A:\n    def f(self):\n        return None\n"
    assert len(tokenizer.encode(code)) < len(code) / 2.5  # indentation and line ends take few tokens


def test_the_digest_follows_the_content(tokenizer, other_model, tmp_path):
    copy = tmp_path / "copy.model"
    copy.write_bytes(SHIPPED_MODEL.read_bytes())
    assert Tokenizer(str(copy)).digest == tokenizer.digest
    assert Tokenizer(str(other_model)).digest != tokenizer.digest


def test_a_model_without_bos_and_eos(other_model):
    other = Tokenizer(str(other_model))
    assert other.bos_id is None and other.eos_id is None
    assert other.vocab_size == 40
    assert other.decode(other.encode("some words")) == "some words"
    # it puts a space in front of a text: a split at "▁" would make more of them
    assert other.encode("some\u2581words") == other.encode("some words")


def test_the_recipe_in_the_docstring(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ast.get_docstring(ast.parse(open(tokenizer_module.__file__).read()))
    exec(textwrap.dedent(text[text.index("    import sentencepiece") :]), {})
    made = Tokenizer("python_2048.model")
    assert made.vocab_size == 2048
    assert all(made.decode(made.encode(text)) == text for text in TEXTS)


@pytest.mark.parametrize(
    "name, content",
    [
        ("missing.model", None),
        ("empty.model", b""),
        ("text.model", b"these are words\n" * 10),
        ("torn.model", SHIPPED_MODEL.read_bytes()[:1000]),
        ("tokenizer.json", b'{"version": "1.0"}'),
        ("", None),  # the folder itself
    ],
)
def test_what_is_no_model_is_refused_in_a_sentence(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        Tokenizer(str(path))
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert "set model.tokenizer_path to a sentencepiece model" in message
