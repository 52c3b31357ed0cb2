"""A rank that does what a test asks for instead of training: `python -m tests.experts.sleeping_rank FOLDER`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from proxytune.errors import DataError
from proxytune.experts import ranks
from proxytune.files import read_json


def main(folder: Path) -> None:
    ranks.attend(folder)
    asked = read_json(folder / ranks.SETTINGS)["do"]
    rank = os.environ["RANK"]
    print("proxytune: a note of both ranks", file=sys.stderr)
    ranks.tell(folder, 0, total=3)
    (folder / f"pid-{rank}").write_text(json.dumps([os.getpid(), os.getppid()]))
    try:
        if asked == "refuse":
            raise DataError("row 7 is broken", "mend it")
        if asked == "break" and rank == "1":
            raise KeyError("a bug")
    except Exception as error:
        ranks.report(folder, error)
        os._exit(1)
    if asked == "die" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    for step in range(1, 4) if asked == "work" else ():
        ranks.tell(folder, step, values={"train/loss": 1.0 / step})
    if asked != "work":
        time.sleep(1000)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
