"""Copies what recipes/plan.py predicted for each preset, from its first comment into its page in runs/.

python docs/write_runs.py
"""

import re
from pathlib import Path

DOCS = Path(__file__).parent
WANTED = re.compile(
    r"\w+ \S+, [\d,]+ parameters|\d+ ranks: |a step, of|GiB at the peak|fastest by"
    r"|  (tokens|longest|recomputed|sequences that|simulated bubble|seconds, |total  |beside it)"
)
BLOCK = re.compile(r"```text predicted\n.*?```", re.DOTALL)


def predicted(preset: str) -> str:
    """The lines of a preset's comment that its page shows."""
    comment = (DOCS.parent / "train_configs" / f"{preset}.toml").read_text().partition("\n\n[job]")[0]
    lines = [line[2:] for line in comment.splitlines()]
    start = next(number for number, line in enumerate(lines) if "recipes/plan.py" in line)
    kept = [line for line in lines[start + 2 :] if WANTED.match(line)]
    return "```text predicted\n" + "\n".join(kept) + "\n```"


def main() -> None:
    for page in (DOCS / "runs").glob("*.md"):
        text = page.read_text()
        if BLOCK.search(text):
            page.write_text(BLOCK.sub(lambda _: predicted(page.stem), text))


if __name__ == "__main__":
    main()
