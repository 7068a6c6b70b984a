"""Rows 1, 2, 4, 13: workers that die, at random and at named points, that are told to end, that come and go."""

from __future__ import annotations

import signal
import time
from functools import partial

from tests.faults.acts import Act, Done, Row, Size
from tests.faults.stack import READY_SECONDS, Process, Scene, eventually

BATCH_MESSAGES = "40"
"""Small batches where batches are to be hit: more of them in the same time."""

BEFORE_COMMIT = ("after-load", "after-copy", "before-commit")


def producers(scene: Scene, count: int = 2, per_second: float = 400) -> list[Process]:
    """Producers that send until the act is over."""
    return [scene.producer(f"producer-{number}", per_second=per_second) for number in range(1, count + 1)]


def kill_at_random(scene: Scene, size: Size) -> Done:
    """Row 1: two workers under load; one of them is killed, again and again."""
    producers(scene)
    pair = [scene.worker("worker-0", CREDITLANE_BATCH_MESSAGES=BATCH_MESSAGES)]
    pair.append(scene.worker("worker-1", CREDITLANE_BATCH_MESSAGES=BATCH_MESSAGES))
    scene.owning(pair[0].name, pair[1].name)
    hits = kills = 0
    while hits < size.kills and kills < 3 * size.kills:
        scene.under_load(20)
        time.sleep(scene.random.uniform(0, 0.5))
        place = scene.random.randrange(2)
        victim = pair[place]
        lanes = scene.owners().get(victim.name, [])
        victim.kill()
        hits += bool(lanes) and scene.broker.depth(lanes).unacknowledged > 0
        kills += 1
        pair[place] = scene.worker(f"worker-{kills + 1}", CREDITLANE_BATCH_MESSAGES=BATCH_MESSAGES)
        if scene.random.random() < 0.5:
            scene.owning(pair[place].name)  # else it is killed, or its partner is, while lanes still move
    return Done(hits, size.kills, f"{kills} × kill -9 of one of two workers, {hits} with messages unacknowledged")


def die_at(points: tuple[str, ...], scene: Scene, size: Size) -> Done:
    """Row 2: a worker dies at a named point of a batch, the next takes its lanes over."""
    producers(scene)
    deaths: dict[str, int] = {}
    wanted = size.rounds * len(points)
    for number in range(wanted):
        point = points[number % len(points)]
        doomed = scene.worker(
            f"doomed-{number}",
            CREDITLANE_CRASH_AT=f"{point}:{scene.random.randint(1, 3)}",
            CREDITLANE_BATCH_MESSAGES=BATCH_MESSAGES,
        )
        if doomed.wait(READY_SECONDS) == -signal.SIGKILL:
            deaths[point] = deaths.get(point, 0) + 1
    scene.worker("heir")
    told = ", ".join(f"{point} {deaths.get(point, 0)} ×" for point in points)
    return Done(sum(deaths.values()), wanted, f"died within a batch: {told}")


def told_to_end(times: int, scene: Scene, size: Size) -> Done:
    """Row 4: SIGTERM under load, once or twice: the worker applies what it holds and leaves the rest in order."""
    producers(scene)
    hits = 0
    wrong: list[str] = []
    codes: list[int] = []
    worker = scene.worker("worker-0", CREDITLANE_BATCH_MESSAGES=BATCH_MESSAGES)
    while hits < size.rounds and len(codes) < 3 * size.rounds:
        scene.owning(worker.name)
        scene.under_load(50)
        time.sleep(scene.random.uniform(0, 0.3))
        before = scene.sent()
        worker.signal(signal.SIGTERM)
        for _ in range(times - 1):
            time.sleep(scene.random.uniform(0.001, 0.1))
            worker.signal(signal.SIGTERM)
        codes.append(worker.wait(60))
        depth = scene.broker.depth()
        hits += scene.sent() > before or depth.total > 0
        # Its work done, a second signal may meet an interpreter that is ending and has no handlers any more; what must
        # not be is that anything was in hand then.
        if codes[-1] not in ((0,) if times == 1 else (0, -signal.SIGTERM)):
            wrong.append(f"a worker that was told to end did so with code {codes[-1]}")
        if depth.unacknowledged and not scene.broker.counts_late:
            wrong.append(f"a worker that was told to end left {depth.unacknowledged} messages unacknowledged")
        worker = scene.worker(f"worker-{len(codes)}", CREDITLANE_BATCH_MESSAGES=BATCH_MESSAGES)
    how = "SIGTERM" if times == 1 else f"{times} × SIGTERM within 0.1 s"
    return Done(hits, size.rounds, f"{len(codes)} × {how}, {hits} under load, exit codes {sorted(set(codes))}", wrong)


def come_and_go(scene: Scene, size: Size) -> Done:
    """Row 13: workers are started, stopped and killed at random while lanes move."""
    producers(scene)
    alive: list[Process] = []
    counts = {"started": 0, "stopped": 0, "killed": 0}
    hits = moves = 0
    owners: dict[str, list[int]] = {}
    deadline = time.monotonic() + size.stir_seconds
    while time.monotonic() < deadline:
        choice = scene.random.choice(("start", "stop", "kill"))
        if len(alive) < 2 or (choice == "start" and len(alive) < 4):
            alive.append(scene.worker(f"worker-{counts['started']}", CREDITLANE_BATCH_MESSAGES=BATCH_MESSAGES))
            counts["started"] += 1
        elif choice == "stop":
            alive.pop(scene.random.randrange(len(alive))).signal(signal.SIGTERM)
            counts["stopped"] += 1
        elif choice == "kill":
            victim = alive.pop(scene.random.randrange(len(alive)))
            lanes = scene.owners().get(victim.name, [])
            victim.kill()
            hits += bool(lanes) and scene.broker.depth(lanes).unacknowledged > 0
            counts["killed"] += 1
        time.sleep(scene.random.uniform(0.1, 1.5))
        now = scene.owners()
        moves += now != owners
        owners = now
    for process in scene.workers:
        if process.running and process not in alive:
            process.wait(60)
    if not alive:
        alive.append(scene.worker("last"))
    eventually(lambda: sum(map(len, scene.owners().values())) == scene.lanes, READY_SECONDS, "every lane has an owner")
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    what = f"{told} in {size.stir_seconds:.0f} s; the owners changed {moves} times, {hits} kills hit messages"
    return Done(moves, 3, what)


ROWS = (
    Row(1, "kill -9 of a worker at random moments under load", (Act("kill -9", kill_at_random),)),
    Row(
        2,
        "kill -9 at named points of a batch",
        (
            Act("before the commit", partial(die_at, BEFORE_COMMIT)),
            Act("after COMMIT, before ack", partial(die_at, ("after-commit",)), replays=True),
            Act("after the results, before ack", partial(die_at, ("after-results",)), replays=True),
        ),
    ),
    Row(
        4,
        "SIGTERM under load, and a second one",
        (Act("once", partial(told_to_end, 1)), Act("twice", partial(told_to_end, 2))),
    ),
    Row(13, "workers started, stopped and killed at random while lanes move", (Act("come and go", come_and_go),)),
)
