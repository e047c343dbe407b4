"""One process that runs boomgen's command line again and again: a JSON list of arguments a line in, the exit code and
what was written out. Only its sleeps are shortened."""

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    from boomgen.cli import main

    pause = time.sleep
    time.sleep = lambda seconds: pause(min(seconds, 0.01))
    answers = os.fdopen(os.dup(1), "w")
    written = [Path(name) for name in sys.argv[1:]]
    for number, path in enumerate(written, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    for line in sys.stdin:
        code = main(json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        print(json.dumps([code, *(path.read_text() for path in written)]), file=answers, flush=True)
        for path in written:
            os.truncate(path, 0)
