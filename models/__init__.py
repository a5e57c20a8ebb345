"""Model definitions, one self-contained file a family: copy one, and give it a name here, to make another."""

from models import llama, qwen2, qwen3

families = {"llama3": llama, "qwen2": qwen2, "qwen3": qwen3}
