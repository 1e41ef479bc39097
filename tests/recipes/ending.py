"""Run a script as `python SCRIPT ...` would, and fail where a thread of its process group is left at its end."""

import atexit
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.processes import gloo_threads


def check() -> None:
    if gloo_threads():
        print(f"left at the end: {gloo_threads()}", flush=True)
        os._exit(70)


atexit.register(check)
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
