"""Revenue on a real Postgres: worked examples, and random lives against a second, plainer way of adding up."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from creditlane.contract import decode_message, receiving_id
from models import audit_rows, revenue_reading
from models.catalog import load_catalog
from models.revenue import CSV_COLUMNS, GROWS, PARTS, PLACES, Book, Revenue, Summary, decimal, month_bounds, write_csv
from models.revenue_reading import revenue, rounded
from models.rules.posting import FLOWS
from tests.proof import freeze, job, named, tamper
from tests.support import Ledger
from workers.ledger_writer import Job

THOROUGH = os.environ.get("CREDITLANE_HYPOTHESIS") == "thorough"

START = datetime(2026, 1, 31, 12, tzinfo=UTC)
DAY = timedelta(days=1)
ALWAYS = START - 365 * DAY, START + 3650 * DAY

PACK = {"minor": 499, "currency": "EUR", "per": 25}
THIRDS = {"minor": 1, "currency": "JPY", "per": 3}
"""A price at which no lot comes to what its parts come to when each is rounded by itself."""

PLAN = """
[catalog]
name = "revenue"

[plans.paid]
monthly_credits = "10"
price = "1.00 EUR"
"""


def made(ledger: Ledger, start: datetime = ALWAYS[0], end: datetime = ALWAYS[1], **options: Any) -> Revenue:
    """The report, and it holds."""
    found = revenue(ledger.writer.connection, start, end, **options)
    assert found.report.faults == []
    return found


def minor(summary: Summary) -> dict[str, int]:
    """A summary's money; what is nothing is left out."""
    figures = {
        "opening": summary.opening, **{part: summary.parts[part] for part in PARTS}, "closing": summary.closing,
    }  # fmt: skip
    return {name: figure.minor for name, figure in figures.items() if figure.minor}


def deliver(ledger: Ledger) -> int:
    """Take the operations that stand in the outbox to their lanes; gives how many they were."""
    query = "DELETE FROM outbox WHERE task ~ '^(credits|codes)[.]' RETURNING id, task, operation, arguments::text"
    found = ledger.writer.connection.execute(query).fetchall()
    ledger.writer.take_outbox()
    for _, name, operation, raw in sorted(found):
        ledger.write(Job(name, operation, decode_message(name, raw.encode()), raw.encode()))
    return len(found)


def test_every_kind_of_entry_has_a_place() -> None:
    assert set(FLOWS) <= set(PLACES)
    for kind, flow in FLOWS.items():
        grows = sum(sign * GROWS[part] for part, sign in PLACES[kind].parts)
        deferred = ("available", "held", "in_transit")
        assert grows == (flow.enters in deferred) - (flow.leaves in deferred), kind


@pytest.mark.parametrize(
    ("fraction", "nearest"),
    [((1, 2), 0), ((3, 2), 2), ((5, 2), 2), ((7, 3), 2), ((8, 3), 3), ((-1, 2), 0), ((0, 7), 0)],
)
def test_half_goes_to_the_even_one(fraction: tuple[int, int], nearest: int) -> None:
    assert rounded(*fraction) == nearest == round(Fraction(*fraction))


def test_money_is_written_with_its_currencys_decimals() -> None:
    written = [decimal(499, "EUR"), decimal(-5, "EUR"), decimal(500, "JPY"), decimal(-7, "JPY"), decimal(0, "USD")]
    assert written == ["4.99", "-0.05", "500", "-7", "0.00"]


def test_months_are_those_of_a_zone() -> None:
    paris = month_bounds(datetime(2026, 2, 28, 23, tzinfo=UTC), datetime(2026, 4, 30, 22, tzinfo=UTC), "Europe/Paris")
    assert [bound.isoformat()[:13] for bound in paris] == ["2026-02-28T23", "2026-03-31T22", "2026-04-30T22"]
    assert month_bounds(START, START + DAY, "UTC") == [START, datetime(2026, 2, 1, tzinfo=UTC), START + DAY]
    with pytest.raises(ValueError, match="ends before it begins"):
        month_bounds(START, START, "UTC")


def test_a_pack_of_which_some_is_used_some_given_back_some_expires_and_the_rest_is_returned(ledger: Ledger) -> None:
    freeze(ledger, START)
    ledger.apply("credits.open", "o", account="a")
    for name, lot in (("g", {}), ("soon", {"amount": 5, "expires_in": 3600})):
        content = {"amount": 20, "source": "pack", "purchase": "p", "unit_price": PACK, **lot}
        ledger.apply("credits.grant", name, account="a", **content)
    ledger.apply("credits.hold", "h", account="a", amount=60)  # five that expire soon, 50 of signing up, 5 of the rest
    ledger.apply("credits.release", "back", account="a", hold="h")
    freeze(ledger, START + DAY)
    ledger.apply("credits.consume", "free", account="a", amount=50)
    ledger.apply("credits.consume", "c", account="a", amount=10)
    ledger.apply("credits.refund", "r", account="a", operation="c", amount=2)
    freeze(ledger, START + 2 * DAY)
    ledger.apply("credits.revoke", "half", account="a", purchase="p", amount=6)
    found = made(ledger)
    assert minor(found.totals()["EUR"]) == {
        "sold": 499,
        "earned": 160,
        "breakage": 100,
        "returned": 119,
        "closing": 120,
    }
    # The same, seen in February: the pack was sold, and a part of it expired, in January.
    february = made(ledger, datetime(2026, 2, 1, tzinfo=UTC), ALWAYS[1])
    opening = {"opening": 399, "earned": 160, "returned": 119, "closing": 120}
    assert minor(february.totals()["EUR"]) == opening
    free = found.totals()[""]
    assert (free.parts["sold"].credits_micro, free.parts["earned"].credits_micro) == (50_000_000, 50_000_000)
    assert minor(free) == {}
    assert list(found.summaries(lambda book: book)) == [Book("", "", "signup"), Book("", "EUR", "pack")]
    assert set(made(ledger, by_account=True).books) == {Book("a", "", "signup"), Book("a", "EUR", "pack")}


def test_what_was_spent_of_a_returned_purchase_is_earned_no_more_until_other_credits_pay_for_it(ledger: Ledger) -> None:
    freeze(ledger, START)
    ledger.apply("credits.open", "o", account="a")
    ledger.apply("credits.grant", "g", account="a", amount=25, source="pack", purchase="p", unit_price=PACK)
    ledger.apply("credits.consume", "c", account="a", amount=60)  # 50 of signing up, and 10
    ledger.apply("credits.revoke", "v", account="a", purchase="p")
    assert minor(made(ledger).totals()["EUR"]) == {"sold": 499, "returned": 499}
    ledger.apply("credits.grant", "g-2", account="a", amount=40, source="pack", unit_price={**PACK, "per": 40})
    totals = minor(made(ledger).totals()["EUR"])
    assert totals == {"sold": 998, "earned": 125, "returned": 499, "closing": 374}
    # What was spent comes back to the lot that was returned, and pays what is owed for it, of which nothing is left.
    ledger.apply("credits.refund", "r", account="a", operation="c")
    assert minor(made(ledger).totals()["EUR"])["closing"] == 374 + 200


def claw_back(ledger: Ledger, account: str, step: int, returned: int, **content: Any) -> None:
    """So much of what was paid for the purchase ``p`` is away."""
    content = {"account": account, "purchase": "p", "paid_minor": 499, "returned_minor": returned, **content}
    ledger.apply("credits.claw_back", f"payment.{step:032x}", step=step, **content)


@pytest.mark.parametrize("price", [None, {"minor": 1000, "currency": "EUR", "per": 20}])
def test_a_dispute_that_is_won_leaves_what_was_earned_whatever_paid_its_debt_meanwhile(
    ledger: Ledger, price: dict[str, Any] | None
) -> None:
    freeze(ledger, START)
    ledger.apply("credits.open", "o", account="a", kind="pool")
    ledger.apply("credits.grant", "g", account="a", amount=25, source="pack", purchase="p", unit_price=PACK)
    ledger.apply("credits.consume", "c", account="a", amount=15)
    before = minor(made(ledger).totals()["EUR"])
    assert before == {"sold": 499, "earned": 299, "closing": 200}
    claw_back(ledger, "a", 1, 499)
    assert minor(made(ledger).totals()["EUR"]) == {"sold": 499, "returned": 499}
    given = {} if price is None else {"unit_price": price}
    ledger.apply("credits.grant", "g-2", account="a", amount=10, source="bonus", **given)
    paid = 0 if price is None else 500  # all ten pay the debt, of which five are left
    after = {"sold": 499 + paid, "earned": paid, "returned": 499}
    assert minor(made(ledger).totals()["EUR"]) == {name: figure for name, figure in after.items() if figure}
    claw_back(ledger, "a", 2, 0)
    won = made(ledger)
    assert minor(won.totals()["EUR"]) == {"sold": 499 + paid, "earned": 299, "closing": 200 + paid}
    assert sum(summary.closing.credits_micro for summary in won.totals().values()) == 20_000_000


def test_what_expired_and_comes_back_with_a_renewal_undone_is_no_breakage(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(PLAN, encoding="utf-8")
    catalog = load_catalog(str(file))
    ledger.writer.catalog = lambda: catalog
    freeze(ledger, START)
    ledger.apply("credits.open", "o", account="a", kind="pool")
    ledger.apply("plans.subscribe", "s", account="a", plan="paid", payment="one")
    ledger.apply("credits.consume", "c", account="a", amount=3)
    freeze(ledger, START + 28 * DAY)
    ledger.apply("plans.renew", "r", account="a", payment="two", period_start=(START + 28 * DAY).isoformat())
    renewed = {"sold": 200, "earned": 30, "breakage": 70, "closing": 100}
    assert minor(made(ledger).totals()["EUR"]) == renewed
    ledger.apply("plans.undo", "u", account="a", actor="admin", reason="a test")
    found = made(ledger)
    assert minor(found.totals()["EUR"]) == {"sold": 200, "earned": 30, "returned": 100, "closing": 70}
    text = io.StringIO(newline="")
    february = made(ledger, datetime(2026, 2, 1, tzinfo=UTC), datetime(2026, 3, 1, tzinfo=UTC))
    assert write_csv(february, text) == 8
    names, *read = csv.reader(text.getvalue().splitlines())
    assert names == list(CSV_COLUMNS)
    assert text.getvalue().count("\r\n") == len(read) + 1
    month = ["2026-02-01T00:00:00+00:00", "2026-03-01T00:00:00+00:00", "", "EUR", "monthly"]
    assert [row[:5] for row in read] == [month] * 8
    assert [row[5:] for row in read] == [
        ["opening", "", "7", "70", "0.70"],
        ["sold", "granted", "10", "100", "1.00"],
        ["moved_in", "rolled_in", "7", "70", "0.70"],
        ["breakage", "expired", "7", "70", "0.70"],
        ["breakage", "unexpired", "-7", "-70", "-0.70"],
        ["returned", "revoked", "10", "100", "1.00"],
        ["moved_out", "rolled_out", "7", "70", "0.70"],
        ["closing", "", "7", "70", "0.70"],
    ]


def test_a_years_payment_comes_to_what_was_paid_over_its_twelve_months(ledger: Ledger) -> None:
    catalog = load_catalog("rollover")
    ledger.writer.catalog = lambda: catalog
    start = datetime(2026, 1, 1, tzinfo=UTC)
    freeze(ledger, start)
    ledger.apply("credits.open", "o", account="a", kind="pool")
    price = {"minor": 10_000, "currency": "USD", "per": 6000}
    ledger.apply("plans.subscribe", "s", account="a", plan="pro_yearly", payment="invoice", unit_price=price)
    for month in range(1, 12):
        freeze(ledger, datetime(2026, month + 1, 2, tzinfo=UTC))
        ledger.apply("credits.consume", f"c{month}", account="a", amount="33.333333", partial=True)
    freeze(ledger, datetime(2027, 3, 1, tzinfo=UTC))
    ledger.apply("credits.settle", "end", account="a")
    found = made(ledger, start, datetime(2027, 3, 1, tzinfo=UTC))
    assert found.months == 14
    sold = [found.totals(month, month)["USD"].parts["sold"].minor for month in range(14)]
    assert sold == [833, 834, 833] * 4 + [0, 0]
    whole = found.totals()["USD"]
    assert whole.parts["sold"].minor == 10_000
    assert whole.parts["earned"].credits_micro == 11 * 33_333_333
    assert whole.parts["earned"].minor + whole.parts["breakage"].minor + whole.closing.minor == 10_000
    by_source = found.summaries(lambda book: book.source)
    assert by_source["monthly"].parts["moved_out"] == by_source["rollover"].parts["moved_in"]
    for month in range(13):
        assert found.totals(month, month)["USD"].closing == found.totals(month + 1, month + 1)["USD"].opening


def test_a_gift_carries_its_money_and_is_counted_once_while_it_is_under_way(ledger: Ledger) -> None:
    freeze(ledger, START)
    for name in ("b", "a", "c"):
        ledger.apply("credits.open", "o", account=name, kind="pool")
    ledger.apply("credits.grant", "g", account="b", amount=8, source="pack", unit_price=THIRDS)  # 8 / 3 yen: 3
    ledger.apply("credits.transfer", "gift", account="b", to="a", amount=4)
    given = made(ledger, by_account=True)
    assert minor(given.totals()["JPY"]) == {"sold": 3, "closing": 3}
    ledger.writer.connection.execute("DELETE FROM outbox WHERE task <> 'credits.receive'")
    assert deliver(ledger) == 1  # the recipient has them, the giver does not know
    under_way = made(ledger, by_account=True)
    accounts = under_way.summaries(lambda book: book.account)
    assert minor(accounts["a"]) == {"moved_in": 1, "closing": 1}
    assert minor(accounts["b"]) == {"sold": 3, "closing": 3}
    assert minor(under_way.totals()["JPY"]) == {"sold": 3, "closing": 3}
    assert under_way.under_way("JPY", under_way.months).minor == 1
    while deliver(ledger):
        pass
    ledger.apply("credits.transfer", "on", account="a", to="c", amount=4)
    ledger.apply("credits.transfer", "nowhere", account="b", to="d", amount=1)
    while deliver(ledger):
        pass
    ledger.apply("credits.transfer", "back", account="c", to="b", amount=3)
    while deliver(ledger):
        pass
    found = made(ledger, by_account=True)
    accounts = found.summaries(lambda book: book.account)
    assert {name: summary.closing.credits_micro // 10**6 for name, summary in accounts.items()} == {
        "a": 0,
        "b": 7,
        "c": 1,
    }
    assert minor(accounts["a"]) == {"moved_in": 1, "moved_out": 1}
    assert minor(found.totals()["JPY"]) == {"sold": 3, "closing": 3}
    assert sum(summary.closing.minor for summary in accounts.values()) == 3


def test_gift_codes_carry_their_money_use_by_use(ledger: Ledger) -> None:
    freeze(ledger, START)
    for name in ("b", "a", "c"):
        ledger.apply("credits.open", "o", account=name, kind="pool")
    ledger.apply("credits.grant", "g", account="b", amount=8, source="pack", unit_price=THIRDS)  # 8 / 3 yen: 3
    ledger.apply("credits.grant", "g-2", account="b", amount=25, source="pack", unit_price=PACK)
    ledger.apply("credits.grant", "g-3", account="b", amount=3, source="pack")
    ledger.apply("codes.issue", "codes", account="b", codes=["AAAA", "BBBB", "CCCC"], amount=2, uses=6, per_account=6)
    for number, (account, code) in enumerate((("a", "AAAA"), ("c", "AAAA"), ("b", "BBBB"), ("a", "CCCC"))):
        ledger.apply("codes.redeem", f"r-{number}", account=account, code=code)
        accounts = made(ledger, by_account=True).summaries(lambda book: book.account)
        assert sum(summary.closing.credits_micro for summary in accounts.values()) == (36 + 2 * (number + 1)) * 10**6
    while deliver(ledger):
        pass
    found = made(ledger, by_account=True)
    moved = {key: minor(each) for key, each in found.summaries(lambda book: (book.account, book.currency)).items()}
    assert sum(each.get("moved_in", 0) for (_, currency), each in moved.items() if currency == "JPY") == 2
    assert moved["b", "JPY"]["moved_out"] == 2
    assert {currency: minor(each) for currency, each in found.totals().items() if currency} == {
        "JPY": {"sold": 3, "closing": 3}, "EUR": {"sold": 499, "closing": 499},
    }  # fmt: skip
    ledger.apply("codes.redeem", "late", account="a", code="BBBB")
    ledger.apply("codes.withdraw", "end", account="b", codes=["BBBB", "AAAA", "CCCC"])
    made(ledger)
    while deliver(ledger):
        pass
    for name in ("a", "b", "c"):
        ledger.apply("credits.consume", "all", account=name, amount=1000, partial=True)
    assert {currency: minor(each) for currency, each in made(ledger).totals().items() if currency} == {
        "JPY": {"sold": 3, "earned": 3}, "EUR": {"sold": 499, "earned": 499},
    }  # fmt: skip


def test_gift_codes_of_which_a_row_is_gone_are_a_fault_to_be_named() -> None:
    issue = revenue_reading._Issue("issue")
    issue.codes.append(("AAAA", 2, 1, 5))
    assert [part.credits_micro for _, _, part in issue.lay(1, 10, 3)] == [5, 5]
    with pytest.raises(revenue_reading.ShortError):
        next(issue.lay(2, 1, 0))


def test_a_gift_that_comes_back_brings_the_money_it_left_with(ledger: Ledger) -> None:
    freeze(ledger, START)
    ledger.apply("credits.open", "o", account="a", kind="pool")
    ledger.apply("credits.grant", "g", account="a", amount=8, source="pack", unit_price=THIRDS)
    ledger.apply("credits.transfer", "nowhere", account="a", to="nobody", amount=2)  # one yen of three
    ledger.apply("credits.consume", "c", account="a", amount=2)  # of six, none
    while deliver(ledger):
        pass
    assert minor(made(ledger).totals()["JPY"]) == {"sold": 3, "closing": 3}
    ledger.apply("credits.consume", "c-2", account="a", amount=1)  # five of eight credits are worth two
    assert minor(made(ledger).totals()["JPY"]) == {"sold": 3, "earned": 1, "closing": 2}


def test_what_is_given_back_bit_by_bit_after_its_lot_has_expired_is_worth_what_it_was(ledger: Ledger) -> None:
    freeze(ledger, START)
    ledger.apply("credits.open", "o", account="a", kind="pool")
    ledger.apply("credits.grant", "g", account="a", amount=8, source="pack", unit_price=THIRDS, expires_in=60)
    ledger.apply("credits.consume", "c", account="a", amount=8)
    freeze(ledger, START + DAY)
    for part in range(8):
        ledger.apply("credits.refund", f"r-{part}", account="a", operation="c", amount=1)
    assert minor(made(ledger).totals()["JPY"]) == {"sold": 3, "closing": 3}


def test_gifts_in_a_circle_are_read_whoever_comes_first(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        revenue_reading, "ACCOUNTS", revenue_reading.ACCOUNTS.replace(f"LIMIT {revenue_reading.PAGE}", "LIMIT 2")
    )
    monkeypatch.setattr(audit_rows, "CHUNK", 3)
    freeze(ledger, START)
    names = ["f", "a", "e", "b", "d", "c"]
    for name in names:
        ledger.apply("credits.open", "o", account=name, kind="pool")
    for number, name in enumerate(names):
        price = {"minor": 100 + number, "currency": "EUR", "per": 7}
        ledger.apply("credits.grant", "g", account=name, amount=10, source="pack", unit_price=price)
    for turn in range(4):
        for giver, taker in itertools.pairwise([*names[turn:], *names[:turn], names[turn]]):
            ledger.apply("credits.transfer", f"gift-{turn}", account=giver, to=taker, amount=3 + turn)
            ledger.apply("credits.consume", f"use-{turn}", account=giver, amount="0.7")
            if turn != 2:
                deliver(ledger)
        while deliver(ledger):
            pass
    found = made(ledger, by_account=True)
    totals = found.totals()["EUR"]
    assert totals.parts["sold"].minor == sum(rounded(1000 + 10 * number, 7) for number in range(6))
    moved = [summary.parts for summary in found.summaries(lambda book: book.account).values()]
    assert sum(parts["moved_in"].minor for parts in moved) == sum(parts["moved_out"].minor for parts in moved) > 0
    assert totals.closing.credits_micro == 60_000_000 - 24 * 700_000


# Random lives


class Plain:
    """What the rows come to when each entry is money by itself, exactly."""

    def __init__(self, ledger: Ledger, accounts: list[str]) -> None:
        connection = ledger.writer.connection
        self.entries = connection.execute(
            "SELECT e.account, g.source, g.price_currency, g.price_minor, g.price_per_micro, e.kind, e.amount_micro,"
            " e.at, g.purchase, CASE WHEN e.kind = 'reinstated' THEN o.arguments ->> 'purchase' END"
            " FROM entries e JOIN grants g USING (account, grant_id)"
            " LEFT JOIN operations o ON o.account = e.account AND o.operation = e.operation"
            " WHERE e.account = ANY(%s)",
            (accounts,),
        ).fetchall()

    def parts(self, start: datetime, end: datetime) -> tuple[Counter[Any], dict[Any, Fraction], Counter[Any]]:
        """By account, currency, source and part: credits, money, and of how many entries."""
        credits: Counter[Any] = Counter()
        count: Counter[Any] = Counter()
        money: dict[Any, Fraction] = {}
        for account, source, currency, price, per, kind, amount, at, purchase, undone in self.entries:
            if at >= end:
                continue
            meaning = [(part, sign, source, currency, price, per) for part, sign in self.meaning(kind)]
            if undone not in (None, purchase):
                # These had paid the debt of another purchase, which was earned after all.
                worth = PRICES[undone]
                meaning = [("earned", -1, source, currency, price, per)]
                owed = ("pack", worth["currency"], worth["minor"], worth["per"] * 10**6)
                meaning += [("earned", 1, *owed), ("returned", -1, *owed)]
            for part, sign, of, money_of, paid, credits_of in meaning:
                if at < start:
                    part, sign = "opening", sign * {"sold": 1, "moved_in": 1}.get(part, -1)
                key = (account, money_of or "", of, part)
                credits[key] += sign * amount
                count[key] += 1
                exact = Fraction(paid * amount, credits_of) if money_of else Fraction(0)
                money[key] = money.get(key, Fraction(0)) + sign * exact
        return credits, money, count

    @staticmethod
    def meaning(kind: str) -> list[tuple[str, int]]:
        match kind:
            case "granted":
                return [("sold", 1)]
            case "received" | "rolled_in":
                return [("moved_in", 1)]
            case "sent" | "rolled_out":
                return [("moved_out", 1)]
            case "consumed" | "captured" | "debt_paid":
                return [("earned", 1)]
            case "restored":
                return [("earned", -1)]
            case "expired":
                return [("breakage", 1)]
            case "unexpired":
                return [("breakage", -1)]
            case "revoked":
                return [("returned", 1)]
            case "reinstated":
                return [("returned", -1)]
            case "debt_incurred":
                return [("returned", 1), ("earned", -1)]
            case "debt_cancelled":
                return [("returned", -1), ("earned", 1)]
            case _:
                assert kind in ("held", "released", "transferred", "bounced"), kind
                return []


PRICES: dict[str | None, dict[str, Any]] = {"p": PACK, "q": THIRDS}
"""What the purchases of random lives cost."""

AMOUNTS = st.sampled_from(["0.000001", "0.5", "1", "2.25", "3", "7", "20"])
WHO = st.sampled_from([0, 0, 0, 1, 2])
LATELY = st.integers(0, 5)
STEP = st.one_of(
    st.tuples(
        st.just("grant"), WHO, AMOUNTS, st.sampled_from([None, PACK, THIRDS]),
        st.sampled_from([None, "p", "q"]), st.sampled_from([None, None, 60, 90_000]),
    ),
    st.tuples(st.just("consume"), WHO, AMOUNTS),
    st.tuples(st.just("hold"), WHO, AMOUNTS, st.sampled_from([60, 86_400])),
    st.tuples(st.sampled_from(["capture", "capture", "release"]), LATELY, st.sampled_from([None, "0.5", "2"])),
    st.tuples(st.just("refund"), LATELY, st.sampled_from([None, "0.5", "2"])),
    st.tuples(st.just("adjust"), WHO, st.sampled_from(["-1", "-0.3", "2"])),
    st.tuples(st.just("revoke"), WHO, st.sampled_from(["p", "q"]), st.sampled_from([None, "1", "0.4"])),
    st.tuples(st.just("dispute"), WHO, st.sampled_from(["p", "p", "q"]), AMOUNTS, st.sampled_from([None, PACK])),
    st.tuples(
        st.just("claw_back"), WHO, st.sampled_from(["p", "p", "q"]), st.sampled_from([0, 40, 100]),
        st.sampled_from([False, False, True]),
    ),
    st.tuples(st.just("transfer"), WHO, st.integers(0, 3), AMOUNTS),
    st.tuples(st.sampled_from(["subscribe", "undo", "undo", "end"]), WHO),
    st.tuples(st.just("deliver")),
    st.tuples(st.just("later"), st.sampled_from([10, 90_000, 32 * 86400])),
)  # fmt: skip

_lives = itertools.count(1)


class Life:
    """Three accounts and what happens to them, from one life to the next at later instants."""

    now = START

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        number = next(_lives)
        self.accounts = [f"{name}{number}" for name in ("z", "m", "a", "nobody")]
        self.done: dict[str, list[tuple[str, str]]] = {"hold": [], "consume": []}
        self.began = Life.now
        freeze(ledger, Life.now)
        self.numbers = itertools.count(1)
        for account in self.accounts[:-1]:
            self.send("credits.open", account=account, kind="pool")
        for place in range(3):
            self.step("grant", place, "5", PACK, "p", 90_000)
        self.step("subscribe", 0)

    def send(self, name: str, **content: Any) -> str:
        operation = f"o{next(self.numbers)}"
        self.ledger.write(job(name, operation, **{key: part for key, part in content.items() if part is not None}))
        return operation

    def step(self, kind: str, *values: Any) -> None:
        match kind, values:
            case "capture" | "release" | "refund", (lately, amount):
                names = self.done["consume" if kind == "refund" else "hold"]
                if names:
                    account, named = names[-1 - lately % len(names)]
                    what = {"operation" if kind == "refund" else "hold": named}
                    some = {} if kind == "release" else {"amount": amount}
                    operation = self.send(f"credits.{kind}", account=account, **what, **some)
                    if kind == "capture":
                        self.done["consume"].append((account, operation))
            case "deliver", ():
                deliver(self.ledger)
            case "later", (seconds,):
                Life.now += timedelta(seconds=seconds)
                freeze(self.ledger, Life.now)
            case _, (place, *rest):
                self.step_of(self.accounts[place], kind, *rest)

    def step_of(self, account: str, kind: str, *values: Any) -> None:
        match kind, values:
            case "grant", (amount, price, purchase, lives):
                self.send(
                    "credits.grant", account=account, amount=amount, source="pack", purchase=purchase,
                    unit_price=PRICES.get(purchase, price), expires_in=lives,
                )  # fmt: skip
            case "consume", (amount,):
                operation = self.send("credits.consume", account=account, amount=amount, partial=True)
                self.done["consume"].append((account, operation))
            case "hold", (amount, ttl):
                operation = self.send("credits.hold", account=account, amount=amount, ttl=ttl)
                self.done["hold"].append((account, operation))
            case "adjust", (amount,):
                self.send("credits.adjust", account=account, amount=amount, actor="admin", reason="a test")
            case "revoke", (purchase, amount):
                self.send("credits.revoke", account=account, purchase=purchase, amount=amount)
            case "dispute", (purchase, amount, price):
                self.step_of(account, "claw_back", purchase, 100, False)
                self.step_of(account, "grant", amount, price, None, None)
                self.step_of(account, "claw_back", purchase, 0, False)
            case "claw_back", (purchase, returned, frozen):
                step = next(self.numbers)
                message = job(
                    "credits.claw_back", f"payment.{step:032x}", account=account, purchase=purchase, paid_minor=100,
                    returned_minor=returned, frozen=frozen, step=step,
                )  # fmt: skip
                self.ledger.write(message)
            case "transfer", (to, amount):
                if self.accounts[to] != account:
                    self.send("credits.transfer", account=account, to=self.accounts[to], amount=amount)
            case "subscribe", ():
                payment = f"payment-{next(self.numbers)}"
                self.send("plans.subscribe", account=account, plan="pro_yearly", payment=payment)
            case "undo", ():
                self.send("plans.undo", account=account, actor="admin", reason="a test")
            case "end", ():
                self.send("plans.cancel", account=account, at="now")


@pytest.mark.timeout(1800 if THOROUGH else 180)
@settings(
    max_examples=400 if THOROUGH else 25,
    derandomize=not THOROUGH,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(STEP, min_size=10, max_size=50), begin=st.integers(-1, 100), length=st.integers(1, 100))
def test_random_lives_come_to_what_their_entries_come_to_one_by_one(
    steps: list[tuple[Any, ...]], begin: int, length: int, ledger: Ledger
) -> None:
    catalog = load_catalog("rollover")
    ledger.writer.catalog = lambda: catalog
    life = Life(ledger)
    for step in steps:
        life.step(*step)
    start = life.began + begin * DAY
    end = start + length * DAY
    found = made(ledger, start, end, by_account=True)
    books = found.summaries(lambda book: book)
    credits, money, count = Plain(ledger, life.accounts).parts(start, end)
    of_life = {book: summary for book, summary in books.items() if book.account in life.accounts}
    for book, summary in of_life.items():
        for part, amount in {"opening": summary.opening, **summary.parts}.items():
            key = (*book, part)
            assert amount.credits_micro == credits.pop(key, 0)
            assert abs(amount.minor - money.get(key, Fraction(0))) <= count[key]
        assert min(summary.closing) >= 0
    assert not any(credits.values())
    for currency, total in found.totals().items():
        went = sum(total.parts[part].minor for part in ("earned", "breakage", "returned"))
        assert total.opening.minor + total.parts["sold"].minor == went + total.closing.minor, currency
    while deliver(ledger):
        pass
    made(ledger)


# What does not close


def begin(ledger: Ledger) -> None:
    """Two accounts, one of which gave the other a part of its pack."""
    freeze(ledger, START)
    for name in ("a", "b"):
        ledger.apply("credits.open", "o", account=name, kind="pool")
    ledger.apply("credits.grant", "g", account="b", amount=25, source="pack", purchase="p", unit_price=PACK)
    ledger.apply("credits.consume", "c", account="b", amount=5)
    ledger.apply("credits.transfer", "gift", account="b", to="a", amount=10)
    while deliver(ledger):
        pass


def no_sender(ledger: Ledger) -> list[str]:
    gift = receiving_id("b", "gift")
    return [f"UPDATE operations SET arguments = '{{}}' WHERE operation = '{gift}'"]


TAMPERINGS: dict[str, tuple[Callable[[Ledger], list[str]] | str, set[tuple[str, str, str]]]] = {
    "a kind that has no place": (
        "UPDATE entries SET kind = 'lent' WHERE account = 'b' AND seq = 2",
        {("b", "entries", "seq 2"), ("b", "grants", "grant 1")},
    ),
    "an entry's amount": (
        "UPDATE entries SET amount_micro = amount_micro + 1 WHERE account = 'b' AND seq = 2",
        {("b", "grants", "grant 1")},
    ),
    "an entry of more than there is": (
        "UPDATE entries SET amount_micro = 26000000 WHERE account = 'b' AND seq = 2",
        {("b", "entries", "seq 2"), ("b", "grants", "grant 1")},
    ),
    "a grant's credits": (
        "UPDATE grants SET available_micro = available_micro - 1, sent_micro = sent_micro + 1 WHERE account = 'b'",
        {("b", "grants", "grant 1")},
    ),
    "a lot that is gone": ("DELETE FROM grants WHERE account = 'b'", {("b", "entries", "seq 1")}),
    "what was sent is another amount": (
        "UPDATE entries SET amount_micro = 1 WHERE account = 'b' AND kind = 'sent'",
        {("b", "entries", "seq 4"), ("", "entries", "EUR")},
    ),
    "a gift in another currency": (
        "UPDATE grants SET price_currency = 'USD' WHERE account = 'a'",
        {("a", "entries", "seq 1"), ("", "entries", "USD")},
    ),
    "a gift of nobody": (no_sender, {("a", "entries", "seq 1")}),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERINGS)
def test_what_was_tampered_with_is_named(what: str, tampered_ledger: Ledger) -> None:
    begin(tampered_ledger)
    change, rows = TAMPERINGS[what]
    tamper(tampered_ledger, *([change] if isinstance(change, str) else change(tampered_ledger)))
    found = revenue(tampered_ledger.writer.connection, *ALWAYS)
    assert not found.report.holds
    assert rows <= named(found.report)


def test_progress_is_told_and_accounts_and_entries_are_counted(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revenue_reading, "TICK", 4)
    begin(ledger)
    told: list[tuple[int, int]] = []
    found = made(ledger, progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 5), (5, 5)]
    assert (found.report.accounts, found.report.entries) == (2, 5)


def test_an_empty_ledger_has_no_revenue(ledger: Ledger) -> None:
    found = made(ledger)
    assert (found.totals(), list(found.lines())) == ({}, [])
