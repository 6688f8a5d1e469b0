"""A contestant that stays alive between its turns: built once, then one timed turn for each line it is sent.

Contestants of a round run one after another, in processes of their own, so that none is measured with what another has
imported, allocated or warmed up.  The other end is `benchmarks/contest.py`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(builders: dict[str, Callable[..., tuple[Callable[[], Any], Callable[[], Any] | None]]]) -> None:
    """Answer turns on standard input.

    The command line names one of `builders` and, as JSON, its arguments.  It gives what is timed, and what answers for
    it: a function whose result, a list of numbers, is compared with the others'; None for none.
    A line is a number of seconds, the least that a turn takes; the reply is JSON: seconds a call, of the clock and of
    the processor, and the calls.  The line "end" is answered with the peak of this process's memory.
    """
    # libraries print; what is read at the other end is only what is written here
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    timed, answer = builders[sys.argv[1]](**json.loads(sys.argv[2]))
    before = time.perf_counter()
    timed()
    seconds = time.perf_counter() - before
    print(json.dumps({"answer": None if answer is None else answer(), "first": seconds}), file=replies)
    for line in sys.stdin:
        if line.strip() == "end":
            print(json.dumps({"megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), file=replies)
            return
        least, calls = float(line), 0
        clock, cpu = time.perf_counter(), time.process_time()
        while calls == 0 or time.perf_counter() - clock < least:
            timed()
            calls += 1
        taken = {"seconds": (time.perf_counter() - clock) / calls, "cpu": (time.process_time() - cpu) / calls}
        print(json.dumps({**taken, "calls": calls}), file=replies)
