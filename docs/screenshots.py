"""Photographs of TensorBoard in a browser: `python docs/screenshots.py` trains a small model for some steps
(on two ranks in chunks, whole, and on two pipeline stages), starts TensorBoard on the three runs, and takes
pictures of its pages for docs/pictures/.

Needs Chromium (`apt-get install chromium`) besides what run_train.sh installs.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
PAGES = {  # page -> its photograph, and the height of its window
    "custom_scalars": ("dashboard.png", 1500),
    "images": ("pictures.png", 1000),
    "text": ("texts.png", 800),
    "hparams": ("runs.png", 500),
}
RUNS = {  # name -> what its command line adds
    "chunks": [],
    "whole": ["--chunkflow.no_enable"],
    "stages": ["--parallelism.pipeline_parallel_degree=2", "--profiling.enable_profiling"],
}
CONFIG = """
[training]
dataset = "python_stdlib"
global_batch_size = 32
seq_len = 65536
steps = 16
[debug]
seed = 41
[chunkflow]
chunk_size = 1024
k = 2
[optimizer]
lr = 3e-3
[lr_scheduler]
warmup_steps = 4
[metrics]
log_freq = 1
[validation]
enable = true
freq = 4
steps = 1
"""
MODEL = {  # of a config.json
    "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048,
    "max_position_embeddings": 65536,
}  # fmt: skip
# Finds elements in the shadow trees of TensorBoard's components, too.
DEEP = """
const deep = (selector, root = document) => [
    ...root.querySelectorAll(selector),
    ...[...root.querySelectorAll("*")].flatMap(
        (each) => each.shadowRoot ? deep(selector, each.shadowRoot) : []),
];
"""


def chromium() -> str | None:
    """The browser's program, None if there is none."""
    names = "chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell"
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """A page of Chromium without a window, spoken to by its DevTools protocol."""

    def __init__(self, program: str, folder: Path, width: int = 1440, height: int = 1000):
        """`folder`: for the browser's own files."""
        requests, self.requests = os.pipe()
        self.answers, answers = os.pipe()
        options = (
            "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --no-first-run"
        )
        arguments = [*options.split(), f"--user-data-dir={folder}", f"--window-size={width},{height}"]

        def hand_over() -> None:  # the pipes are its files 3 and 4
            high = [os.dup2(each, 100 + number) for number, each in enumerate((requests, answers))]
            for number, each in enumerate(high):
                os.dup2(each, 3 + number)

        self.process = subprocess.Popen(
            [program, *arguments, "--remote-debugging-pipe", "about:blank"],
            preexec_fn=hand_over, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(requests)
        os.close(answers)
        self.number, self.buffer, self.session = 0, b"", None
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]

    def ask(self, method: str, **parameters: Any) -> dict:
        """The result of a command. RuntimeError if it has none."""
        self.number += 1
        question = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            question["sessionId"] = self.session
        os.write(self.requests, json.dumps(question).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                more = os.read(self.answers, 1 << 16)
                if not more:
                    raise RuntimeError("the browser has ended")
                self.buffer += more
            message, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(message)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, after `deep(selector)` was defined."""
        expression = "(() => {" + DEEP + f"return {script};" + "})()"
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 60) -> Any:
        """The expression's value, once it is true. TimeoutError after `seconds`."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{script} is {value!r} after {seconds} s")
            time.sleep(0.2)
        return value

    def open(self, address: str) -> None:
        self.ask(
            "Page.navigate", url="about:blank"
        )  # an address that differs in its #part only loads nothing
        self.ask("Page.navigate", url=address)

    def photograph(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        with suppress(RuntimeError, OSError):
            self.session = None
            self.ask("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.requests)
        os.close(self.answers)


@contextmanager
def tensorboard(folder: Path, seconds: float = 60):
    """The address of a TensorBoard that shows the runs in a folder, once it has read them."""
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"http://localhost:{port}/"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + seconds
        while not _answers(address + "data/runs"):
            if time.monotonic() > deadline or process.poll() is not None:
                raise TimeoutError(f"TensorBoard does not show {folder}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(10)


def _answers(address: str) -> Any:
    with suppress(OSError, ValueError), urllib.request.urlopen(address, timeout=10) as answer:
        return json.load(answer)
    return None


READY = {  # page -> what is there when it is drawn: a line in each chart that can be seen, and so on
    "custom_scalars": """deep("tf-line-chart-data-loader").length >= 5
        && deep("tf-line-chart-data-loader").every((chart) =>
            chart.getBoundingClientRect().top > innerHeight
            || deep("path.line", chart.shadowRoot).some((line) => line.getAttribute("d")))""",
    "images": "deep('img').filter((each) => each.naturalWidth > 500).length >= 3",
    "text": "deep('table').length >= 1 && deep('pre').length >= 1",
    "hparams": "deep('vaadin-grid-cell-content').some((each) => each.innerText.includes('chunk_size'))",
}


def photograph(address: str, browser: Browser, page: str, path: Path) -> None:
    """Opens a page (a key of READY), waits until it is drawn, and takes its picture."""
    browser.open(f"{address}#{page}")
    browser.wait_for(READY[page])
    time.sleep(1)  # what moves comes to rest
    browser.photograph(path)


def train(folder: Path) -> None:
    """The runs, each in a folder of its name."""
    model, config = folder / "model", folder / "config.toml"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    shutil.copy(REPO / "chunkflow" / "data" / "python_2048.model", model / "tokenizer.model")
    config.write_text(CONFIG)
    environ = os.environ | {"NGPU": "2", "CONFIG_FILE": str(config), "CUDA_VISIBLE_DEVICES": ""}
    for name, options in RUNS.items():
        where = f"--model.hf_assets_path={model}", f"--job.dump_folder={folder / 'runs' / name}"
        subprocess.run([REPO / "run_train.sh", *where, *options], env=environ, check=True)


def photograph_all(program: str, runs: Path, folder: Path) -> None:
    """Photographs of all pages into docs/pictures/. `folder`: for the browser's own files."""
    with tensorboard(runs) as address:
        for page, (file, height) in PAGES.items():
            browser = Browser(program, folder / page, height=height)
            try:
                photograph(address, browser, page, REPO / "docs" / "pictures" / file)
            finally:
                browser.close()


def main() -> None:
    program = chromium()
    if not program:
        raise SystemExit("error: there is no Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(folder)
        photograph_all(program, folder / "runs", folder)


if __name__ == "__main__":
    main()
