"""What is written in README.md and docs/: pages, and the commands in them."""

import re
from pathlib import Path

REPO = Path(__file__).parent.parent.parent
DOCS = REPO / "docs"
# A fenced block: its language, the word behind it, its text.
BLOCK = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    return [REPO / "README.md", *sorted(DOCS.rglob("*.md"))]


def commands_of(text: str) -> list[str]:
    """Commands in code blocks, in tables and elsewhere between backticks. In a table row, arguments that follow
    a command are for the same program."""
    found = []
    for language, _, block in BLOCK.findall(text):
        if language in ("bash", "console"):
            lines = block.replace("\\\n", "").strip().splitlines()
            prompt = "$ " if language == "console" else ""  # other lines of a console are output
            found += [line.removeprefix(prompt) for line in lines if line.startswith(prompt)]
    for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines():
        program = None
        for code in re.findall(r"`([^`]+)`", line):
            if re.match(r"(\w+=\S+ )*(\./run_\w+\.sh|python|sbatch)\b", code) and code != "run_train.sh":
                program = code.partition(" --")[0]
                found.append(code)
            elif code.startswith("--") and line.startswith("|") and program:
                found.append(f"{program} {code}")
    return list(dict.fromkeys(re.sub(" +", " ", command) for command in found))
