"""Stopping on request: SIGTERM or SIGUSR1 finish the step and save; a second signal ends at once.

run_train.sh receives the signals for its processes: it writes the file `stop` into the folder
$CHUNKFLOW_CONTROL, and they answer with the file `saved`. So torchrun need not forward signals, and each
process is told once.
"""

import logging
import os
import signal
import threading
import time
from pathlib import Path

logger = logging.getLogger(__name__)

SAVED_STATUS = 75  # EX_TEMPFAIL: start the same command again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop. Create one, at the start of a recipe."""

    def __init__(self):
        folder = os.environ.get("CHUNKFLOW_CONTROL")
        self.control = Path(folder) if folder else None
        self._signal = 0
        for number in SIGNALS:
            signal.signal(number, self._receive)
        if self.control:
            threading.Thread(target=self._outlive_no_launcher, name="launcher-watch", daemon=True).start()

    def _receive(self, number: int, frame) -> None:
        if self._signal:
            os._exit(128 + number)  # files on the disk are complete at any moment
        self._signal = number

    @property
    def asked(self) -> bool:
        return self._signal > 0 or (self.control is not None and (self.control / "stop").exists())

    def _outlive_no_launcher(self) -> None:
        """Ends this process when run_train.sh is gone, since two runs must not write one folder."""
        launcher = int(os.environ["CHUNKFLOW_LAUNCHER"])
        while True:
            try:
                os.kill(launcher, 0)
            except OSError:  # no such process, or by now another user's
                os._exit(128 + signal.SIGHUP)
            time.sleep(0.5)

    def leave(self, saved: bool) -> None:
        """Ends the process after the step at which the ranks agreed to stop."""
        if not saved:
            logger.info("Stopped as asked; checkpoint.enable is false, so nothing was saved")
            raise SystemExit(128 + signal.SIGTERM)
        logger.info(f"Stopped as asked: the same command goes on from here (exit status {SAVED_STATUS})")
        if self.control is None:
            raise SystemExit(SAVED_STATUS)
        (self.control / "saved").touch()
        raise SystemExit(0)  # torchrun takes another status for a crash, and may restart the run
