"""What becomes of a row, in every form that public data has: against transformers' rendering of the same chat
written out by hand, and sentences for what is refused."""

import copy
import json
import random
import re

import pytest
from transformers import PreTrainedTokenizerFast

from chunkflow.data.dataset import open_dataset
from chunkflow.data.rows import MEANING, RowSettings, read_rows, summed_up
from chunkflow.data.tokenise import tokenised
from chunkflow.data.tokenizer import Tokenizer
from tests.helpers.hugging_face import raw_tokenizer

pytestmark = pytest.mark.quick

# Writes all that a message can have; "silent", which only references have, takes the loss off an answer.
TEMPLATE = """\
{%- macro body(message) %}
    {%- if message.reasoning_content %}{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{%- endif %}
    {{- message.content or '' }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>' }}
{%- endmacro %}
{%- if tools %}{{- '<|im_start|>tools\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and not message.silent %}{%- generation %}{{- body(message) }}{%- endgeneration %}
    {%- elif message.role == 'tool' %}{{- (message.name or '') + '\n' + body(message) }}
    {%- else %}{{- body(message) }}{%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agent")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw_tokenizer("bytes", special, ["<think>", "</think>", "<tool_call>"]).save(
        str(folder / "tokenizer.json")
    )
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(str(folder))


def sequences(row, tokenizer, notes=None, **settings):
    before = copy.deepcopy(row)
    made = read_rows(row, RowSettings(tokenizer, 100_000, **settings), set() if notes is None else notes)
    assert row == before  # a record may be read again, with other settings
    return list(tokenised(made, tokenizer))


# ---------------------------------------------------------------------------------------------------- shapes


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def tool(content, **more):
    return {"role": "tool", "content": content, **more}


def call(name="add", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*made):
    return {"role": "assistant", "tool_calls": list(made)}


QA = [user("What is 1 + 2?"), assistant("It is 3.")]
FOUR = [user("a"), assistant("b b"), user("c"), assistant("d d")]
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "sums", "parameters": {"type": "object"}},
}
BARE = ADD["function"]
AGENT = [
    system("You are an agent."),
    user("1 + 2?"),
    assistant("Let me see.", tool_calls=[call(a=1, b="ü<")]),
    tool("3", name="add", tool_call_id="x"),
    assistant("3."),
]
WHOLE = "whole text: BOS, text, EOS"


def agent(key="messages", stringify=json.dumps, **row):
    """AGENT as agents' data sets have it: parquet, so that each message has all keys, and JSON strings."""
    keys = dict.fromkeys(["role", "content", "tool_calls", "name", "tool_call_id"])
    messages = copy.deepcopy(AGENT)
    for message in messages:
        for made in message.get("tool_calls") or []:
            made["function"]["arguments"] = stringify(made["function"]["arguments"])
            made["id"] = "x"
    return {key: [keys | message for message in messages], **row}


def turns(*pairs, **more):
    return {"conversations": [{"from": who, "value": text} for who, text in pairs], **more}


WILDCHAT = {
    "country": "Germany", "hashed_ip": "0f", "header": {"accept-language": "de", "user-agent": "x"}, "language": "German",
    "redacted": False, "state": "Berlin", "timestamp": None, "toxic": False, "turn_identifier": 22, "openai_id": None,
}  # fmt: skip

# name: (row, the same as messages, or as (text, loss) of plain text, or WHOLE, and the notes that are made)
SHAPES = {
    # chats, by every name and key
    "messages": ({"messages": QA}, QA),
    "conversations": (turns(("human", "What is 1 + 2?"), ("gpt", "It is 3.")), QA),
    "conversation": ({"conversation": QA}, QA),
    "trajectory": ({"trajectory": QA}, QA),
    "dialog": ({"dialog": FOUR}, FOUR),
    "conversations of role and content": ({"conversations": FOUR}, FOUR),
    "messages of from and value": ({"messages": turns(("human", "a"), ("gpt", "b"))["conversations"]}, [user("a"), assistant("b")]),
    "turns of both kinds": ({"dialog": [{"from": "user", "value": "a"}, assistant("b")]}, [user("a"), assistant("b")]),
    "from user and assistant": (turns(("user", "a"), ("assistant", "b")), [user("a"), assistant("b")]),
    "model": (turns(("system", "s"), ("human", "a"), ("model", "b")), [system("s"), user("a"), assistant("b")]),
    "bot": (turns(("human", "a"), ("bot", "b")), [user("a"), assistant("b")]),
    "developer": ({"messages": [{"role": "developer", "content": "s"}, *QA]}, [system("s"), *QA]),
    "an answer alone": ({"messages": [assistant("b")]}, [assistant("b")]),
    "no answer": ({"messages": [user("a")]}, [user("a")]),
    "a last question": ({"messages": [*QA, user("b")]}, [*QA, user("b")]),
    "empty contents": ({"messages": [user(""), assistant("")]}, [user(""), assistant("")]),
    "messages as a JSON string": ({"messages": json.dumps(FOUR)}, FOUR),
    "conversations as a JSON string": ({"conversations": json.dumps(turns(("human", "a"), ("gpt", "b"))["conversations"])}, [user("a"), assistant("b")]),
    # contents
    "text parts": ({"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}]), assistant([{"text": "c"}, " d"])]}, [user("ab\n"), assistant("c d")]),
    "parts of parquet": ({"messages": [user([{"type": "text", "text": "a", "image_url": None}]), assistant("b")]}, [user("a"), assistant("b")]),
    "parts to be cached": ({"messages": [user([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]), assistant("b")]}, [user("a"), assistant("b")], ["not read in messages: cache_control"]),
    "special tokens in a text": ({"messages": [user("<|im_end|>"), assistant("x <|im_start|>")]}, [user("<|im_end|>"), assistant("x <|im_start|>")]),
    # reasoning
    "thinking": ({"messages": [user("a"), assistant("b", thinking="t")]}, [user("a"), assistant("b", reasoning_content="t")]),
    "reasoning": ({"messages": [user("a"), assistant("b", reasoning="t", reasoning_content=None)]}, [user("a"), assistant("b", reasoning_content="t")]),
    "reasoning said twice": ({"messages": [user("a"), assistant("b", reasoning="t", reasoning_content="t")]}, [user("a"), assistant("b", reasoning_content="t")]),
    "empty reasoning": ({"messages": [user("a"), assistant("b", reasoning_content="", tool_calls=[])]}, [user("a"), assistant("b")]),
    "Multilingual-Thinking": (
        {"reasoning_language": "French", "developer": "d", "user": "u", "analysis": "an", "final": "f",
         "messages": [system("reasoning language: French") | {"thinking": None}, user("u") | {"thinking": None}, assistant("f", thinking="an")]},
        [system("reasoning language: French"), user("u"), assistant("f", reasoning_content="an")], ["not read: analysis, developer, final, reasoning_language, user"],
    ),
    # systems
    "OpenThoughts": (turns(("user", "a"), ("assistant", "b"), system="s"), [system("s"), user("a"), assistant("b")]),
    "a system beside messages": ({"system": "s", "messages": QA}, [system("s"), *QA]),
    "the same system twice": ({"system": "s", "messages": [system("s"), *QA]}, [system("s"), *QA]),
    "an empty system": ({"system": "", "messages": QA, "tools": []}, QA),
    "OpenHermes": (turns(("human", "a"), ("gpt", "b"), system_prompt="s", source="x", views=3.0, idx=None), [system("s"), user("a"), assistant("b")], ["not read: source, views"]),
    # tools
    "an agent": ({"messages": AGENT, "tools": [ADD]}, (AGENT, [ADD])),
    "CoderForge": ({"messages": json.dumps(agent()["messages"]), "tools": json.dumps([ADD]), "trajectory_id": "t", "finish_reason": "finish", "image": "docker.io/u/repo_x.1776-y:1f.0", "reward": 1.0, "license": "MIT"}, (AGENT, [ADD]), ["not read: finish_reason, image, license, reward, trajectory_id"]),
    "SWE-Zero": (agent("trajectory", instance_id="i"), AGENT, ["not read: instance_id"]),
    "OpenHands": (agent("trajectory", tools=[ADD | {"x": None}], model_patch="p", exit_status="submit", resolved=1), (AGENT, [ADD]), ["not read: exit_status, model_patch, resolved"]),
    "arguments as an object": (agent(stringify=dict), AGENT),
    "arguments of parquet": ({"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [{"id": None, "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None, "c": {"d": None}}}}]}]}, [user("a"), calls(call(a=1, c={}))]),
    "a null that was written": ({"messages": [user("a"), calls({"function": {"name": "add", "arguments": '{"a": null}'}})]}, [user("a"), calls(call(a=None))]),
    "no arguments": ({"messages": [user("a"), calls({"function": {"name": "f", "arguments": ""}}, {"function": {"name": "g"}})]}, [user("a"), calls(call("f"), call("g"))]),
    "calls without a function": ({"messages": [user("a"), calls({"id": "x", "name": "add", "arguments": '{"a": 1}'})]}, [user("a"), calls(call(a=1))]),
    "several calls": ({"messages": [user("a"), calls(call(a=1), call(b=[2, {"c": 3}])), tool("1"), tool("2")]}, [user("a"), calls(call(a=1), call(b=[2, {"c": 3}])), tool("1"), tool("2")]),
    "SWE-smith": (
        {"messages": json.dumps([
            system("s") | {"agent": "main", "message_type": "system_prompt"},
            {"role": "user", "content": [{"type": "text", "text": "fix it"}], "agent": "main", "message_type": "observation"},
            {"role": "assistant", "content": "I look.", "thought": "I look.", "action": "ls", "agent": "main", "message_type": "action",
             "tool_calls": [{"function": {"name": "bash", "arguments": '{"command": "ls"}'}, "id": "t", "type": "function", "index": 1}]},
            {"role": "tool", "content": [{"type": "text", "text": "a.py"}], "tool_call_ids": ["t"], "agent": "main", "message_type": "observation"},
        ]), "instance_id": "i", "patch": "p"},
        [system("s"), user("fix it"), assistant("I look.", tool_calls=[call("bash", command="ls")]), tool("a.py")],
        ["not read in messages: action, agent, message_type, thought, tool_call_ids", "not read: instance_id, patch"],
    ),
    "glaive": (
        turns(("human", "1 + 2?"), ("function_call", '{"name": "add", "arguments": {"a": 1}}'), ("observation", '{"sum": 3}'), ("gpt", "3"), system="s", tools=json.dumps([BARE])),
        ([system("s"), user("1 + 2?"), calls(call(a=1)), tool('{"sum": 3}'), assistant("3")], [BARE]),
    ),
    "a call that is an object": ({"messages": [user("a"), {"role": "tool_call", "content": {"name": "add", "arguments": '{"a": 1}'}}]}, [user("a"), calls(call(a=1))]),
    "several calls of a role": (turns(("human", "a"), ("tool_call", '[{"name": "f", "arguments": {}}, {"function": {"name": "g", "arguments": "{}"}}]'), ("tool_response", "1"), ("function", "2")), [user("a"), calls(call("f"), call("g")), tool("1"), tool("2")]),
    "ToolACE": (turns(("user", "a"), ("assistant", "[f(x=1)]"), ("tool", "[1]"), ("assistant", "b"), system="s"), [system("s"), user("a"), assistant("[f(x=1)]"), tool("[1]"), assistant("b")]),
    "tools as JSON strings": ({"messages": QA, "tools": [json.dumps(ADD), json.dumps(BARE)]}, (QA, [ADD, BARE])),
    "a written null in tools": ({"messages": QA, "tools": '[{"name": "f", "default": null}]'}, (QA, [{"name": "f", "default": None}])),
    "no tools": ({"messages": QA, "tools": "[]", "weight": None}, QA),
    # metadata
    "LMSys-Chat-1M": (
        {"conversation_id": "x", "model": "v", "conversation": FOUR, "turn": 2, "language": "English", "openai_moderation": [{"flagged": False}], "redacted": False}, FOUR,
        ["not read: conversation_id, language, model, openai_moderation, redacted, turn"],
    ),
    "WildChat": (
        {"conversation_hash": "x", "conversation": [message | WILDCHAT for message in QA]}, QA,
        ["not read in messages: country, hashed_ip, header, language, redacted, state, toxic, turn_identifier", "not read: conversation_hash"],
    ),
    "names": ({"messages": [user("a") | {"name": "Ann", "id": 1}, assistant("b", name="Bob"), tool("c", name="f")]}, [user("a"), assistant("b"), tool("c", name="f")], ["not read in messages: id, name"]),
    "LongAlign": ({"messages": FOUR, "length": 9}, FOUR, ["not read: length"]),
    # weights
    "SlimOrca": (
        {"conversations": [{"from": "system", "value": "s", "weight": None}, {"from": "human", "value": "a", "weight": 0.0}, {"from": "gpt", "value": "b", "weight": 1.0}]},
        [system("s"), user("a"), assistant("b")],
    ),
    "a turn without loss": ({"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d")]}, [user("a"), assistant("b", silent=True), user("c"), assistant("d")]),
    # several forms
    "UltraChat": ({"prompt": "a", "prompt_id": "x", "messages": FOUR}, FOUR, ['"messages" is read, and "prompt" beside it is not', "not read: prompt_id"]),
    "no_robots": ({"prompt": "a", "prompt_id": "x", "messages": QA, "category": "Generation"}, QA, ['"messages" is read, and "prompt" beside it is not', "not read: category, prompt_id"]),
    "messages before conversations": ({"conversations": FOUR, "messages": QA, "text": "t"}, QA, ['"messages" is read, and "conversations" beside it is not', '"messages" is read, and "text" beside it is not']),
    "conversations before prompt": ({"prompt": "p", "completion": "c", "conversations": QA}, QA, ['"conversations" is read, and "completion" beside it is not', '"conversations" is read, and "prompt" beside it is not']),
    "NuminaMath": ({"source": "s", "problem": "p", "solution": "q", "messages": QA}, QA, ['"messages" is read, and "problem" beside it is not', '"messages" is read, and "solution" beside it is not', "not read: source"]),
    # a question and its answer
    "prompt and completion of messages": ({"prompt": [system("s"), user("a"), assistant("b"), user("c")], "completion": [assistant("d"), user("e"), assistant("f")]}, [system("s"), user("a"), assistant("b", silent=True), user("c"), assistant("d"), user("e"), assistant("f")]),
    "prompt of messages, completion a string": ({"prompt": [user("a")], "completion": "b"}, [user("a"), assistant("b")]),
    "prompt a string, completion of messages": ({"prompt": "a", "completion": [assistant("b", thinking="t")], "system": "s", "tools": [ADD]}, ([system("s"), user("a"), assistant("b", reasoning_content="t")], [ADD])),
    "Alpaca": ({"instruction": "Sum.", "input": "1, 2", "output": "3", "text": "Below is"}, [user("Sum.\n\n1, 2"), assistant("3")], ['"instruction" is read, and "text" beside it is not']),
    "Alpaca without an input": ({"instruction": "Sum.", "input": "", "output": "3"}, [user("Sum."), assistant("3")]),
    "Alpaca with a system": ({"instruction": "Sum.", "output": "3", "system": "s", "history": []}, [system("s"), user("Sum."), assistant("3")]),
    "LongAlpaca": ({"instruction": "i", "output": "o", "file": "f", "input": ""}, [user("i"), assistant("o")], ["not read: file"]),
    "Dolly": ({"instruction": "i", "context": "c\nd", "response": "r", "category": "qa"}, [user("i\n\nc\nd"), assistant("r")], ["not read: category"]),
    "OpenOrca": ({"id": "x", "system_prompt": "s", "question": "q", "response": "r"}, [system("s"), user("q"), assistant("r")], ["not read: id"]),
    "OpenOrca without a system": ({"id": "x", "system_prompt": "", "question": "q", "response": "r"}, [user("q"), assistant("r")], ["not read: id"]),
    "OpenMathInstruct-2": ({"problem": "p", "generated_solution": "g", "expected_answer": "4", "problem_source": "m"}, [user("p"), assistant("g")], ["not read: expected_answer, problem_source"]),
    "OpenMathInstruct-1": ({"question": "p", "generated_solution": "g", "is_correct": True, "error_message": ""}, [user("p"), assistant("g")], ["not read: error_message, is_correct"]),
    "problem and solution": ({"problem": "p", "solution": "s", "answer": "4"}, [user("p"), assistant("s")], ['"problem" is read, and "answer" beside it is not']),
    "GSM8K": ({"question": "q", "answer": "a #### 4"}, [user("q"), assistant("a #### 4")]),
    "HelpSteer": ({"prompt": "p", "response": "r", "helpfulness": 3}, [user("p"), assistant("r")], ["not read: helpfulness"]),
    # plain
    "prompt and completion": ({"prompt": "a ", "completion": "b c", "weight": 1}, [("a ", 0), ("b c", 1), ("<|im_end|>", 1)]),
    "an empty completion": ({"prompt": "a ", "completion": ""}, [("a ", 0), ("<|im_end|>", 1)]),
    "FineWeb": ({"text": "a b", "id": "x", "url": "u", "language_score": 0.9}, [("<|endoftext|>", 1), ("a b", 1), ("<|im_end|>", 1)], ["not read: id, language_score, url"]),
    "The Stack": ({"content": "def f():", "path": "x.py"}, [("<|endoftext|>", 1), ("def f():", 1), ("<|im_end|>", 1)], ["not read: path"]),
    "Cosmopedia": ({"prompt": "p", "text": "a b", "format": "blog"}, [("<|endoftext|>", 1), ("a b", 1), ("<|im_end|>", 1)], ['"text" is read, and "prompt" beside it is not', "not read: format"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_tokens_and_mask_are_those_of_transformers(name, tokenizer, reference):
    row, expected, *said = SHAPES[name]
    notes = set()
    [sequence] = sequences(row, tokenizer, notes)
    if isinstance(expected[0], tuple):
        encoded = [(reference(text, add_special_tokens=False)["input_ids"], loss) for text, loss in expected]
        ids = sum((part for part, _ in encoded), [])
        mask = sum(([loss] * len(part) for part, loss in encoded), [])
    else:
        messages, tools = expected if isinstance(expected[0], list) else (expected, None)
        rendered = reference.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True, truncation=False
        )
        ids, mask = rendered["input_ids"], rendered["assistant_masks"]
    assert sequence.tokens == ids
    assert sequence.labels == [token if loss else -100 for token, loss in zip(ids, mask)]
    assert sequence.weights is None and sequence.weight == 1
    assert summed_up(notes) == sorted(sum(said, []))


def test_there_are_shapes_enough():
    assert len(SHAPES) >= 60


# ------------------------------------------------------------------------------------- wrong in silence once


def test_a_loss_mask_is_not_ignored(tokenizer):
    [sequence] = sequences({"input_ids": [5, 6, 7, 8], "loss_mask": [0, 1, 0, 1]}, tokenizer)
    assert sequence.tokens == [5, 6, 7, 8] and sequence.labels == [-100, 6, -100, 8]


def test_a_system_beside_conversations_is_not_lost(tokenizer):
    [sequence] = sequences(turns(("human", "a"), ("gpt", "b"), system="Speak Latin."), tokenizer)
    assert tokenizer.decode(sequence.tokens).startswith("<|im_start|>system\nSpeak Latin.")


def test_arguments_in_a_string_are_encoded_once(tokenizer):
    """As Qwen2.5's and Llama 3.1's templates write them: `arguments | tojson`."""
    row = {"messages": [user("a"), calls({"function": {"name": "add", "arguments": '{"a": "b"}'}})]}
    [sequence] = sequences(row, tokenizer)
    assert '"arguments": {"a": "b"}' in tokenizer.decode(sequence.tokens)


# ------------------------------------------------------------------------------ token ids, weights, plain text


def test_rows_of_token_ids():
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "position_ids": [0, 1, 2], "id": "x"}
    cases = {  # more keys: labels and weights
        (): ([5, 6, 7], None),
        (("labels", (-100, 6, 9)),): ([-100, 6, 9], None),
        (("labels", None), ("loss_mask", None)): ([5, 6, 7], None),
        (("loss_mask", (0, 1, 1)),): ([-100, 6, 7], None),
        (("loss_mask", (False, True, 0.0)),): ([-100, 6, -100], None),
        (("loss_mask", (0.25, 0, 3)),): ([5, -100, 7], [0.25, 1.0, 3.0]),
    }
    for more, (labels, weights) in cases.items():
        more = {key: value and list(value) for key, value in more}
        [sequence] = sequences(row | more, None)
        assert (sequence.tokens, sequence.labels, sequence.weights) == ([5, 6, 7], labels, weights)


def test_weights_of_messages_and_rows(tokenizer):
    messages = [user("a") | {"weight": 0}, assistant("b", weight=0.5), user("c"), assistant("d", weight=2), user("e"), assistant("f")]  # fmt: skip
    [sequence] = sequences({"messages": messages, "weight": 0.25}, tokenizer)
    end, weights = tokenizer.encode("<|im_end|>"), {}
    for label, weight in zip(sequence.labels, sequence.weights):
        if label >= 0:
            weights.setdefault(weight, []).append(label)
    assert weights == {
        weight: tokenizer.encode(text) + end for weight, text in ((0.5, "b"), (2.0, "d"), (1.0, "f"))
    }
    assert sequence.weight == 0.25
    for row in ({"text": "a"}, {"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}, {"input_ids": [1]}):  # fmt: skip
        [sequence] = sequences(row | {"weight": 3}, tokenizer)
        assert (sequence.weight, sequence.weights) == (3.0, None)
        assert [sequence.weight for sequence in sequences(row | {"weight": 0.0}, tokenizer)] == [0.0]


def test_weights_in_plain_chatml():
    shipped = Tokenizer()
    [sequence] = sequences({"messages": [user("a"), assistant("b", weight=0.5)]}, shipped)
    answer = shipped.encode("b") + shipped.encode("<|im_end|>")
    assert [label for label in sequence.labels if label >= 0] == answer
    assert [weight for label, weight in zip(sequence.labels, sequence.weights) if label >= 0] == [0.5] * len(
        answer
    )


def test_a_question_and_its_answer_without_a_chat_template():
    """Prompt, line break, completion; what else asks comes first, behind blank lines."""
    shipped = Tokenizer()
    cases = {
        "q\n\nc\n": {"instruction": "q", "context": "c", "response": "r"},
        "q\n": {"problem": "q", "solution": "r"},
        "s\n\nq\n": {"system_prompt": "s", "question": "q", "response": "r"},
    }
    for asked, row in cases.items():
        [sequence] = sequences(row, shipped)
        prompt, answer = shipped.encode(asked), [*shipped.encode("r"), shipped.eos_id]
        assert sequence.tokens == prompt + answer and sequence.labels == [-100] * len(prompt) + answer
    [sequence] = sequences({"prompt": [user("q")], "completion": [assistant("r")]}, shipped)
    assert (
        shipped.decode(sequence.tokens)
        == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nr<|im_end|>\n"
    )
    with pytest.raises(
        ValueError, match='the row has "tools" beside "question", which is not read: remove it'
    ):
        sequences({"question": "q", "answer": "a", "tools": [ADD]}, shipped)


def test_one_sequence_for_each_turn():
    shipped = Tokenizer()
    row = {
        "messages": [user("a"), assistant("b"), user("c"), assistant("d", weight=0), assistant("e", weight=2)]
    }
    first, second = sequences({**row, "weight": 0.5}, shipped, multi_turn="expand")
    [whole] = sequences(row, shipped)
    assert second.tokens == whole.tokens and first.tokens == whole.tokens[: len(first.tokens)]
    end = shipped.encode("<|im_end|>")
    for sequence, answer, weights in ((first, "b", {1.0}), (second, "e", {1.0, 2.0})):
        assert [label for label in sequence.labels if label >= 0] == shipped.encode(answer) + end
        assert set(sequence.weights or [1.0]) == weights and sequence.weight == 0.5
    [alone] = sequences({"messages": [user("a")]}, shipped, multi_turn="expand")
    assert set(alone.labels) == {-100}


# --------------------------------------------------------------------------------------------------- columns


def test_columns_rename(tokenizer):
    cases = [
        ({"prompt": "q", "completion": "a"}, {"q": "x ", "a": "y"}, {"prompt": "x ", "completion": "y"}),
        ({"messages": "chat"}, {"chat": json.dumps(QA)}, {"messages": QA}),
        ({"text": "body"}, {"body": "x", "text": None}, {"text": "x"}),
        ({"instruction": "query", "output": "answer"}, {"query": "x", "answer": "y"}, {"instruction": "x", "output": "y"}),
        ({"prompt": "completion", "completion": "prompt"}, {"prompt": "y", "completion": "x"}, {"prompt": "x", "completion": "y"}),
        ({"input_ids": "tokens", "loss_mask": "mask"}, {"tokens": [1, 2], "mask": [0, 1]}, {"input_ids": [1, 2], "loss_mask": [0, 1]}),
        ({"tools": "functions", "system": "sys", "weight": "w"}, {"messages": QA, "functions": [ADD], "sys": "s", "w": 0.5}, {"messages": QA, "tools": [ADD], "system": "s", "weight": 0.5}),
        # what is named is read, whatever else the row has
        ({"prompt": "problem", "completion": "solution"}, {"problem": "x", "solution": "y", "messages": QA}, {"prompt": "x", "completion": "y"}),
    ]  # fmt: skip
    for columns, row, ours in cases:
        assert sequences(row, tokenizer, columns=columns) == sequences(ours, tokenizer)


BAD_COLUMNS = [
    ({"prompt": "q"}, {"prompt": "x", "completion": "y"}, 'training.columns names "q" for "prompt", and the row has ["prompt", "completion"]: write the name of one'),
    ({"prompt": "q", "text": "q"}, {"q": "x"}, 'training.columns names "q" for "text", and for another key too: write'),
    ({"prompt": "q"}, {"q": "x", "prompt": "z", "completion": "y"}, 'has both "prompt" and "q", which training.columns names for it: remove one'),
    ({"completion": "chosen"}, {"prompt": "x", "chosen": "y", "rejected": "z"}, 'the row has "rejected" beside "prompt", which is not read: judged answers'),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_COLUMNS, ids=range(len(BAD_COLUMNS)))
def test_columns_that_do_not_fit(case, tokenizer):
    columns, row, sentence = case
    with pytest.raises(ValueError) as error:
        sequences(row, tokenizer, columns=columns)
    assert sentence in str(error.value)


# --------------------------------------------------------------------------------------------------- refused


def chat(*messages, **more):
    return {"messages": [user("a"), *messages], **more}


def called(function, **more):
    return chat({"role": "assistant", "content": None, "tool_calls": [{"function": function, **more}]})


CALL = 'a call is {"name", "arguments"}, or that under "function", with a JSON object as arguments'
REFUSED = [
    # forms
    ({"Text": "a"}, 'none of the known keys (it has ["Text"]): a row is {"text"}, {"messages"}'),
    ({"input": "a", "output": "b"}, 'has "output" without "instruction": a row is'),
    ({"instruction": "a"}, 'has "instruction" without "output": '),
    ({"problem": "a", "answer": "4"}, 'without "'),
    ({"loss_mask": [1]}, 'has "loss_mask" without "input_ids"'),
    ({"prompt": "a", "completion": None}, "completion is null: it must be a string, write it"),
    ({"messages": None}, "messages is null: it must be a list, write it"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, 'has "chosen", which is not read: judged answers are for preference training'),
    ({"prompt": "a", "completion": "b", "label": False}, 'has "label" beside "prompt": true or false of one answer is for KTO'),
    ({"chosen": QA, "rejected": QA}, 'has "chosen", which is not read: judged answers'),
    ({"messages": QA, "input_ids": [1]}, 'has both "messages" and "input_ids": a row is'),
    # keys with a meaning
    (chat(chosen="b"), 'has "chosen" beside "messages", which is not read: judged answers'),
    (chat(rejected=[user("b")]), 'has "rejected" beside "messages", which is not read'),
    (chat(chat_template_kwargs={"enable_thinking": False}), 'has "chat_template_kwargs" beside "messages", which is not read: templates get no arguments'),
    (chat(images=["x.png"]), 'has "images" beside "messages", which is not read: only text is trained'),
    ({"text": "a", "image": {"bytes": "x"}}, 'has "image" beside "text"'),
    (chat(image="coco/train2017/000000033471.jpg"), 'has "image" beside "messages", which is not read: only text is trained'),
    (chat(image="iVBORw0KGgo/AAAA" + 99 * "+/9j"), 'has "image" beside "messages"'),
    (chat(image="data:image/png;base64,iVBO"), 'has "image" beside "messages"'),
    (chat(image="000000033471"), 'has "image" beside "messages"'),
    ({"messages": [user("<image>\nWhat is it?"), assistant("A cat.")], "image": "coco/000000033471"}, 'has "image" beside "messages"'),
    ({"text": "a", "audio": "x"}, 'has "audio" beside "text"'),
    (chat(videos=["x"]), 'has "videos" beside'),
    (chat(documents=[{"text": "d"}]), 'has "documents" beside "messages", which is not read: write them into the messages'),
    (chat(functions=[BARE]), 'has "functions" beside "messages", which is not read: write "tools", or name it in training.columns'),
    (chat(completion="b"), 'has "completion" beside "messages"'),
    (chat(labels=[1]), 'has "labels" beside "messages"'),
    ({"text": "a", "loss_mask": [1]}, 'has "loss_mask" beside "text"'),
    ({"text": "a", "system": "s"}, 'has "system" beside "text"'),
    ({"text": "a", "tools": [ADD]}, 'has "tools" beside "text"'),
    ({"text": "a", "sample_weight": 0.5}, 'has "sample_weight" beside "text", which is not read: write "weight"'),
    ({"prompt": "a", "completion": "b", "system": "s"}, 'has "system" beside "prompt"'),
    ({"prompt": "a", "completion": "b", "context": "c"}, 'has "context" beside "prompt"'),
    ({"instruction": "a", "output": "b", "reasoning": "r"}, 'has "reasoning" beside "instruction"'),
    ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, 'has "history" beside "instruction", which is not read: write a chat'),
    ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, 'has both "input" and "context": remove one'),
    ({"prompt": "a", "completion": "b", "completion_mask": [1]}, 'has "completion_mask" beside "prompt", which is not read: write "loss_mask"'),
    ({"input_ids": [1], "system": "s"}, 'has "system" beside "input_ids"'),
    ({"input_ids": [1], "seq_lengths": [1]}, 'has "seq_lengths" beside "input_ids", which is not read: packed sequences'),
    # token ids
    ({"input_ids": [1, 2], "labels": [1, 2], "loss_mask": [1, 1]}, 'has both "labels" and "loss_mask"'),
    ({"input_ids": [1, 2], "loss_mask": [1]}, '"loss_mask" has 1 entries and "input_ids" 2: give one entry a token'),
    ({"input_ids": [1, 2], "loss_mask": [1, -1]}, "loss_mask[1] is -1: it must be 0, 1 or another finite weight"),
    ({"input_ids": [1, 2], "loss_mask": [1, float("inf")]}, "loss_mask[1] is Infinity: it must be"),
    ({"input_ids": [1, 2], "loss_mask": [float("nan"), 1]}, "loss_mask[0] is NaN: it must be"),
    ({"input_ids": [1, 2], "loss_mask": ["1", 1]}, 'loss_mask[0] is "1": it must be'),
    ({"input_ids": [1, 2], "loss_mask": "11"}, 'loss_mask is "11": it must be a list'),
    ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "attention_mask is [1, 0]: padding is not read"),
    ({"input_ids": [1, 2], "attention_mask": [1]}, '"attention_mask" has 1 entries'),
    ({"input_ids": [1, 2], "position_ids": [0, 0]}, "position_ids is [0, 0]: positions are counted from 0"),
    # weights
    ({"text": "a", "weight": -1}, "weight is -1: it must be a finite number of at least 0"),
    ({"text": "a", "weight": True}, "weight is true: it must be a finite number"),
    ({"text": "a", "weight": "1"}, 'weight is "1": it must be a finite number'),
    ({"input_ids": [1], "weight": float("nan")}, "weight is NaN: it must be a finite number"),
    ({"text": "a", "weight": 10**400}, "it must be a finite number"),
    (chat(assistant("b", weight=float("inf"))), "messages[1].weight is Infinity: it must be"),
    ({"messages": [user("a") | {"weight": 0.5}]}, "messages[0].weight is 0.5, and there is loss on the assistant's messages only"),
    ({"prompt": [user("a"), assistant("b", weight=1)], "completion": "c"}, "prompt[1].weight is 1, and there is loss on the completion only"),
    (chat(assistant("b", train=False)), 'messages[1] has "train", which is not read: write "weight"'),
    (chat(assistant("b", training=True)), 'messages[1] has "training", which is not read: write "weight"'),
    # messages
    (chat("b"), 'messages[1] is "b": it must be an object with "role" and "content", or "from"'),
    (chat(None), "messages[1] is null: it must be an object"),
    (chat({"role": "ai", "content": "b"}), 'messages[1] has the role "ai": rename it to one of system, user, assistant, tool'),
    (chat({"role": ["user"], "content": "b"}), 'messages[1] has the role ["user"]: rename it'),
    (chat({"from": "gpt", "text": "b"}), 'messages[1] has the keys ["from", "text"]: it must be an object'),
    (chat({"role": "assistant", "content": None}), "messages[1].content is null: it must be a string"),
    (chat({"from": "gpt", "value": None}), "messages[1].value is null: it must be a string"),
    (chat({"role": "assistant", "content": "b", "value": "c"}), 'messages[1] has two keys for "content", which differ'),
    (chat(assistant("b", thinking="c", reasoning="d")), 'messages[1] has two keys for "reasoning_content", which differ'),
    (chat(user("b") | {"thinking": "c"}), 'messages[1] has "reasoning_content" and the role "user": only an assistant'),
    (chat(assistant("b", thinking=["c"])), 'messages[1].reasoning_content is ["c"]: it must be a string'),
    (chat(assistant({"text": "b"})), 'messages[1].content is {"text": "b"}: it must be a string, or a list of text parts'),
    (chat(user([{"type": "image_url", "image_url": {"url": "x"}}])), 'messages[1].content[0] is {"type": "image_url"'),
    (chat(user([{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "b"}])), "messages[1].content[1] is"),
    (chat(user([{"text": "a", "image": "x"}])), 'messages[1].content[0] is {"text": "a", "image": "x"}: only text'),
    (chat(user("\ud800")), "messages[1].content has \\ud800 at position 0, which is half a character"),
    (chat(assistant("b", function_call={"name": "f"})), 'messages[1] has "function_call", which is not read in a message: write "tool_calls"'),
    (chat(assistant("b", documents=["d"])), 'messages[1] has "documents", which is not read in a message'),
    ({"messages": [system("s") | {"tools": [ADD]}]}, 'messages[0] has "tools", which is not read in a message'),
    (chat(assistant("b", function_call={"name": "f"})), 'messages[1] has "function_call", which is not read'),
    (chat(assistant("b", channel="final")), 'messages[1] has "channel", which the chat template'),
    (chat(assistant("b", thought="not in it")), 'messages[1] has "thought", which the chat template'),
    ({"dialog": ["hello"]}, 'dialog[0] is "hello": it must be an object'),
    ({"conversation": [{"input": "a", "output": "b"}]}, 'conversation[0] has the keys ["input", "output"]'),
    ({"conversations": {"from": ["human"]}}, '"conversations" is {"from": ["human"]}: it must be a list'),
    ({"messages": "not JSON"}, '"messages" is "not JSON": it must be a list of'),
    ({"messages": '{"role": "user"}'}, 'it must be a list of {"role", "content"} objects'),
    ({"messages": "[" * 100_000}, "as a JSON string (not valid JSON: RecursionError)"),
    ({"trajectory": []}, '"trajectory" is an empty list'),
    # systems and tools
    ({"system": "s", "messages": [system("t"), *QA]}, 'the row has the system prompt "s" and messages[0] another, "t"'),
    ({"system": "s", "system_prompt": "t", "messages": QA}, 'the row has both "system" and "system_prompt"'),
    ({"system": ["s"], "messages": QA}, 'system is ["s"]: it must be a string'),
    (chat(tools="add(a, b)"), 'tools is "add(a, b)": it must be a list of objects, or that as a JSON string (not valid JSON: '),
    (chat(tools='{"name": "add"}'), 'tools is {"name": "add"}: it must be a list of objects'),
    (chat(tools=[3]), "tools has 3: it must be a list of objects"),
    (chat(tools=["add"]), 'a tool is "add": it must be an object, or that as a JSON string'),
    # calls
    (called({"name": "f", "arguments": "{"}), 'messages[1].tool_calls[0].function.arguments is "{": it must be an object, or that as a JSON string (not valid JSON: '),
    (called({"name": "f", "arguments": "[1]"}), f"messages[1].tool_calls[0] has the arguments [1]: {CALL}"),
    (called({"name": "f", "arguments": 3}), "messages[1].tool_calls[0] has the arguments 3: "),
    (called({"arguments": {}}), f'messages[1].tool_calls[0] is {{"function": {{"arguments": {{}}}}}}: {CALL}'),
    (called({"name": "f", "parameters": {}}), 'messages[1].tool_calls[0] has "parameters", which is not read'),
    (called({"name": "f"}, result=3), 'messages[1].tool_calls[0] has "result", which is not read'),
    (called({"name": "f"}, type="code"), 'messages[1].tool_calls[0] has the type "code": only "function" is read'),
    (called("f"), 'messages[1].tool_calls[0] is {"function": "f"}: a call is'),
    (chat(calls(3)), "messages[1].tool_calls[0] is 3: a call is"),
    (chat({"role": "assistant", "tool_calls": {"name": "f"}}), 'messages[1].tool_calls is {"name": "f"}: it must be a list of calls'),
    (chat(user("b") | {"tool_calls": [call()]}), 'messages[1] has "tool_calls" and the role "user": only an assistant'),
    (chat({"role": "function_call", "content": "f(1)"}), 'messages[1].content is "f(1)": it must be the call of the role "function_call"'),
    (chat({"role": "function_call", "content": "[]"}), 'messages[1] has the role "function_call" and no call as its content'),
    (chat({"role": "tool_call", "content": '{"tool": "f"}'}), 'messages[1].content[0] is {"tool": "f"}: a call is'),
    (chat({"role": "tool_call", "content": '{"name": "f"}', "tool_calls": [call()]}), 'has the role "tool_call" and "tool_calls"'),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused_is_one_sentence(case, tokenizer):
    row, fragment = case
    with pytest.raises(ValueError) as error:
        sequences(row, tokenizer)
    sentence = str(error.value)
    assert fragment in sentence and "\n" not in sentence and len(sentence) < 500
    assert re.search(
        r": .*(write|remove|rename|give|add|must be|correct|repair|choose|a call is|only)", sentence
    )


# ----------------------------------------------------------------------------------------- nothing is lost


QUESTIONS = [
    "prompt",
    "completion",
    "instruction",
    "output",
    "response",
    "question",
    "answer",
    "problem",
    "solution",
]
MEANT = [
    "input",
    "context",
    "system",
    "system_prompt",
    "history",
    "chosen",
    "rejected",
    "functions",
    "images",
    "documents",
]
OF_MESSAGES = ["reasoning", "thinking", "reasoning_content", "language", "hashed_ip", "tools", "function", "text", "thought", "train", "name", "unknown"]  # fmt: skip


def random_row(draw):
    """A row of keys of all kinds, and its marks: words that are nowhere else -> the keys that they are under."""
    marks = {}

    def mark(*keys):
        marks[f"m{len(marks)}w"] = keys
        return f"m{len(marks) - 1}w"

    def some(keys, chance):
        return [key for key in keys if draw.random() < chance]

    def message(form):
        role, content = draw.choice([("role", "content"), ("from", "value"), ("from", "content")])
        said = draw.choice(
            ["system", "user", "human", "gpt", "assistant", "tool", "observation", "tool_call"]
        )
        text = mark(form, "content")
        if said == "tool_call":
            text = json.dumps({"name": text, "arguments": {mark(form): [mark(form)]}})
        elif draw.random() < 0.15:
            kind = draw.choice(["text", "text", "image"])
            text = [{"type": "text", "text": text}, {"type": kind, "text": mark(form, "content")}]
        made = {role: said, content: text}
        if said in ("gpt", "user") and draw.random() < 0.2:
            arguments = draw.choice([dict, json.dumps])({mark(form): mark(form)})
            function = {"name": mark(form), "arguments": arguments}
            made["tool_calls"] = [draw.choice([function, {"function": function, "id": None}])]
        # a tool's name may be lost: as its id, it says which call it answers, as the order does
        keys = [key for key in OF_MESSAGES if key != "name" or said not in ("tool", "observation")]
        return made | {key: mark(form, key) for key in some(keys, 0.03)}

    row = {}
    for form in some(["messages", "conversations", "trajectory"], 0.2):
        turns = [message(form) for _ in range(draw.randint(1, 4))]
        row[form] = draw.choice([list, list, json.dumps])(turns)
    for key in some(QUESTIONS, 0.25) + some(["text", "content", "id", "url"], 0.25) + some(MEANT, 0.05):
        row[key] = mark(key)
    if draw.random() < 0.1:
        row["tools"] = draw.choice([list, json.dumps])([{"name": mark("tools")}])
    keys = list(row)
    draw.shuffle(keys)
    return {key: row[key] for key in keys}, marks


def said_of(keys, notes):
    """Whether the notes name one of the keys."""
    said = '"{0}" beside it is not', "not read: {0}", "not read in messages: {0}"
    return any(note.endswith(words.format(key)) for note in notes for words in said for key in keys)


@pytest.mark.parametrize("shipped", [False, True])
def test_all_of_a_row_is_rendered_or_noted_or_the_row_is_refused(shipped, tokenizer):
    tokenizer = Tokenizer() if shipped else tokenizer
    draw, refused, read, noted = random.Random(0), 0, 0, 0
    for _ in range(4000):
        row, marks = random_row(draw)
        notes = set()
        try:
            made = read_rows(row, RowSettings(tokenizer, 1 << 20), notes)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        [one] = made
        rendered = (
            one.chat.text if one.chat else "".join(text for text, _ in one.spans if isinstance(text, str))
        )
        for mark, keys in marks.items():
            assert mark in rendered or said_of(keys, notes), (row, mark, notes)
        read += any(mark in rendered for mark in marks)
        noted += any(mark not in rendered for mark in marks)
    assert min(refused, read, noted) > 300, (refused, read, noted)


def test_every_key_with_a_meaning_is_refused_where_it_is_not_read(tokenizer):
    for key in MEANING.keys() - {"input_ids"}:
        with pytest.raises(ValueError, match=f'the row has "{key}" beside "text", which is not read'):
            sequences({"text": "a", key: ["b"]}, tokenizer)
        sequences({"text": "a", key: None}, tokenizer)
        sequences({"text": "a", key: []}, tokenizer)


def test_a_dataset_says_once_what_is_not_read(tokenizer, tmp_path, caplog):
    rows = [
        {"q": "a", "a": "b", "id": 1, "text": "t"},
        {"q": "a", "a": "b", "source": "x"},
        {"q": "a", "a": "b"} | WILDCHAT,
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    columns = {"instruction": "q", "output": "a"}
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level("INFO"):
            dataset = open_dataset(
                "jsonl",
                str(path),
                tokenizer,
                vocab_size=1000,
                seed=0,
                cache_dir=str(tmp_path),
                columns=columns,
            )
        assert [record.message for record in caplog.records if "read" in record.message] == [
            '"instruction" is read, and "text" beside it is not',
            "not read: country, hashed_ip, header, id, language, redacted, source, state, toxic, turn_identifier",
        ]
    [expected] = sequences({"instruction": "a", "output": "b"}, tokenizer)
    assert len(dataset) == 9 and dataset.row(4, dataset.lengths[4])[0].tolist() == expected.tokens


def test_many_keys_are_one_note():
    notes = {"not read: b", "not read: a", "not read in messages: c", "x is read"}
    assert summed_up(notes) == ["not read in messages: c", "not read: a, b", "x is read"]
    [sentence] = summed_up({f"not read: {number:03}" for number in range(200)})
    assert sentence.startswith("not read: 000, 001") and sentence.endswith("049 and 150 more")
