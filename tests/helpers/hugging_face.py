"""Hugging Face folders for tests: tiny models of transformers, tokenizers, a chat template; and what our model
makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer

from chunkflow.execution.loss import loss_sum
from chunkflow.storage import hf_weights as hf
from models import families
from models.hf_config import model_of
from tests.helpers.reference import whole_sequence

CHATML = """\
{% for message in messages %}
    {% if message.role == 'assistant' %}
{{ '<|im_start|>assistant\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

WORDS = [
    "You are helpful. Be brief. What is 1 + 2? It is 3. And so on; the user asks, the assistant answers.\n\n",
    '<|im_start|>system user assistant tool\n<tool_response> {"name": "add", "arguments": {"a": 1}}\n',
    "    def f(x):\n        return x + 1\n\n",
] * 4


def raw_tokenizer(
    kind: str, special: list[str], added: list[str], texts: list[str] = WORDS, vocab_size: int = 700
) -> RawTokenizer:
    """Made as Qwen's and Llama 3's are ("bytes"), or as Llama 2's and Mistral's are ("metaspace"); both have
    all bytes. Trained on `texts`."""
    if kind == "bytes":
        raw = RawTokenizer(models.BPE())
        raw.normalizer = normalizers.NFC()
        words = Regex(
            r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        raw.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        raw.decoder = decoders.ByteLevel()
        alphabet, pieces = pre_tokenizers.ByteLevel.alphabet(), []
    else:
        raw = RawTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        raw.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet, pieces = [], [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special + pieces,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    saved = json.loads(raw.to_str())  # bytes are no special tokens
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in special]
    raw = RawTokenizer.from_str(json.dumps(saved))
    raw.add_tokens([AddedToken(text, normalized=False) for text in added])
    if kind == "bytes":
        raw.post_processor = processors.ByteLevel(trim_offsets=True)
    raw.enable_truncation(max_length=16)  # as the last use left it: files have that
    return raw


KINDS = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}  # names: the classes load slowly, which not every rank needs
ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn of DeepSeek": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 16},
}  # fmt: skip


def theirs(kind="llama", rope="default", seed=0, **changes):
    """A tiny model of transformers: random weights that make every part count."""
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32 if kind == "qwen3" else 16,
        "intermediate_size": 112, "vocab_size": 2048, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "tie_word_embeddings": kind == "qwen3",
        "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"} | ROPES[rope],
    }  # fmt: skip
    make_config, make_model = (
        getattr(transformers, KINDS[kind] + part) for part in ("Config", "ForCausalLM")
    )
    torch.manual_seed(seed)
    model = make_model(make_config(**sizes | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.size(1) ** -0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.5)
    return model


def ours(folder):
    name, args = model_of(folder)
    with torch.device("meta"):
        model = families[name].Transformer(args)
    model.to_empty(device="cpu")
    hf.load_weights(model, families[name], folder)
    return model


def chunk_of(tokens, labels):
    return whole_sequence(tokens, labels, loss_sum)


def logits_of(model, tokens):
    return model(tokens, whole_sequence(tokens, None, lambda hidden, weight, chunk: hidden @ weight.t()))


def rewrite(folder, **changes):
    """Changes keys of a folder's config.json; None removes one."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
