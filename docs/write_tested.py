"""Writes docs/tested.md, which features have been tested together, from the tests' own marks:

@pytest.mark.proves("never/always + LoRA + shared", "stages + LoRA")

says that LoRA is right under both ways to gather parameters, on sequences that ranks share, and on stages.
"+": in one run; "/": and, in another run."""

from __future__ import annotations

import ast
import re
from itertools import product
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).parent.parent
PAGE = REPO / "docs" / "tested.md"

# Word of a mark -> a pattern that is in the code of each test that has it.
LAYOUTS = {
    "one process": "", "never": "never|Pipeline|layout_config",
    "always": "always|layout_config|processes|ranks|LAYOUTS", "HSDP": "replica",
    "stages": "stages|pipeline|LAYOUTS", "virtual stages": "virtual|Interleaved",
    "stages x ranks": "shape|pipeline_parallel_degree=2|LAYOUTS",
    "shared": "spread|shared|most_ranks",
}  # fmt: skip
FEATURES = {
    "chunks": "whole_sequence|curve|reference", "k > 1": r"\bk\b|\[1, 2|chunked_gradients\(.*, 2",
    "k by group": "room", "no_enable": "enable|whole_sequences",
    "full": "full", "selective": "selective|op", "compile": "compile|prepared",
    "kv_offload": "kv_offload", "keep_attention": "keep_attention", "cpu_offload": "offload",
    "tied": "tie", "weights": "weight", "LoRA": "adapter", "DPO": "textbook|dpo", "bf16": "bf16|bfloat16",
    "float8": "float8", "int8": "int8", "AdamW8bit": "AdamW8bit", "validation": "validat|evaluate",
    "resume": "STOP|resume|stop|KillLoop|parts", "other layout": "stages|other",
}  # fmt: skip
WORDS = LAYOUTS | FEATURES
# Who calls one of these compares with whole sequences, or with the undisturbed run, and says what it proves.
COMPARISONS = ("assert_same_gradients", "assert_same_curves", "KillLoop")


class Test(NamedTuple):
    name: str  # file::function
    code: str  # its own, and what it names in its file
    combinations: list[set[str]]
    compares: bool


def expand(mark: str) -> list[set[str]]:
    return [set(words) for words in product(*(part.strip().split("/") for part in mark.split(" + ")))]


def tests_of(path: Path) -> list[Test]:
    kinds = ast.FunctionDef | ast.ClassDef | ast.Assign
    tree = [node for node in ast.parse(path.read_text()).body if isinstance(node, kinds)]
    nodes = {node.name if hasattr(node, "name") else ast.unparse(node.targets[0]): node for node in tree}
    names = {
        name: {getattr(part, "id", getattr(part, "arg", None)) for part in ast.walk(node)}
        for name, node in nodes.items()
    }
    found = []
    for test, function in nodes.items():
        if not test.startswith("test_"):
            continue
        known, new = set(), {test}
        while new:
            known |= new
            new = set().union(*(names[name] for name in new)) & nodes.keys() - known
        marks = [
            mark for mark in function.decorator_list if ast.unparse(mark).startswith("pytest.mark.proves(")
        ]
        function.decorator_list = [mark for mark in function.decorator_list if mark not in marks]
        code = "\n".join(ast.unparse(nodes[name]) for name in known)
        combinations = [words for mark in marks for text in mark.args for words in expand(text.value)]
        compares = any(re.search(rf"\b{name}\(", code) for name in COMPARISONS)
        found.append(Test(f"{path.name}::{test}", code, combinations, compares))
    return found


def all_tests() -> list[Test]:
    return [test for path in sorted((REPO / "tests").glob("test_*.py")) for test in tests_of(path)]


def table(rows, columns, tests: list[Test]) -> str:
    lines = ["| |" + "|".join(columns) + "|", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [
            [
                str(number)
                for number, test in enumerate(tests, start=1)
                if column != row and any({row, column} <= words for words in test.combinations)
            ]
            for column in columns
        ]
        lines.append(f"|{row}|" + "|".join(map(" ".join, cells)) + "|")
    return "\n".join(lines)


def page() -> str:
    tests = [test for test in all_tests() if test.combinations]
    said = []
    for number, test in enumerate(tests, start=1):
        sorted_words = [filter(words.__contains__, WORDS) for words in test.combinations]
        said.append(f"{number}. `{test.name}`: " + "; ".join(map(" + ".join, sorted_words)))
    layouts = table(["shared", *FEATURES], LAYOUTS, tests)
    return TEXT.format(layouts, table(FEATURES, FEATURES, tests), "\n".join(said))


TEXT = """# Tested combinations

Written by `python docs/write_tested.py` from marks of the tests. A number is a test of the list below
that has both in one run and compares it with whole sequences in one process: gradients to 1e-10 in fp64,
curves of a recipe to 1e-8, resumed runs to the bit. bf16, float8, int8 and AdamW8bit round by their nature:
they are held to margins. **An empty cell is not tested together**; it may work.

Layouts: `never` and `always` are `fsdp_reshard_after_forward` of FSDP2 ranks, virtual stages are two stages a
rank, shared is a sequence over several ranks. Features: chunks is all else at its default, k by group a k of
each group, no_enable whole sequences, full and selective activation checkpoints, cpu_offload parameters in
host memory, weights those of rows and tokens, other layout a resume on another layout.

## Features by layout

{}

## Features with each other, in any layout

{}

## The tests

{}
"""

if __name__ == "__main__":
    PAGE.write_text(page())
