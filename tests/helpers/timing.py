"""Times on a machine that others use too: how much work a call is, and limits that a slow machine may break."""

import time
from contextlib import suppress

LIMITS_S = (0.6, 2.4, 9.6)


def cpu_seconds(call) -> float:
    """Return the processor seconds of the quickest of three calls: neither another process's load nor luck counts."""
    seconds = []
    for _ in range(3):
        start = time.thread_time()
        call()
        seconds.append(time.thread_time() - start)
    return min(seconds)


def patiently(check, limits_s=LIMITS_S):
    """Call a check with ever longer time limits until it holds; what is wrong does not hold with any of them."""
    for limit_s in limits_s[:-1]:
        with suppress(AssertionError):
            return check(limit_s)
    return check(limits_s[-1])
