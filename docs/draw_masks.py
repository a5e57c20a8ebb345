"""Draws pictures/masks.png of data.md: a chat of two turns as chat templates write it, coloured by loss.

python docs/draw_masks.py [FILE]
"""

import json
import sys
import tempfile
from os.path import commonprefix
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent.parent)
)  # tests/ has a tokenizer, and a template like Qwen3's own

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from chunkflow.data.rows import RowSettings, read_rows
from chunkflow.data.tokenise import tokenised
from chunkflow.data.tokenizer import Tokenizer
from tests.helpers.hugging_face import raw_tokenizer
from tests.test_chat import QWEN3

CHAT = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "reasoning_content": "Add them.", "content": "3"},
    {"role": "user", "content": "Double it."},
    {"role": "assistant", "reasoning_content": "Twice 3.", "content": "6"},
]
WORDS = "user\nassistant\n1 + 2?\nAdd them.\nDouble it.\nTwice 3."
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# two in turn show where a token ends
LOSS, NO_LOSS, LEFT_OUT = ("#8fd987", "#b4e8ad"), ("#dcdcdc", "#ebebeb"), ("#f2a29b", "#f7bdb8")
COLUMNS, LETTER, HEIGHT = 65, 0.088, 0.21  # characters of a line; inches of a character and of a line
Token = tuple[str, tuple[str, str]]  # its text and colours


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("pictures") / "masks.png"
    with tempfile.TemporaryDirectory() as folder:
        raw = raw_tokenizer("bytes", SPECIAL, ["<think>", "</think>"], [WORDS] * 2, 2000)
        raw.save(f"{folder}/tokenizer.json")
        Path(folder, "tokenizer_config.json").write_text(json.dumps({"chat_template": QWEN3}))
        own, shipped = Tokenizer(folder), Tokenizer(folder, "qwen3")
        panels = [
            ("Qwen3's own template drops the first reasoning: refused", [refused(own)]),
            ('training.chat_template = "qwen3": one sequence', sequences(shipped)),
            (
                'training.multi_turn = "expand": a sequence for each answer',
                sequences(own, multi_turn="expand"),
            ),
        ]
    legend = [("loss", LOSS), ("no loss", NO_LOSS), ("left out", LEFT_OUT)]
    draw(panels, legend, target)


def sequences(tokenizer: Tokenizer, **settings) -> list[list[Token]]:
    """The chat's sequences as they are trained."""
    rows = read_rows({"messages": CHAT}, RowSettings(tokenizer, tokenizer.vocab_size, **settings), set())
    return [
        [(text, NO_LOSS if label < 0 else LOSS) for text, label in zip(tokenizer.pieces(tokens), labels)]
        for tokens, labels, *_ in tokenised(rows, tokenizer)
    ]


def refused(tokenizer: Tokenizer) -> list[Token]:
    """The whole chat, with what stood in its first answer when the model wrote it."""
    answered, whole = (tokenizer.chat.render(CHAT[:end]) for end in (2, 4))
    start = len(commonprefix([answered, whole]))
    end = next(end for end in range(start, len(answered)) if whole.startswith(answered[end:], start))
    parts = (whole[:start], NO_LOSS), (answered[start:end], LEFT_OUT), (whole[start:], NO_LOSS)
    return [
        (text, colours)
        for part, colours in parts
        for text in tokenizer.pieces(tokenizer.encode(part))
        if text
    ]


def draw(panels: list[tuple[str, list[list[Token]]]], legend: list[Token], target: Path) -> None:
    """Each message begins a line, and each sequence a bracket."""
    lines = 1.3 + sum(1.7 + sum(map(messages, shown)) + 0.4 * (len(shown) - 1) for _, shown in panels)
    figure = Figure(figsize=(COLUMNS * LETTER, lines * HEIGHT), dpi=160)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(lines, 0)
    axes.axis("off")
    style = {"family": "DejaVu Sans Mono", "size": 8.5, "va": "center_baseline"}

    def write(column: float, row: float, text: str, colours: tuple[str, str], number: int = 0) -> float:
        box = (column, row - 0.45), len(text), 0.9
        axes.add_patch(Rectangle(*box, facecolor=colours[number % 2], linewidth=0))
        for place, letter in enumerate(text):
            axes.text(column + place + 0.5, row, letter, ha="center", **style)
        return column + len(text)

    row, column = 0.6, 1.5
    for text, colours in legend:
        column = write(column, row, f" {text} ", colours) + 1.5
    for title, shown in panels:
        row += 1.5
        axes.text(1.5, row, title, weight="bold", **style | {"family": "DejaVu Sans"})
        row += 0.2
        for tokens in shown:
            first = row + 0.6
            for number, (text, colours) in enumerate(tokens):
                if text == "<|im_start|>":
                    row, column = row + 1, 1.5
                column = write(column, row, text.replace("\n", "⏎"), colours, number)
            axes.plot([0.7, 0.7], [first, row + 0.4], color="#555555", linewidth=1.5)
            row += 0.4
        row -= 0.4
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(64).save(target, optimize=True)


def messages(tokens: list[Token]) -> int:
    return sum(text == "<|im_start|>" for text, _ in tokens)


if __name__ == "__main__":
    main()
