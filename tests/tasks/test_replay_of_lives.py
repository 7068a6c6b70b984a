"""Whatever life an account has had, in whatever batches: it is audited, replayed and gone on from without a fault."""

from __future__ import annotations

from datetime import timedelta
from itertools import count
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.audit import audit, audit_new
from models.seal import make_seal
from tasks.replay import Replayer
from tests.proof import START, freeze, job
from tests.support import Ledger
from workers.ledger_writer import Job

_lives = count(1)
_day = count(1)

AMOUNTS = st.sampled_from(["0.000001", "0.5", "1", "3", "20", "700"])
EARLIER = st.integers(0, 40)
"""Which of the operations so far is meant, counted from the last; there may be none."""

STEPS = st.one_of(
    st.tuples(st.just("grant"), AMOUNTS, st.sampled_from([None, 60, 3600]), st.sampled_from([None, "p", "q"]),
              st.sampled_from([None, ["image"]])),
    st.tuples(st.just("consume"), AMOUNTS, st.booleans()),
    st.tuples(st.just("use"), st.integers(1, 40)),
    st.tuples(st.just("hold"), AMOUNTS, st.sampled_from([60, 7200])),
    st.tuples(st.just("capture"), EARLIER, st.one_of(st.none(), AMOUNTS)),
    st.tuples(st.just("release"), EARLIER),
    st.tuples(st.just("refund"), EARLIER, st.one_of(st.none(), AMOUNTS)),
    st.tuples(st.just("adjust"), AMOUNTS, st.sampled_from(["", "-"])),
    st.tuples(st.just("revoke"), st.sampled_from(["p", "q", 1, 2, 3]), st.one_of(st.none(), AMOUNTS)),
    st.tuples(st.just("claw_back"), st.sampled_from(["p", "p", "q"]), st.sampled_from([0, 0, 50, 99, 100]),
              st.sampled_from([False, False, True])),
    st.tuples(st.just("settle")),
    st.tuples(st.just("again"), EARLIER),
    st.tuples(st.just("later"), st.sampled_from([0, 59, 60, 4000, 7200])),
    st.tuples(st.just("commit")),
    st.tuples(st.just("look")),
)  # fmt: skip


class Life:
    """One account, and the messages that have been sent for it."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.account = f"life-{next(_lives)}"
        self.now = START + timedelta(days=next(_day))  # the ledger's time never goes back
        self.sent: list[Job] = []
        self.batch: list[Job] = []
        self.send("credits.open")

    def send(self, name: str, **arguments: Any) -> None:
        """Put an operation into the batch."""
        given = {key: value for key, value in arguments.items() if value is not None}
        made = job(name, f"{len(self.sent)}", account=self.account, **given)
        self.sent.append(made)
        self.batch.append(made)

    def earlier(self, back: int) -> str:
        """The id of an operation so far, or of none."""
        return f"{len(self.sent) - 1 - back}" if back < len(self.sent) else "none"

    def commit(self) -> None:
        """Write the batch."""
        freeze(self.ledger, self.now)
        if self.batch:
            self.ledger.write(*self.batch)
        self.batch = []

    def step(self, kind: str, *values: Any) -> None:
        """Do one step of the life."""
        match kind, values:
            case "grant", (amount, expires_in, purchase, features):
                self.send("credits.grant", amount=amount, source="pack", expires_in=expires_in, purchase=purchase,
                          features=features)  # fmt: skip
            case "consume", (amount, partial):
                self.send("credits.consume", amount=amount, partial=partial)
            case "use", (quantity,):
                self.send("credits.consume", feature="image", quantity=quantity)
            case "hold", (amount, ttl):
                self.send("credits.hold", amount=amount, ttl=ttl)
            case "capture", (back, amount):
                self.send("credits.capture", hold=self.earlier(back), amount=amount)
            case "release", (back,):
                self.send("credits.release", hold=self.earlier(back))
            case "refund", (back, amount):
                self.send("credits.refund", operation=self.earlier(back), amount=amount)
            case "adjust", (amount, sign):
                self.send("credits.adjust", amount=sign + amount, actor="x", reason="y")
            case "revoke", (which, amount):
                what = {"grant": which} if isinstance(which, int) else {"purchase": which}
                self.send("credits.revoke", amount=amount, **what)
            case "claw_back", (purchase, returned, frozen):
                self.send("credits.claw_back", purchase=purchase, paid_minor=100, returned_minor=returned,
                          step=len(self.sent), frozen=frozen)  # fmt: skip
            case "settle", ():
                self.send("credits.settle")
            case "again", (back,):
                if back < len(self.sent):
                    first = self.sent[-1 - back]
                    self.batch.append(Job(first.name, first.operation, first.message, first.arguments))
            case "later", (seconds,):
                self.commit()
                self.now += timedelta(seconds=seconds)
            case "commit", ():
                self.commit()
            case "look", ():
                self.commit()
                assert audit_new(self.ledger.writer.connection, wait_seconds=0).faults == []
                make_seal(self.ledger.writer.connection, 0)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(steps=st.lists(STEPS, max_size=60))
def test_a_life(steps: list[tuple[Any, ...]], ledger: Ledger) -> None:
    life = Life(ledger)
    for kind, *values in steps:
        life.step(kind, *values)
    life.commit()
    connection = ledger.writer.connection
    assert audit_new(connection, wait_seconds=0).faults == []
    report = audit(connection, [life.account], replayer=Replayer({ledger.catalog.label: ledger.catalog}))
    assert report.faults == []
    assert report.replayed == report.operations
