"""The cases of `bench_gpu.py`, each a function of the bench."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gpu_compile
import torch
from bench_gpu_host import measured
from gpu_against_numpy import against_numpy
from gpu_bench import Bench, decoding, filled, tick_floor

from rwkv_es.engine import gpu_loop
from rwkv_es.engine.rollout import rollout
from rwkv_es.engine.scheduler import Request
from rwkv_es.es.strategy import ES
from rwkv_es.es.update import Rule, Updater, checksum
from rwkv_es.gpu import engine as gpu
from rwkv_es.gpu import trial as gpu_trial
from rwkv_es.model import fp8
from rwkv_es.model.batch import agreeing
from rwkv_es.model.forward import Model, draw_factors
from rwkv_es.model.sampler import SamplingParams, sample
from rwkv_es.model.weights import Factors
from rwkv_es.noise.factors import StepNoise, gpu_kernels, hash_key, normal_table, table_values
from rwkv_es.system.errors import ConfigError

_HOT = SamplingParams(seed=1, temperature=1.0)
_US = {
    **{"norm_and_mix": 35, "project_down": 25, "activate_pairs": 10},
    **{"update_state": 810, "norm_and_shift": 20, "square_relu": 30},
}
_TICK_MS = {(256, 4): 14.8, (1024, 4): 54, (256, 2): 11.6, (1024, 2): 41}  # by rows and bytes of a state's number


def check(bench: Bench) -> None:
    """Graphs against plain calls with allocations between ticks, torch's logits, bits in any number of rows."""
    model = bench.model(num_layers=2)
    noise, rows = bench.noise(model), 8 if bench.is_tiny else 64
    factors = draw_factors(noise, model, range(4))
    error = gpu_trial._difference(model, factors)
    bench.say("check", "logits against plain torch, relative", error, "", predicted="below 0.06 in bf16")
    against_numpy(bench)
    requests = [Request(i % 8, i, (1 + i % 40, 2)[: 1 + i % 2], 1 + i % 4, id=i) for i in range(rows + 4)]
    found = []
    for slots, is_captured in ((rows, False), (rows, True), (rows // 2, True)):
        with gpu.running(model, factors, rows) as engine:
            engine.capture = engine.capture if is_captured else None
            how = decoding(bench, slots, _HOT)
            found.append(gpu_loop.rollout(engine, requests, how, factors, lambda _: _allocate(bench)).completions)
    bench.say("check", "tokens of graphs and of plain calls are equal", found[0] == found[1], "", predicted=1)
    bench.say("check", "and of half as many slots", found[2] == found[1], "", predicted=1)
    counts = gpu_loop.counts_of(max(bench.rows), 8)
    bench.say("check", "numbers of rows with equal products", len(agreeing(model, counts)), f"of {len(counts)}")


def _allocate(bench: Bench) -> None:
    """Write over whatever memory was given back by mistake."""
    for size in (16, 64, 224, 448, 1024, 4096, 1 << 14):
        torch.full((size,), float("nan"), device=bench.device)


def ceilings(bench: Bench) -> None:
    """What copies and large products reach on this card."""
    size = 1 << (31 if not bench.is_tiny else 12)
    source = torch.empty(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copy = 2 * size / bench.seconds(lambda: target.copy_(source))
    width = 8192 if not bench.is_tiny else 32
    x, w = bench.random(width, width), bench.random(width, width)
    flops = 2 * width**3 / bench.seconds(lambda: x @ w)
    if not bench.is_tiny:
        bench.copy, bench.flops = copy, flops
    bench.say("ceilings", "copy, read and written", copy / 1e12, "TB/s", predicted=3.0)
    bench.say("ceilings", "bf16 product of 8192 x 8192", flops / 1e12, "TFLOP/s", predicted=790)


def products(bench: Bench) -> None:
    """The layer's products at each number of rows, and for which a row's bits are those among the most rows."""
    a = bench.arch
    shapes = {"C-C": (a.n_embd, a.n_embd), "ffn.key": (a.n_embd, a.n_ffn), "ffn.value": (a.n_ffn, a.n_embd)}
    shapes |= {"w1": (a.n_embd, a.rank_w), "g2": (a.rank_g, a.n_embd), "head": (a.n_embd, a.n_vocab)}
    counts = gpu_loop.counts_of(max(bench.rows), 8)
    for name, (into, out) in shapes.items():
        w, x = bench.random(out, into, scale=into**-0.5).t(), bench.random(max(bench.rows), into)
        whole = torch.mm(x, w)
        same = [n for n in counts if torch.equal(torch.mm(x[:n], w), whole[:n])]
        bench.say("products", f"{name}: rows with the bits of {counts[-1]}", len(same), f"of {len(counts)}", rows=same)
        for rows in bench.rows:
            seconds = bench.seconds(lambda: torch.mm(x[:rows], w))  # noqa: B023
            more = {"floor": bench.flops / 1e12, "predicted": "600-660" if min(into, out) >= 4096 else "50-150"}
            bench.say("products", f"{name}, {rows} rows", 2 * rows * into * out / seconds / 1e12, "TFLOP/s", **more)


def of_kernels(bench: Bench) -> None:
    """Each kernel of a layer alone, out of a cold cache."""
    a = bench.arch
    halves = (a.rank_w, a.rank_a, a.rank_v, a.rank_g)
    cold = torch.empty(256 << 20 if not bench.is_tiny else 16, dtype=torch.uint8, device=bench.device)
    for rows in bench.rows:
        for state in (torch.float32, torch.float16):
            sizes = gpu_compile.Sizes(a.n_embd, a.n_ffn, halves, bench.rank, state)
            calls = gpu_compile.calls_of(sizes, rows, str(bench.device))
            for name, call in calls.items():
                seconds = 1e6 * bench.seconds(call, before=cold.zero_)
                more = {"predicted": _US.get(name)} if rows == 1024 and bench.rank == 1 else {}
                if name == "update_state":
                    moved = 2 * rows * a.n_embd * 64 * state.itemsize
                    more = {"floor": 1e6 * moved / bench.copy, "predicted": 420 if state.itemsize == 2 else 810}
                elif state == torch.float16:
                    continue
                bench.say("kernels", f"{name}, {rows} rows, {state}, rank {bench.rank}", seconds, "us", **more)


def ticks(bench: Bench) -> None:
    """A whole tick as a graph: perturbed and not, greedy and sampled, with states in fp32 and fp16."""
    for state in (torch.float32, torch.float16):
        model = bench.model(state=state)
        for rows in bench.rows:
            factors = draw_factors(bench.noise(model), model, range(max(rows // 2, 1)))
            for name, seen, how in (
                ("", factors, SamplingParams()),
                ("sampled", factors, _HOT),
                ("plain", None, SamplingParams()),
            ):
                seconds = _tick(bench, model, seen, (rows, how))
                floor, what = tick_floor(bench, rows, state), f"{rows} rows, {state}, rank {bench.rank} {name}".strip()
                predicted = _TICK_MS.get((rows, state.itemsize)) if bench.rank == 1 else None
                bench.say("ticks", what, 1e3 * seconds, "ms", floor=1e3 * floor, predicted=predicted)
                bench.say("ticks", f"{what}: tokens a second", rows / seconds, "tokens/s", floor=rows / floor)
            if bench.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() / 1e9
                bench.say("ticks", f"memory, {rows} rows, {state}", peak, "GB")
            del factors
        del model


def in_fp8(bench: Bench) -> None:
    """The same with the blocks' products in fp8 (--quantize fp8), states in fp16; and how far logits move."""
    exact, rows = bench.model(state=torch.float16), max(bench.rows)
    model = exact._replace(is_fp8=True)
    try:
        fp8.refuse(bench.device, model.like.dtype)
    except ConfigError as error:
        bench.say("fp8", str(error), 0, "")
        return
    text = range(1, 17)
    expected, found = exact.logits(text), model.logits(text)
    error = float((found - expected).norm() / expected.norm())
    bench.say("fp8", "logits against bf16, relative", error, "", predicted="0.006-0.04")
    factors = draw_factors(bench.noise(model), model, range(max(rows // 2, 1)))
    seconds = _tick(bench, model, factors, (rows, SamplingParams()))
    predicted = 33 if (rows, bench.rank) == (1024, 1) else None
    bench.say("fp8", f"a tick, {rows} rows, rank {bench.rank}", 1e3 * seconds, "ms", predicted=predicted)


def _tick(bench: Bench, model: Model, factors: Factors | None, asked: tuple[int, SamplingParams]) -> float:
    rows, how = asked
    with gpu.running(model, factors, rows) as engine:
        slots = filled(engine, factors, rows, how)
        return bench.seconds(lambda: slots.tick(rows), 10)


def sampling(bench: Bench) -> None:
    """The choice of a token by plain torch; the kernel's part is the difference of two ticks."""
    for rows in bench.rows:
        logits = torch.randn(rows, bench.arch.n_vocab, device=bench.device)
        counter = torch.arange(4 * rows, device=bench.device).reshape(rows, 4)
        for how in (SamplingParams(), _HOT, _HOT._replace(top_p=0.9)):
            seconds = bench.seconds(lambda: sample(logits, how, counter), 5)  # noqa: B023
            what = f"torch, {rows} rows, temperature {how.temperature}, top_p {how.top_p}"
            bench.say("sampling", what, 1e3 * seconds, "ms", floor=4e3 * logits.numel() / bench.copy)


def noise(bench: Bench) -> None:
    """Values of the table, by torch and by the kernel."""
    directions, count = (512, 4 * bench.arch.n_embd) if not bench.is_tiny else (2, 40)
    index, key = torch.arange(directions, device=bench.device), hash_key("perturbation", 0, "x")
    seconds = bench.seconds(lambda: table_values(index, (0, *key), 0, count), 3)
    bench.say("noise", "by torch", 1e9 * seconds / directions / count, "ns a value", predicted=0.15)
    if (drawn := gpu_kernels(bench.device)) is not None:
        out = torch.empty(directions, count, dtype=torch.bfloat16, device=bench.device)
        table = normal_table(bench.device).bfloat16()
        seconds = bench.seconds(lambda: drawn.fill_from_table(out, 0, index, (0, *key), table), 5)
        bench.say("noise", "by the kernel", 1e9 * seconds / directions / count, "ns a value", predicted=0.003)
        is_equal = torch.equal(out.float(), table_values(index, (0, *key), 0, count))
        bench.say("noise", "the same bits", is_equal, "", predicted=1)


def update(bench: Bench) -> None:
    """One step's update of the whole model, and the checksum of weights and masters."""
    for master in ("fp32", "stochastic"):
        model = bench.model()
        made = bench.noise(model)
        _update(bench, Updater(model, list(made.targets), Rule(master=master), {}), made, master)


def _update(bench: Bench, updater: Updater, made: StepNoise, master: str) -> None:
    fitness = torch.randn(16, device=bench.device)
    seconds = bench.seconds(lambda: updater.step(made, fitness, 1e-6), 1)
    bench.say("update", f"first, 16 members, master {master}", seconds, "s")
    for members in (1024, 8192) if not bench.is_tiny else (4,):
        fitness = torch.randn(members, device=bench.device)
        seconds = bench.seconds(lambda: updater.step(made, fitness, 1e-6), 1)  # noqa: B023
        predicted = {1024: 0.3, 8192: 0.6}.get(members)
        bench.say("update", f"{members} members, master {master}", seconds, "s", predicted=predicted)
    seconds = bench.seconds(lambda: checksum(*updater.exact()), 1)
    bench.say("update", f"checksum, master {master}", seconds, "s", predicted=0.05)


def step(bench: Bench) -> None:
    """An ES step: ask, 1,024 generations in flight, tell."""
    members, prompts, most_new = (128, 8, 64) if not bench.is_tiny else (4, 2, 2)
    model = bench.model(state=torch.float16)
    es = ES(model, population=members, lr=1e-6)
    asked: list[object] = []
    seconds = bench.seconds(lambda: asked.append(es.ask()), 1)
    bench.say("step", f"noise of {members} members", seconds, "s")
    drawn = es.ask()
    texts = [tuple(range(1, 9 + p)) for p in range(prompts)]
    requests = [Request(m, p, text, most_new) for m in drawn.ids for p, text in enumerate(texts)]
    how, found = decoding(bench, members * prompts, _HOT), []
    seconds = bench.seconds(lambda: found.append(rollout(model, requests, how, drawn.factors)), 1)
    tokens = sum(len(completion.tokens) for completion in found[-1].completions)
    bench.say("step", f"{members * prompts} generations of {most_new} tokens", seconds, "s")
    bench.say("step", "tokens written a second, capture included", tokens / seconds, "tokens/s")
    rewards = torch.randn(members, prompts, dtype=torch.float64)
    bench.say("step", "update", bench.seconds(lambda: es.tell(rewards), 1), "s", predicted=0.3)


def memory(bench: Bench) -> None:
    """Generations in flight that fit: by the formula, and by allocating them."""
    if bench.device.type != "cuda":
        return
    model = bench.model(state=torch.float16)
    rows, factors = 3000, draw_factors(bench.noise(model), model, range(1500))
    with gpu.running(model, factors, rows) as engine:
        slots = filled(engine, factors, rows, SamplingParams())
        seconds = bench.seconds(lambda: slots.tick(rows), 3)
    peak = torch.cuda.max_memory_allocated() / 1e9
    bench.say("memory", f"{rows} rows, states in fp16", peak, "GB", predicted="fits 80 GB from 3,190 rows down")
    bench.say("memory", f"{rows} rows: tokens a second", rows / seconds, "tokens/s")


def tiny(bench: Bench) -> None:
    """The embedded model tuned with the demo's recipe, with 256 and 512 slots: the same checksums."""
    if bench.device.type != "cuda":
        return
    sums = []
    for slots in (256, 512):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            options = ["--config", "tiny", "--device", "cuda", "--slots", str(slots), "--run", str(run)]
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "rwkv_es", "train", *options], check=True, stdout=sys.stderr)
            seconds, lines = time.perf_counter() - began, (run / "ledger.jsonl").read_text().splitlines()
            sums.append([json.loads(line).get("checksum") for line in lines])
            bench.say("tiny", f"tuned, {slots} slots", seconds, "s")
    bench.say("tiny", "the same checksums for both", sums[0] == sums[1], "", predicted=1)


def host(bench: Bench) -> None:
    """The host's part of a tick."""
    slots = 1024 if not bench.is_tiny else 16
    found = measured(slots, 1, 24 if bench.is_tiny else 800, 4 * slots)
    bench.say("host", f"{slots} slots", found["host_ms_per_full_tick"], "ms a tick", predicted=0.7)


def compile_(bench: Bench) -> None:
    """What the kernels become on the cards that are asked about most."""
    for card in ("sm_80", "sm_90") if not bench.is_tiny else ():
        script = str(Path(__file__).with_name("gpu_compile.py"))
        done = subprocess.run([sys.executable, script, card], check=True, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            facts = json.loads(line)
            bench.say("compile", f"{facts['kernel']} on {card}", facts.pop("instructions"), "instructions", **facts)


CASES: dict[str, Callable[[Bench], None]] = {
    **{"check": check, "ceilings": ceilings, "products": products, "kernels": of_kernels, "ticks": ticks},
    **{"update": update, "noise": noise, "sampling": sampling, "step": step, "memory": memory, "tiny": tiny},
    **{"fp8": in_fp8, "host": host, "compile": compile_},
}
