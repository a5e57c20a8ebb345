"""Chats against transformers, as the independent reference, and by hand: what is rendered, tokenised and
supervised."""

import json
import re
import runpy
import shutil
import sys

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from chunkflow.data.chat import labels_of
from chunkflow.data.dataset import open_dataset
from chunkflow.data.messages import read_messages
from chunkflow.data.tokenizer import Tokenizer
from tests.helpers.hugging_face import CHATML, WORDS, raw_tokenizer
from tests.helpers.processes import REPO

pytestmark = pytest.mark.quick

# Templates in the manner of the families, `generation` marking what the model writes, which is transformers'
# way to a mask.


LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}{{- "Today: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {%- generation %}{{- message.content | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" + message.content | tojson + "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

QWEN2 = """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}{{- messages[0]['content'] if messages[0].role == 'system' else 'You are helpful.' }}
    {{- "\n\n# Tools\n<tools>" }}{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}{{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == "system" and loop.first %}{%- continue %}{%- endif %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- if message.content %}{{- message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}{{- '\n' }}{%- endif %}
            {{- '<tool_call>\n{"name": "' }}{{- call.function.name }}{{- '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

QWEN3 = """\
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(query=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.found and message.role == 'user' %}
        {%- set ns.query = messages | length - 1 - loop.index0 %}{%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- if loop.index0 > ns.query and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + message.content.lstrip('\n') }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

MISTRAL = """\
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + '\n\n' %}{%- set rest = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set rest = messages %}{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
    {%- if message.role == 'user' %}{{- '[INST] ' + (system if loop.first else '') + message.content + '[/INST]' }}
    {%- else %}{%- generation %}{{- ' ' + message.content + eos_token }}{%- endgeneration %}{%- endif %}
{%- endfor %}"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}
{%- else %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\n' }}
{%- endif %}"""

STYLES = {  # template, special tokens, ordinary added tokens, bos, eos, make of tokenizer
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], [], None, "<|im_end|>", "bytes"),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        [],
        "<|begin_of_text|>",
        "<|eot_id|>",
        "bytes",
    ),
    "qwen2": (
        QWEN2,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<tool_call>", "</tool_call>"],
        None,
        "<|im_end|>",
        "bytes",
    ),
    "qwen3": (
        QWEN3,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<think>", "</think>"],
        None,
        "<|im_end|>",
        "bytes",
    ),
    "mistral": (MISTRAL, ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], [], "<s>", "</s>", "metaspace"),
    "zephyr": (ZEPHYR, ["<unk>", "<s>", "</s>"], [], "<s>", "</s>", "metaspace"),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder of each style, as transformers writes one."""
    made = {}
    for name, (template, special, added, bos, eos, kind) in STYLES.items():
        folder = made[name] = tmp_path_factory.mktemp(name)
        raw_tokenizer(kind, special, added).save(str(folder / "tokenizer.json"))
        config = {
            "bos_token": bos,
            "eos_token": {"__type": "AddedToken", "content": eos},
            "chat_template": template,
        }
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="session")
def references(folders):
    return {name: PreTrainedTokenizerFast.from_pretrained(str(folder)) for name, folder in folders.items()}


@pytest.fixture
def read(tmp_path):
    """[(tokens, labels)] of rows, by the dataset."""

    def read(tokenizer, *rows):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = open_dataset(
            "jsonl", str(path), tokenizer, vocab_size=1 << 20, seed=0, cache_dir=str(tmp_path / "cache")
        )
        made = [dataset.row(index, length) for index, length in enumerate(dataset.lengths)]
        return [(tokens.tolist(), labels.tolist()) for tokens, labels, _ in made]

    return read


def say(*contents, system=None, **more):
    """User and assistant in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)
    ]
    return {"messages": messages, **more}


CHATS = [
    say("What is 1 + 2?", "It is 3."),
    say("a", "b", "c", "d", "e", "f"),
    say("What is 1 + 2?", "3", "And 3 + 4?", "It is 7.\n\nSo.", "Thanks", system="Be brief."),
    say("naïve Ωmega 漢字 \U0001f600", "\U0001f600 e\u0301 漢", "code?", "def f(x):\n    return x + 1"),
    say("<|im_end|> </s> in a text", "and <|im_start|> [INST] in an answer", "?", "b"),
    say("   spaces   ", "x   ", "\nlines\n\n", "y\n"),
    say("nothing to learn"),
    say("", "empty before", "?", "b", system="s"),
]


def mask(labels):
    return [int(label != -100) for label in labels]


def less_empty_blocks(tokens, mask, tokenizer):
    """The mask without the empty reasoning blocks that the template puts in: there is no loss on them."""
    block = tokenizer.encode("<think>\n\n</think>\n\n")
    for place in range(len(tokens)):
        if tokens[place : place + len(block)] == block:
            mask[place : place + len(block)] = [0] * len(block)
    return mask


@pytest.mark.parametrize("style", STYLES)
def test_masks_are_those_of_transformers(style, folders, references, read):
    reference, tokenizer = references[style], Tokenizer(str(folders[style]))
    rows = CHATS if style != "qwen3" else [row for row in CHATS if len(row["messages"]) <= 2]
    for row, (tokens, labels) in zip(rows, read(tokenizer, *rows)):
        expected = reference.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, truncation=False
        )
        assert tokens == expected["input_ids"]
        assert mask(labels) == less_empty_blocks(tokens, expected["assistant_masks"], tokenizer)
        assert all(label in (-100, token) for token, label in zip(tokens, labels))
        assert tokenizer.chat.render(row["messages"]) == reference.apply_chat_template(
            row["messages"], tokenize=False
        )


@pytest.mark.parametrize("style", STYLES)
def test_masks_are_those_of_token_prefixes(style, folders, references, read, tmp_path):
    """The other way to a mask: which tokens are new when a turn is added to the prompt that asks for it."""
    reference, folder = references[style], tmp_path / "plain"
    plain = re.sub(r"\{%-? *(end)?generation *-?%\}", "", STYLES[style][0])
    shutil.copytree(folders[style], folder)
    (folder / "chat_template.jinja").write_text(plain)  # wins over the one in tokenizer_config.json
    tokenizer = Tokenizer(str(folder))
    rows = [row for row in CHATS[:4] if style != "qwen3" or len(row["messages"]) <= 2]
    for row, (tokens, labels) in zip(rows, read(tokenizer, *rows)):
        expected = [0] * len(tokens)
        for place, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                settings = {"return_dict": False, "chat_template": plain}
                before = reference.apply_chat_template(
                    row["messages"][:place], add_generation_prompt=True, **settings
                )
                after = reference.apply_chat_template(row["messages"][: place + 1], **settings)
                end = len(after) - after[::-1].index(tokenizer.eos_id)  # without the line break behind it
                assert tokens[:end] == after[:end] and after[: len(before)] == before
                expected[len(before) : end] = [1] * (end - len(before))
        assert mask(labels) == less_empty_blocks(tokens, expected, tokenizer) and 1 in expected


@pytest.mark.parametrize("style", STYLES)
def test_a_question_is_that_of_transformers_and_ends_as_its_turn_does(style, folders, references, read):
    tokenizer, content = Tokenizer(str(folders[style])), "naïve <|im_end|> 漢字?\n"
    prompt, end = tokenizer.question(content)
    messages = [{"role": "user", "content": content}]
    assert prompt == references[style].apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    ((tokens, labels),) = read(tokenizer, say(content, "b"))
    assert tokens[: len(prompt)] == prompt and end == [label for label in labels if label >= 0][-1:]


def test_a_question_in_plain_chatml(read):
    tokenizer = Tokenizer()
    prompt, end = tokenizer.question("a <|im_end|>?")
    ((tokens, labels),) = read(tokenizer, say("a <|im_end|>?", "b"))
    assert tokens[: len(prompt)] == prompt and mask(labels[: len(prompt) + 1]) == [0] * len(prompt) + [1]
    assert len(end) > 1 and [label for label in labels if label >= 0][-len(end) :] == end


ADD = [
    {
        "type": "function",
        "function": {"name": "add", "description": "sums <a> & 'b'", "parameters": {"type": "object"}},
    }
]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": "ü<"}}}],
}


def test_tools_their_calls_and_their_answers(folders, references, read):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2 and 3 + 4?"},
        CALL,
    ]
    messages += [
        {"role": "tool", "content": "3", "name": "add", "tool_call_id": "x"},
        {"role": "tool", "content": "7"},
    ]
    messages += [{"role": "assistant", "content": "3, 7."}]
    tokenizer, reference = Tokenizer(str(folders["qwen2"])), references["qwen2"]
    rows = [
        {"messages": messages, "tools": ADD},
        {"messages": messages, "tools": []},
        {"messages": messages[1:]},
    ]
    for row, (tokens, labels) in zip(rows, read(tokenizer, *rows)):
        expected = reference.apply_chat_template(
            row["messages"],
            tools=row.get("tools") or None,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert tokens == expected["input_ids"] and mask(labels) == expected["assistant_masks"]
        supervised = tokenizer.decode([label for label in labels if label >= 0])
        assert (
            supervised == '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü<"}}\n</tool_call>3, 7.'
        )


def test_a_template_of_its_own_for_tools(folders, read, tmp_path):
    config = json.loads((folders["chatml"] / "tokenizer_config.json").read_text())
    named = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}
    config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    shutil.copy(folders["chatml"] / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reference, row = PreTrainedTokenizerFast.from_pretrained(str(tmp_path)), say("a", "b")
    made = read(Tokenizer(str(tmp_path)), {**row, "tools": ADD}, row)
    for (tokens, _), tools in zip(made, (ADD, None)):
        assert tokens == reference.apply_chat_template(row["messages"], tools=tools, return_dict=False)


def test_earlier_reasoning_that_the_template_drops(folders, references, read):
    """Qwen 3's template writes reasoning after the last question only."""
    tokenizer, reference = Tokenizer(str(folders["qwen3"])), references["qwen3"]
    with pytest.raises(ValueError) as error:
        read(tokenizer, say("a", "b"), say("a", "b", "c", "d", system="s"))
    message = str(error.value)
    assert re.match(
        r"\S+data.jsonl:2: messages\[2\]: the chat template of \S+ renders the chat up to here in another way",
        message,
    )
    assert '(a shipped one, "qwen3"), or training.multi_turn = "expand"' in message and "\n" not in message
    row = say("a", "b", "c", "d", "e", "f")
    row["messages"][1]["weight"] = row["messages"][3]["weight"] = 0
    row["messages"][5]["reasoning_content"] = "f, of course"
    [(tokens, labels)] = read(tokenizer, row)
    messages = [
        {key: value for key, value in message.items() if key != "weight"} for message in row["messages"]
    ]
    expected = reference.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert tokens == expected["input_ids"]
    assert (
        tokenizer.decode([label for label in labels if label >= 0]) == "<think>\nf, of course\n</think>\n\nf"
    )
    end = len(tokens) - 1  # the line break behind <|im_end|>
    first = max(place for place in range(end) if not expected["assistant_masks"][place]) + 1
    assert mask(labels) == [0] * first + [1] * (end - first) + [0]


@pytest.mark.parametrize("style", [*STYLES, None])
def test_no_loss_on_messages_of_weight_0(style, folders, read):
    tokenizer = Tokenizer(str(folders[style]) if style else "")
    if style == "qwen3":
        return
    row, weighted = (
        say("a", "one", "c", "two", "e", "three", system="s"),
        say("a", "one", "c", "two", "e", "three", system="s"),
    )
    for place, weight in enumerate([0, 0, 1, 0, 0, None, 1.0]):
        weighted["messages"][place]["weight"] = weight
    (tokens, labels), (same, fewer) = read(tokenizer, row, weighted)
    assert tokens == same
    kept = [label if label != -100 else token for token, label in zip(tokens, fewer)]
    assert kept == tokens
    texts = [
        tokenizer.decode([label for label in found if label >= 0]).replace("<|im_end|>", "")
        for found in (labels, fewer)
    ]
    assert [re.sub("</s>| ", "", text) for text in texts] == ["onetwothree", "onethree"]


def test_sharegpt(folders, read):
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}
    row = say("a", "b", "c", "d", system="s")
    row["messages"][4]["weight"] = 0
    row["messages"].append({"role": "tool", "content": "7"})
    turns = [{"from": names[message["role"]], "value": message["content"]} for message in row["messages"]]
    turns[4]["weight"] = 0
    call = {"from": "gpt", "value": None, "tool_calls": CALL["tool_calls"]}
    both = (
        {"messages": [*say("a")["messages"], CALL]},
        {"conversations": [{"from": "human", "value": "a"}, call]},
    )
    one, other = read(Tokenizer(str(folders["qwen2"])), *both)
    assert one == other and 1 in mask(one[1])
    for path in (str(folders["qwen2"]), ""):
        one, other = read(Tokenizer(path), row, {"id": "x", "conversations": turns})
        assert one == other and 1 in mask(one[1])


# --------------------------------------------------------------------------------------------------- built in


def bare(folder, tmp_path):
    """The tokenizer without its chat template."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    shutil.copy(folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(str(tmp_path))


BUILT_IN = {
    "qwen2": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ <|im_end|>\n<|im_start|>assistant\n«A"
    " <|im_end|>»\n"
    "<|im_start|>tool\nT<|im_end|>\n<|im_start|>assistant\n«B<|im_end|>»\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«A<|eot_id|>»<|start_header_id|>ipython<|end_header_id|>"
    "\n\nT<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«B<|eot_id|>»",
}


@pytest.mark.parametrize("style", BUILT_IN)
def test_built_in_templates_are_chosen_by_special_tokens(style, folders, references, read, tmp_path):
    tokenizer, reference = bare(folders[style], tmp_path), references[style]
    turns = [("system", "S"), ("user", "Q "), ("assistant", "A "), ("tool", "T"), ("assistant", "B")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    [(tokens, labels)] = read(tokenizer, row)
    text = BUILT_IN[style].replace("«", "").replace("»", "")
    assert tokenizer.chat.render(row["messages"]) == text
    assert tokens == reference(text, add_special_tokens=False)["input_ids"]
    marked, previous = "", False  # put together from the tokens
    for name, label in zip(tokenizer.pieces(tokens), labels):
        if (label != -100) != previous:
            marked, previous = marked + ("»" if previous else "«"), not previous
        marked += name
    assert marked + "»" * previous == BUILT_IN[style]
    asked = tokenizer.chat.render(row["messages"][:2], add_generation_prompt=True)
    assert text.startswith(asked) and BUILT_IN[style].startswith(asked + "«")


def test_without_special_tokens_for_chats_it_is_plain_chatml(folders, tmp_path, read):
    assert Tokenizer().chat is None
    tokenizer = bare(folders["zephyr"], tmp_path)
    assert tokenizer.chat is None
    [(tokens, labels)] = read(tokenizer, say("a", "b"))
    parts = [
        "<|im_start|>user\n",
        "a",
        "<|im_end|>",
        "\n",
        "<|im_start|>assistant\n",
        "b",
        "<|im_end|>",
        "\n",
    ]
    encoded = tokenizer.encode_batch(parts)
    assert tokens == sum(encoded, []) and [label for label in labels if label >= 0] == encoded[5] + encoded[6]


# ---------------------------------------------------------------------------------------------- sentencepiece


@pytest.fixture(scope="session")
def llama2(tmp_path_factory):
    """A sentencepiece model that puts a space in front of a text, with two tokens added and a template."""
    folder = tmp_path_factory.mktemp("llama2")
    with open(folder / "tokenizer.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(WORDS), model_writer=model, model_type="bpe", vocab_size=420, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    template = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": "{{ bos_token }}" + template,
    }
    config["added_tokens_decoder"] = {
        "1": {"content": "<s>"},
        "420": {"content": "<|im_start|>"},
        "421": {"content": "<|im_end|>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_sentencepiece_folder(llama2, read):
    tokenizer = Tokenizer(str(llama2))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (422, 1, 421)
    assert Tokenizer(str(llama2 / "tokenizer.model")).digest == tokenizer.digest
    [(tokens, labels)] = read(tokenizer, say("What is \U0001f600?", "So it is.", "a", "b"))
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama2 / "tokenizer.model"))

    def pieces(text):  # without a space in front: behind a letter that is bytes in no other token
        return model.encode("Ж" + text)[len(model.encode("Ж")) :]

    start, end, line = [420], [421], pieces("\n")
    expected = [1, *start, *pieces("user\nWhat is \U0001f600?"), *end, *line, *start, *pieces("assistant\n")]
    answer, rest = (
        pieces("So it is.") + end,
        [*line, *start, *pieces("user\na"), *end, *line, *start, *pieces("assistant\n")],
    )
    last = pieces("b") + end
    assert tokens == [*expected, *answer, *rest, *last, *line]
    assert labels == [-100] * len(expected) + answer + [-100] * len(rest) + last + [-100] * len(line)
    assert "".join(tokenizer.pieces(tokens)).startswith(
        "<s><|im_start|>user\nWhat is \U0001f600?<|im_end|>\n<|im_start|>assistant"
    )
    assert tokenizer.decode(answer + start + pieces("a")) == "So it is.<|im_start|>a"
    assert (
        tokenizer.decode(start + pieces(" a")) == "<|im_start|> a"
    )  # a space that was there, not one put in front


@pytest.mark.parametrize("number, shown", [("x", '"x"'), ("-1", '"-1"')])
def test_added_tokens_without_an_id(llama2, tmp_path, number, shown):
    shutil.copy(llama2 / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {number: {"content": "<a>"}}})
    )
    with pytest.raises(
        ValueError, match=f'tokenizer_config.json: the added token "<a>" has the id {shown}: write a token id'
    ):
        Tokenizer(str(tmp_path))


# ----------------------------------------------------------------------------------------------------- errors


def test_a_turn_that_begins_or_ends_inside_a_token(folders, read, tmp_path):
    tokenizer = Tokenizer(str(folders["chatml"]))
    assert tokenizer.encode("assistant\n\nb") != tokenizer.encode("assistant\n") + tokenizer.encode("\nb")
    sentence = (
        r'data.jsonl:2: messages\[3\]: its text begins inside the token "\\n\\n", so that .*"weight": 0'
    )
    with pytest.raises(ValueError, match=sentence):
        read(tokenizer, say("a", "b"), say("a", "b", "c", "\nd"))
    row = say("a", "b", "c", "\nd")
    row["messages"][3]["weight"] = 0
    assert 1 in mask(read(tokenizer, row)[0][1])
    chat = tokenizer.chat.turns(read_messages(say("a", "bc"), "messages"))
    [turn] = chat.turns
    ends = [(place, place + 1) for place in range(turn.start)] + [(turn.start, turn.limit + 1)]
    with pytest.raises(ValueError, match=r"messages\[1\]: its text ends inside the token"):
        labels_of(chat, [0] * len(ends), ends)


def test_a_special_token_that_takes_white_space_along(folders, read, tmp_path):
    """Phi 3's end of turn swallows the line break behind it: that token is still the end of the turn, and
    supervised."""
    saved = json.loads((folders["chatml"] / "tokenizer.json").read_text())
    for token in saved["added_tokens"]:
        token["rstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    shutil.copy(folders["chatml"] / "tokenizer_config.json", tmp_path)
    tokenizer = Tokenizer(str(tmp_path))
    [(tokens, labels)] = read(tokenizer, say("a", "b", "c", "d"))
    assert [token for token in labels if token >= 0] == [
        number for text in "bd" for number in [*tokenizer.encode(text), tokenizer.eos_id]
    ]


def test_a_template_without_a_token_for_the_end(folders, read, tmp_path):
    """All that it writes behind an answer is supervised then: nothing else can end the turn."""
    shutil.copy(folders["chatml"] / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '###' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    tokenizer = Tokenizer(str(tmp_path))
    [(_, labels)] = read(tokenizer, say("a", "b <|im_end|> c", "d"))
    assert tokenizer.decode([label for label in labels if label >= 0]) == "b <|im_end|> c###"


BAD_CHATS = [
    (
        {"messages": [{"role": "assistant", "content": "a", "weight": -0.5}]},
        "messages[0].weight is -0.5: it must be a finite number of at least 0 (0: no loss",
    ),
    (
        {"messages": [{"role": "assistant", "content": "a", "weight": True}]},
        "messages[0].weight is true: it must be a finite number",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "weight": 1}]},
        "messages[0].weight is 1, and there is loss on the assistant's",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "nick": "x"}]},
        'messages[0] has "nick", which the chat template',
    ),
    (
        {"messages": [{"role": "user", "content": "a"}], "tools": ADD},
        'the row has "tools", which the chat template',
    ),
    (
        {"messages": [{"role": "user", "content": "a"}], "tools": "add"},
        'tools is "add": it must be a list of objects',
    ),
    ({"messages": [CALL]}, 'messages[0] has "tool_calls", which'),
    (
        {"messages": [{"content": None, "tool_calls": [1]}]},
        'messages[0] has the keys ["content", "tool_calls"]: it must be an object with',
    ),
    ({"conversations": [{"from": "gpt", "value": 3}]}, "conversations[0].value is 3: it must be a string"),
    (
        {"conversations": [{"from": "bard", "value": ""}]},
        'conversations[0] has the role "bard": rename it to one of system, user',
    ),
    (
        {"conversations": [{"speaker": "user", "content": ""}]},
        'has the keys ["speaker", "content"]: it must be an object with "role" and',
    ),
    (
        {"messages": [{"role": "user", "content": "a", "role ": "x"}]},
        'messages[0] has "role ", which the chat template',
    ),
    (
        {"conversations": "a"},
        '"conversations" is "a": it must be a list of {"role", "content"} objects (or {"from",',
    ),
    ({"conversations": []}, '"conversations" is an empty list'),
    ({"conversations": [], "messages": []}, '"messages" is an empty list'),
]


@pytest.mark.parametrize("case", BAD_CHATS, ids=range(len(BAD_CHATS)))
@pytest.mark.parametrize("own", [True, False])
def test_a_bad_chat_is_one_sentence(case, own, folders, read):
    row, fragment = case
    with pytest.raises(ValueError) as error:
        read(Tokenizer(str(folders["chatml"]) if own else ""), say("a", "b"), row)
    fragment = fragment if own else fragment.replace("the chat template", "the plain ChatML")
    assert (
        re.match(r"\S+data.jsonl:2: ", str(error.value))
        and fragment in str(error.value)
        and "\n" not in str(error.value)
    )


BAD_TEMPLATES = [
    ("{% for message in messages %}", "is not valid Jinja (line 1: Unexpected end of template"),
    ("{{ messages[0].__class__.__mro__ }}", "cannot render the messages ("),  # the sandbox
    ("{% for _ in range(10 ** 9) %}{% endfor %}", "cannot render the messages (Range too big"),
    (
        "{{ messages.append(1) }}",
        "cannot render the messages (access to attribute 'append' of 'list' object is unsafe",
    ),
    ("{{ raise_exception('no\nsuch\nchats') }}", "cannot render the messages (no such chats): correct them"),
    ("{{ messages[5].content + 'a' }}", "cannot render the messages ("),
    ("{{ 1 / 0 }}", "cannot render the messages (division by zero)"),
    ("{{ messages[0].content }}{{ messages[1].content }}", "messages[1]: up to here the chat template"),
    (
        "{{ messages | length }}{{ messages[-1].content }}",
        "messages[1]: the chat template",
    ),  # the prompt counts otherwise
    (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}",
        'does not say where the answer begins in "<assistant>b<|im_end|>" (it knows no'
        " add_generation_prompt)",
    ),
    (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}{% if add_generation_prompt"
        " %}assistant:<think>{% endif %}",
        'does not begin this turn with the prompt that it asks for an answer with ("<think>" is missing)',
    ),
]


@pytest.mark.parametrize("case", BAD_TEMPLATES, ids=range(len(BAD_TEMPLATES)))
def test_a_bad_template_is_one_sentence(case, folders, tmp_path, read):
    template, fragment = case
    shutil.copy(folders["chatml"] / "tokenizer.json", tmp_path)
    shutil.copy(folders["chatml"] / "tokenizer_config.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError) as error:
        read(Tokenizer(str(tmp_path)), say("a", "b"))
    message = str(error.value)
    assert fragment in message and str(tmp_path / "chat_template.jinja") in message and "\n" not in message
    assert "is not valid Jinja" in message or message.startswith(f"{tmp_path}/data.jsonl:1: ")


# -------------------------------------------------------------------------------------------- cache, and time


def test_another_template_is_another_cache(folders, tmp_path, read):
    shutil.copy(folders["chatml"] / "tokenizer.json", tmp_path)
    config = json.loads((folders["chatml"] / "tokenizer_config.json").read_text())
    digests, made = set(), []
    for change in (
        {},
        {"chat_template": "Hi." + CHATML},
        {"chat_template": None},
        {"eos_token": "<|endoftext|>"},
        {"jinja": 1},
    ):
        if change == {"jinja": 1}:
            (tmp_path / "chat_template.jinja").write_text("Ho." + CHATML)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | change))
        tokenizer = Tokenizer(str(tmp_path))
        digests.add(tokenizer.digest)
        made.append(tokenizer.decode(read(tokenizer, say("a", "b"))[0][0])[:3])
    assert len(digests) == 5 and made[1] == "Hi." and made[4] == "Ho."


def test_the_clock_stands_still_between_renderings(folders, tmp_path, read):
    shutil.copy(folders["chatml"] / "tokenizer.json", tmp_path)
    shutil.copy(folders["chatml"] / "tokenizer_config.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%f') }}" + CHATML)
    assert 1 in mask(read(Tokenizer(str(tmp_path)), *[say("a", "b", "c", "d")] * 20)[19][1])


# ---------------------------------------------------------------------------------------------------- preview


def preview(capsys, monkeypatch, tmp_path, folder, *options):
    """What `python recipes/preview.py` prints."""
    rows = [say("What is\x1b[31m", "It is 3.\nSo \U0001f600.", "a", "b"), {"text": "a " * 40}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "x.toml").write_text(
        f'[model]\ntokenizer_path = "{folder}/tokenizer.json"\n[training]\ndataset = "jsonl"\nshuffle ='
        " false\n"
        f'dataset_path = "{tmp_path}/data.jsonl"\nglobal_batch_size = 2\n[chunkflow]\nchunk_size = 16\n'
    )
    monkeypatch.setattr(sys, "argv", ["preview.py", "--job.config_file", str(tmp_path / "x.toml"), *options])
    monkeypatch.setenv("CHUNKFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    runpy.run_path(str(REPO / "recipes" / "preview.py"), run_name="__main__")
    return capsys.readouterr().out


def test_the_preview_shows_tokens_masks_and_chunks(folders, tmp_path, capsys, monkeypatch):
    out = preview(capsys, monkeypatch, tmp_path, folders["chatml"])
    tokenizer = Tokenizer(str(folders["chatml"]))
    chat, text = out.split(f"{tmp_path}/data.jsonl:")[1:]
    supervised = len(tokenizer.encode("It is 3.\nSo \U0001f600.<|im_end|>b<|im_end|>"))
    tokens = len(
        tokenizer.encode(
            tokenizer.chat.render(say("What is\x1b[31m", "It is 3.\nSo \U0001f600.", "a", "b")["messages"])
        )
    )
    assert chat.startswith(f"1: {tokens} tokens, {supervised} with loss\n---- tokens 0 to 15: rank 0, group ")
    assert chat.count("---- tokens ") == -(-tokens // 16) and "\x1b" not in out
    kept = re.sub(r"---- tokens .*-\n", "", chat.partition("\n")[2]).replace("»\n«", "\n").replace("|\n", "|")
    inside = re.findall("«(.*?)»", kept.replace("\n", ""))
    assert "".join(inside).replace("|im", "@im").replace("|>", "@>").replace("|", "") == (
        "It is 3.⏎So \U0001f600.<@im_end@>b<@im_end@>"
    )
    assert "\\x1b" in kept.replace("|", "")
    assert text.startswith("2: ") and text.count("---- tokens ") > 1


def test_the_preview_as_a_page(folders, tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.html"
    out = preview(
        capsys,
        monkeypatch,
        tmp_path,
        folders["chatml"],
        "--html",
        str(page),
        "--training.global_batch_size=5",
    )
    assert out.rstrip().endswith(f"{page}: 2 sequences, open it in a browser")  # each row once
    text, tokenizer = page.read_text(), Tokenizer(str(folders["chatml"]))
    loss = "".join(re.findall(r'<i class=loss title="id \d+">(.*?)</i>', text, re.DOTALL))
    assert loss.startswith("It is 3.⏎\nSo \U0001f600.&lt;|im_end|&gt;b&lt;|im_end|&gt;")
    shown = [int(number) for number in re.findall(r'<i(?: class=loss)? title="id (\d+)">', text)]
    chats = [
        tokenizer.encode(
            tokenizer.chat.render(say("What is\x1b[31m", "It is 3.\nSo \U0001f600.", "a", "b")["messages"])
        )
    ]
    starts = [shown[start : start + len(chats[0])] for start in range(len(shown))]
    assert chats[0] in starts and "\x1b" not in text and text.count("<div class=chunk>") > 2


def test_the_preview_in_colours(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = preview(capsys, monkeypatch, tmp_path, folders["chatml"], "--training.global_batch_size=1")
    green = "".join(re.findall("\33\\[48;5;(?:22|28)m(.*?)\33\\[0m", out)).removeprefix("with loss")
    grey = "".join(re.findall("\33\\[48;5;(?:236|240)m(.*?)\33\\[0m", out)).removeprefix("without loss")
    assert green == "It is 3.⏎So \U0001f600.<|im_end|>b<|im_end|>"
    asked, answered = "<|im_start|>user⏎{}<|im_end|>⏎<|im_start|>assistant⏎", "⏎"
    assert grey == asked.format("What is\\x1b[31m") + answered + asked.format("a") + answered
    assert "\33[36m---- tokens 0 to 15: " in out
    assert "\33" not in preview(
        capsys, monkeypatch, tmp_path, folders["chatml"], "--metrics.disable_color_printing"
    )
