"""How much work a call is, on a machine that others use too."""

import time


def cpu_seconds(call) -> float:
    """Return the processor seconds of the quickest of three calls: neither another process's load nor luck counts."""
    seconds = []
    for _ in range(3):
        start = time.thread_time()
        call()
        seconds.append(time.thread_time() - start)
    return min(seconds)
