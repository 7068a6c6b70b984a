"""Limits of a pool's members in the rules and in the second ledger, step by step, on random operations."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.catalog import parse_catalog
from models.rules.sharing import MEMBER
from tests.oracle.model import Row
from tests.oracle.pools import PoolLedger
from tests.oracle.test_against_rules import CATALOG, COMMON, THOROUGH, Both, Step, present, reduced

POOLS = ("", 'members = "listed"', "member_limit = 6", 'members = "listed"\nmember_limit = 4\nperiod = "day"')
CATALOGS = [
    parse_catalog(
        CATALOG.replace("{on_spent}", "debt").replace('name = "oracle"', 'name = "oracle"\nzone = "America/Havana"')
        + f"[pools]\n{text}\n",
        "pools.toml",
    )
    for text in POOLS
]
BEGIN = datetime(2026, 10, 31, 3, tzinfo=UTC)
KINDS = ("day", "week", "month", "total")

JUMPS = (0, 0, 0, 1, 60, 60, 3600, 7200, 40_000, 86_400, 9 * 86_400)
SUMS = ("0.5", "1", "1.5", "2", "3", "7")


class Members(Both):
    """With what is counted of each member in the period under way."""

    def do(self, name: str, operation: str, content: Row) -> Row:
        result = super().do(name, operation, content)
        ledger = self.ledger
        assert isinstance(ledger, PoolLedger)
        counted = {key.removeprefix(MEMBER): each for key, each in self.account.allowances.items()}
        for who, allowance in counted.items():
            assert allowance.is_listed is ledger.members[who]["listed"]
            start = ledger.start(ledger.period_of(who), self.now)
            used = allowance.used if allowance.since >= start else 0
            assert used == ledger.used(who, self.now), who
        for who, member in ledger.members.items():
            assert who in counted or not member["marks"] or not ledger.used(who, self.now)
        return result


def life(random: Random) -> list[Step]:
    """What happens to a pool; a member's kind of period never becomes again what it was before."""
    choice = random.choice
    now = BEGIN
    script: list[Step] = [
        (now, "credits.open", "open", present(kind="pool")),
        (now, "credits.grant", "grant", present(amount=choice(("9", "40")), source="pack")),
    ]
    holds, charges = ["none"], ["none"]
    kinds = dict.fromkeys(("ann", "bob"), 0)
    for number in range(random.randint(10, 40)):
        now += timedelta(seconds=choice(JUMPS))
        name = choice(("set", "consume", "consume", "hold", "hold", "capture", "capture", "release", "refund",
                       "refund", "remove" if number % 3 == 0 else "consume", "settle"))  # fmt: skip
        identity = f"{name}-{number}"
        content = present()
        if name in ("consume", "hold"):
            what: Row = {"feature": "export"} if random.random() < 0.1 else {"amount": choice(SUMS)}
            content = present(member=choice(("ann", "ann", "bob", None)), **what)
            if name == "hold":
                content["ttl"] = choice((600, 3600, 90_000))
                holds.append(identity)
            else:
                content["partial"] = random.random() < 0.4
                charges.append(identity)
        elif name in ("capture", "release"):
            content = present(hold=choice(holds[-2:]))
            if name == "capture":
                content |= choice(({}, {"amount": "0"}, {"amount": choice(SUMS)}))
                charges.append(identity)
        elif name == "refund":
            content = present(operation=choice(charges[-3:]), amount=choice((None, "0.5", "1")))
        elif name in ("set", "remove"):
            who = choice(("ann", "bob"))
            content = present(member=who)
            if name == "set":
                kinds[who] = min(len(KINDS) - 1, kinds[who] + (random.random() < 0.3))
                content |= {"limit": choice(("0", "3", "8", "20")), "period": KINDS[kinds[who]]}
            name = f"{name}_member"
        family = "pools" if name.endswith("_member") else "credits"
        script.append((now, f"{family}.{name}", identity, content))
    return script


@pytest.mark.timeout(1800 if THOROUGH else 180)
@settings(COMMON, max_examples=3000 if THOROUGH else 300)
@given(seed=st.integers(0, 2**64), which=st.integers(0, len(CATALOGS) - 1))
def test_limits_of_members_are_the_same_in_both_ledgers(seed: int, which: int) -> None:
    script = life(Random(seed))
    both: Any = Members(CATALOGS[which])
    try:
        for both.now, name, operation, content in script:
            both.do(name, operation, content)
    except Exception as error:
        pytest.fail(f"{reduced(CATALOGS[which], script, Members)}\n({error})", pytrace=False)
