"""How processes that train together find each other, and part: who says what is wrong, with which exit code."""

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from rwkv_es.config.options import Config, to_dict
from rwkv_es.run.cluster import Cluster
from rwkv_es.run.launcher import LOST, has_store, is_mistake, on_sigterm, wait_to_be_ended
from rwkv_es.system.errors import ClusterError, ConfigError, RwkvEsError, Terminated

JOIN_S = 120.0  # how long processes wait at the start for all to be there
STARTS_WITHOUT_STEP = 10  # so many in a row are started again by the launcher, not more
_GRACE_S = 60.0  # our own time limit speaks before that of torch, which does not know names
_PROGRESS = "rwkv-es-progress"  # in the launcher's store: the first start after the last progress, and the steps then
_UNSET = "start several processes by `accelerate launch`, or unset WORLD_SIZE to train in one"


@contextmanager
def joined(config: Config) -> Iterator[Cluster]:
    """Take part in what `accelerate launch` has started, if anything.

    Raises:
        ClusterError: another process cannot be reached, dies or hangs.
        ConfigError: the processes were started with different options, or there are more than the population feeds.
        Terminated: this process was asked to end.
    """
    if num_processes() == 1:
        cluster = Cluster()
        with _naming_lost_devices(cluster):
            yield cluster
        return
    cluster = _join(config)
    try:
        with _naming_lost_devices(cluster):
            cluster.meet(to_dict(config))
            if config.population // 2 < cluster.size:
                pairs = f"population {config.population} has too few mirrored pairs"
                raise ConfigError(f"{pairs} for {cluster.size} processes")
            yield cluster
            _leave()
    except BaseException as error:
        said = _settled(cluster, error)
        atexit.register(_end_at_once, said)
        if said is error:
            raise
        raise said from None


@contextmanager
def _naming_lost_devices(cluster: Cluster) -> Iterator[None]:
    """Take a GPU that fails for what it is: a loss, after which the same command continues."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("CUDA error"):  # "CUDA out of memory" would come again
            raise
        reason = str(error).splitlines()[0]
        raise ClusterError(cluster.fate([cluster.rank], reason)) from None


def num_processes() -> int:
    """Return how many processes train together, by the launcher's environment variables.

    Raises:
        ConfigError: one of them is no number that it can be.
    """
    size = _number("WORLD_SIZE", 1, 1)
    if size > 1 and not 0 <= _number("RANK", 0) < size:
        raise ConfigError(f"RANK must be below WORLD_SIZE, which is {size}; got {os.environ['RANK']}; {_UNSET}")
    if size > 1:
        _number("LOCAL_RANK", 0)
        _number("MASTER_PORT", 1)
    return size


def _number(name: str, least: int, default: int | None = None) -> int:
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal() or int(text) < least:
        found = f"got {text!r}" if name in os.environ else "it is not set"
        raise ConfigError(f"the environment variable {name} must be a whole number from {least} on; {found}; {_UNSET}")
    return int(text)


def _settled(cluster: Cluster, error: BaseException) -> BaseException:
    """Find out which process has to say what has happened. Returns what this one ends with."""
    asked = [1] if isinstance(error, Terminated) else []  # to end, by a launcher that another process has ended
    on_sigterm(lambda *_: asked.append(1))
    if is_mistake(error):
        if not isinstance(error, SystemExit) and cluster.speaks_of_mistake():
            on_sigterm(signal.SIG_IGN)  # the launcher ends us soon; first we say why
            return error
    elif not cluster.has_mistake():
        lost = cluster.lost_neighbours() if isinstance(error, Terminated) else []
        on_sigterm(signal.SIG_IGN)
        return ClusterError(cluster.fate(lost)) if lost else error
    wait_to_be_ended(asked)
    return SystemExit(2)


def _join(config: Config) -> Cluster:
    from accelerate import PartialState
    from torch import distributed
    from torch.distributed import distributed_c10d

    limit = timedelta(seconds=min(config.rank_timeout, JOIN_S))
    before = on_sigterm(signal.SIG_DFL)  # waiting for the others is deaf to a Python handler
    try:
        is_cpu = config.device == "cpu" or not torch.cuda.is_available()
        store, rank, size = next(distributed.rendezvous("env://", timeout=limit))
        # The launcher's store outlives the processes: without a prefix, those started again meet addresses of the dead.
        fresh = distributed.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        state = PartialState(cpu=is_cpu, timeout=limit, store=fresh, rank=rank, world_size=size)
        distributed_c10d._set_pg_timeout(timedelta(seconds=config.rank_timeout + _GRACE_S), None)
    except ValueError as error:
        raise ConfigError(f"the processes cannot meet: {' '.join(str(error).split())}; {_UNSET}") from None
    except RuntimeError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ClusterError(f"the other processes cannot be reached at {where}: {str(error).splitlines()[0]}") from None
    finally:
        on_sigterm(before)
    return Cluster(
        state.process_index, state.num_processes, config.rank_timeout, "cpu" if is_cpu else str(state.device)
    )


def refuse_endless_starts(num_steps: int) -> None:
    """Remember in the launcher's store where this start begins; refuse one more after many that took no step.

    Raises:
        ConfigError: whatever ends the processes, starting them again does not mend it.
    """
    if not has_store():
        return
    from torch import distributed

    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    limit, port = timedelta(seconds=JOIN_S), int(os.environ["MASTER_PORT"])
    try:
        store = distributed.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=limit)
        known = store.get(_PROGRESS).decode().split() if store.check([_PROGRESS]) else []
        if known[:1] != [str(num_steps)]:
            store.set(_PROGRESS, f"{num_steps} {start}")
            return
    except RuntimeError as error:
        raise ClusterError(f"the launcher cannot be reached: {str(error).splitlines()[0]}") from None
    if start - int(known[1]) >= STARTS_WITHOUT_STEP:
        raise ConfigError(
            f"{STARTS_WITHOUT_STEP} starts in a row have ended before step {num_steps + 1} was taken; look above for "
            "what ended them, mend it, and give the same command again"
        )


def _leave() -> None:
    from torch import distributed

    distributed.destroy_process_group()


def _end_at_once(error: BaseException) -> None:
    """End this process without torch's farewell, which would wait long for those that do not answer."""
    codes: dict[type[BaseException], int] = {Terminated: 143, KeyboardInterrupt: 130, ClusterError: LOST}
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(codes.get(type(error), 2 if isinstance(error, (RwkvEsError, SystemExit)) else 1))
