"""Train on two nodes that are network namespaces of this machine, and count what crosses the wire between them.

python scripts/two_nodes.py            (as root, with iproute2; --large adds a random model of 0.1B shape)

Each namespace runs the documented command for several machines. The bytes of a step are the difference between a long
and a short run, divided by the steps in between, as counted at the wire (/proc/net/dev): headers, acknowledgements and
heartbeats included.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NODES = ("rwkv-es-0", "rwkv-es-1")
ADDRESSES = ("10.231.7.1", "10.231.7.2")
SHORT, LONG = 2, 7
POPULATION, PROMPTS = 16, 4
MOST_BYTES = 64 * POPULATION * PROMPTS + 4096


def main() -> int:
    """Print the bytes of a step for each model. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Train on two network namespaces and count the bytes of a step.")
    parser.add_argument("--large", action="store_true", help="also with a random model of 0.1B shape")
    is_large = parser.parse_args().large
    with tempfile.TemporaryDirectory() as folder, two_namespaces():
        models = {"tiny": "tiny", **({"0.1B-shaped": large_model(Path(folder))} if is_large else {})}
        found = {name: bytes_per_step(Path(folder), name, model) for name, model in models.items()}
    for name, num_bytes in found.items():
        print(f"{name}: {num_bytes:.0f} bytes a step between two nodes (at most {MOST_BYTES} allowed)")
    return 0 if all(num_bytes <= MOST_BYTES for num_bytes in found.values()) else 1


@contextmanager
def two_namespaces() -> Iterator[None]:
    """Make two namespaces that are joined by a pair of virtual network cards."""
    hosts = "127.0.0.1 localhost\n" + "".join(f"{address} {node}\n" for address, node in zip(ADDRESSES, NODES))
    for node in NODES:
        names = Path("/etc/netns", node, "hosts")  # `ip netns exec` puts it over /etc/hosts
        names.parent.mkdir(parents=True, exist_ok=True)
        names.write_text(hosts)
    for command in (
        *(f"ip netns add {node}" for node in NODES),
        f"ip link add rwkv0 netns {NODES[0]} type veth peer name rwkv1 netns {NODES[1]}",
        *(f"ip -n {node} addr add {ADDRESSES[i]}/24 dev rwkv{i}" for i, node in enumerate(NODES)),
        *(f"ip -n {node} link set {card} up" for i, node in enumerate(NODES) for card in ("lo", f"rwkv{i}")),
    ):
        subprocess.run(command.split(), check=True)
    try:
        yield
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "del", node], check=False)
            shutil.rmtree(Path("/etc/netns", node))


def bytes_per_step(folder: Path, name: str, model: str) -> float:
    """Train shortly and long; return the bytes that one more step sends over the wire, both directions."""
    counts = [train_counted(folder / f"{name}-{steps}", model, steps) for steps in (SHORT, LONG)]
    ledgers = [(folder / f"{name}-{steps}" / "ledger.jsonl").read_text().splitlines() for steps in (SHORT, LONG)]
    checksums = [[json.loads(line)["checksum"] for line in ledger] for ledger in ledgers]
    assert checksums[1][:SHORT] == checksums[0] and len(checksums[1]) == LONG, "the runs differ"
    return (counts[1] - counts[0]) / (LONG - SHORT)


def train_counted(run: Path, model: str, steps: int) -> int:
    """Train on both nodes; return the bytes that have crossed the wire meanwhile."""
    before = wire_bytes()
    jobs = [subprocess.Popen(command(rank, run, model, steps), env=environment(rank)) for rank in range(len(NODES))]
    codes = [job.wait(600) for job in jobs]
    if any(codes):
        raise RuntimeError(f"the nodes ended with the codes {codes}")
    return wire_bytes() - before


def command(machine_rank: int, run: Path, model: str, steps: int) -> list[str]:
    """Return the documented command for several machines, inside of a namespace."""
    longest = 40 if model == "tiny" else 4
    launch = f"--config_file {ROOT}/scripts/launch/nodes4x8.yaml --num_machines 2 --num_processes 2"
    node = f"--machine_rank {machine_rank} --main_process_ip {ADDRESSES[0]}"
    sizes = f"--steps {steps} --population {POPULATION} --prompts {PROMPTS} --max-new-tokens {longest} --eval-every 0"
    options = (
        f"--threads 1 --model {model} --sigma 0.02 --snapshot-every 1000 --checksum-every 1 --device cpu --tracker none"
    )
    program = f"{sys.executable} -m accelerate.commands.launch {launch} {node} -m rwkv_es train {sizes} {options}"
    return inside(machine_rank, f"{program} --run {run}")


def inside(machine_rank: int, program: str) -> list[str]:
    """Return the command that runs a program on a node: in its namespace, under its host name."""
    node = NODES[machine_rank]
    return ["ip", "netns", "exec", node, "unshare", "--uts", "sh", "-c", f"hostname {node}; exec {program}"]


def environment(machine_rank: int) -> dict[str, str]:
    """Return the variables that a node with several network cards needs."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"rwkv{machine_rank}"}


def wire_bytes() -> int:
    """Return the bytes received and sent so far by the first node's card."""
    shown = subprocess.run(
        ["ip", "netns", "exec", NODES[0], "cat", "/proc/net/dev"], check=True, stdout=subprocess.PIPE, text=True
    )
    fields = next(line for line in shown.stdout.splitlines() if "rwkv0:" in line).partition(":")[2].split()
    return int(fields[0]) + int(fields[8])


def large_model(folder: Path) -> str:
    """Write a checkpoint of random weights in the shape of the 0.1B model. Returns its path."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from checkpoints import random_params

    path = folder / "large.pth"
    torch.save({name: weight.bfloat16() for name, weight in random_params(12, 768, 65536).items()}, path)
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
