"""Rows 7, 9, 12, 16: duplicates, poison, contention, and old and new side by side."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from creditlane.lanes import lane_name, lane_of
from tests.faults.acts import Act, Done, Row, Size
from tests.faults.oracle import read_record
from tests.faults.poison import Poison, by_hand, poisons
from tests.faults.producers import Notes, Operation
from tests.faults.stack import PATIENCE_SECONDS, Message, RedisBroker, Scene, eventually

MIDDLE = 500
"""Good messages around poison: a whole batch."""

CONTENDED = 10
"""Holds, or charges, that all contenders want at once."""

PROCESSES = 4
"""Processes that contenders are dealt out to."""


def two_workers(scene: Scene, **settings: str) -> None:
    """Two workers that own their lanes."""
    scene.worker("worker-0", **settings)
    scene.worker("worker-1")
    scene.owning("worker-0", "worker-1")


def duplicates(scene: Scene, size: Size) -> Done:
    """Row 7: every operation is sent one to three times, by processes of their own; some with other content."""
    two_workers(scene)
    for number in range(2):
        name = f"original-{number}"
        scene.producer(name, count=size.operations)
        for copy in range(2):
            scene.producer(f"copy-{number}-{copy}", ids_of=name, count=size.operations, share=0.5, altered=0.05)
    scene.finish()
    record = read_record(scene.files)
    distinct = len({sent.key for sent in record.sent})
    contents: dict[tuple[str, str], set[str]] = {}
    for sent in record.sent:
        contents.setdefault(sent.key, set()).add(repr((sent.name, sent.arguments)))
    clashing = sum(len(each) > 1 for each in contents.values())
    twice = len(record.sent) - distinct
    what = f"{distinct} operations sent {len(record.sent)} times by 6 processes, {clashing} ids with two contents"
    return Done(min(twice, clashing), 1, what)


# --- Poison ------------------------------------------------------------------------------------------


def poison_alone(scene: Scene, size: Size) -> Done:
    """Row 9: each poison alone in a lane, while the other lanes are busy."""
    worker = scene.worker("worker")
    scene.owning(worker.name)
    scene.producer("producer", per_second=200)
    notes = scene.notes("by-hand")
    sent = 0
    for poison in poisons(scene.random, "alone", isinstance(scene.broker, RedisBroker)):
        lane = lane_name(scene.random.randrange(scene.lanes))
        push(scene, notes, lane, [poison])
        sent += 1
        eventually(lambda sent=sent: quarantined(scene) >= sent, PATIENCE_SECONDS, f"{poison.label} is quarantined")  # type: ignore[misc]
    notes.done()
    wrong = [] if worker.running else ["poison ended the worker"]
    return Done(
        quarantined(scene), sent, f"{sent} kinds of poison, each alone: all kept whole, none stopped a lane", wrong
    )


def poison_in_the_middle(scene: Scene, size: Size) -> Done:
    """Row 9: poison among 500 good messages, all in the lane before the worker comes."""
    notes = scene.notes("by-hand")
    account = "middle"
    lane = lane_of(account, scene.lanes)
    kinds = poisons(scene.random, "middle", isinstance(scene.broker, RedisBroker))
    # All of them at once in one batch, or each kind in a batch of its own.
    blocks = [kinds] if size.operations < 1000 else [kinds, *([kind] for kind in poisons(
        scene.random, "block", isinstance(scene.broker, RedisBroker)))]  # fmt: skip
    good(scene, notes, lane, [("credits.open", account, "open", {"account": account})])
    sent = number = 0
    for block in blocks:
        places = sorted(scene.random.sample(range(MIDDLE), len(block))) if len(block) > 1 else [MIDDLE // 2]
        mixed: list[Poison | Operation] = []
        for place in range(MIDDLE):
            if place in places:
                mixed.append(block[places.index(place)])
            number += 1
            arguments: dict[str, Any] = {"account": account, "amount": "0.000001"}
            mixed.append(("credits.consume", account, f"good-{number}", arguments))
        push(scene, notes, lane, mixed)
        sent += len(block)
    bad_members(scene, notes, account, lane)
    notes.done()
    worker = scene.worker("worker")
    scene.owning(worker.name)
    scene.finish()
    hits = quarantined(scene)
    wrong = [] if worker.running else ["poison ended the worker"]
    if worker.logged().count("lanes: took") > 1:
        wrong.append("poison made the consumer begin anew")
    what = f"{sent} messages of poison and a bad member of a batch among {number} good ones in one lane"
    return Done(hits, sent + 1, what, wrong)


def bad_members(scene: Scene, notes: Notes, account: str, lane: str) -> None:
    """A batch of which one member is no operation: it fails alone."""
    operations: list[Operation] = [
        ("credits.consume", account, f"member-{place}", {"account": account, "amount": "0.000001"})
        for place in range(20)
    ]
    notes.sent("by hand", *operations)
    kept = b'[[],{"account": "' + account.encode() + b'"},{}]'
    notes.poison("a bad member of a batch", lane, kept, "unknown_operation")
    members: list[Any] = [[name, id, arguments] for name, _, id, arguments in operations]
    members.insert(10, ["credits.nothing", "bad", {"account": account}])
    scene.broker.publish(lane, [by_hand("credits.batch", "a batch", {"v": 1, "operations": members})])


def good(scene: Scene, notes: Notes, lane: str, operations: list[Operation]) -> None:
    """Send good messages by hand; whoever sends so finds the answer under the id."""
    push(scene, notes, lane, operations)


def push(scene: Scene, notes: Notes, lane: str, mixed: Iterable[Poison | Operation]) -> None:
    """Note messages and put them into a lane, in order."""
    group: list[Message] = []
    for each in mixed:
        if isinstance(each, Poison):
            notes.poison(each.label, lane, each.kept, each.code)
            if isinstance(each.message, bytes):
                if group:
                    scene.broker.publish(lane, group)
                    group = []
                assert isinstance(scene.broker, RedisBroker)
                scene.broker.push(lane, [each.message])
            else:
                group.append(each.message)
        else:
            name, _, id, arguments = each
            notes.sent("by hand", each, replies=[id])
            group.append(by_hand(name, id, arguments))
    if group:
        scene.broker.publish(lane, group)


def quarantined(scene: Scene) -> int:
    """How many messages are in quarantine."""
    return int(scene.value("SELECT count(*) FROM quarantine"))


# --- Contention --------------------------------------------------------------------------------------


def contend(scene: Scene, size: Size, first: list[Operation], wanted: list[Operation], together: int) -> None:
    """Apply some operations, then let producers in several processes send the others all at once.

    :param together: threads, over all processes.
    """
    two_workers(scene)
    scene.producer("first", operations=first)
    eventually(lambda: scene.done() == len(first), PATIENCE_SECONDS, "what they contend for is there")
    go = scene.directory / "go"
    scene.random.shuffle(wanted)
    for number in range(PROCESSES):
        scene.producer(
            f"contender-{number}", operations=wanted[number::PROCESSES], threads=together // PROCESSES, go=str(go)
        )
    go.touch()
    scene.finish()


def one_for_many(scene: Scene, size: Size) -> Done:
    """Row 12: producers on a balance for one."""
    account = "one"
    first: list[Operation] = [
        ("credits.open", account, "open", {"account": account, "kind": "pool"}),
        ("credits.grant", account, "grant", {"account": account, "amount": "1", "source": "pack"}),
    ]
    wanted: list[Operation] = [
        ("credits.consume", account, f"consume-{number}", {"account": account, "feature": "context"})
        for number in range(size.contenders)
    ]
    contend(scene, size, first, wanted, size.contenders)
    applied = applied_of(scene, "credits.consume")
    wrong = [] if applied == [("", 1)] else [f"{applied} consumes were applied on a balance for one"]
    what = f"{size.contenders} producers in {PROCESSES} processes on a balance for one: one was served"
    return Done(scene.done() - len(first), size.contenders, what, wrong)


def captures(scene: Scene, size: Size) -> Done:
    """Row 12: many captures of one hold; one of them gets it."""
    account = "holder"
    first: list[Operation] = [
        ("credits.open", account, "open", {"account": account, "kind": "pool"}),
        ("credits.grant", account, "grant", {"account": account, "amount": "100", "source": "pack"}),
        *(
            ("credits.hold", account, f"hold-{number}", {"account": account, "amount": "2"})
            for number in range(CONTENDED)
        ),
    ]
    wanted: list[Operation] = [
        (
            "credits.capture",
            account,
            f"capture-{number}",
            {"account": account, "hold": f"hold-{number % CONTENDED}", "amount": scene.random.choice(("1", "2", "3"))},
        )
        for number in range(size.contenders)
    ]
    contend(scene, size, first, wanted, CONTENDED * PROCESSES)
    applied = applied_of(scene, "credits.capture", "hold")
    expected = [(f"hold-{number}", 1) for number in range(CONTENDED)]
    wrong = [] if applied == expected else [f"captures applied by hold: {applied}"]
    what = f"{size.contenders} captures of {CONTENDED} holds by {PROCESSES} processes at once: one each was applied"
    return Done(scene.done() - len(first), size.contenders, what, wrong)


def refunds(scene: Scene, size: Size) -> Done:
    """Row 12: many refunds of one charge; never more goes back than was taken."""
    account = "charged"
    first: list[Operation] = [
        ("credits.open", account, "open", {"account": account, "kind": "pool"}),
        ("credits.grant", account, "grant", {"account": account, "amount": "100", "source": "pack"}),
        *(
            ("credits.consume", account, f"charge-{number}", {"account": account, "amount": "2"})
            for number in range(CONTENDED)
        ),
    ]
    wanted: list[Operation] = [
        (
            "credits.refund",
            account,
            f"refund-{number}",
            {"account": account, "operation": f"charge-{number % CONTENDED}", "amount": "0.5"},
        )
        for number in range(size.contenders)
    ]
    contend(scene, size, first, wanted, CONTENDED * PROCESSES)
    applied = applied_of(scene, "credits.refund", "operation")
    expected = [(f"charge-{number}", 4) for number in range(CONTENDED)]
    wrong = [] if applied == expected else [f"refunds applied by charge: {applied}"]
    what = f"{size.contenders} refunds of {CONTENDED} charges by {PROCESSES} processes at once: four quarters each"
    return Done(scene.done() - len(first), size.contenders, what, wrong)


def redeems(scene: Scene, size: Size) -> Done:
    """Row 12: many accounts in all lanes redeem the last uses of a few codes, paid for and given."""
    names = [f"CODE{number}" for number in range(CONTENDED)]
    issue: dict[str, Any] = {"account": "issuer", "amount": "2.5", "uses": 2}
    given = {"actor": "ann", "reason": "a campaign"}
    first: list[Operation] = [
        ("credits.open", "issuer", "open", {"account": "issuer", "kind": "pool"}),
        *(
            ("credits.grant", "issuer", f"grant-{number}", {"account": "issuer", "amount": "17", "source": "pack"})
            for number in range(3)
        ),
        ("codes.issue", "issuer", "paid", {**issue, "codes": names[1:]}),
        ("codes.issue", "issuer", "given", {**issue, "codes": names[:1], **given}),
        *(
            ("credits.open", account, "open", {"account": account, "kind": "pool"})
            for account in (f"user-{number}" for number in range(size.contenders))
        ),
    ]
    wanted: list[Operation] = [
        ("codes.redeem", f"user-{number}", "redeem", {"account": f"user-{number}", "code": names[number % CONTENDED]})
        for number in range(size.contenders)
    ]
    contend(scene, size, first, wanted, CONTENDED * PROCESSES)
    applied = applied_of(scene, "codes.redeem", "code")
    expected = [(name, 2) for name in names]
    uses = scene.rows("SELECT code, min(slot), max(slot), count(*) FROM redemptions GROUP BY code ORDER BY code")
    wrong = [] if applied == expected else [f"codes redeemed: {applied}"]
    wrong += [] if uses == [(name, 0, 1, 2) for name in names] else [f"uses of codes: {uses}"]
    what = f"{size.contenders} accounts on {CONTENDED} codes of two uses by {PROCESSES} processes at once: two got each"
    return Done(scene.done() - len(first), size.contenders, what, wrong)


REFERRALS = """
[catalog]
name = "referrals"
[referrals]
referrer = "5"
referee = "3"
per_referrer = 20
"""
REWARDED = 20
"""As the catalog has it: claims of one code that are more are not rewarded."""


def referrals(scene: Scene, size: Size) -> Done:
    """Row 12: many claim one code, pairs claim each other's, and some their own, several times and at once."""
    scene.charge_by(REFERRALS)
    pairs = [(f"left-{number}", f"right-{number}") for number in range(CONTENDED)]
    fans = [f"fan-{number}" for number in range(REWARDED + CONTENDED)]
    first: list[Operation] = []
    for account in ("star", *fans, *(each for pair in pairs for each in pair)):
        code = account.replace("-", "0").upper()
        first.append(("credits.open", account, "open", {"account": account}))
        first.append(("referrals.issue", account, "issue", {"account": account, "code": code}))
    claims = [(fan, "star") for fan in fans] + [each for left, right in pairs for each in (
        (left, right), (right, left), (left, left))]  # fmt: skip
    wanted: list[Operation] = []
    while len(wanted) < max(size.contenders, 2 * len(claims)):
        account, owner = claims[len(wanted) % len(claims)]
        code = owner.replace("-", "0").upper()
        wanted.append(("referrals.claim", account, f"claim-{len(wanted)}", {"account": account, "code": code}))
    contend(scene, size, first, wanted, CONTENDED * PROCESSES)
    wrong = []
    claimed = dict(scene.rows("SELECT account, referrer FROM referrals WHERE referrer IS NOT NULL"))
    rewarded = set(scene.rows("SELECT account, arguments ->> 'referee' FROM operations"
                              " WHERE name = 'referrals.reward' AND status = 'applied'"))  # fmt: skip
    if any(account == referrer for account, referrer in claimed.items()):
        wrong.append("an account has referred itself")
    if any((other, one) in rewarded for one, other in rewarded):
        wrong.append("two accounts were rewarded for each other")
    if [claimed.get(fan) for fan in fans] != ["star"] * len(fans):
        wrong.append("not all who claimed a code were referred by it")
    stars = sum(account == "star" for account, _ in rewarded)
    if stars != REWARDED:
        wrong.append(f"a referrer was rewarded {stars} times")
    bonuses = scene.rows("SELECT account, count(*) FROM grants GROUP BY 1 HAVING count(*) > 1 AND account <> 'star'")
    if any(count > 2 for _, count in bonuses):
        wrong.append(f"bonuses by account: {bonuses}")
    what = f"{len(wanted)} claims by {PROCESSES} processes: of one code, of each other's, of their own"
    return Done(scene.done() - len(first), len(wanted), what, wrong)


def applied_of(scene: Scene, name: str, argument: str = "") -> list[tuple[str, int]]:
    """How many operations of a name were applied, by one of their arguments."""
    return [
        (value, count)
        for value, count in scene.rows(
            "SELECT coalesce(arguments ->> %s, ''), count(*) FROM operations WHERE name = %s AND status = 'applied'"
            " GROUP BY 1 ORDER BY 1",
            argument,
            name,
        )
    ]


# --- Old and new -------------------------------------------------------------------------------------


def versions(scene: Scene, size: Size) -> Done:
    """Row 16: messages with and without what is optional, of a version to come, and workers with other settings."""
    two_workers(scene, CREDITLANE_BATCH_MESSAGES="7", CREDITLANE_BATCH_OPERATIONS="1000")
    scene.producer("old", count=size.operations, version=True)
    scene.producer("new", count=size.operations)
    # The same operations, spelt out: replays, no conflicts.
    scene.producer("again", ids_of="new", count=size.operations, share=0.5, version=True)
    notes = scene.notes("by-hand")
    parked = 0
    for number in range(20):
        lane = lane_name(scene.random.randrange(scene.lanes))
        newer = [
            each for each in poisons(scene.random, f"newer-{number}", payloads=False) if "version 99" in each.label
        ]
        push(scene, notes, lane, newer)
        parked += len(newer)
    notes.done()
    scene.finish()
    codes = scene.rows("SELECT code, count(*) FROM quarantine GROUP BY 1")
    wrong = [] if codes == [("unknown_version", parked)] else [f"in quarantine: {codes}"]
    what = (
        f"version 1 with and without optional fields, {parked} messages of version 99 parked, workers with batches of 7"
        " and 500; no older code was at hand: its messages and settings stand for it"
    )
    return Done(quarantined(scene), parked, what, wrong)


def lanes_changed(scene: Scene, size: Size) -> Done:
    """Row 16: the documented procedure: producers stop, drain, stop the workers, change LANES, start again."""
    for number in range(2):
        scene.producer(f"before-{number}", count=size.operations)
    for producer in scene.producers:
        producer.wait(300)
    backlog = scene.broker.depth().total
    two_workers(scene)
    scene.drain()
    for worker in scene.workers:
        worker.process.terminate()
        worker.wait(60)
    scene.lanes *= 2
    names = ("worker-2", "worker-3")
    for name in names:
        scene.worker(name)
    scene.owning(*names)
    for number in range(2):
        scene.producer(
            f"after-{number}", count=size.operations, after=f"before-{number}",
            accounts=scene.accounts(f"before-{number}"),
        )  # fmt: skip
    what = (
        f"{scene.lanes // 2} lanes became {scene.lanes} after {backlog} waiting messages were drained: order kept too"
    )
    return Done(backlog, 1, what)


def lanes_changed_carelessly(before: int, after: int, scene: Scene, size: Size) -> Done:
    """Row 16: LANES is changed with a backlog: order across the change is not promised, everything else is."""
    scene.lanes = before
    scene.producer("before", count=size.operations).wait(300)
    backlog = scene.broker.depth().total
    scene.lanes = after
    scene.worker("worker-0")
    scene.worker("worker-1")
    scene.producer("after", count=size.operations, after="before", accounts=scene.accounts("before"))
    scene.owning("worker-0", "worker-1")
    what = f"{before} lanes became {after} with {backlog} messages waiting: all applied, order not promised"
    if after < before:
        scene.producers[-1].wait(300)
        scene.drain(range(after))
        stranded = scene.broker.depth(range(after, before)).total
        for worker in scene.workers:
            worker.process.terminate()
            worker.wait(60)
        scene.lanes = before
        scene.worker("of-before")
        scene.owning("of-before")
        what += f"; {stranded} waited in the lanes that were no more, until workers with the old number alone came"
        return Done(min(backlog, stranded), 1, what)
    return Done(backlog, 1, what)


ROWS = (
    Row(7, "duplicates from other processes; the same id with other content", (
        Act("duplicates", duplicates, replays=True),
    )),
    Row(9, "poison, alone and in the middle of a batch of 500", (
        Act("alone", poison_alone),
        Act("in the middle", poison_in_the_middle),
    )),
    Row(12, "contention: captures of one hold, refunds of one charge, a balance for one, gift codes, referrals", (
        Act("captures", captures),
        Act("refunds", refunds),
        Act("a balance for one", one_for_many),
        Act("redeems", redeems),
        Act("referrals", referrals),
    )),
    Row(16, "old and new on one queue; LANES changed with a backlog", (
        Act("versions", versions, replays=True),
        Act("lanes, by the procedure", lanes_changed),
        Act("lanes grown carelessly", partial(lanes_changed_carelessly, 8, 16), order=False),
        Act("lanes shrunk carelessly", partial(lanes_changed_carelessly, 16, 8), order=False),
    )),
)  # fmt: skip
