import ast
import io
import json
import runpy
import sys
import textwrap

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from chunkflow.data import tokenizer as tokenizer_module
from chunkflow.data.chat import RenderedChat
from chunkflow.data.tokenizer import SHIPPED_MODEL, Tokenizer

pytestmark = pytest.mark.quick


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
    text = "".join(
        map(
            chr,
            [*range(0x800), *range(0x2500, 0x2600), *range(0xD7F0, 0xD800), *range(0xE000, 0x110000, 997)],
        )
    )
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_the_shipped_model(tokenizer):
    assert tokenizer.vocab_size == 2048
    assert (
        tokenizer.bos_id is not None and tokenizer.eos_id is not None and tokenizer.bos_id != tokenizer.eos_id
    )
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
        ("empty.json", b""),
        ("bytes.json", b"\xff\n"),
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
    assert (
        "set model.tokenizer_path to a tokenizer.json, a sentencepiece model (tokenizer.model), or a folder"
        in message
    )


# --------------------------------------------------------------------------------------------- tokenizer.json


@pytest.fixture(scope="module")
def raw():
    """As GPT-2, Llama 3 and Qwen have them: pieces of bytes."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(["def words to(learn): from\n\treturn a  few\n"] * 3, trainer)
    return raw


@pytest.fixture
def folder(raw, tmp_path):
    """Writes a folder: tokenizer.json, with `config` as its tokenizer_config.json, and opens it."""

    def folder(config=None, **files):
        raw.save(str(tmp_path / "tokenizer.json"))
        for name, content in {"tokenizer_config": config, **files}.items():
            if content is not None:
                text = content if isinstance(content, str) else json.dumps(content)
                (tmp_path / f"{name}.json").write_text(text)
        return Tokenizer(str(tmp_path))

    return folder


def test_a_tokenizer_json(folder, raw, tmp_path):
    made = folder(
        {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "lstrip": False}, "pad_token": None}
    )
    assert made.vocab_size == raw.get_vocab_size() and (made.bos_id, made.eos_id) == (0, 1)
    assert made.encode_batch(TEXTS) == [raw.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert made.encode_batch([]) == [] and made.encode("a<end>") == [*made.encode("a"), 2]
    for text in TEXTS:
        assert made.decode([0, *made.encode(text), 1]) == text
        assert "".join(made.pieces(made.encode(text))) == text
    assert (
        "".join(made.pieces([0, *made.encode("naïve \U0001f600"), 2, 1])) == "<bos>naïve \U0001f600<end><eos>"
    )
    assert Tokenizer(str(tmp_path / "tokenizer.json")).digest == made.digest  # its folder belongs to it


def test_settings_of_the_last_use_do_not_count(folder, raw):
    from_file = tokenizers.Tokenizer.from_str(raw.to_str())
    from_file.enable_truncation(max_length=3)
    from_file.enable_padding(length=12)
    both = [("<bos>", 0), ("<eos>", 1)]
    from_file.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=both)
    made = folder(tokenizer=json.loads(from_file.to_str()))
    assert made.encode("words to learn from") == raw.encode("words to learn from").ids
    assert made.bos_id is None and made.eos_id is None
    from_file.post_processor = processors.ByteLevel(trim_offsets=True)
    made, text = folder(tokenizer=json.loads(from_file.to_str())), "a   few  words "
    [(ids, offsets)] = made.encode_chats([RenderedChat(text, [], "messages")])
    assert len(ids) == len(offsets) and [text[start:end] for start, end in offsets] == list(made.pieces(ids))


def test_where_the_special_tokens_come_from(folder):
    assert folder(special_tokens_map={"bos_token": "<bos>", "eos_token": "<eos>"}).bos_id == 0
    made = folder({"bos_token": None, "eos_token": "<end>"})  # wins
    assert made.bos_id is None and made.eos_id == 2


def test_the_digest_follows_the_folder(folder):
    configs = [
        None,
        {"eos_token": "<eos>"},
        {"eos_token": "<end>"},
        {"eos_token": "<end>", "chat_template": "{{ messages }}"},
    ]
    assert len({folder(config).digest for config in configs}) == 4
    assert folder(configs[3]).digest == folder({**configs[3], "model_max_length": 4096}).digest


BAD_FOLDERS = [
    ({"tokenizer_config": "{"}, "tokenizer_config.json: this file cannot be read (Expecting"),
    ({"tokenizer_config": "[]"}, "tokenizer_config.json: this file does not hold one JSON object"),
    ({"special_tokens_map": "0"}, "special_tokens_map.json: this file does not hold one JSON object"),
    (
        {"config": {"eos_token": "<none>"}},
        'tokenizer_config.json: eos_token is "<none>", which the tokenizer does not have',
    ),
    ({"config": {"bos_token": 3}}, "tokenizer_config.json: bos_token is 3: it must be a string or null"),
    ({"config": {"bos_token": {"id": 3}}}, 'bos_token is {"id": 3}: it must be a string or null'),
    (
        {"config": {"chat_template": 3}},
        "tokenizer_config.json: chat_template is 3: it must be a string, or a list of",
    ),
    (
        {"config": {"chat_template": [{"name": "rag", "template": ""}]}},
        '{"name", "template"} with a "default", correct it',
    ),
    (
        {"config": {"chat_template": [{"name": "default"}]}},
        '{"name", "template"} with a "default", correct it',
    ),
    ({"config": {"chat_template": "{% if %}"}}, "is not valid Jinja (line 1: Expected an expression"),
]


@pytest.mark.parametrize("case", BAD_FOLDERS, ids=range(len(BAD_FOLDERS)))
def test_a_bad_folder_is_one_sentence(folder, case, tmp_path):
    files, fragment = case
    with pytest.raises(ValueError) as error:
        folder(**files)
    assert fragment in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_without_the_package_it_is_one_sentence(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ValueError,
        match=r"tokenizer.json: .* tokenizers, which is not installed: pip install 'chunkflow\[hf\]'",
    ):
        folder()
    loaded_without = runpy.run_path(tokenizer_module.__file__)  # nor does sentencepiece need it
    assert loaded_without["Tokenizer"]().encode("so") == Tokenizer().encode("so")


def test_without_sentencepiece_its_models_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        ValueError, match="python_2048.model: .* sentencepiece, which is not installed: pip install"
    ):
        Tokenizer()
