"""Gives each of several test processes processors of its own.

Engines start a busy thread for each processor that they may use: with more threads than processors,
everything takes ten times as long. They count the processors when they are imported, so this module
comes before them.
"""

import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):  # Linux only
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    if processors := sorted(os.sched_getaffinity(0))[worker::count]:
        assert "numpy" not in sys.modules  # whose products would have a thread for each processor
        os.sched_setaffinity(0, processors)
