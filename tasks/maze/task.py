"""Find the way out of a maze by moves: each answer is a direction, and the environment says which ways are open."""

import itertools
import random
import re
from collections import deque
from collections.abc import Generator, Sequence
from zlib import crc32

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Done, Generated, Problem

VERSION = "1"
STOP = ("\n\nUser:",)
MAX_NEW_TOKENS = 64
TEMPLATE = "chat"
MAX_TURNS = 60

SIZE, LARGEST = 5, 20
SIZES = {"train": 10_000, "test": 500}
WAYS = {"north": (0, -1), "east": (1, 0), "south": (0, 1), "west": (-1, 0)}
Place = tuple[int, int]
Passages = dict[Place, dict[str, Place]]  # where each way leads


def problems(split: str, data: str = "", argument: str = "") -> Sequence[Problem]:
    """Draw mazes; the argument is how many fields they have on a side. Needs no data."""
    if data:
        raise TaskError(f"task maze draws its own mazes and takes no data; got {data!r}")
    if argument and argument not in map(str, range(4, LARGEST + 1)):
        raise TaskError(f"maze:N takes the fields on a side, from 4 to {LARGEST}, as in maze:8; got {argument!r}")
    size = int(argument or SIZE)
    return Generated(lambda index: _problem(split, index, size), SIZES[split])


def environment(problem: Problem) -> Generator[str | None, str, Done]:
    """Walk: the last direction that an answer names counts; one that is closed changes nothing."""
    size = problem.meta["size"]
    passages, place, answer = draw(problem.meta["key"], size), (0, 0), (yield None)
    while True:
        named = re.findall("|".join(WAYS), answer.lower())
        if named and named[-1] in passages[place]:
            place = passages[place][named[-1]]
            if place == (size - 1, size - 1):
                return Done(1.0, "You are out.")
            answer = yield f"You are at {_where(place)}. Open: {', '.join(passages[place])}."
        else:
            answer = yield f"That way is closed. Open: {', '.join(passages[place])}."


def draw(key: str, size: int) -> Passages:
    """Carve a maze without loops, by going on at random and back where nothing is left."""
    rng, way_back = random.Random(key), [(0, 0)]
    passages: Passages = {(0, 0): {}}
    while way_back:
        x, y = way_back[-1]
        steps = [(way, (x + dx, y + dy)) for way, (dx, dy) in WAYS.items()]
        free = [(way, p) for way, p in steps if p not in passages and min(p) >= 0 and max(p) < size]
        if not free:
            way_back.pop()
            continue
        way, place = rng.choice(free)
        back = next(name for name, step in WAYS.items() if step == (-WAYS[way][0], -WAYS[way][1]))
        passages[x, y][way], passages[place] = place, {back: (x, y)}
        way_back.append(place)
    return {place: {way: passages[place][way] for way in WAYS if way in passages[place]} for place in passages}


def _problem(split: str, index: int, size: int) -> Problem:
    """Draw mazes until the way out belongs to the split."""
    for attempt in itertools.count():
        key = f"maze {VERSION} {split} {index} {attempt}"
        passages = draw(key, size)
        way = "\n".join(_shortest(passages, (size - 1, size - 1)))
        if (crc32(way.encode()) % 5 == 0) == (split == "test"):
            break
    question = (
        f"You are in a maze of {size} by {size} fields, at {_where((0, 0))} in the north-west corner. The way out is "
        f"in the south-east corner. Answer with one direction at a time: north, east, south or west. Open: "
        f"{', '.join(passages[0, 0])}."
    )
    return Problem(question, way, {"key": key, "size": size})


def _shortest(passages: Passages, goal: Place) -> list[str]:
    ways: dict[Place, list[str]] = {(0, 0): []}
    line = deque([(0, 0)])
    while goal not in ways:
        place = line.popleft()
        for way, following in passages[place].items():
            if following not in ways:
                ways[following] = [*ways[place], way]
                line.append(following)
    return ways[goal]


def _where(place: Place) -> str:
    return f"column {place[0] + 1}, row {place[1] + 1}"
