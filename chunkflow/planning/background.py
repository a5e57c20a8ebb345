"""Plans made in a separate process, so that training does not wait for them.

Planning is pure Python: a thread would hold the interpreter's lock and delay the training thread by as long
as it takes (1.4 s for 600 chunks on 16 stages).
"""

import pickle
import signal
import subprocess
import sys

from chunkflow.planning.planner import Plan, PlanSettings, plan_step


class PlanProcess:
    """Calls `plan_step`, for one replica, in a process that imports no torch and ends with this one."""

    def __init__(self, settings: PlanSettings, replica: int):
        self.settings, self.replica = settings, replica
        self.process: subprocess.Popen | None = None  # started by the first call

    def _send(self, message) -> None:
        pickle.dump(message, self.process.stdin)
        self.process.stdin.flush()

    def __call__(self, lengths: list[int]) -> Plan:
        if self.process is None:
            command = [sys.executable, "-m", "chunkflow.planning.background"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._send((self.settings, self.replica))
        self._send(lengths)
        answer = pickle.load(self.process.stdout)
        if isinstance(answer, Exception):
            raise answer
        return answer


def main() -> None:
    # Signals may reach all processes of a job; the training process decides what becomes of this one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    settings, replica = pickle.load(questions)
    while True:
        try:
            lengths = pickle.load(questions)
        except EOFError:  # the training process has ended
            return
        try:
            answer = plan_step(lengths, settings, [replica])
        except Exception as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
