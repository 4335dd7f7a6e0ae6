"""Processes that train together, started without a launcher: forked from a server that has imported everything."""

import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

SMALL = {
    **{"model": "tiny", "task": "countdown_mini", "population": 8, "prompts": 2, "max_new_tokens": 40, "steps": 5},
    **{"sigma": 0.02, "lr": 0.02, "targets": "matrices=1,head.weight=3", "eval_every": 2, "eval_size": 6},
    **{"snapshot_every": 2, "reward_workers": 0, "threads": 1, "tracker": "none", "device": "cpu"},
}
TIME_LIMIT_S = 60

_started = []
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["rwkv_es.verbs.train", "rwkv_es.verbs.export", "rwkv_es.measure.page", "accelerate", "torch._dynamo"]
)


def arguments(folder, **options):
    """The command line of a small training."""
    return ["train", *(f"--{name}={value}" for name, value in {**SMALL, "run": folder, **options}.items())]


def run_together(size, argv, sabotage=None):
    """Run a command line in `size` processes; argv may be a list per rank. Returns exit codes and outputs by rank.

    `sabotage` is called in every process first, with its rank.
    """
    return finish(start_together(size, argv, sabotage))


def start_together(size, argv, sabotage=None):
    logs = Path(os.environ["PYTEST_LOGS"])
    port = _free_port()
    argvs = [argv] * size if isinstance(argv[0], str) else argv
    jobs = []
    for rank in range(size):
        log = logs / f"{port}-{rank}"
        process = _context.Process(target=_job, args=(rank, size, port, argvs[rank], sabotage, str(log)))
        process.start()
        _started.append(process)
        jobs.append((process, log))
    return jobs


def finish(jobs):
    for process, _ in jobs:
        process.join(TIME_LIMIT_S)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process, _ in jobs], [log.read_text() for _, log in jobs]


def end_all():
    """Kill what a failed test has left."""
    while _started:
        process = _started.pop()
        process.kill()
        process.join()


def kill_self(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _job(rank, size, port, argv, sabotage, log):
    sys.stdin.close()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in {**place, **address}.items()})
    from rwkv_es.cli import main
    from rwkv_es.run import cluster

    cluster.ANSWER_S = 1.0
    if sabotage is not None:
        sabotage(rank)
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
