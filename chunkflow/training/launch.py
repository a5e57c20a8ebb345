"""torchrun for run_train.sh: a run that ended with a sentence for the user ends without torchrun's report.

That report is a traceback of torchrun's and one of each process: right for a crash, but not for a row that
cannot be read, which a rank has said in one sentence. `user_errors` leaves each rank's sentence in the folder
$CHUNKFLOW_CONTROL; one that rank 0 has not printed is printed here.
"""

import logging
import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

LOGGERS = ("api", "errors.error_handler")  # say that a process failed, before the report does


def launch() -> None:
    folder = Path(os.environ["CHUNKFLOW_CONTROL"])
    for name in LOGGERS:
        logger = logging.getLogger(f"torch.distributed.elastic.multiprocessing.{name}")
        logger.addFilter(lambda record: not any(folder.glob("error_of_rank_*")))
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sentences = {path.name: path.read_text() for path in sorted(folder.glob("error_of_rank_*"))}
        crashed = any(each.error_file != "<N/A>" for each in error.failures.values())
        if crashed or failure.exitcode != 1 or f"error_of_rank_{rank}" not in sentences:
            raise
        seen = "0" in os.environ.get("LOG_RANK", "0").split(",")
        printed = sentences.get("error_of_rank_0") if seen else None
        for sentence in dict.fromkeys(sentences.values()):
            if sentence != printed:
                print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    launch()
