"""Processes that train one model together: who does what, what they exchange, who is lost.

Only this module imports torch.distributed, and only if there are several processes. In a step, one
float64 per member and prompt goes round, and a few counters; weights go round once, when a run continues.
"""

import hashlib
import pickle
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rwkv_es import __version__
from rwkv_es.pretrained.checkpoint import Params
from rwkv_es.run.identity import BY_CONTENT, without_folders
from rwkv_es.run.launcher import has_store, on_sigterm
from rwkv_es.system.errors import ClusterError, ConfigError, RwkvEsError

ANSWER_S = 5.0  # how long after a failure the others may take to report that they are alive
TERMINATED_S = 3.0  # the same, when the launcher ends all
LISTEN_S = 0.25  # how often a process that waits for others looks whether one has met a mistake

T = TypeVar("T")


class Cluster:
    """This process among those that train together; a single one is a cluster of size 1."""

    def __init__(self, rank: int = 0, size: int = 1, timeout_s: float = 600.0, device: str = "cpu") -> None:
        self.rank, self.size, self.timeout_s, self.device = rank, size, timeout_s, torch.device(device)
        self.hosts = [socket.gethostname()] * size
        self.place = "the start"  # where in the training we are, for messages

    @property
    def is_leader(self) -> bool:
        """Say whether this process writes the run folder and speaks."""
        return self.rank == 0

    def shard(self, count: int) -> range:
        """Return this process's part of `count` things."""
        return shard(count, self.rank, self.size)

    def gather(self, rows: Tensor, count: int, counters: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Collect what every process found for its part of `count` things, in their order, and its k counters.

        rows (len(self.shard(count)),P) float64 -> (count,P); counters -> (size,k). The message's length is the same
        for all.
        """
        width = rows.shape[1]
        sizes = [len(shard(count, rank, self.size)) * width for rank in range(self.size)]
        message = torch.full((max(sizes) + len(counters),), torch.nan, dtype=torch.float64)
        message[: rows.numel()] = rows.flatten()
        message[max(sizes) :] = torch.tensor(counters, dtype=torch.float64)
        messages = self._all_gather(message)  # (size, longest part + k)
        parts = [messages[rank, :size] for rank, size in enumerate(sizes)]
        return torch.cat(parts).reshape(count, width), messages[:, max(sizes) :]

    def agree(self, what: str, value: str) -> None:
        """Make sure that all processes have the same value.

        Raises:
            ClusterError: it names the ranks that differ from rank 0.
        """
        digest = int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "little", signed=True)
        digests = self._all_gather(torch.tensor([digest]))[:, 0].tolist()
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            raise ClusterError(
                f"{what} of {self._names(others)} differ from those of rank 0 at {self.place}; start the same command "
                "again: every process then rebuilds them from the ledger. If it comes back, suspect that machine"
            )

    def on_leader(self, compute: Callable[[], T]) -> T | None:
        """Compute a value on rank 0 alone (None elsewhere). An error there ends the others too, silently."""
        value, error = None, None
        if self.is_leader:
            try:
                value = compute()
            except RwkvEsError as caught:
                error = caught
        if error is None and self.broadcast(True):
            return value
        if error is None:
            raise SystemExit(2)
        self.broadcast(False)
        raise error

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the source's value on every process."""
        if self.size == 1:
            return value
        data = torch.frombuffer(bytearray(pickle.dumps(value) if self.rank == source else b"\0"), dtype=torch.uint8)
        num_bytes = int(self._broadcast(torch.tensor([len(data)]), source))
        data = data if self.rank == source else torch.empty(num_bytes, dtype=torch.uint8)
        return pickle.loads(self._broadcast(data, source).numpy().tobytes())

    def broadcast_params(self, params: Params | None) -> Params:
        """Return rank 0's tensors on every process, on the CPU, sent one by one."""
        if self.size == 1:
            assert params is not None
            return params
        layout = self.broadcast({name: (w.shape, w.dtype) for name, w in params.items()} if params else {})
        received = {}
        for name, (shape, dtype) in layout.items():
            tensor = params[name].cpu().contiguous() if params else torch.empty(shape, dtype=dtype)
            data = self._broadcast(tensor.flatten().view(torch.uint8), 0)  # bytes: no backend knows all dtypes
            received[name] = data.view(dtype).reshape(shape)
        return received

    def meet(self, options: Mapping[str, Any]) -> None:
        """Learn the others' hosts, and make sure that all were started alike; where files lie may differ.

        Raises:
            ConfigError: a process was started with different options or versions.
        """
        threads = options.get("threads") or torch.get_num_threads()  # sums may depend on it
        named = {name: without_folders(name, value) for name, value in options.items() if name not in BY_CONTENT}
        self.hosts = [self.broadcast(socket.gethostname(), source) for source in range(self.size)]
        self.compare(
            {**named, "threads": threads, "rwkv_es": __version__, "torch": torch.__version__}, "was started with"
        )

    def compare(self, mine: Mapping[str, Any], verb: str) -> None:
        """Make sure that all processes have the same values.

        Raises:
            ConfigError: it names the first rank that differs from rank 0, and in what.
        """
        said = [self.broadcast(dict(mine), source) for source in range(self.size)]
        for rank, theirs in enumerate(said):
            others = [f"{n} {theirs.get(n)} (rank 0: {v})" for n, v in said[0].items() if theirs.get(n) != v]
            if others:
                raise ConfigError(
                    f"rank {rank} on host {self.hosts[rank]} {verb} {', '.join(others)}; give all the same"
                )

    def lost(self, patience_s: float) -> list[int]:
        """Return the ranks that do not say within `patience_s` seconds that they are alive. All must ask."""
        from torch.distributed import distributed_c10d

        missing = [rank for rank in range(self.size) if rank != self.rank]
        deadline = time.monotonic() + patience_s
        try:
            store = distributed_c10d._get_default_store()
            store.set(f"alive-{self.rank}", "1")
            while missing and time.monotonic() < deadline:
                time.sleep(0.05)
                missing = [rank for rank in missing if not store.check([f"alive-{rank}"])]
            store.set(f"heard-{self.rank}", "1")
            others = [f"heard-{rank}" for rank in range(self.size) if rank not in missing]
            # Without a launcher the store is in rank 0, which must not go before the others have asked.
            while self.is_leader and time.monotonic() < deadline and not store.check(others):
                time.sleep(0.01)
        except RuntimeError:  # the store went with its process
            return [0]
        return missing

    def has_mistake(self) -> bool:
        """Say whether another process has told that there is something to mend; it says what."""
        from torch.distributed import distributed_c10d

        try:
            store = distributed_c10d._get_default_store()
            found: bool = store.check(["mistake"])
            if found:
                store.set(f"silent-{self.rank}", "1")
        except RuntimeError:  # the store went with its process
            return False
        return found

    def speaks_of_mistake(self) -> bool:
        """Tell the others that there is something to mend; say whether this process is the one to say what."""
        from torch.distributed import distributed_c10d

        silent = [f"silent-{rank}" for rank in range(self.size) if rank != self.rank]
        deadline = time.monotonic() + ANSWER_S
        try:
            store = distributed_c10d._get_default_store()
            if store.add("mistake", 1) > 1:
                store.set(f"silent-{self.rank}", "1")
                return False
            # Without a launcher the store is in rank 0, which must not go before the others have looked.
            while self.is_leader and not has_store() and time.monotonic() < deadline:
                if store.check(silent):
                    break
                time.sleep(0.01)
        except RuntimeError:  # the store went with its process
            return True
        return True

    def lost_neighbours(self) -> list[int]:
        """Return the ranks of this host that do not answer; the launcher has asked all of them to end."""
        return [rank for rank in self.lost(TERMINATED_S) if self.hosts[rank] == self.hosts[self.rank]]

    def _all_gather(self, tensor: Tensor) -> Tensor:
        """Collect equal-sized tensors: (...) -> (size,...)."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        from torch import distributed

        sent = tensor.to(self.device)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        self._finish(lambda: distributed.all_gather(parts, sent, async_op=True))
        return torch.stack(parts).cpu()

    def _broadcast(self, tensor: Tensor, source: int) -> Tensor:
        from torch import distributed

        sent = tensor.to(self.device)
        self._finish(lambda: distributed.broadcast(sent, source, async_op=True))
        return sent.cpu()

    def _finish(self, start: Callable[[], Any]) -> None:
        """Wait for an exchange in Python, where signals are heard. Raises ClusterError when somebody is lost."""
        began, reason = time.monotonic(), f"no word for {self.timeout_s:g} s"
        listened = began
        try:
            work = start()
            while (now := time.monotonic()) < began + self.timeout_s:
                if work.is_completed():
                    work.wait()
                    return
                if now > listened + LISTEN_S:
                    listened = now
                    self._heed_mistake()
                time.sleep(0.0005)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
        self._heed_mistake()
        on_sigterm(signal.SIG_IGN)  # the launcher ends us soon anyway; first we say why
        raise ClusterError(self.fate(self.lost(ANSWER_S), reason))

    def _heed_mistake(self) -> None:
        if self.has_mistake():
            raise SystemExit(2)

    def fate(self, lost: Sequence[int], reason: str = "") -> str:
        """Return what a person has to know about lost processes."""
        text = f"{self._names(lost)} died, hung or cannot be reached at {self.place}"
        return f"{text}{reason and f' ({reason})'}; the same command continues after the last whole step"

    def _names(self, ranks: Sequence[int]) -> str:
        return ", ".join(f"rank {rank} on host {self.hosts[rank]}" for rank in ranks) or "another process"


def shard(count: int, rank: int, size: int) -> range:
    """Return a rank's part of `count` things: neighbours stay together, sizes differ by one at most."""
    return range(count * rank // size, count * (rank + 1) // size)
