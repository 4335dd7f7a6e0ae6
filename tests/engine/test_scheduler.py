import random

from rwkv_es.engine.scheduler import Move, Request, Scheduler, longest_first, with_shared_prefixes


def request(member, problem, prompt, sample=0):
    return Request(member, problem, tuple(prompt), max_new_tokens=4, sample=sample)


def read_all(requests, num_slots, seed=0):
    """Play the part of the token loop with answers of random length; return what every request's row had read."""
    lengths = random.Random(seed)
    scheduler = Scheduler(requests, num_slots)
    rows, left, saved, history, ticks = {}, {}, {}, {}, 0
    while not scheduler.is_done:
        ticks += 1
        assert ticks < 10_000
        for slot, req, prefix in scheduler.schedule():
            rows[slot] = list(saved[prefix]) if prefix else []
            history[req] = len(rows[slot])
            left[slot] = lengths.randint(1, 9)
        for source, target in scheduler.close():
            rows[target], left[target] = rows[source], left[source]
        for prefix in scheduler.release():
            del saved[prefix]
        assert len(scheduler.active) <= num_slots
        assert len(saved) <= min(2 * num_slots, max(num_slots // 4, 16))  # a header and a prompt each
        for slot, req in enumerate(scheduler.active):
            if len(rows[slot]) < len(req.prompt):
                rows[slot].append(req.prompt[len(rows[slot])])
                prefix = (req.member, tuple(rows[slot]))
                if len(rows[slot]) in req.shared_prefixes and scheduler.publish(prefix):
                    saved[prefix] = list(rows[slot])
            else:
                left[slot] -= 1
        finished = [slot for slot, req in enumerate(scheduler.active) if left[slot] <= 0]
        for slot in finished:
            req = scheduler.active[slot]
            assert rows[slot] == list(req.prompt), "a row's text is its request's prompt, forked or not"
        scheduler.finish(finished)
    for prefix in scheduler.release():
        del saved[prefix]
    assert not saved
    return history, ticks


def test_every_request_is_served_once_whatever_the_slots():
    requests = [request(m, p, [p + 1] * (p + 1)) for m in range(4) for p in range(5)]
    for num_slots in (1, 3, 20, 50):
        history, _ = read_all(requests, num_slots)
        assert set(history) == set(requests)


def test_a_free_slot_is_filled_at_once():
    scheduler = Scheduler([request(0, p, [1]) for p in range(5)], 2)
    assert [a.slot for a in scheduler.schedule()] == [0, 1]
    assert scheduler.schedule() == []
    scheduler.finish([0])
    assert [(a.slot, a.request.problem) for a in scheduler.schedule()] == [(0, 2)]
    assert scheduler.close() == [], "nobody has to move"


def test_retired_gaps_are_closed_from_the_end_and_moves_do_not_depend_on_each_other():
    scheduler = Scheduler([request(0, p, [1]) for p in range(6)], 6)
    scheduler.schedule()
    scheduler.finish([1, 4, 2])
    assert scheduler.schedule() == []
    moves = scheduler.close()
    assert sorted(moves) == [Move(3, 1), Move(5, 2)] or sorted(moves) == [Move(3, 2), Move(5, 1)]
    assert sorted(r.problem for r in scheduler.active) == [0, 3, 5]


def test_a_common_header_is_read_once_per_member():
    header = list(range(100, 120))
    requests = with_shared_prefixes([request(m, p, [*header, p, 7, p]) for m in range(3) for p in range(4)])
    assert {r.shared_prefixes for r in requests} == {(20,)}
    history, _ = read_all(requests, 16)
    started = [history[r] for r in requests]
    assert started.count(0) == 3 and started.count(20) == 9


def test_samples_of_one_prompt_read_it_once_and_nested_forks_work():
    header = list(range(100, 120))
    requests = with_shared_prefixes(
        [request(m, p, [*header, p, 7, p], s) for m in range(2) for p in range(3) for s in range(4)]
    )
    assert {r.shared_prefixes for r in requests} == {(20, 22)}
    for num_slots in (1, 2, 5, 64):
        history, _ = read_all(requests, num_slots, seed=num_slots)
        started = [history[r] for r in requests]
        assert started.count(0) == 2, "one row per member reads the header"
        assert started.count(20) == 4, "one row per other problem starts behind the header"
        assert started.count(22) == 18, "other samples start at the prompt's last token"


def test_short_prefixes_and_single_prompts_are_not_forked():
    requests = with_shared_prefixes([request(0, 0, [1, 2, 3]), request(0, 1, [1, 2, 4]), request(1, 0, range(50))])
    assert [r.shared_prefixes for r in requests] == [(), (), ()]


def test_members_never_share_a_state():
    prompt = list(range(30))
    requests = with_shared_prefixes([request(m, 0, prompt, s) for m in range(2) for s in range(2)])
    history, _ = read_all(requests, 8)
    assert [history[r] for r in requests] == [0, 29, 0, 29]


def test_a_prompt_that_is_the_header_of_another_still_has_its_last_token_to_read():
    long, short = list(range(30)), list(range(20))
    requests = with_shared_prefixes([request(0, 0, long), request(0, 1, short)])
    assert requests[0].shared_prefixes == (20,) and requests[1].shared_prefixes == ()
    read_all(requests, 4)


def test_the_longest_of_the_last_start_first_and_the_others_as_they_came():
    requests = [request(m, p, [1] * (p + 1), s) for m in range(2) for p in range(3) for s in range(2)]
    ordered = longest_first(requests, 7)
    assert ordered[:5] == requests[:5]
    assert [(r.member, r.problem, r.sample) for r in ordered[5:]] == [
        *((0, 2, 1), (1, 2, 0), (1, 2, 1)),  # one sample of the first five is a sibling of this one
        *((1, 1, 0), (1, 1, 1), (1, 0, 0), (1, 0, 1)),
    ]
    assert longest_first(requests[:3], 7) == [requests[2], *requests[:2]]
    assert longest_first([], 7) == []


def test_where_too_many_prefixes_are_shared_at_once_requests_read_their_prompts_by_themselves():
    """`read_all` looks at how many are saved: 120 prompts begin at once, each wanted by two samples."""
    plain = [request(0, p, [p] * 9 + [1], sample) for p in range(120) for sample in range(2)]
    history, ticks = read_all(with_shared_prefixes(plain), 120)
    assert sorted(history.values()).count(9) >= 30, "those for which there was room are shared"
    assert ticks <= 1.1 * read_all(plain, 120)[1]
