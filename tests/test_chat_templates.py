"""Chat templates: the shipped ones against the families' own, masks against transformers, one sequence a turn,
what a template leaves out of a chat or puts in, and training.chat_template.

stock_renderings.json has the text that the families' own templates make of chats (Qwen2.5, Qwen3, Llama 3.1;
rendered by transformers); chats whose history Qwen3's does not keep are rendered up to each answer.
"""

import json
import random
import re

import pytest
import transformers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from chunkflow.data.chat import ChatTemplate, one_turn_each
from chunkflow.data.messages import Messages
from chunkflow.data.shipped_templates import FAMILIES, FOLDER, SHIPPED
from chunkflow.data.tokenizer import Tokenizer
from tests.helpers.hugging_face import raw_tokenizer, theirs
from tests.helpers.processes import REPO, run, train
from tests.test_chat import QWEN2, QWEN3

pytestmark = pytest.mark.quick

STOCK = json.loads((REPO / "tests" / "stock_renderings.json").read_text())
LLAMA_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LLAMA_TOKENS]
ADDED = ["<tool_call>", "</tool_call>", "<think>", "</think>"]


def source(name):
    return (FOLDER / f"{name}.jinja").read_text()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tokenizer with the special tokens of all families, and no chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    raw_tokenizer("bytes", SPECIAL, ADDED).save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def template(text, keeps_turns=False):
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}
    return ChatTemplate({"default": text}, tokens, SPECIAL, "the chat template x.jinja", keeps_turns)


def chat_of(messages, tools=None, weights=None):
    weights = weights or [float(message["role"] == "assistant") for message in messages]
    return Messages("messages", messages, weights, tools)


def say(*contents, **last):
    """User and assistant in turn; `last`: more keys of the last message."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(contents)]
    messages[-1] |= last
    return messages


def learnt(chat):
    """What has a loss, turn by turn."""
    return [chat.text[turn.start : turn.end] for turn in chat.turns]


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


# ------------------------------------------------------------------------------- against the families' own ones


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shipped_template_writes_what_the_familys_own_does(name):
    for row in STOCK[name]:
        arguments = {"tools": row["tools"], "bos_token": "<|begin_of_text|>", **row["options"]}
        [text], _ = render_jinja_template([row["messages"]], chat_template=source(name), **arguments)
        assert text == row["text"], row["name"]
        if set(row["options"]) <= {"add_generation_prompt"}:
            assert (
                template(source(name)).render(row["messages"], row["tools"], **row["options"]) == row["text"]
            )


BLOCK = re.compile(r"<think>\n.*?\n</think>\n\n", re.DOTALL)


@pytest.mark.parametrize("row", STOCK["qwen3, history dropped"], ids=lambda row: row["name"])
def test_qwen3_keeps_the_reasoning_that_its_own_template_drops(row):
    """Reasoning blocks apart, the text is the same up to each answer; each turn has its block, the last as
    Qwen3's own template writes it."""
    messages, rendered = row["messages"], template(source("qwen3"), keeps_turns=True)
    for end, text in row["up_to"].items():
        kept = messages[: int(end) + 1]
        ours = rendered.render(kept, row["tools"])
        answers = [message for message in kept if message["role"] == "assistant"]
        assert BLOCK.sub("", ours) == BLOCK.sub("", text)
        assert ours.rpartition("<|im_start|>")[2] == text.rpartition("<|im_start|>")[2]
        blocks = [block.strip("\n") for block in re.findall("<think>(.*?)</think>", ours, re.DOTALL)]
        assert blocks == [message.get("reasoning_content", "") for message in answers]


# ------------------------------------------------------------------------------------------------ every turn


TEXTS = [
    "a",
    "Hello there.",
    "",
    " x ",
    "\n\nlines\n",
    "naïve 漢字",
    '{"a": "b\\n"}',
    "<b></b>",
    "<|im_end|>?",
    "    i",
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def random_chat(draw, name):
    """Messages, with what the template knows of: systems, tools, calls, reasoning, contents of many kinds."""
    rich = name in FAMILIES
    messages = [{"role": "system", "content": draw.choice(TEXTS)}] if draw.random() < 0.5 else []
    tools = TOOLS if rich and draw.random() < 0.5 else None
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": draw.choice(TEXTS)})
        while True:
            answer = {"role": "assistant", "content": draw.choice(TEXTS)}
            messages.append(answer)
            if rich and draw.random() < 0.5:
                answer["reasoning_content"] = draw.choice(["So.", "One\n\ntwo", "\nthree\n"])
            if not rich or draw.random() < 0.5:
                break
            count = 1 if name == "llama3.1" else draw.randint(1, 2)
            arguments = draw.choice([{}, {"a": 1, "b": "ü<"}, {"html": "<p></p>"}])
            answer["tool_calls"] = [call("add", **arguments)] * count
            messages += [{"role": "tool", "content": draw.choice(TEXTS)}] * count
    return chat_of(messages, tools, [])._replace(
        weights=[draw.choice([0.0, 1.0, 0.5]) * (message["role"] == "assistant") for message in messages]
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_template_keeps_every_turn(name):
    """The text up to any message is the beginning of the whole; up to an answer, with the prompt that asks for
    it, the beginning of the text up to and with it. Only answers of tools in a row are one turn of Qwen's
    user. The marks in the template say the same as these beginnings do."""
    draw, shipped = random.Random(name), template(source(name), keeps_turns=True)
    plain = template(re.sub(r"\{%-? *(end)?generation *-?%\}", "", source(name)))
    for _ in range(200):
        chat = random_chat(draw, name)
        messages, tools = chat.messages, chat.tools
        whole = shipped.render(messages, tools)
        for end in range(2 if messages[0]["role"] == "system" else 1, len(messages) + 1):
            before, after = messages[end - 1], messages[end] if end < len(messages) else {"role": ""}
            up_to = shipped.render(messages[:end], tools)
            if (
                before["role"] != "tool"
                or after["role"] != "tool"
                or name in ("chatml", "llama3", "llama3.1")
            ):
                assert whole.startswith(up_to)
            if after["role"] == "assistant":
                asked = shipped.render(messages[:end], tools, add_generation_prompt=True)
                assert asked.startswith(up_to) and shipped.render(messages[: end + 1], tools).startswith(
                    asked
                )
        assert shipped.turns(chat) == plain.turns(chat)


@pytest.mark.parametrize("name", SHIPPED)
def test_masks_of_shipped_templates_are_those_of_transformers(name, folder, tmp_path):
    draw, tokenizer = random.Random(name), Tokenizer(str(folder), name)
    reference = PreTrainedTokenizerFast.from_pretrained(str(folder), chat_template=source(name))
    for _ in range(40):
        chat = random_chat(draw, name)
        chat = chat._replace(weights=[float(message["role"] == "assistant") for message in chat.messages])
        expected = reference.apply_chat_template(
            chat.messages, tools=chat.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        rendered = tokenizer.chat.turns(chat)
        [(ids, offsets)] = tokenizer.encode_chats([rendered])
        assert ids == expected["input_ids"]
        spans = [(turn.start, turn.end) for turn in rendered.turns]
        # transformers counts a token that begins before the turn, which is an error here
        inside = [any(at < end and start < to for start, end in spans) for at, to in offsets]
        assert inside == [bool(learns) for learns in expected["assistant_masks"]]


def test_content_beside_a_call_and_reasoning_in_llama_3_1():
    messages = say("1 + 2?", "Let me see.", reasoning_content="Add.", tool_calls=[call("add", a=1)])
    chat = template(source("llama3.1"), keeps_turns=True).turns(chat_of(messages))
    assert learnt(chat) == [
        '<think>\nAdd.\n</think>\n\nLet me see.\n\n{"name": "add", "parameters": {"a": 1}}<|eot_id|>'
    ]
    with pytest.raises(
        ValueError, match=r"cannot render the messages \(Llama 3.1 makes one call in a turn\)"
    ):
        template(source("llama3.1")).render(say("a", "", tool_calls=[call("add")] * 2))
    with pytest.raises(ValueError, match="the tools are to stand in the first message of the user"):
        template(source("llama3.1")).render([{"role": "assistant", "content": "a"}], TOOLS)


# --------------------------------------------------------------------------------------------------- expanded


def unmarked(text):
    return re.sub(r"\{%-? *(end)?generation *-?%\}", "", text)


@pytest.mark.parametrize("marked", [True, False])
def test_expanded_is_one_chat_a_turn(marked, folder):
    """Each is what transformers renders of the messages up to the turn, with the mask of its last answer."""
    own = template(QWEN3 if marked else unmarked(QWEN3))
    reference = PreTrainedTokenizerFast.from_pretrained(str(folder))
    messages = say("a", "b", "c", "d", "e", "f", "thanks")
    for place, reasoning in ((1, "B."), (5, "F.")):
        messages[place]["reasoning_content"] = reasoning
    chat = chat_of(messages, weights=[0, 1.0, 0, 0.5, 0, 2.0, 0])
    parts = list(map(own.turns, one_turn_each(chat)))
    assert [[turn.message for turn in part.turns] for part in parts] == [[1], [3], [5]]
    assert [part.turns[0].weight for part in parts] == [1.0, 0.5, 2.0]
    for part in parts:
        [turn] = part.turns
        kept = messages[: turn.message + 1]
        assert part.text == reference.apply_chat_template(kept, chat_template=QWEN3, tokenize=False)
        asked = reference.apply_chat_template(
            kept[:-1], chat_template=QWEN3, tokenize=False, add_generation_prompt=True
        )
        assert part.text.startswith(asked) and part.text[turn.end :] == "\n"
    assert [learnt(part) for part in parts] == [
        ["<think>\nB.\n</think>\n\nb<|im_end|>"],
        ["d<|im_end|>"],  # the empty block before it is the template's
        ["<think>\nF.\n</think>\n\nf<|im_end|>"],
    ]
    assert "</think>\n\nd" in parts[1].text and "B." not in parts[1].text


def test_expanded_where_every_turn_is_kept_or_has_no_loss():
    qwen3 = template(source("qwen3"), keeps_turns=True)
    chat = chat_of(say("a", "b", "c", "d"))
    whole, parts = qwen3.turns(chat), list(map(qwen3.turns, one_turn_each(chat)))
    assert [whole.text.startswith(part.text) for part in parts] == [True, True]
    assert [turn for part in parts for turn in part.turns] == whole.turns
    nothing = chat_of(say("a", "b", "c"), weights=[0.0] * 3)
    assert one_turn_each(nothing) == [nothing] and not qwen3.turns(nothing).turns


# ------------------------------------------------------------------------- what a template puts in, leaves out


@pytest.mark.parametrize("marked", [True, False])
def test_no_loss_on_an_empty_block_that_the_template_puts_in(marked):
    own = template(QWEN3 if marked else unmarked(QWEN3))
    for content, start in [("b", "b"), ("  b", "  b"), ("\n\nb", "b"), ("<b></b>", "<b></b>"), ("", "")]:
        chat = own.turns(chat_of(say("a", content)))
        assert learnt(chat) == [f"{start}<|im_end|>"] and "<think>\n\n</think>\n\n" in chat.text
    own = template(
        (QWEN2 if marked else unmarked(QWEN2)).replace("loop.first %}{{- '\\n' }}", "loop.first %}")
    )
    given = "<think>\n\n</think>\n\nb"  # the row's own: to be learnt
    assert learnt(own.turns(chat_of(say("a", given)))) == [f"{given}<|im_end|>"]
    html = say("a", "", tool_calls=[call("write", text="<p></p>b")])
    assert '"<p></p>b"' in learnt(own.turns(chat_of(html)))[0]


def test_no_loss_on_the_end_of_a_block_that_the_prompt_begins():
    """As templates write that make the model think: the prompt ends in <think>."""
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    assert learnt(template(text).turns(chat_of(say("a", "b")))) == ["b<|im_end|>"]
    chat = template(text).turns(chat_of(say("a", "b", reasoning_content="B.")))
    assert learnt(chat) == ["B.\n</think>\n\nb<|im_end|>"]


def test_no_loss_on_a_block_behind_a_header_that_is_marked_too():
    text = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "<|im_start|>assistant\n<think>\n\n</think>\n{{ m.content }}<|im_end|>\n{% endgeneration %}"
        "{% else %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    assert learnt(template(text).turns(chat_of(say("a", "s", "b", "c")))) == [
        "s<|im_end|>\n",
        "c<|im_end|>\n",
    ]


def test_the_token_that_ends_a_turn_is_learnt_even_if_it_is_not_marked():
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}"
    )
    assert learnt(template(text).turns(chat_of(say("a", "b <|im_end|> c")))) == ["b <|im_end|> c<|im_end|>"]


def test_marks_that_cannot_be_placed_leave_it_to_the_beginnings():
    text = (
        "{% macro answer(m) %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{{ answer(m) }}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert learnt(template("Hi." + text).turns(chat_of(say("a", "b", "c", "d")))) == [
        "b<|im_end|>",
        "d<|im_end|>",
    ]


LLAMA_STOCK = """\
{#- in the manner of Llama 3.1's own: no content beside a call -#}
{%- for m in messages %}
    {%- if m.tool_calls %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + m.tool_calls[0].function.name + '"}<|eot_id|>' }}
    {%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
{#- Cutting Knowledge Date -#}"""
DROPS = "the chat template x.jinja leaves out its "
LOST = [
    (
        LLAMA_STOCK,
        say("a", "Let me see.", tool_calls=[call("add")]),
        None,
        f'messages[1]: {DROPS}content beside its tool_calls ("Let me see."): remove it, or set'
        ' training.chat_template to a template that keeps it (a shipped one, "llama3.1")',
    ),
    (  # without loss on it, and though the same text stands elsewhere
        LLAMA_STOCK,
        [*say("See.", "See.", tool_calls=[call("add")]), *say("b", "See.")],
        [0.0, 0.0, 0.0, 1.0],
        f'messages[1]: {DROPS}content beside its tool_calls ("See.")',
    ),
    (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        [{"role": "system", "content": "Be {brief}."}, *say("a", "b")],
        None,
        f'messages[0]: {DROPS}content ("Be {{brief}}."): remove it, or set training.chat_template to a template'
        " that keeps it (a file, or a shipped one)",
    ),
    (
        "{% for m in messages %}{% set _ = m.tool_calls %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        say("a", "b", tool_calls=[call("add")]),
        None,
        f'messages[1]: {DROPS}tool_calls ("add")',
    ),
    (
        "{% for m in messages %}{% set _ = m.reasoning_content %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        say("a", "b", reasoning_content="B."),
        None,
        f'messages[1]: {DROPS}reasoning_content ("B.")',
    ),
]


@pytest.mark.parametrize("text, messages, weights, sentence", LOST, ids=range(len(LOST)))
def test_what_a_template_leaves_out_is_an_error(text, messages, weights, sentence):
    with pytest.raises(ValueError) as error:
        template(text).turns(chat_of(messages, weights=weights))
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_what_a_template_writes_in_another_way_or_place_is_not_lost():
    moved = (  # the system in the user's turn, the answers of tools as JSON
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
        "{{ m.content | tojson if m.role == 'tool' else m.content | trim }}"
        "{{ messages[0].content if loop.first }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [
        {"role": "system", "content": "s"},
        *say(" a ", "\nb\n"),
        {"role": "tool", "content": 'x\n"y"'},
    ]
    assert learnt(template(moved).turns(chat_of([*messages, *say("c", "d")]))) == [
        "b<|im_end|>",
        "d<|im_end|>",
    ]
    # reasoning of turns without loss is dropped as the template does
    messages = [*say("a", "b", reasoning_content="B."), *say("c", "<think>\nD.\n</think>\n\nd", "e", "f")]
    [turn] = (
        template(QWEN3.replace("message.content }}", "message.content.split('</think>')[-1] }}"))
        .turns(chat_of(messages, weights=[0.0] * 5 + [1.0]))
        .turns
    )
    assert turn.message == 5


def test_a_template_that_rewrites_turns_is_refused_with_both_remedies():
    for text in (QWEN3, unmarked(QWEN3)):
        with pytest.raises(ValueError) as error:
            template(text).turns(chat_of(say("a", "b", "c", "d")))
        assert str(error.value) == (
            "messages[1]: the chat template x.jinja renders the chat up to here in another way once more"
            " messages follow (it changes or drops earlier text, such as reasoning): set training.chat_template to a template that keeps every turn"
            ' (a shipped one, "qwen3"), or training.multi_turn = "expand"'
        )
    counts = "{{ messages | length }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"\(a file, or a shipped one\), or training.multi_turn"):
        template(counts).turns(chat_of(say("a", "b", "c", "d")))


# ------------------------------------------------------------------------------------- training.chat_template


def test_a_chosen_template_replaces_the_tokenizers_own(folder, tmp_path):
    own, file = Tokenizer(str(folder)), tmp_path / "mine.jinja"
    file.write_text("Hi." + source("chatml"))
    chosen, named = Tokenizer(str(folder), str(file)), Tokenizer(str(folder), "qwen2.5")
    assert own.chosen_template == "" and chosen.chosen_template == file.read_text()
    assert named.chosen_template == source("qwen2.5")
    messages = say("a", "b")
    texts = [tokenizer.chat.render(messages) for tokenizer in (own, chosen, named)]
    assert texts[1] == "Hi." + texts[0] and texts[2].startswith("<|im_start|>system\nYou are Qwen")
    file.write_text("Ho." + source("chatml"))
    digests = {made.digest for made in (own, chosen, named, Tokenizer(str(folder), str(file)))}
    assert len(digests) == 4
    assert Tokenizer(str(folder), "chatml").digest == own.digest, "the same as the built-in one"
    assert Tokenizer(str(folder), "qwen3").chat.turns(chat_of(messages)).turns


BAD = [
    (
        "qwen4",
        'training.chat_template = "qwen4" is no shipped template, and no file that can be read (No such',
    ),
    ("qwen4", 'one of chatml, llama3, llama3.1, qwen2.5, qwen3 (did you mean "qwen3"?)'),
    ("llama3.1", 'training.chat_template = "llama3.1" needs the special token <|end_header_id|>, which the'),
    ("{folder}", "(Is a directory)"),
    ("{folder}/broken.jinja", "broken.jinja is not valid Jinja (line 1: "),
    (
        "{folder}/bytes.jinja",
        'bytes.jinja" is no shipped template, and no file that can be read (it is not UTF-8)',
    ),
]


@pytest.mark.parametrize("given, sentence", BAD)
def test_a_chat_template_that_cannot_be_used(given, sentence, tmp_path):
    raw_tokenizer("bytes", SPECIAL[:3], []).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "broken.jinja").write_text("{% for m in %}")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError) as error:
        Tokenizer(str(tmp_path), given.replace("{folder}", str(tmp_path)))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_run_checks_its_chat_template_and_exports_it(folder, tmp_path):
    """In the folder of the run's end and in what convert.py makes of its checkpoint, where transformers finds
    it. The tokenizer's own drops reasoning, which the run could not train on."""
    model, file = tmp_path / "model", tmp_path / "rows.jsonl"
    theirs("qwen3").save_pretrained(model)
    options = [f"--model.hf_assets_path={model}", "--training.chat_template=qwen3", "--training.seq_len=256"]
    checked = run(tmp_path, "--check", *options)
    assert (
        checked.returncode == 2 and "has no tokenizer: set model.tokenizer_path, or leave" in checked.stdout
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_text((folder / name).read_text())
    (model / "chat_template.jinja").write_text(QWEN3)
    checked = run(tmp_path, "--check", *options, "--training.chat_template=qwen4")
    assert checked.returncode == 2 and checked.stdout.count("\n") == 1
    assert checked.stdout.startswith('error: training.chat_template = "qwen4" is no shipped template')

    file.write_text(json.dumps({"messages": say("a", "b", "c", "d", reasoning_content="D.")}))
    options += ["--training.steps=1", "--lr_scheduler.warmup_steps=0", "--training.global_batch_size=1"]
    train(tmp_path, "run", file, *options, "--checkpoint.enable", "--checkpoint.last_save_in_hf")
    checkpoint, converted = tmp_path / "run" / "checkpoint" / "step-1", tmp_path / "converted"
    convert = str(REPO / "recipes" / "convert.py")
    made = run(tmp_path, str(checkpoint), str(converted), "--dtype=float32", TRAIN_FILE=convert)
    assert made.returncode == 0, made.stdout
    for saved in (checkpoint.with_name("step-1-hf"), converted):
        assert transformers.AutoTokenizer.from_pretrained(saved).chat_template == source("qwen3")
