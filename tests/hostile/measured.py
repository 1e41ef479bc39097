"""Run a program as its own `__main__`, and leave what it took: `measured.py RECORD LIMIT_MB PROGRAM [ARGUMENT...]`.

RECORD is a JSON file of the largest memory and the processor's seconds, of the process and of those it started. A
process that grows by more than LIMIT_MB ends at once, so that no test fills the machine.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import threading
import time


def resident_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    record, limit, program, *arguments = sys.argv[1:]
    idle, began = resident_mb(), time.monotonic()

    def leave(**more: str) -> None:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        taken = {
            "grown_mb": max(used[0].ru_maxrss / 1024 - idle, used[1].ru_maxrss / 1024 - idle),
            "processor_s": sum(one.ru_utime + one.ru_stime for one in used),
            "wall_s": time.monotonic() - began,
        }
        with open(record, "w") as file:
            json.dump(taken | more, file)

    def watch() -> None:
        while True:
            time.sleep(0.05)
            if resident_mb() - idle > float(limit):
                leave(ended="it grew beyond the limit")
                os._exit(99)

    threading.Thread(target=watch, daemon=True).start()
    sys.argv = [program, *arguments]
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        leave()


if __name__ == "__main__":
    main()
