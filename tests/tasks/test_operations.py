"""What each operation does, sentence by sentence, and each of its refusals by name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from creditlane.codes import Code
from creditlane.contract import OPERATIONS as MESSAGES
from creditlane.contract import Result, decode_message, receiving_id
from models.catalog import load_catalog, parse_catalog
from models.rules.catalog import Catalog
from models.rules.state import CLOSED, MAX_OPEN_GRANTS, MAX_OPEN_HOLDS, Account
from tasks.ledger import Row, apply
from tasks.registry import OPERATIONS

START = datetime(2026, 1, 31, 12, tzinfo=UTC)

CATALOG = """
[catalog]
name = "test"
version = 3
[signup]
credits = "6"
[lead]
credits = "2"
source = "lead"
expires_days = 14
[priorities]
signup = 10
pack = 50
[features.image]
price = "1"
per = "8"
[features.video]
price = "2"
[features.poster]
price = "1"
per = "8"
rounding = "up"
[features.export]
price = "0"
[features.yacht]
price = "1000000000000"
[packs.small]
credits = "10"
price = "2.00 EUR"
[packs.large]
credits = "100"
price = "15.00 EUR"
"""

DEBT = parse_catalog(CATALOG, "test.toml")
FORGIVE = parse_catalog(CATALOG + '[clawback]\non_spent = "forgive"\n', "test.toml")


@dataclass
class Lane:
    """An account of its own and a clock; every operation goes through the door and the ledger."""

    catalog: Catalog = DEBT
    account: Account = field(default_factory=lambda: Account("user_42"))
    now: datetime = START
    sent: int = 0
    row: Row | None = None
    """The row of the last operation, none for a replay or a conflict."""

    def __call__(self, name: str, id: str | None = None, /, **content: Any) -> dict[str, Any]:
        """Send ``credits.<name>``, or a task by its whole name, and return the result."""
        self.sent += 1
        arguments = msgspec.json.encode({"account": "user_42", **content})
        task = name if "." in name else f"credits.{name}"
        message = decode_message(task, arguments)
        done = apply(
            self.account,
            task,
            id or f"operation-{self.sent}",
            message,
            arguments,
            self.now,
            self.catalog,
        )
        self.row = done.row
        result: dict[str, Any] = json.loads(done.result)
        return result

    def wait(self, **for_: float) -> None:
        self.now += timedelta(**for_)

    def available(self) -> str:
        balance: dict[str, Any] = self("settle")["balance"]
        return str(balance["available"])

    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.account.entries]


def lane(*grants: str | dict[str, Any], catalog: Catalog = DEBT) -> Lane:
    """An open account with these grants and nothing else; a grant by itself is an amount of source "pack"."""
    made = Lane(catalog)
    made("open", kind="pool")
    for each in grants:
        made("grant", **({"amount": each, "source": "pack"} if isinstance(each, str) else each))
    return made


def refused(result: dict[str, Any], code: Code) -> bool:
    assert result["status"] == "rejected"
    assert result["code"] == code
    assert result["reason"]
    assert result.get("charged", "0") == "0"
    assert "grants" not in result
    return True


def uses(result: dict[str, Any]) -> list[tuple[int, str]]:
    return [(use["grant"], use["amount"]) for use in result.get("grants", [])]


# The worked example of the catalog `packs`.


def test_the_worked_example_of_the_packs_catalog() -> None:
    packs = Lane(load_catalog("packs"))
    steps: list[tuple[str, dict[str, Any], str, str]] = [
        ("open", {}, "0", "50"),
        ("consume", {"feature": "image", "quantity": 12}, "1.5", "48.5"),
        ("consume", {"feature": "regeneration"}, "0.2", "48.3"),
        ("consume", {"feature": "save_collection"}, "10", "38.3"),
        ("consume", {"feature": "export"}, "0", "38.3"),
        ("grant", {"amount": "25", "source": "pack", "purchase": "pi_1"}, "0", "63.3"),
    ]
    for name, content, charged, available in steps:
        result = packs(name, **content)
        assert result["status"] == "applied"
        assert result["charged"] == charged
        assert result["balance"]["available"] == available
    assert packs("settle")["balance"]["by_source"] == {"signup": "38.3", "pack": "25"}
    packs.wait(days=36_500)
    assert packs.available() == "63.3", "nothing expires"


# All of them.


def test_every_message_of_the_contract_has_its_operation() -> None:
    assert set(OPERATIONS) == set(MESSAGES)


EXAMPLES: dict[str, dict[str, Any]] = {
    "grant": {"amount": "1", "source": "pack"},
    "consume": {"amount": "1"},
    "hold": {"amount": "1"},
    "capture": {"hold": "h"},
    "release": {"hold": "h"},
    "refund": {"operation": "c"},
    "adjust": {"amount": "1", "actor": "anna", "reason": "goodwill"},
    "revoke": {"grant": 1},
    "claw_back": {"purchase": "pi_1", "paid_minor": 100, "returned_minor": 100, "step": 1},
    "settle": {},
    "transfer": {"to": "user_43", "amount": "1"},
    "receive": {
        "sender": "user_41",
        "transfer": "gift",
        "lots": [{"source": "pack", "amount": "1", "priority": 50}],
    },
    "confirm": {"transfer": "gift"},
    "bounce": {"transfer": "gift", "refused": "unknown_account"},
}
CONCLUDING = ("confirm", "bounce", "claw_back")
"""What ends something that the account has begun: applied even when it was closed meanwhile."""


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_nothing_but_an_opening_is_applied_to_an_account_that_was_not_opened(name: str) -> None:
    unopened = Lane()
    result = unopened(name, **EXAMPLES[name])
    assert refused(result, Code.UNKNOWN_ACCOUNT)
    assert result["balance"] == {"available": "0"}
    assert unopened.account.entries == []
    assert unopened.account.status == "unopened"


@pytest.mark.parametrize("name", [*(name for name in EXAMPLES if name not in CONCLUDING), "open"])
def test_nothing_is_applied_to_a_closed_account(name: str) -> None:
    closed = lane("5")
    closed.account.status = CLOSED
    assert refused(closed(name, **EXAMPLES.get(name, {})), Code.ACCOUNT_CLOSED)
    assert closed.kinds() == ["granted"]


def test_a_result_of_every_operation_is_a_result_of_the_contract() -> None:
    own = lane("10")
    own("consume", "c", amount="1")
    own("hold", "h", amount="1")
    for name, content in (
        *EXAMPLES.items(),
        ("open", {}),
        ("hold", {"amount": "99"}),
        ("release", {"hold": "h"}),
    ):
        result = msgspec.convert(own(name, **content), Result, strict=False)
        assert result.operation == f"credits.{name}"
        assert result.account == "user_42"
        assert result.balance is not None


def test_operations_are_numbered_without_gaps_and_refusals_count() -> None:
    own = lane("1")
    numbers = []
    for amount in ("0.5", "5", "0.5"):
        own("consume", amount=amount)
        assert own.row is not None
        numbers.append((own.row.number, own.row.status, own.row.entries))
    assert numbers == [(3, "applied", 1), (4, "rejected", 0), (5, "applied", 1)]


def test_the_row_says_what_was_used_by_whom_when_and_by_which_catalog() -> None:
    own = lane("5")
    own(
        "consume",
        feature="image",
        quantity=12,
        member="anna",
        occurred_at="2026-01-30T00:00:00Z",
        metadata={"a": 1},
    )
    row = own.row
    assert row is not None
    assert (row.feature, row.quantity_micro, row.member) == ("image", 12_000_000, "anna")
    assert row.occurred_at == datetime(2026, 1, 30, tzinfo=UTC)
    assert (row.applied_at, row.catalog, row.charged_micro) == (START, "test-3", 1_500_000)
    assert (row.first_seq, row.entries) == (2, 1)
    assert json.loads(row.arguments)["metadata"] == {"a": 1}


def test_a_late_event_is_charged_to_the_grants_that_are_live_when_it_is_applied() -> None:
    own = lane({"amount": "5", "source": "old", "expires_in": 60}, {"amount": "5", "source": "new"})
    own.wait(seconds=60)
    result = own("consume", amount="1", occurred_at="2026-01-31T12:00:01Z")
    assert uses(result) == [(2, "1")]


# Idempotency.


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("consume", {"amount": "1"}),
        ("consume", {"amount": "100"}),
        ("consume", {"feature": "unheard_of"}),
        ("hold", {"amount": "2", "ttl": 1}),
        ("grant", {"amount": "3", "source": "gift"}),
        ("adjust", {"amount": "-1", "actor": "anna", "reason": "wrong"}),
        ("revoke", {"grant": 1}),
        ("settle", {}),
        ("open", {"kind": "user"}),
    ],
)
def test_the_same_id_with_the_same_content_gets_the_first_answer_marked_as_replayed(
    name: str, content: dict[str, Any]
) -> None:
    own = lane("5")
    first = own(name, "x", **content)
    assert "replayed" not in first
    own("adjust", amount="50", actor="anna", reason="so that another answer would be given")
    own.wait(days=1)
    own("settle")
    state = (own.account.seq, own.account.operations, own.account.available, own.account.held)
    assert own(name, "x", **content) == {**first, "replayed": True}
    assert own.row is None
    assert state == (own.account.seq, own.account.operations, own.account.available, own.account.held)


@pytest.mark.parametrize(("name", "content"), [("hold", {"amount": "2", "ttl": 1}), ("settle", {})])
def test_a_replay_and_a_conflict_change_nothing_not_even_the_time(name: str, content: dict[str, Any]) -> None:
    """What time does is written with an operation, which says by which catalog."""
    own = lane("5")
    first = own("hold", "x", amount="2", ttl=1)
    operations, entries = own.account.operations, len(own.account.entries)
    own.wait(seconds=1)
    again = own(name, "x", **content)
    assert again == {**first, "replayed": True} if name == "hold" else refused(again, Code.ID_CONFLICT)
    assert own.row is None
    assert own.account.operations == operations
    assert (own.account.available, own.account.held) == (3_000_000, 2_000_000)
    assert len(own.account.entries) == entries


def test_a_refusal_is_repeated_even_when_it_would_now_be_applied() -> None:
    own = Lane()
    assert refused(own("consume", "x", amount="1"), Code.UNKNOWN_ACCOUNT)
    own("open")
    again = own("consume", "x", amount="1")
    assert refused(again, Code.UNKNOWN_ACCOUNT)
    assert again["replayed"] is True


@pytest.mark.parametrize(
    "other",
    [
        ("consume", {"amount": "2"}),
        ("consume", {"feature": "image"}),
        ("consume", {"amount": "1", "partial": True}),
        ("consume", {"amount": "1", "member": "anna"}),
        ("consume", {"amount": "1", "metadata": {}}),
        ("hold", {"amount": "1"}),
        ("settle", {}),
    ],
)
def test_the_same_id_with_other_content_is_a_conflict_and_nothing_is_applied(
    other: tuple[str, dict[str, Any]],
) -> None:
    own = lane("5")
    first = own("consume", "x", amount="1")
    seq, operations = own.account.seq, own.account.operations
    name, content = other
    assert refused(own(name, "x", **content), Code.ID_CONFLICT)
    assert own.row is None
    assert (own.account.seq, own.account.operations) == (seq, operations)
    assert own("consume", "x", amount="1") == {**first, "replayed": True}


def test_content_is_the_same_however_it_is_spelt() -> None:
    own = lane("5")
    own("consume", "x", amount="1", occurred_at="2026-01-31T12:00:00Z")
    again = own("consume", "x", amount=1, occurred_at="2026-01-31T13:00:00+01:00", partial=False, v=1, member=None)
    assert again["replayed"] is True


@pytest.mark.parametrize("name", ["consume", "hold"])
def test_no_quantity_is_a_quantity_of_one(name: str) -> None:
    own = lane("5")
    first = own(name, "x", feature="image")
    assert first["charged"] == "0.125"
    for quantity in (1, "1", "1.000000"):
        assert own(name, "x", feature="image", quantity=quantity) == {**first, "replayed": True}
    assert refused(own(name, "x", feature="image", quantity=2), Code.ID_CONFLICT)


# Open.


def test_open_creates_the_account_with_the_catalogs_sign_up_grant() -> None:
    own = Lane()
    result = own("open", email="a@example.org", locale="fr", timezone="Europe/Paris")
    assert result["balance"] == {"available": "6", "by_source": {"signup": "6"}}
    assert uses(result) == [(1, "6")]
    account = own.account
    assert (account.status, account.kind, account.opened_at) == ("open", "user", START)
    assert (account.email, account.locale, account.timezone) == ("a@example.org", "fr", "Europe/Paris")
    assert account.grants[1].priority == 10
    assert account.grants[1].expires_at is None


def test_a_lead_gets_what_the_catalog_gives_leads_for_as_long_as_it_says() -> None:
    own = Lane()
    assert own("open", kind="lead")["balance"] == {"available": "2", "by_source": {"lead": "2"}}
    assert own.account.grants[1].expires_at == START + timedelta(days=14)
    own.wait(days=14)
    assert own.available() == "0"


def test_a_pool_starts_empty() -> None:
    own = Lane()
    assert own("open", kind="pool")["balance"] == {"available": "0"}
    assert own.account.grants == {}


def test_an_open_account_is_not_opened_again() -> None:
    own = Lane()
    own("open")
    assert refused(own("open", kind="lead"), Code.ACCOUNT_EXISTS)
    assert own.account.kind == "user"
    assert own.available() == "6"


# Grant.


def test_grant_adds_a_lot_with_all_that_it_says() -> None:
    own = lane()
    result = own(
        "grant",
        "g",
        amount="25",
        source="pack",
        priority=7,
        features=["image"],
        effective_at="2026-02-01T00:00:00Z",
        expires_in=60,
        unit_price={"minor": 499, "currency": "EUR", "per": "25"},
        purchase="pi_1",
    )
    assert result["grant"] == 1
    assert result["balance"] == {"available": "0", "upcoming": "25"}
    lot = own.account.grants[1]
    assert (lot.source, lot.priority, lot.features, lot.purchase) == ("pack", 7, frozenset({"image"}), "pi_1")
    assert lot.effective_at == datetime(2026, 2, 1, tzinfo=UTC)
    assert lot.expires_at == lot.effective_at + timedelta(seconds=60)
    assert (lot.price_minor, lot.price_currency, lot.price_per) == (499, "EUR", 25_000_000)
    assert (lot.operation, lot.created_at) == ("g", START)


def test_a_grant_has_its_sources_priority_unless_it_brings_one() -> None:
    own = lane("1", {"amount": "1", "source": "unnamed"}, {"amount": "1", "source": "pack", "priority": 0})
    assert [lot.priority for lot in own.account.grants.values()] == [50, 100, 0]


def test_an_upcoming_grant_is_not_spendable_before_its_start_and_is_from_then_on() -> None:
    own = lane({"amount": "5", "source": "pack", "effective_at": "2026-01-31T12:00:10Z"})
    own.wait(seconds=9.999999)
    assert refused(own("consume", amount="1"), Code.INSUFFICIENT_CREDITS)
    own.wait(seconds=0.000001)
    assert own("consume", amount="1")["status"] == "applied"


@pytest.mark.parametrize(
    "ends",
    [
        {"expires_at": "2026-01-31T12:00:00Z"},
        {"expires_at": "2026-01-31T11:59:59Z"},
        {"effective_at": "2026-03-01T00:00:00Z", "expires_at": "2026-03-01T00:00:00Z"},
        {"effective_at": "2026-03-01T00:00:00Z", "expires_at": "2026-02-01T00:00:00Z"},
        {"effective_at": "2026-01-01T00:00:00Z", "expires_in": 60},
    ],
)
def test_a_grant_that_ends_before_it_starts_or_has_ended_is_invalid(ends: dict[str, Any]) -> None:
    own = lane()
    assert refused(own("grant", amount="1", source="pack", **ends), Code.INVALID)
    assert own.account.grants == {}


def test_a_grant_over_the_limit_of_open_grants_is_refused_until_one_is_used_up() -> None:
    own = lane(*["1"] * MAX_OPEN_GRANTS)
    assert refused(own("grant", amount="1", source="pack"), Code.LIMIT_REACHED)
    assert refused(own("adjust", amount="1", actor="anna", reason="more"), Code.LIMIT_REACHED)
    own("consume", amount="1")
    assert own("grant", amount="1", source="pack")["status"] == "applied"


FORTUNE = 10**12
"""Credits; nine times as many is what may ever come into one account."""


def spent_fortunes(last: int) -> Lane:
    """An account that got nine fortunes but for what the last one lacks, all of them gone."""
    own = lane()
    for amount in (*[FORTUNE] * 8, last):
        own("grant", amount=amount, source="pack", expires_in=1)
    own.wait(seconds=1)
    assert own.available() == "0"
    return own


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("grant", {"source": "pack"}),
        ("adjust", {"actor": "anna", "reason": "goodwill"}),
    ],
)
def test_more_than_an_account_may_ever_get_is_refused_even_when_all_of_it_is_gone(
    name: str, content: dict[str, Any]
) -> None:
    own = spent_fortunes(FORTUNE - 3)
    lots = own.account.last_grant
    assert refused(own(name, amount="3.000001", **content), Code.LIMIT_REACHED)
    assert own.account.last_grant == lots
    assert own(name, amount="3", **content)["status"] == "applied"
    assert refused(own(name, amount="0.000001", **content), Code.LIMIT_REACHED)
    assert own("consume", amount="3")["status"] == "applied"


def test_a_refund_counts_as_credits_that_come_in_and_is_checked_after_what_was_taken() -> None:
    own = spent_fortunes(FORTUNE - 3)
    own("grant", amount="2", source="pack")
    own("consume", "c", amount="2")
    assert refused(own("refund", operation="c", amount="3"), Code.EXCEEDS_ORIGINAL)
    assert refused(own("refund", operation="c"), Code.LIMIT_REACHED)
    assert own("refund", operation="c", amount="1")["status"] == "applied"
    assert refused(own("refund", operation="c", amount="0.5"), Code.LIMIT_REACHED)


def test_what_is_released_does_not_come_in_again() -> None:
    own = spent_fortunes(FORTUNE - 3)
    own("grant", amount="3", source="pack")
    own("hold", "h", amount="3")
    assert own("release", hold="h")["balance"]["available"] == "3"


# Consume.


@pytest.mark.parametrize(
    ("content", "charged"),
    [
        ({"feature": "image", "quantity": 12}, "1.5"),
        ({"feature": "poster", "quantity": 12}, "2"),
        ({"feature": "video"}, "2"),
        ({"feature": "video", "quantity": "0.5"}, "1"),
        ({"feature": "export", "quantity": 1000}, "0"),
        ({"amount": "0.000001"}, "0.000001"),
    ],
)
def test_consume_prices_a_feature_times_a_quantity_or_takes_an_explicit_amount(
    content: dict[str, Any], charged: str
) -> None:
    own = lane("5")
    result = own("consume", **content)
    assert (result["status"], result["charged"]) == ("applied", charged)
    assert own.account.consumed == 5_000_000 - own.account.available


def test_consume_burns_in_burn_down_order_across_grants() -> None:
    own = lane(
        "2",
        {"amount": "2", "source": "pack", "features": ["image"]},
        {"amount": "2", "source": "pack", "priority": 1},
        {"amount": "2", "source": "pack", "expires_in": 60},
    )
    assert uses(own("consume", feature="video", quantity="2.5")) == [(3, "2"), (4, "2"), (1, "1")]
    assert uses(own("consume", feature="image", quantity="20")) == [(2, "2"), (1, "0.5")]


def test_too_little_is_refused_with_what_is_required_available_and_short_and_the_cheapest_offer() -> None:
    own = lane("5")
    entries = list(own.account.entries)
    result = own("consume", amount="8")
    assert refused(result, Code.INSUFFICIENT_CREDITS)
    assert (result["required"], result["available"], result["shortfall"]) == ("8", "5", "3")
    assert result["offer"] == {"pack": "small", "credits": "10", "price": "2.00 EUR"}
    assert own.account.entries == entries, "nothing is written but the operation itself"
    assert own("consume", amount="16")["offer"]["pack"] == "large"
    assert "offer" not in own("consume", amount="106")


def test_what_is_available_to_a_charge_is_what_its_scope_allows() -> None:
    own = lane("1", {"amount": "9", "source": "pack", "features": ["image"]})
    assert own("consume", feature="video")["available"] == "1"
    assert own("consume", amount="2")["available"] == "1"
    assert own("consume", feature="image", quantity=80)["status"] == "applied"


def test_partial_takes_what_is_there() -> None:
    own = lane("5")
    result = own("consume", amount="8", partial=True)
    assert (result["status"], result["charged"], result["balance"]["available"]) == ("applied", "5", "0")
    assert (result["required"], result["available"], result["shortfall"]) == ("8", "5", "3")
    assert own("consume", feature="export", partial=True)["status"] == "applied"


def test_partial_of_enough_takes_all_and_falls_short_of_nothing() -> None:
    result = lane("5")("consume", amount="5", partial=True)
    assert result["charged"] == "5"
    assert "shortfall" not in result


def test_partial_with_nothing_to_take_is_refused() -> None:
    assert refused(lane()("consume", amount="1", partial=True), Code.INSUFFICIENT_CREDITS)


@pytest.mark.parametrize("name", ["consume", "hold"])
def test_a_feature_that_the_catalog_does_not_have_is_refused(name: str) -> None:
    assert refused(lane("5")(name, feature="imgae"), Code.UNKNOWN_FEATURE)


@pytest.mark.parametrize("name", ["consume", "hold"])
def test_a_quantity_that_costs_more_than_the_largest_amount_is_invalid(name: str) -> None:
    assert refused(lane("5")(name, feature="yacht", quantity="1.1"), Code.INVALID)


# Time.


def test_an_expired_credit_is_not_spendable_however_late_the_sweep_is() -> None:
    own = lane({"amount": "5", "source": "pack", "expires_in": 60})
    own.wait(seconds=59.999999)
    assert own("consume", amount="1")["status"] == "applied"
    own.wait(seconds=0.000001)
    result = own("consume", amount="1")
    assert refused(result, Code.INSUFFICIENT_CREDITS)
    assert result["balance"] == {"available": "0"}
    assert own.account.expired == 4_000_000


def test_settle_is_nothing_but_settling() -> None:
    own = lane({"amount": "5", "source": "pack", "expires_in": 60})
    own("settle")
    assert own.kinds() == ["granted"]
    own.wait(seconds=60)
    assert own("settle")["charged"] == "0"
    assert own.kinds() == ["granted", "expired"]
    assert own.row is not None
    assert (own.row.entries, own.row.first_seq) == (0, None), "time wrote it, not the operation"


# Hold, capture, release.


def test_hold_sets_credits_aside_in_burn_down_order_and_keeps_a_receipt() -> None:
    own = lane("2", {"amount": "2", "source": "pack", "priority": 1})
    result = own("hold", "h", amount="3")
    assert uses(result) == [(2, "2"), (1, "1")]
    assert result["hold"] == "h"
    assert result["balance"]["held"] == "3"
    assert result["balance"]["available"] == "1"
    assert [(line.grant, line.taken) for line in own.account.holds["h"].lines] == [
        (2, 2_000_000),
        (1, 1_000_000),
    ]


def test_a_hold_lives_fifteen_minutes_unless_it_says_otherwise() -> None:
    own = lane("5")
    assert own("hold", "h", amount="3")["expires_at"] == "2026-01-31T12:15:00Z"
    assert own("hold", amount="1", ttl=60)["expires_at"] == "2026-01-31T12:01:00Z"
    own.wait(minutes=15)
    assert own.available() == "5"
    assert refused(own("capture", hold="h"), Code.HOLD_CLOSED)


def test_held_credits_are_not_spendable() -> None:
    own = lane("5")
    own("hold", amount="3")
    assert refused(own("consume", amount="2.000001"), Code.INSUFFICIENT_CREDITS)
    assert refused(own("hold", amount="2.000001"), Code.INSUFFICIENT_CREDITS)


def test_a_hold_over_the_limit_of_open_holds_is_refused_until_one_is_closed() -> None:
    own = lane("5")
    for number in range(MAX_OPEN_HOLDS):
        own("hold", f"h{number}", amount="0.001")
    assert refused(own("hold", amount="0.001"), Code.LIMIT_REACHED)
    own("release", hold="h0")
    assert own("hold", amount="0.001")["status"] == "applied"


def test_capture_takes_all_of_a_hold_unless_it_says_how_much() -> None:
    own = lane("5")
    own("hold", "h", amount="3")
    result = own("capture", hold="h")
    assert (result["charged"], result["balance"]["available"]) == ("3", "2")
    assert "held" not in result["balance"]
    assert own.account.consumed == 3_000_000


def test_capturing_less_gives_the_rest_back_in_reverse_order_of_taking() -> None:
    own = lane("2", {"amount": "2", "source": "pack", "priority": 1})
    own("hold", "h", amount="3")
    result = own("capture", hold="h", amount="1.5")
    assert result["charged"] == "1.5"
    assert uses(result) == [(2, "1.5")]
    assert [lot.available for lot in own.account.grants.values()] == [2_000_000, 500_000]


def test_capturing_nothing_gives_all_back() -> None:
    own = lane("5")
    own("hold", "h", amount="3")
    result = own("capture", hold="h", amount="0")
    assert (result["charged"], result["balance"]["available"]) == ("0", "5")
    assert refused(own("capture", hold="h"), Code.HOLD_CLOSED)


def test_capturing_more_burns_the_extra_as_a_consume_of_the_same_operation() -> None:
    own = lane("5", {"amount": "1", "source": "pack", "priority": 1})
    own("hold", "h", amount="1")
    result = own("capture", "k", hold="h", amount="4")
    assert uses(result) == [(2, "1"), (1, "3")]
    assert [(entry.kind, entry.operation, entry.refers_to) for entry in own.account.entries[-2:]] == [
        ("captured", "k", "h"),
        ("consumed", "k", "h"),
    ]


def test_capturing_more_than_there_is_takes_nothing_and_leaves_the_hold_open() -> None:
    own = lane("5")
    own("hold", "h", amount="3")
    result = own("capture", hold="h", amount="5.5")
    assert refused(result, Code.INSUFFICIENT_CREDITS)
    assert (result["required"], result["available"], result["shortfall"]) == ("2.5", "2", "0.5")
    assert result["balance"]["held"] == "3"
    assert own("capture", hold="h", amount="5")["status"] == "applied"


def test_the_extra_of_a_capture_is_paid_within_the_scope_of_the_holds_feature() -> None:
    own = lane({"amount": "4", "source": "pack", "features": ["video"]})
    own("hold", "h", feature="video")
    assert own("capture", hold="h", quantity=2)["charged"] == "4"
    own = lane({"amount": "4", "source": "pack", "features": ["image"]})
    own("hold", "h", feature="export")
    assert refused(own("capture", hold="h", amount="1"), Code.INSUFFICIENT_CREDITS)


def test_a_quantity_is_captured_at_the_price_of_the_holds_feature() -> None:
    own = lane("5")
    own("hold", "h", feature="image", quantity=16)
    result = own("capture", hold="h", quantity=12)
    assert result["charged"] == "1.5"
    assert own.row is not None
    assert (own.row.feature, own.row.quantity_micro) == ("image", 12_000_000)


def test_a_quantity_of_a_hold_without_a_feature_is_invalid() -> None:
    own = lane("5")
    own("hold", "h", amount="3")
    assert refused(own("capture", hold="h", quantity=1), Code.INVALID)
    assert own.account.holds["h"].status == "open"


def test_a_quantity_of_a_feature_that_left_the_catalog_is_refused() -> None:
    own = lane("5")
    own("hold", "h", feature="image")
    own.catalog = load_catalog("metering")
    own("hold", "h2", feature="image")
    own.catalog = parse_catalog('[catalog]\nname = "bare"\n', "bare.toml")
    assert refused(own("capture", hold="h", quantity=1), Code.UNKNOWN_FEATURE)
    assert own("capture", hold="h")["status"] == "applied"


def test_a_hold_is_captured_even_after_its_grant_has_expired() -> None:
    own = lane({"amount": "5", "source": "pack", "expires_in": 60})
    own("hold", "h", amount="3")
    own.wait(seconds=61)
    result = own("capture", hold="h", amount="2")
    assert (result["charged"], result["balance"]["available"]) == ("2", "0")
    assert (own.account.consumed, own.account.expired) == (2_000_000, 3_000_000)


def test_release_gives_a_hold_back_whole() -> None:
    own = lane("2", {"amount": "2", "source": "pack", "priority": 1})
    own("hold", "h", amount="3")
    result = own("release", hold="h")
    assert (result["charged"], result["balance"]["available"]) == ("-3", "4")
    assert [(entry.kind, entry.grant) for entry in own.account.entries[-2:]] == [
        ("released", 1),
        ("released", 2),
    ]
    assert own.account.holds["h"].status == "released"


def test_what_is_released_to_a_grant_that_has_expired_lapses_at_once() -> None:
    own = lane({"amount": "5", "source": "pack", "expires_in": 60})
    own("hold", "h", amount="3")
    own.wait(seconds=60)
    assert own("release", hold="h")["balance"] == {"available": "0"}
    assert own.account.expired == 5_000_000


@pytest.mark.parametrize("name", ["capture", "release"])
def test_a_hold_that_never_was_is_unknown(name: str) -> None:
    own = lane("1")
    own("hold", "refused", amount="5")
    own("consume", "c", amount="1")
    for hold in ("nowhere", "refused", "c"):
        assert refused(own(name, hold=hold), Code.UNKNOWN_HOLD)


@pytest.mark.parametrize("name", ["capture", "release"])
@pytest.mark.parametrize("first", ["capture", "release", "time"])
def test_a_hold_is_closed_once(name: str, first: str) -> None:
    own = lane("5")
    own("hold", "h", amount="3")
    if first == "time":
        own.wait(minutes=15)
    else:
        own(first, hold="h")
    available = own.available()
    assert refused(own(name, hold="h"), Code.HOLD_CLOSED)
    assert own.available() == available


# Refund.


def test_refund_gives_back_all_of_a_consume_in_reverse_order_of_taking() -> None:
    own = lane("2", {"amount": "2", "source": "pack", "priority": 1})
    own("consume", "c", amount="3")
    result = own("refund", operation="c")
    assert (result["charged"], result["balance"]["available"]) == ("-3", "4")
    assert uses(result) == [(1, "1"), (2, "2")]
    assert own.account.restored == 3_000_000


def test_refunds_in_parts_never_give_back_more_than_was_taken_in_total() -> None:
    own = lane("2", {"amount": "2", "source": "pack", "priority": 1})
    own("consume", "c", amount="3")
    assert uses(own("refund", operation="c", amount="1.5")) == [(1, "1"), (2, "0.5")]
    assert refused(own("refund", operation="c", amount="1.500001"), Code.EXCEEDS_ORIGINAL)
    assert uses(own("refund", operation="c", amount="1")) == [(2, "1")]
    assert uses(own("refund", operation="c")) == [(2, "0.5")]
    for content in ({}, {"amount": "0.000001"}):
        assert refused(own("refund", operation="c", **content), Code.EXCEEDS_ORIGINAL)
    assert own.available() == "4"


def test_refund_gives_back_a_capture_with_its_extra() -> None:
    own = lane("5", {"amount": "1", "source": "pack", "priority": 1})
    own("hold", "h", amount="1")
    own("capture", "k", hold="h", amount="4")
    assert uses(own("refund", operation="k", amount="3.5")) == [(1, "3"), (2, "0.5")]


def test_a_refund_to_a_grant_that_has_expired_goes_into_a_new_grant_that_lives_refund_days() -> None:
    own = lane({"amount": "5", "source": "pack", "expires_in": 60, "features": ["video"], "purchase": "pi_1"})
    own("consume", "c", feature="video")
    own.wait(seconds=60)
    result = own("refund", operation="c")
    assert uses(result) == [(2, "2")]
    lot = own.account.grants[2]
    assert lot.expires_at == own.now + timedelta(days=30)
    assert (lot.source, lot.features, lot.purchase, lot.priority) == (
        "pack",
        frozenset({"video"}),
        "pi_1",
        50,
    )
    own.wait(days=30)
    assert own.available() == "0"


def test_only_a_consume_or_a_capture_that_was_applied_is_a_charge() -> None:
    own = lane("5")
    own("hold", "h", amount="1")
    own("consume", "refused", amount="50")
    own("adjust", "a", amount="-1", actor="anna", reason="wrong")
    for operation in ("nowhere", "h", "refused", "a", "operation-2"):
        assert refused(own("refund", operation=operation), Code.UNKNOWN_CHARGE)


@pytest.mark.parametrize("free", [("consume", {"feature": "export"}), ("capture", {"hold": "h", "amount": "0"})])
def test_a_charge_of_nothing_has_nothing_to_give_back(free: tuple[str, dict[str, Any]]) -> None:
    own = lane("5")
    own("hold", "h", amount="1")
    name, content = free
    own(name, "c", **content)
    assert refused(own("refund", operation="c"), Code.EXCEEDS_ORIGINAL)


def test_a_refund_that_may_need_more_lots_than_an_account_may_have_is_refused() -> None:
    own = lane({"amount": "1", "source": "pack", "expires_in": 60}, {"amount": "1", "source": "pack", "expires_in": 60})
    own("consume", "c", amount="2")
    own.wait(seconds=60)
    for _ in range(MAX_OPEN_GRANTS - 1):
        own("grant", amount="1", source="pack")
    assert refused(own("refund", operation="c"), Code.LIMIT_REACHED)
    assert refused(own("refund", operation="c", amount="0.5"), Code.LIMIT_REACHED), "each line is counted"
    assert refused(own("refund", operation="c", amount="2.000001"), Code.EXCEEDS_ORIGINAL), "is looked at before"
    own("consume", amount="1")
    assert uses(own("refund", operation="c")) == [(MAX_OPEN_GRANTS + 2, "1"), (MAX_OPEN_GRANTS + 3, "1")]
    assert own.account.open_grants() == MAX_OPEN_GRANTS


# Adjust.


def test_a_plus_is_a_grant_of_its_own() -> None:
    own = lane("1")
    result = own("adjust", amount="2.5", actor="anna", reason="goodwill")
    assert result["grant"] == 2
    assert result["balance"]["by_source"] == {"pack": "1", "adjustment": "2.5"}


def test_a_minus_takes_credits_away_in_burn_down_order() -> None:
    own = lane("2", {"amount": "2", "source": "pack", "priority": 1})
    result = own("adjust", amount="-3", actor="anna", reason="wrong")
    assert uses(result) == [(2, "2"), (1, "1")]
    assert (own.account.revoked, own.account.consumed, own.account.debt) == (3_000_000, 0, 0)
    assert own.kinds()[-2:] == ["revoked", "revoked"]


def test_a_minus_over_the_unscoped_balance_takes_nothing() -> None:
    own = lane("2", {"amount": "9", "source": "pack", "features": ["image"]})
    result = own("adjust", amount="-3", actor="anna", reason="wrong")
    assert refused(result, Code.INSUFFICIENT_CREDITS)
    assert (result["required"], result["available"], result["shortfall"]) == ("3", "2", "1")


# Revoke and debt.


def test_revoke_takes_a_grants_remaining_credits_away() -> None:
    own = lane("5", "7")
    result = own("revoke", grant=1)
    assert (result["charged"], uses(result)) == ("5", [(1, "5")])
    assert result["balance"] == {"available": "7", "by_source": {"pack": "7"}}
    assert refused(own("revoke", grant=1), Code.EXCEEDS_ORIGINAL)


def test_revoke_takes_only_the_purchases_own_grants_the_last_to_burn_first() -> None:
    bought = {"amount": "4", "source": "pack", "purchase": "pi_1"}
    own = lane({**bought, "expires_in": 60}, bought, {"amount": "4", "source": "pack", "expires_in": 30})
    result = own("revoke", purchase="pi_1", amount="5")
    assert uses(result) == [(2, "4"), (1, "1")]
    assert own.account.grants[3].available == 4_000_000


def test_what_was_spent_becomes_debt_and_the_next_grants_pay_it_first() -> None:
    own = lane("5")
    own("consume", amount="4")
    result = own("revoke", grant=1)
    assert (result["charged"], result["owed"]) == ("1", "4")
    assert result["balance"] == {"available": "0", "debt": "4"}
    assert own("grant", amount="3", source="pack")["balance"] == {"available": "0", "debt": "1"}
    assert own("adjust", amount="3", actor="anna", reason="gift")["balance"] == {
        "available": "2",
        "by_source": {"adjustment": "2"},
    }


def test_what_was_spent_is_forgiven_when_the_catalog_says_so() -> None:
    own = lane("5", catalog=FORGIVE)
    own("consume", amount="4")
    result = own("revoke", grant=1)
    assert (result["charged"], result["forgiven"]) == ("1", "4")
    assert "owed" not in result
    assert result["balance"] == {"available": "0"}
    assert refused(own("revoke", grant=1), Code.EXCEEDS_ORIGINAL)


def test_revoking_in_parts_ends_the_same_as_at_once() -> None:
    own, once = lane("5"), lane("5")
    for each in (own, once):
        each("consume", amount="2")
    for amount in ("1", "1.5", "2.5"):
        own("revoke", grant=1, amount=amount)
    once("revoke", grant=1)
    for bucket in ("available", "consumed", "revoked", "debt"):
        assert getattr(own.account, bucket) == getattr(once.account, bucket)
    assert own.account.debt == 2_000_000


def test_what_expired_unspent_is_gone_and_owes_nothing() -> None:
    own = lane({"amount": "5", "source": "pack", "expires_in": 60})
    own("consume", amount="2")
    own.wait(seconds=60)
    assert own("revoke", grant=1)["owed"] == "2"
    own = lane({"amount": "5", "source": "pack", "expires_in": 60})
    own.wait(seconds=60)
    assert refused(own("revoke", grant=1), Code.EXCEEDS_ORIGINAL)


def test_more_than_a_grant_was_worth_cannot_be_revoked() -> None:
    own = lane("5")
    assert refused(own("revoke", grant=1, amount="5.000001"), Code.EXCEEDS_ORIGINAL)
    assert own.available() == "5"


@pytest.mark.parametrize("what", [{"grant": 2}, {"purchase": "pi_2"}])
def test_a_grant_or_a_purchase_that_never_was_is_unknown(what: dict[str, Any]) -> None:
    own = lane({"amount": "5", "source": "pack", "purchase": "pi_1"})
    assert refused(own("revoke", **what), Code.UNKNOWN_GRANT)


def test_what_a_release_a_refund_and_a_smaller_capture_give_back_pays_the_debt_first() -> None:
    for give_back in (
        ("release", {"hold": "h"}),
        ("refund", {"operation": "c"}),
        ("capture", {"hold": "h", "amount": "0"}),
    ):
        own = lane("5", "5")
        own("consume", "c", amount="5")
        own("hold", "h", amount="5")
        assert own("revoke", grant=1, amount="2")["owed"] == "2"
        name, content = give_back
        result = own(name, **content)
        assert result["balance"]["available"] == "3"
        assert "debt" not in result["balance"]


def test_what_was_forgiven_is_taken_when_it_comes_back_after_all() -> None:
    for give_back in (
        ("release", {"hold": "h"}),
        ("capture", {"hold": "h", "amount": "0"}),
        ("refund", {"operation": "c"}),
    ):
        own = lane("5", catalog=FORGIVE)
        own("consume", "c", amount="2")
        own("hold", "h", amount="3")
        assert own("revoke", grant=1)["forgiven"] == "5"
        name, content = give_back
        assert own(name, **content)["balance"]["available"] == "0"
        assert own.kinds()[-1] == "revoked"
        own.wait(days=1)
        assert own.available() == "0"


def test_what_was_forgiven_is_taken_when_a_holds_time_is_out() -> None:
    own = lane("5", catalog=FORGIVE)
    own("hold", amount="3", ttl=60)
    own("revoke", grant=1, amount="4")
    own.wait(seconds=60)
    assert own.available() == "1"


def test_what_was_forgiven_of_a_lot_is_not_taken_from_others() -> None:
    own = lane("5", catalog=FORGIVE)
    own("consume", amount="5")
    own("revoke", grant=1)
    assert own("grant", amount="3", source="pack")["balance"]["available"] == "3"


@pytest.mark.parametrize("on_spent", [DEBT, FORGIVE])
@pytest.mark.parametrize("what", [{"grant": 1}, {"purchase": "pi_1"}])
def test_what_came_back_to_a_successor_of_a_lot_is_revoked_with_it(what: dict[str, Any], on_spent: Catalog) -> None:
    own = lane({"amount": "5", "source": "pack", "expires_in": 60, "purchase": "pi_1"}, "9", catalog=on_spent)
    own("consume", "c", amount="5")
    own.wait(seconds=60)
    own("refund", operation="c", amount="3")
    assert own.account.grants[3].origin == 1
    result = own("revoke", **what)
    assert uses(result) == [(3, "3")]
    assert result["owed" if on_spent is DEBT else "forgiven"] == "2"
    own("refund", operation="c")
    assert (own.available(), own.account.debt) == ("9", 0)
    assert own.account.grants[4].origin == 1
    assert refused(own("revoke", **what), Code.EXCEEDS_ORIGINAL)


def test_a_successor_of_a_successor_continues_the_first_lot() -> None:
    own = lane({"amount": "5", "source": "pack", "expires_in": 60})
    own("consume", "c", amount="5")
    own.wait(seconds=60)
    own("refund", operation="c")
    own("consume", "c2", amount="5")
    own.wait(days=30)
    own("refund", operation="c2")
    assert [lot.origin for lot in own.account.grants.values()] == [None, 1, 1]
    assert uses(own("revoke", grant=1)) == [(3, "5")]


@pytest.mark.parametrize("on_spent", [DEBT, FORGIVE])
@pytest.mark.parametrize("ends_by", ["release", "capture", "time"])
def test_what_comes_back_to_an_expired_lot_that_was_clawed_back_is_taken_before_it_lapses(
    ends_by: str, on_spent: Catalog
) -> None:
    own = lane({"amount": "5", "source": "pack", "expires_in": 60}, catalog=on_spent)
    own("hold", "h", amount="5", ttl=61)
    own("revoke", grant=1, amount="2")
    own.wait(seconds=60)
    if ends_by == "time":
        own.wait(seconds=1)
        own("settle")
    else:
        own(ends_by, hold="h", **({"amount": "0"} if ends_by == "capture" else {}))
    account = own.account
    assert (account.available, account.debt, account.revoked, account.expired) == (0, 0, 2_000_000, 3_000_000)


def test_what_lapses_of_a_lot_that_was_not_clawed_back_pays_no_debt() -> None:
    own = lane("5", {"amount": "5", "source": "pack", "expires_in": 60, "priority": 1})
    own("hold", "h", amount="5")
    own("consume", amount="5")
    own("revoke", grant=1)
    own.wait(seconds=60)
    assert own("release", hold="h")["balance"] == {"available": "0", "debt": "5"}


def test_what_an_administrator_took_of_a_lot_is_not_taken_again_by_its_revocation() -> None:
    own = lane("5")
    own("adjust", amount="-2", actor="anna", reason="wrong")
    assert refused(own("revoke", grant=1, amount="3.000001"), Code.EXCEEDS_ORIGINAL)
    result = own("revoke", grant=1)
    assert (result["charged"], "owed" in result) == ("3", False)
    assert own.account.debt == 0


def booked(own: Lane) -> list[tuple[int, int]]:
    """What was taken back and what was forgiven of each lot."""
    return [(lot.clawed_back, lot.forgiven) for lot in own.account.grants.values()]


def last(own: Lane, count: int) -> list[tuple[str, int, int]]:
    """The last entries: kind, lot, micro-credits."""
    return [(entry.kind, entry.grant, entry.amount_micro) for entry in own.account.entries[-count:]]


def test_what_is_left_of_a_revocation_is_owed_by_the_lots_whose_credits_were_spent() -> None:
    bought = {"amount": "4", "source": "pack", "purchase": "pi_1"}
    own = lane({**bought, "priority": 9}, {**bought, "priority": 1})
    own("consume", amount="6")
    result = own("revoke", purchase="pi_1")
    assert uses(result) == [(1, "2")]
    assert result["owed"] == "6"
    assert booked(own) == [(4_000_000, 0), (4_000_000, 0)]
    assert last(own, 2) == [("debt_incurred", 1, 2_000_000), ("debt_incurred", 2, 4_000_000)]


def test_what_a_revocation_owes_is_booked_first_where_credits_are_away_and_then_where_there_is_worth() -> None:
    own = lane("3")
    own("consume", amount="3")
    own("revoke", grant=1)
    own("grant", amount="5", source="pack", purchase="pi_1")
    own("grant", amount="4", source="pack", purchase="pi_1", priority=1)
    own("consume", amount="4")
    assert [lot.available for lot in own.account.grants.values()] == [0, 2_000_000, 0]
    result = own("revoke", purchase="pi_1", amount="7")
    assert (uses(result), result["owed"]) == ([(2, "2")], "5")
    assert booked(own)[1:] == [(3_000_000, 0), (4_000_000, 0)]
    assert last(own, 2) == [("debt_incurred", 2, 1_000_000), ("debt_incurred", 3, 4_000_000)]
    assert own("revoke", purchase="pi_1")["owed"] == "2"
    assert last(own, 1) == [("debt_incurred", 2, 2_000_000)]
    assert refused(own("revoke", purchase="pi_1"), Code.EXCEEDS_ORIGINAL)


def test_a_lot_whose_debt_was_paid_gives_nothing_more_when_its_credits_come_back() -> None:
    bought = {"amount": "5", "source": "pack", "purchase": "pi_1"}
    own = lane({**bought, "priority": 9}, {**bought, "priority": 1})
    own("consume", "c", amount="10")
    assert own("revoke", grant=1)["owed"] == "5"
    assert "debt" not in own("grant", amount="5", source="gift")["balance"]
    own("refund", operation="c")
    assert [lot.available for lot in own.account.grants.values()] == [5_000_000, 5_000_000, 0]
    result = own("revoke", purchase="pi_1")
    assert (uses(result), "owed" in result) == ([(2, "5")], False), "lot 1 would be the first to be taken"
    assert own.available() == "5"


def test_what_was_forgiven_of_a_lot_is_not_away_when_the_rest_of_its_purchase_is_owed() -> None:
    own = lane({"amount": "1", "source": "pack"})
    own("consume", amount="1")
    own("revoke", grant=1)
    bought = {"source": "pack", "purchase": "pi_1"}
    own("grant", amount="3", **bought)
    own("grant", amount="2", **bought)
    assert own("consume", amount="4")["status"] == "applied"
    own.catalog = FORGIVE
    assert own("revoke", grant=2, amount="2")["forgiven"] == "2"
    own.catalog = DEBT
    assert own("revoke", purchase="pi_1", amount="2")["owed"] == "2"
    assert booked(own)[1:] == [(2_000_000, 2_000_000), (2_000_000, 0)]


def test_naming_a_lot_that_continues_another_revokes_both() -> None:
    own = lane({"amount": "5", "source": "pack", "expires_in": 60})
    own("consume", "c", amount="5")
    own.wait(seconds=60)
    own("refund", operation="c", amount="3")
    assert refused(own("revoke", grant=2, amount="5.000001"), Code.EXCEEDS_ORIGINAL)
    result = own("revoke", grant=2)
    assert (uses(result), result["owed"]) == ([(2, "3")], "2")
    assert booked(own) == [(5_000_000, 0), (0, 0)]
    assert last(own, 1) == [("debt_incurred", 1, 2_000_000)]


def test_what_an_administrator_took_of_a_lot_that_continues_another_is_booked_on_the_first() -> None:
    own = lane({"amount": "5", "source": "pack", "expires_in": 60, "purchase": "pi_1"})
    own("consume", "c", amount="5")
    own.wait(seconds=60)
    own("refund", operation="c")
    assert uses(own("adjust", amount="-2", actor="anna", reason="wrong")) == [(2, "2")]
    assert booked(own) == [(2_000_000, 0), (0, 0)]
    result = own("revoke", purchase="pi_1")
    assert (uses(result), "owed" in result) == ([(2, "3")], False)


# Sequences that took credits twice, or let them be kept.

BOUGHT = {"amount": "5", "source": "pack", "purchase": "pi_1"}


@pytest.mark.parametrize("number", [1, 2])
def test_a_lot_whose_purchase_was_revoked_is_not_revoked_again_by_its_number(number: int) -> None:
    own = lane(BOUGHT, BOUGHT)
    own("consume", amount="10")
    assert own("revoke", purchase="pi_1")["owed"] == "10"
    assert refused(own("revoke", grant=number), Code.EXCEEDS_ORIGINAL)
    assert refused(own("revoke", purchase="pi_1"), Code.EXCEEDS_ORIGINAL)
    assert own.account.debt == 10_000_000


def test_what_was_forgiven_of_a_purchase_is_taken_whichever_of_its_lots_it_comes_back_to() -> None:
    own = lane(BOUGHT, {**BOUGHT, "amount": "2", "priority": 1}, catalog=FORGIVE)
    assert uses(own("consume", "c", amount="2")) == [(2, "2")]
    result = own("revoke", purchase="pi_1")
    assert (uses(result), result["forgiven"]) == ([(1, "5")], "2")
    assert booked(own) == [(5_000_000, 0), (2_000_000, 2_000_000)]
    assert own("refund", operation="c")["balance"] == {"available": "0"}
    assert booked(own) == [(5_000_000, 0), (2_000_000, 0)]
    assert last(own, 2) == [("restored", 2, 2_000_000), ("revoked", 2, 2_000_000)]


def test_what_returns_unspent_to_an_ended_lot_of_a_revoked_purchase_pays_what_is_owed_for_it() -> None:
    own = lane(BOUGHT, {**BOUGHT, "expires_in": 60})
    assert uses(own("hold", "h", amount="5")) == [(2, "5")]
    result = own("revoke", purchase="pi_1")
    assert (uses(result), result["owed"]) == ([(1, "5")], "5")
    own.wait(seconds=60)
    assert own("release", hold="h")["balance"] == {"available": "0"}
    assert last(own, 2) == [("released", 2, 5_000_000), ("debt_paid", 2, 5_000_000)]
    assert own.account.debt == 0


def test_what_returns_unspent_to_an_ended_lot_that_continues_a_revoked_one_pays_what_is_owed_for_it() -> None:
    own = lane({**BOUGHT, "expires_in": 20})
    own("consume", "c", amount="5")
    own.wait(seconds=60)
    assert uses(own("refund", operation="c")) == [(2, "5")]
    own.wait(days=29.75)
    assert uses(own("hold", "h", amount="5", ttl=86_400)) == [(2, "5")]
    assert own("revoke", purchase="pi_1")["owed"] == "5"
    own.wait(days=0.25)
    assert own("release", hold="h")["balance"] == {"available": "0"}
    assert last(own, 2) == [("released", 2, 5_000_000), ("debt_paid", 2, 5_000_000)]
    assert own.account.debt == 0


def test_what_was_forgiven_of_a_used_up_lot_is_taken_out_of_what_the_one_that_continues_it_gets_back() -> None:
    own = lane({**BOUGHT, "amount": "1", "expires_in": 20}, catalog=FORGIVE)
    own("consume", "c1", amount="1")
    own.wait(seconds=60)
    own("refund", operation="c1")
    assert uses(own("consume", "c2", amount="1")) == [(2, "1")]
    assert own("revoke", purchase="pi_1")["forgiven"] == "1"
    assert booked(own) == [(1_000_000, 1_000_000), (0, 0)]
    assert own("refund", operation="c2")["balance"] == {"available": "0"}
    assert booked(own) == [(1_000_000, 0), (0, 0)]
    assert last(own, 2) == [("restored", 2, 1_000_000), ("revoked", 2, 1_000_000)]


@pytest.mark.parametrize("how", ["release", "capture", "time"])
def test_a_tiny_hold_that_ends_pays_no_more_than_itself_of_the_debt(how: str) -> None:
    own = lane(BOUGHT)
    own("consume", amount="5")
    own("grant", amount="9", source="gift")
    own("hold", "h", amount="0.000001", ttl=60)
    assert own("revoke", purchase="pi_1")["owed"] == "5"
    if how == "time":
        own.wait(seconds=60)
        result = own("settle")
    else:
        result = own(how, hold="h", **({"amount": "0"} if how == "capture" else {}))
    assert result["balance"] == {"available": "8.999999", "debt": "4.999999", "by_source": {"gift": "8.999999"}}


# When it is due next.


def test_the_account_notes_when_time_will_change_it() -> None:
    own = lane()
    account = own.account
    assert account.next_due_at is None
    own("grant", amount="5", source="pack", expires_in=100)
    assert account.next_due_at == START + timedelta(seconds=100)
    own("grant", amount="5", source="pack", expires_in=50)
    assert account.next_due_at == START + timedelta(seconds=50)
    own("hold", "h", amount="10", ttl=30)
    assert account.next_due_at == START + timedelta(seconds=30)
    own.wait(seconds=30)
    own("settle")
    assert account.next_due_at == START + timedelta(seconds=50)
    own.wait(seconds=70)
    own("settle")
    assert account.next_due_at is None


def test_what_was_noted_too_early_is_set_right_by_settling_and_changes_nothing() -> None:
    own = lane({"amount": "5", "source": "pack", "expires_in": 100})
    own("hold", "h", amount="5", ttl=10)
    own("capture", hold="h", amount="4")
    assert own.account.next_due_at == START + timedelta(seconds=10)
    own.wait(seconds=10)
    seq = own.account.seq
    own("settle")
    assert own.account.seq == seq
    assert own.account.next_due_at == START + timedelta(seconds=100)


def test_a_refund_into_a_successor_is_noted_too() -> None:
    own = lane({"amount": "5", "source": "pack", "expires_in": 60})
    own("consume", "c", amount="5")
    own.wait(seconds=60)
    own("settle")
    assert own.account.next_due_at is None
    own("refund", operation="c")
    assert own.account.next_due_at == own.now + timedelta(days=30)


# Transfers: the rest is in tests/oracle/test_transfers.py.


def test_a_recipient_has_room_for_the_lots_of_a_transfer_or_they_go_back() -> None:
    full = lane(*["1"] * (MAX_OPEN_GRANTS - 1))
    parcel = {"source": "pack", "amount": "1", "priority": 50}
    two = full("receive", receiving_id("anna", "two"), sender="anna", transfer="two", lots=[parcel, parcel])
    assert refused(two, Code.LIMIT_REACHED)
    one = full("receive", receiving_id("anna", "one"), sender="anna", transfer="one", lots=[parcel])
    assert one["status"] == "applied"
