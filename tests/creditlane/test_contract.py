"""The message contract: what passes the door, what does not, and what is said about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from creditlane import contract
from creditlane.amounts import Micro
from creditlane.codes import Code
from creditlane.contract import ContractError, check_id, decode_batch, decode_message
from models.rules.state import MAX_OPEN_GRANTS

MINIMAL: dict[str, dict[str, Any]] = {
    "credits.open": {"account": "user_42"},
    "credits.grant": {"account": "user_42", "amount": "25", "source": "pack"},
    "credits.consume": {"account": "user_42", "feature": "image"},
    "credits.hold": {"account": "user_42", "amount": "3"},
    "credits.capture": {"account": "user_42", "hold": "job-7"},
    "credits.release": {"account": "user_42", "hold": "job-7"},
    "credits.refund": {"account": "user_42", "operation": "order-991"},
    "credits.adjust": {"account": "user_42", "amount": "-2", "actor": "anna", "reason": "goodwill"},
    "credits.revoke": {"account": "user_42", "grant": 1},
    "credits.claw_back": {
        "account": "user_42",
        "purchase": "pi_1",
        "paid_minor": 499,
        "returned_minor": 0,
        "step": 1,
    },
    "credits.settle": {"account": "user_42"},
    "pools.set_member": {"account": "user_42", "member": "anna"},
    "pools.remove_member": {"account": "user_42", "member": "anna"},
    "credits.transfer": {"account": "user_42", "to": "user_43", "amount": "5"},
    "credits.receive": {
        "account": "user_42",
        "sender": "user_41",
        "transfer": "gift-1",
        "lots": [{"source": "pack", "amount": "5", "priority": 50}],
    },
    "credits.confirm": {"account": "user_42", "transfer": "gift-1"},
    "credits.bounce": {"account": "user_42", "transfer": "gift-1", "refused": "unknown_account"},
    "credits.convert": {"account": "user_42", "to": "user_43"},
    "accounts.freeze": {"account": "user_42", "actor": "ann", "reason": "a stolen card"},
    "accounts.thaw": {"account": "user_42", "actor": "ann", "reason": "found again"},
    "accounts.close": {"account": "user_42", "actor": "ann", "reason": "asked for"},
    "accounts.reopen": {"account": "user_42", "actor": "ann", "reason": "by mistake"},
    "codes.issue": {"account": "user_42", "codes": ["ABCD1234"], "amount": "5"},
    "codes.redeem": {"account": "user_42", "code": "ABCD1234"},
    "codes.withdraw": {"account": "user_42", "codes": ["ABCD1234"]},
    "codes.conclude": {
        "account": "user_42",
        "code": "ABCD1234",
        "issue": "issue-1",
        "place": 0,
        "slot": 0,
        "redeemed_by": "user_43",
    },
    "referrals.issue": {"account": "user_42", "code": "ANNA2X"},
    "referrals.claim": {"account": "user_42", "code": "ANNA2X"},
    "referrals.reward": {"account": "user_42", "referee": "user_43", "code": "ANNA2X"},
    "plans.subscribe": {"account": "user_42", "plan": "pro"},
    "plans.change": {"account": "user_42", "plan": "pro"},
    "plans.cancel": {"account": "user_42"},
    "plans.renew": {"account": "user_42", "period_start": "2027-02-01T00:00:00Z"},
    "plans.undo": {"account": "user_42", "actor": "ann", "reason": "by mistake"},
}

PAID = {
    "payment": "in_1", "unit_price": {"minor": 999, "currency": "EUR", "per": "100"},
    "period_start": "2027-02-01T00:00:00Z", "period_end": "2027-03-01T00:00:00Z",
}  # fmt: skip

FULL: dict[str, dict[str, Any]] = {
    "credits.open": {
        "account": "user_42",
        "kind": "lead",
        "email": "a@example.org",
        "locale": "fr-FR",
        "timezone": "America/Argentina/Buenos_Aires",
        "welcome": False,
        "occurred_at": "2019-05-01T00:00:00Z",
        "referral_code": "ANNA2X",
        "v": 1,
    },
    "credits.grant": {
        "account": "user_42",
        "amount": "25",
        "source": "pack",
        "priority": 0,
        "features": ["image", "context"],
        "effective_at": "2026-01-31T00:00:00Z",
        "expires_at": "2026-03-01T00:00:00+01:00",
        "unit_price": {"minor": 499, "currency": "EUR", "per": "25"},
        "purchase": "pi_1",
        "reason": "bought",
    },
    "credits.consume": {
        "account": "user_42",
        "feature": "image",
        "quantity": "12",
        "member": "anna",
        "partial": True,
        "occurred_at": "2026-01-31T00:00:00Z",
        "metadata": {"size": [1, 2.5, None, True, {"deep": "ä"}]},
    },
    "credits.hold": {"account": "user_42", "feature": "video", "quantity": 3, "ttl": 60, "metadata": {}},
    "credits.capture": {"account": "user_42", "hold": "job-7", "quantity": "0"},
    "credits.release": {"account": "user_42", "hold": "job-7"},
    "credits.refund": {"account": "user_42", "operation": "order-991", "amount": "1", "reason": "broken"},
    "credits.adjust": {"account": "user_42", "amount": 5, "actor": "anna", "reason": "goodwill"},
    "credits.revoke": {"account": "user_42", "purchase": "pi_1", "amount": "1", "reason": "dispute"},
    "credits.claw_back": {
        "account": "user_42",
        "purchase": "pi_1",
        "paid_minor": 499,
        "returned_minor": 500,
        "step": 3,
        "frozen": True,
        "currency": "EUR",
    },
    "credits.settle": {"account": "user_42"},
    "pools.set_member": {"account": "user_42", "member": "anna", "limit": "0", "period": "week"},
    "pools.remove_member": {"account": "user_42", "member": "anna", "v": 1},
    "credits.transfer": {"account": "user_42", "to": "user_43", "amount": "5", "message": "for you"},
    "credits.receive": {
        "account": "user_42",
        "sender": "user_41",
        "transfer": "gift-1",
        "lots": [
            {"source": "pack", "amount": "0.5", "priority": 0, "expires_at": "2026-03-01T00:00:00Z"},
            {
                "source": "pack",
                "amount": 1,
                "priority": 1000,
                "unit_price": {"minor": 499, "currency": "EUR", "per": "25"},
                "features": ["image"],
                "effective_at": "2026-02-01T00:00:00Z",
            },
        ],
        "message": "for you",
        "from_lead": True,
    },
    "credits.confirm": {"account": "user_42", "transfer": "gift-1"},
    "credits.bounce": {"account": "user_42", "transfer": "gift-1", "refused": "limit_reached"},
    "credits.convert": {"account": "user_42", "to": "user_43", "after": "job-7"},
    "accounts.freeze": {"account": "user_42", "actor": "ann", "reason": "a stolen card", "v": 1},
    "accounts.thaw": {"account": "user_42", "actor": "ann", "reason": "found again", "v": 1},
    "accounts.close": {"account": "user_42", "actor": "ann", "reason": "asked for", "v": 1},
    "accounts.reopen": {"account": "user_42", "actor": "ann", "reason": "by mistake", "v": 1},
    "codes.issue": {
        "account": "user_42",
        "codes": ["ABCD", "1234"],
        "amount": 5,
        "uses": 3,
        "per_account": 2,
        "expires_at": "2027-03-01T00:00:00Z",
        "credits_expire_in": 86400,
        "source": "campaign",
        "message": "for you",
        "actor": "anna",
        "reason": "campaign 12",
    },
    "codes.redeem": {"account": "user_42", "code": "ABCD1234"},
    "codes.withdraw": {"account": "user_42", "codes": ["ABCD", "1234"], "actor": "anna", "reason": "over"},
    "codes.conclude": {
        "account": "user_42",
        "code": "ABCD1234",
        "issue": "issue-1",
        "place": 999,
        "slot": 5,
        "redeemed_by": "user_43",
    },
    "referrals.issue": {"account": "user_42", "code": "7" * 64},
    "referrals.claim": {"account": "user_42", "code": "ANNA2X"},
    "referrals.reward": {"account": "user_42", "referee": "user_43", "code": "ANNA2X", "v": 1},
    "plans.subscribe": {"account": "user_42", "plan": "pro", **PAID},
    "plans.change": {"account": "user_42", "plan": "pro", **PAID},
    "plans.cancel": {"account": "user_42", "at": "now", "reason": "moved away"},
    "plans.renew": {"account": "user_42", "plan": "pro", **PAID},
    "plans.undo": {"account": "user_42", "actor": "ann", "reason": "by mistake"},
}

REQUIRED = [
    (name, field)
    for name, content in MINIMAL.items()
    for field in content
    if (name, field) not in {("credits.consume", "feature"), ("credits.hold", "amount"), ("credits.revoke", "grant")}
]


def encoded(content: object) -> bytes:
    return json.dumps(content).encode()


def refused(name: str, arguments: bytes) -> ContractError:
    with pytest.raises(ContractError) as caught:
        decode_message(name, arguments)
    assert len(str(caught.value)) <= contract.MAX_TEXT
    assert str(caught.value)
    return caught.value


def invalid(name: str, **changes: Any) -> str:
    """The reason for which a message is refused that is good but for these changes."""
    error = refused(name, encoded({**MINIMAL[name], **changes}))
    assert error.code is Code.INVALID_MESSAGE
    return str(error)


def test_there_is_an_example_of_every_operation() -> None:
    assert set(MINIMAL) == set(FULL) == set(contract.OPERATIONS)


@pytest.mark.parametrize("name", list(MINIMAL))
def test_a_message_with_only_the_required_arguments_passes(name: str) -> None:
    message = decode_message(name, encoded(MINIMAL[name]))
    assert type(message) is contract.OPERATIONS[name]
    assert message.operation == name
    assert message.account == "user_42"
    assert message.v == 1


@pytest.mark.parametrize("name", list(FULL))
def test_a_message_with_every_argument_passes(name: str) -> None:
    assert type(decode_message(name, encoded(FULL[name]))) is contract.OPERATIONS[name]


def test_a_message_that_is_a_piece_of_a_batch_passes_undecoded() -> None:
    raw = msgspec.Raw(encoded(MINIMAL["credits.settle"]))
    assert decode_message("credits.settle", raw) == contract.Settle(account="user_42")


def test_amounts_and_quantities_are_read_into_millionths() -> None:
    message = decode_message("credits.consume", encoded(FULL["credits.consume"]))
    assert isinstance(message, contract.Consume)
    assert message.quantity == 12_000_000
    grant = decode_message("credits.grant", encoded(FULL["credits.grant"]))
    assert isinstance(grant, contract.Grant)
    assert grant.amount == 25_000_000
    assert grant.unit_price == contract.UnitPrice(minor=499, currency="EUR", per=Micro(25_000_000))
    assert grant.effective_at == datetime(2026, 1, 31, tzinfo=UTC)


def test_the_charge_of_a_refund_is_called_operation_on_the_wire() -> None:
    message = decode_message("credits.refund", encoded(MINIMAL["credits.refund"]))
    assert isinstance(message, contract.Refund)
    assert message.charge == "order-991"
    assert message.operation == "credits.refund"
    assert "charge" in invalid("credits.refund", charge="order-991")


def test_a_hold_lives_fifteen_minutes_unless_it_says_otherwise() -> None:
    message = decode_message("credits.hold", encoded(MINIMAL["credits.hold"]))
    assert isinstance(message, contract.Hold)
    assert message.ttl == 900


@pytest.mark.parametrize(("name", "field"), REQUIRED)
def test_a_missing_required_argument_is_named(name: str, field: str) -> None:
    content = {each: value for each, value in MINIMAL[name].items() if each != field}
    error = refused(name, encoded(content))
    assert error.code is Code.INVALID_MESSAGE
    assert f"`{field}`" in str(error)


@pytest.mark.parametrize("name", list(MINIMAL))
@pytest.mark.parametrize("field", ["amounts", "Account", "", "id", "__class__", "operations"])
def test_an_unknown_argument_is_named(name: str, field: str) -> None:
    assert f"unknown field `{field}`" in invalid(name, **{field: 1})


@pytest.mark.parametrize("name", list(MINIMAL))
@pytest.mark.parametrize("account", [None, 1, True, "", "a" * 129, ["a"], {"a": 1}, "a\x00b"])
def test_an_account_is_1_to_128_characters_of_text(name: str, account: object) -> None:
    assert "$.account" in invalid(name, account=account)


@pytest.mark.parametrize("name", list(MINIMAL))
def test_an_account_may_be_128_characters_of_any_language(name: str) -> None:
    account = "ユ" * 128
    assert decode_message(name, encoded({**MINIMAL[name], "account": account})).account == account


NAMES = [
    ("credits.grant", "source"),
    ("credits.grant", "purchase"),
    ("credits.consume", "feature"),
    ("credits.consume", "member"),
    ("credits.hold", "member"),
    ("credits.capture", "hold"),
    ("credits.release", "hold"),
    ("credits.refund", "operation"),
]
TEXTS = [
    ("credits.adjust", "actor"),
    ("credits.adjust", "reason"),
    ("credits.grant", "reason"),
    ("credits.refund", "reason"),
    ("credits.revoke", "reason"),
    ("codes.issue", "message"),
]
CONTROLS = ["\x00", "\n", "\r", "\t", "\x1b", "\x7f", "\x80", "\x85", "\x9f", "\u2028", "\u2029"]


@pytest.mark.parametrize(("name", "field"), [*NAMES, *TEXTS, ("credits.open", "email")])
@pytest.mark.parametrize("control", CONTROLS)
def test_no_text_holds_a_control_character_or_a_line_separator(name: str, field: str, control: str) -> None:
    for text in (f"a{control}b", f"a{control}", control):
        assert f"$.{field}" in invalid(name, **{field: text})


@pytest.mark.parametrize(
    ("name", "field", "most"),
    [*((*each, 128) for each in NAMES), *((*each, 500) for each in TEXTS), ("credits.open", "email", 254)],
)
def test_a_text_is_refused_from_one_character_over_its_limit(name: str, field: str, most: int) -> None:
    assert decode_message(name, encoded({**MINIMAL[name], field: "x" * most}))
    assert f"$.{field}" in invalid(name, **{field: "x" * (most + 1)})


@pytest.mark.parametrize(("name", "field"), [*NAMES, *TEXTS])
def test_a_text_is_not_empty_and_not_a_number(name: str, field: str) -> None:
    for wrong in ("", 1, 1.5, True, ["a"], {"a": "b"}):
        assert f"$.{field}" in invalid(name, **{field: wrong})


@pytest.mark.parametrize("escape", [b"\\ud800", b"\\udfff", b"\\udc00\\ud800", b"\xed\xa0\x80", b"\xff", b"\xc0\x80"])
@pytest.mark.parametrize("place", [b'{"account":"a%s"}', b'{"a%s":1,"account":"a"}'])
def test_lone_surrogates_and_broken_utf_8_are_refused(escape: bytes, place: bytes) -> None:
    assert refused("credits.settle", place % escape).code is Code.INVALID_MESSAGE


def test_lone_surrogates_in_metadata_are_refused() -> None:
    for text in (b'{"a":"\\ud800"}', b'{"\\udfff":1}', b'{"a":["x\\ud800 y"]}'):
        arguments = b'{"account":"a","amount":"1","metadata":' + text + b"}"
        assert refused("credits.consume", arguments).code is Code.INVALID_MESSAGE


def test_a_surrogate_pair_is_one_character() -> None:
    assert decode_message("credits.settle", b'{"account":"\\ud83d\\ude00"}').account == "\U0001f600"


AMOUNTS = [
    ("credits.grant", "amount"),
    ("credits.consume", "quantity"),
    ("credits.hold", "amount"),
    ("credits.capture", "amount"),
    ("credits.capture", "quantity"),
    ("credits.refund", "amount"),
    ("credits.adjust", "amount"),
    ("credits.revoke", "amount"),
]
NO_AMOUNT = [
    b"1.0",
    b"0.1",
    b"1e3",
    b"1E400",
    b"-1.5",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b'"1e3"',
    b'"NaN"',
    b'"1.0000001"',
    b'"0.' + b"0" * 599 + b'1"',
    b'"+1"',
    b'" 1"',
    b'"1\\n"',
    b'"\\u0661"',
    b'"1000000000000.000001"',
    b"1000000000001",
    b"9223372036854775808",
    b"-9223372036854775809",
    b"18446744073709551616",
    b'"9223372036854775808"',
    b"9" * 400,
    b"9" * 5000,
    b"-1000000000001",
]


@pytest.mark.parametrize(("name", "field"), AMOUNTS)
@pytest.mark.parametrize("amount", NO_AMOUNT)
def test_what_is_no_exact_amount_within_bounds_is_refused(name: str, field: str, amount: bytes) -> None:
    content = {each: value for each, value in MINIMAL[name].items() if each != field}
    arguments = encoded(content)[:-1] + b', "%s": %s}' % (field.encode(), amount)
    error = refused(name, arguments)
    assert error.code is Code.INVALID_MESSAGE
    assert "amount" in str(error) or f"$.{field}" in str(error)


@pytest.mark.parametrize(("name", "field"), AMOUNTS)
@pytest.mark.parametrize("amount", [b"NaN", b"Infinity", b"-Infinity", b"01", b"1.", b"+1", b"0x1", b"1_000"])
def test_what_is_no_json_number_is_refused(name: str, field: str, amount: bytes) -> None:
    content = {each: value for each, value in MINIMAL[name].items() if each != field}
    arguments = encoded(content)[:-1] + b', "%s": %s}' % (field.encode(), amount)
    assert refused(name, arguments).code is Code.INVALID_MESSAGE


@pytest.mark.parametrize(("name", "field"), AMOUNTS)
def test_the_largest_amount_passes(name: str, field: str) -> None:
    message = decode_message(name, encoded({**MINIMAL[name], field: 10**12}))
    assert getattr(message, field) == 10**18


@pytest.mark.parametrize(
    ("name", "field"), [each for each in AMOUNTS if each[0] not in ("credits.adjust", "credits.capture")]
)
@pytest.mark.parametrize("amount", [0, "0", "-0", "0.000000", -1, "-0.000001"])
def test_an_amount_is_more_than_0(name: str, field: str, amount: str | int) -> None:
    assert f"{field} must be more than 0" in invalid(name, **{field: amount})


@pytest.mark.parametrize("field", ["amount", "quantity"])
def test_a_capture_may_be_of_nothing_but_not_of_less(field: str) -> None:
    assert decode_message("credits.capture", encoded({**MINIMAL["credits.capture"], field: "0"}))
    assert f"{field} must not be negative" in invalid("credits.capture", **{field: "-0.000001"})


def test_a_members_limit_may_be_nothing_but_not_less() -> None:
    assert decode_message("pools.set_member", encoded({**MINIMAL["pools.set_member"], "limit": "0"}))
    assert "limit must not be negative" in invalid("pools.set_member", limit="-0.000001")
    assert "period" in invalid("pools.set_member", period="year")


@pytest.mark.parametrize("amount", [0, "0", "-0.0"])
def test_an_adjustment_goes_either_way_but_not_nowhere(amount: str | int) -> None:
    assert "amount is 0" in invalid("credits.adjust", amount=amount)


@pytest.mark.parametrize("name", ["credits.consume", "credits.hold"])
def test_a_charge_names_a_feature_or_an_amount_but_not_both(name: str) -> None:
    for content in ({}, {"feature": "image", "amount": "1"}, {"quantity": "1"}):
        error = refused(name, encoded({"account": "a", **content}))
        assert error.code is Code.INVALID_MESSAGE
        assert "feature (with quantity) or amount" in str(error)
    error = refused(name, encoded({"account": "a", "amount": "1", "quantity": "2"}))
    assert "quantity goes with feature" in str(error)


def test_a_capture_takes_an_amount_or_a_quantity_but_not_both() -> None:
    assert "not both" in invalid("credits.capture", amount="1", quantity="1")


def test_a_revocation_names_a_grant_or_a_purchase_but_not_both() -> None:
    assert "one of the two" in invalid("credits.revoke", purchase="pi_1")
    assert "one of the two" in str(refused("credits.revoke", b'{"account":"a"}'))


def test_a_grant_ends_at_an_instant_or_after_a_while_but_not_both() -> None:
    assert "not both" in invalid("credits.grant", expires_at="2030-01-01T00:00:00Z", expires_in=60)


WRONG: dict[tuple[str, str], list[Any]] = {
    ("credits.open", "kind"): ["admin", "", 1, "User"],
    ("credits.open", "locale"): ["", "f" * 36, "fr FR", "fr\n", 1],
    ("credits.open", "timezone"): ["", "Europe Paris", "../../etc/passwd\x00", "x" * 65, 2],
    ("credits.open", "welcome"): ["false", 1, 0, ""],
    ("credits.grant", "priority"): [-1, 1001, "1", 1.5, 2**63],
    ("credits.grant", "features"): [[], [""], "image", [1], ["a"] * 65, ["a\x00"], {}],
    ("credits.grant", "expires_in"): [0, -1, "60", 1.5, 100 * 366 * 24 * 3600 + 1, 2**64],
    ("credits.consume", "partial"): ["true", 1, 0, ""],
    ("credits.consume", "metadata"): ["a", 1, [], [["a", 1]]],
    ("credits.hold", "ttl"): [0, -1, "60", 60.5, 30 * 24 * 3600 + 1, 2**63],
    ("credits.revoke", "grant"): [0, -1, "1", 1.5, 2**31, True],
}
BAD_FIELDS = [(name, field, bad) for (name, field), values in WRONG.items() for bad in values]


@pytest.mark.parametrize(("name", "field", "bad"), BAD_FIELDS)
def test_an_argument_of_a_wrong_type_or_out_of_range_is_named(name: str, field: str, bad: object) -> None:
    assert f"$.{field}" in invalid(name, **{field: bad})


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("credits.open", "occurred_at"),
        ("credits.grant", "effective_at"),
        ("credits.grant", "expires_at"),
        ("credits.consume", "occurred_at"),
        ("credits.hold", "occurred_at"),
    ],
)
@pytest.mark.parametrize(
    "bad",
    [
        "2026-01-31",
        "2026-01-31T00:00:00",
        "2026-02-30T00:00:00Z",
        "2026-01-31T25:00:00Z",
        "tomorrow",
        "",
        1767225600,
        1.5,
        True,
    ],
)
def test_an_instant_is_complete_and_has_its_offset(name: str, field: str, bad: object) -> None:
    assert f"$.{field}" in invalid(name, **{field: bad})


INSTANTS = [
    ("credits.open", "occurred_at"),
    ("credits.grant", "effective_at"),
    ("credits.grant", "expires_at"),
    ("credits.consume", "occurred_at"),
    ("credits.hold", "occurred_at"),
]


@pytest.mark.parametrize(("name", "field"), INSTANTS)
@pytest.mark.parametrize(
    "good",
    ["1970-01-01T00:00:00Z", "8999-12-31T23:59:59.999999Z", "1969-12-31T23:00:00-01:00", "9000-01-01T00:59:59+01:00"],
)
def test_an_instant_may_lie_anywhere_in_the_years_1970_to_8999(name: str, field: str, good: str) -> None:
    message = decode_message(name, encoded({**MINIMAL[name], field: good}))
    assert getattr(message, field) == datetime.fromisoformat(good)


@pytest.mark.parametrize(("name", "field"), INSTANTS)
@pytest.mark.parametrize(
    "bad",
    [
        "1969-12-31T23:59:59.999999Z",
        "1970-01-01T00:00:00+00:01",
        "9000-01-01T00:00:00Z",
        "8999-12-31T23:59:59-00:01",
        "9999-12-31T23:59:59Z",
        "9999-12-31T23:59:59-23:59",
        "0001-01-01T00:00:00Z",
        "0001-01-01T00:00:00+23:59",
    ],
)
def test_an_instant_outside_the_years_1970_to_8999_is_refused(name: str, field: str, bad: str) -> None:
    assert f"{field} must lie between the years 1970 and 8999" in invalid(name, **{field: bad})


@pytest.mark.parametrize("name", ["credits.consume", "credits.hold"])
def test_a_feature_without_a_quantity_is_one_of_it(name: str) -> None:
    one = {"account": "a", "feature": "image"}
    said: list[dict[str, Any]] = [one, {**one, "quantity": 1}, {**one, "quantity": "1.0"}]
    messages = [decode_message(name, encoded(content)) for content in said]
    assert messages[0] == messages[1] == messages[2]
    assert getattr(messages[0], "quantity", None) == 1_000_000
    amount = decode_message(name, encoded({"account": "a", "amount": "1"}))
    assert getattr(amount, "quantity", None) is None


def test_a_captures_quantity_is_not_filled_in() -> None:
    message = decode_message("credits.capture", encoded(MINIMAL["credits.capture"]))
    assert isinstance(message, contract.Capture)
    assert message.quantity is None


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"minor": 1},
        {"currency": "EUR"},
        {"minor": -1, "currency": "EUR"},
        {"minor": 4.99, "currency": "EUR"},
        {"minor": "499", "currency": "EUR"},
        {"minor": 10**15 + 1, "currency": "EUR"},
        {"minor": 1, "currency": "eur"},
        {"minor": 1, "currency": "EURO"},
        {"minor": 1, "currency": "EUR\n"},
        {"minor": 1, "currency": "EUR", "per": "0"},
        {"minor": 1, "currency": "EUR", "per": "-1"},
        {"minor": 1, "currency": "EUR", "per": 1.5},
        {"minor": 1, "currency": "EUR", "tax": 1},
        "4.99 EUR",
        499,
    ],
)
def test_a_unit_price_is_an_integer_of_minor_units_with_its_currency(bad: object) -> None:
    assert "$.unit_price" in invalid("credits.grant", unit_price=bad)


def test_metadata_is_at_most_4_kib_as_json() -> None:
    room = 4096 - len('{"a":""}')
    charge = MINIMAL["credits.consume"]
    assert decode_message("credits.consume", encoded({**charge, "metadata": {"a": "x" * room}}))
    assert "at most 4096 bytes" in invalid("credits.consume", metadata={"a": "x" * (room + 1)})
    assert "at most 4096 bytes" in invalid("credits.hold", metadata={"a": "ä" * (room // 2 + 1)})


@pytest.mark.parametrize("metadata", [{"a": "\x00"}, {"\x00": 1}, {"a": [{"b": "x\x00y"}]}])
def test_metadata_holds_no_nul_character(metadata: dict[str, Any]) -> None:
    assert "NUL" in invalid("credits.consume", metadata=metadata)


@pytest.mark.parametrize(
    "text", ["\\u0000", "a\\u0000b", "\\\\u0000", "\\\\\\u0000", "u0000", "\\", "\\\\", "\\x00", "\\u0001"]
)
def test_a_backslash_before_u0000_is_no_nul_character(text: str) -> None:
    for metadata in ({"a": text}, {text: 1}, {"a": [{"b": text}]}):
        message = decode_message("credits.consume", encoded({**MINIMAL["credits.consume"], "metadata": metadata}))
        assert isinstance(message, contract.Consume)
        assert message.metadata == metadata


@pytest.mark.parametrize("text", ["\\\x00", "\\\\\x00", "\\\\\\\x00", "\\u0000\x00", "\x00\\u0000", '"\x00'])
def test_a_nul_character_is_refused_whatever_stands_before_it(text: str) -> None:
    for metadata in ({"a": text}, {text: 1}):
        assert "NUL" in invalid("credits.consume", metadata=metadata)


@given(st.lists(st.sampled_from(["\\", "\\", "\x00", "u0000", "u", '"']), max_size=8).map("".join))
def test_a_text_in_metadata_passes_if_and_only_if_it_has_no_nul_character(text: str) -> None:
    arguments = encoded({"account": "a", "amount": "1", "metadata": {"a": text}})
    assert verdict(lambda: decode_message("credits.consume", arguments)) is (
        Code.INVALID_MESSAGE if "\x00" in text else None
    )


def nested(levels: int, kind: str) -> dict[str, Any]:
    """Metadata of so many levels of objects, of arrays, or of both in turn; the first is an object."""
    value: Any = "deep"
    for level in range(levels - 1, 0, -1):
        value = [value] if kind == "arrays" or (kind == "both" and level % 2) else {"a": value}
    return {"a": value}


@pytest.mark.parametrize("kind", ["objects", "arrays", "both"])
@pytest.mark.parametrize("name", ["credits.consume", "credits.hold"])
def test_metadata_has_at_most_16_levels(name: str, kind: str) -> None:
    message = decode_message(name, encoded({**MINIMAL[name], "metadata": nested(16, kind)}))
    assert getattr(message, "metadata", None) == nested(16, kind)
    assert "more than 16 levels" in invalid(name, metadata=nested(17, kind))
    beside = {"flat": [1, 2], **nested(17, kind), "z": {}}
    assert "more than 16 levels" in invalid(name, metadata=beside)


@pytest.mark.parametrize("empty", [[], {}])
def test_an_empty_object_or_array_is_a_level_too(empty: object) -> None:
    def metadata(levels: int) -> dict[str, Any]:
        value = empty
        for _ in range(levels - 2):
            value = [value]
        return {"a": value}

    charge = MINIMAL["credits.consume"]
    assert decode_message("credits.consume", encoded({**charge, "metadata": metadata(16)}))
    assert "more than 16 levels" in invalid("credits.consume", metadata=metadata(17))


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
@pytest.mark.parametrize("depth", [2_000, 100_000, 500_000])
def test_nesting_that_is_too_deep_is_refused(opening: bytes, depth: int) -> None:
    closing = b"]" if opening == b"[" else b"}"
    deep = opening * depth + b"1" + closing * depth
    arguments = b'{"account":"a","amount":"1","metadata":{"a":' + deep + b"}}"
    assert refused("credits.consume", arguments).code is Code.INVALID_MESSAGE
    assert refused("credits.consume", deep).code is Code.INVALID_MESSAGE


@pytest.mark.parametrize(
    "arguments",
    [
        b"",
        b" ",
        b"null",
        b"1",
        b'"a"',
        b"[]",
        b"true",
        b"{",
        b"{}",
        b'{"account":"a"',
        b'{"account":"a"}}',
        b"\x00",
        b"\xef\xbb\xbf{}",
        b"\x80\x04N.",
    ],
)
@pytest.mark.parametrize("name", list(MINIMAL))
def test_what_is_no_json_object_of_the_operation_is_refused(name: str, arguments: bytes) -> None:
    assert refused(name, arguments).code is Code.INVALID_MESSAGE


@pytest.mark.parametrize("version", [2, 99, 2**63, 10**30])
@pytest.mark.parametrize("name", list(MINIMAL))
def test_a_newer_version_is_told_apart_from_a_wrong_message(name: str, version: int) -> None:
    for content in ({**MINIMAL[name], "v": version}, {**MINIMAL[name], "v": version, "novelty": 1}):
        error = refused(name, encoded(content))
        assert error.code is Code.UNKNOWN_VERSION
        assert str(version) in str(error)


@pytest.mark.parametrize("version", [0, -1, "1", "99", 1.0, None, True, [2]])
def test_what_is_no_version_is_a_wrong_message(version: object) -> None:
    assert "$.v" in invalid("credits.settle", v=version)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "credits",
        "credits.Open",
        "credits.batch",
        "credits.open ",
        "payments.steal",
        "x" * 10_000,
        "\x00",
        "os.system",
    ],
)
def test_a_name_that_is_no_operation_is_refused_as_such(name: str) -> None:
    error = refused(name, b'{"account":"a"}')
    assert error.code is Code.UNKNOWN_OPERATION


@pytest.mark.parametrize("name", ["credits.nothing", "credits.Open", "", "credits.batch"])
def test_an_unknown_name_of_a_newer_version_is_of_a_newer_version(name: str) -> None:
    assert refused(name, b'{"account":"a","v":2}').code is Code.UNKNOWN_VERSION
    assert refused(name, b'{"v":99,"to":"b"}').code is Code.UNKNOWN_VERSION
    for arguments in (b'{"v":1}', b'{"v":0}', b'{"v":"2"}', b"{}", b"[2]", b"\x00", b'{"v":2'):
        assert refused(name, arguments).code is Code.UNKNOWN_OPERATION


# Batches.


def batch(*members: object, **more: object) -> bytes:
    return encoded({"operations": list(members), **more})


def batch_refused(arguments: bytes) -> ContractError:
    with pytest.raises(ContractError) as caught:
        decode_batch(arguments)
    assert len(str(caught.value)) <= contract.MAX_TEXT
    return caught.value


def test_a_batch_keeps_its_members_in_order_and_undecoded() -> None:
    decoded = decode_batch(batch(["credits.settle", "id-1", {"account": "a"}], ["no.such", "id-2", [1, {"b": None}]]))
    assert [(name, operation, json.loads(bytes(raw))) for name, operation, raw in decoded.operations] == [
        ("credits.settle", "id-1", {"account": "a"}),
        ("no.such", "id-2", [1, {"b": None}]),
    ]


def test_a_batch_holds_1_to_1000_operations() -> None:
    members = [["credits.settle", f"id-{number}", {"account": "a"}] for number in range(1001)]
    assert len(decode_batch(batch(*members[:1])).operations) == 1
    assert len(decode_batch(batch(*members[:1000])).operations) == 1000
    assert batch_refused(batch(*members)).code is Code.INVALID_MESSAGE
    assert batch_refused(batch()).code is Code.INVALID_MESSAGE


@pytest.mark.parametrize(
    "member",
    [
        [],
        ["credits.settle"],
        ["credits.settle", "id"],
        ["credits.settle", "id", {}, {}],
        ["credits.settle", "", {}],
        ["credits.settle", "x" * 129, {}],
        ["credits.settle", "a\x00", {}],
        ["credits.settle", 1, {}],
        [1, "id", {}],
        {"name": "credits.settle"},
        "credits.settle",
        None,
    ],
)
def test_a_batch_of_anything_but_name_id_and_arguments_is_refused(member: object) -> None:
    error = batch_refused(batch(["credits.settle", "id-1", {"account": "a"}], member))
    assert error.code is Code.INVALID_MESSAGE
    assert "$.operations" in str(error)


def test_a_batch_of_a_newer_version_is_told_apart() -> None:
    assert batch_refused(batch(["credits.settle", "id", {}], v=99)).code is Code.UNKNOWN_VERSION
    assert batch_refused(batch({"operation": "credits.settle"}, v=2)).code is Code.UNKNOWN_VERSION


def test_a_batch_with_an_unknown_argument_is_refused() -> None:
    assert "lane" in str(batch_refused(batch(["credits.settle", "id", {}], lane=1)))


# Operation ids.


@pytest.mark.parametrize("good", ["a", "order-991", "x" * 128, "ユーザー", "a b", "\U0001f600" * 128])
def test_an_id_is_1_to_128_characters(good: str) -> None:
    assert check_id(good) == good


@pytest.mark.parametrize(
    "bad", ["", "x" * 129, None, 1, 1.5, True, b"abc", ["a"], "\ud800", "a\udfffb", *CONTROLS, "a\x00b"]
)
def test_any_other_id_is_refused_as_the_operation_id(bad: object) -> None:
    with pytest.raises(ContractError, match="operation id") as caught:
        check_id(bad)
    assert caught.value.code is Code.INVALID_MESSAGE


# Whatever comes.

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["1", "0.2", "image", "2026-01-01T00:00:00Z", "user", "9" * 30]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
fields = st.sampled_from(sorted({field for content in FULL.values() for field in content} | {"account", "v"}))


def verdict(decode: Callable[[], object]) -> Code | None:
    """The code of the contract's error, none when the message passes; any other exception goes on."""
    try:
        decode()
    except ContractError as error:
        return error.code if str(error) else None
    return None


@given(name=st.sampled_from([*MINIMAL, "credits.batch", "nonsense"]), arguments=st.binary(max_size=200))
@example(name="credits.settle", arguments=b'{"account":"\\')
@example(name="credits.settle", arguments=b'{"account":"a","v":1e999}')
@example(name="credits.settle", arguments=b'{"v":' + b"9" * 10_000 + b"}")
@settings(deadline=None)
def test_random_bytes_raise_nothing_but_the_contracts_error(name: str, arguments: bytes) -> None:
    assert verdict(lambda: decode_batch(arguments)) in (Code.INVALID_MESSAGE, Code.UNKNOWN_VERSION)
    wrong = Code.INVALID_MESSAGE if name in MINIMAL else Code.UNKNOWN_OPERATION
    assert verdict(lambda: decode_message(name, arguments)) in (wrong, Code.UNKNOWN_VERSION)


@given(
    name=st.sampled_from(list(MINIMAL)),
    changes=st.dictionaries(fields | st.text(max_size=5), json_values, max_size=4),
    whole=st.booleans(),
)
@settings(deadline=None, max_examples=400)
def test_random_json_raises_nothing_but_the_contracts_error(name: str, changes: dict[str, Any], whole: bool) -> None:
    content = changes if whole else {**MINIMAL[name], **changes}
    for ascii_only in (True, False):
        arguments = json.dumps(content, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        for decode in (partial(decode_message, name, arguments), partial(decode_batch, arguments)):
            assert verdict(decode) in (None, Code.INVALID_MESSAGE, Code.UNKNOWN_VERSION)


@given(st.text(st.characters(), max_size=200) | st.none() | st.binary() | st.integers())
def test_any_id_is_taken_unchanged_or_refused(operation: object) -> None:
    refusal = verdict(lambda: check_id(operation))
    assert refusal in (None, Code.INVALID_MESSAGE)
    assert refusal is not None or check_id(operation) == operation


# Results.


def test_a_result_is_read_from_what_the_ledger_answers() -> None:
    result = msgspec.json.decode(
        b'{"operation":"credits.consume","id":"order-991","status":"rejected","account":"user_42",'
        b'"code":"insufficient_credits","reason":"no","required":"2","available":"1.5","shortfall":"0.5",'
        b'"balance":{"available":"1.5","by_source":{"pack":"1.5"}},"replayed":true}',
        type=contract.Result,
    )
    assert not result.applied
    assert result.code is Code.INSUFFICIENT_CREDITS
    assert str(result.shortfall) == "0.5"
    assert result.balance is not None
    assert str(result.balance.available) == "1.5"
    assert result.replayed


# Transfers.


def test_nobody_gives_credits_to_themselves() -> None:
    assert "the account itself" in invalid("credits.transfer", to="user_42")


@pytest.mark.parametrize("amount", ["0", "-1", 0])
def test_nothing_less_than_something_is_given(amount: str | int) -> None:
    assert "amount must be more than 0" in invalid("credits.transfer", amount=amount)
    assert "amount must be more than 0" in invalid(
        "credits.receive", lots=[{"source": "pack", "amount": amount, "priority": 1}]
    )


def test_a_claw_back_follows_from_a_payment_alone() -> None:
    message = decode_message("credits.claw_back", encoded(FULL["credits.claw_back"]))
    contract.check_reserved("credits.claw_back", "payment.1", message)
    with pytest.raises(ContractError, match="follows from a payment alone") as refusal:
        contract.check_reserved("credits.claw_back", "order-991", message)
    assert refusal.value.code is Code.INVALID_MESSAGE
    contract.check_reserved("credits.settle", "payment.1", decode_message("credits.settle", b'{"account":"a"}'))


@pytest.mark.parametrize(
    ("field", "value"),
    [("paid_minor", -1), ("returned_minor", -1), ("step", 0), ("paid_minor", 10**15 + 1), ("currency", "eur"),
     ("frozen", 1)],
)  # fmt: skip
def test_a_claw_back_says_a_state_that_can_be(field: str, value: object) -> None:
    assert field in str(refused("credits.claw_back", encoded({**FULL["credits.claw_back"], field: value})))


def test_the_ids_of_what_follows_from_a_transfer() -> None:
    # Written down from: printf '4:anna6:gift-1' | sha256sum
    digest = "52a5b4ac5d3553f8e28362036c44ebe83205b16c35e4d001dbc2bd6271071d93"
    assert contract.receiving_id("anna", "gift-1") == f"transfer.receive:{digest}"
    assert contract.concluding_id("anna", "gift-1") == f"transfer.conclude:{digest}"


def test_no_two_transfers_have_an_id_in_common() -> None:
    pairs = [("a", "bc"), ("ab", "c"), ("abc", ""), ("", "abc"), ("1:a", "b"), ("a", "1:b"), ("ä", "b"), ("a", "̈b")]
    ids = {make(*pair) for pair in pairs for make in (contract.receiving_id, contract.concluding_id)}
    assert len(ids) == 2 * len(pairs)


def test_the_ids_of_conversions_are_kept_for_them() -> None:
    first, later = contract.converting_id("lena", "anna"), contract.converting_id("lena", "anna", "job-7")
    # Written down from: printf '4:lena4:anna' | sha256sum, and printf '4:lena4:anna5:job-7' | sha256sum
    assert first == "lead.convert:18b432385bc50f68cb8ca597a09bb601cd215d2a9556c7c9a961f42b114a5e0a"
    assert later == "lead.convert:4aa0fe9ca6d62b1b0ec6d3bd2db94ff42d4b88064ba7547cf7356d26639e46b7"
    message = decode_message("credits.convert", encoded({"account": "lena", "to": "anna"}))
    after = decode_message("credits.convert", encoded({"account": "lena", "to": "anna", "after": "job-7"}))
    for id, good in (("order-991", message), (first, message), (later, after)):
        contract.check_reserved("credits.convert", id, good)
    for id, bad in ((later, message), (first, after), ("order-991", after)):
        with pytest.raises(ContractError, match="derived by the ledger"):
            contract.check_reserved("credits.convert", id, bad)


def test_a_lead_becomes_a_user_other_than_itself() -> None:
    assert "the lead itself" in invalid("credits.convert", to="user_42")
    for wrong in ({"lead": "user_42"}, {"lead": "visitor", "kind": "pool"}):
        assert "lead names another account" in invalid("credits.open", **wrong)
    assert decode_message("credits.open", encoded({"account": "user_42", "lead": "visitor"}))


def test_the_ids_of_what_follows_from_the_longest_names_are_ids() -> None:
    longest = "\U0001f4b3" * contract.MAX_NAME
    assert check_id(contract.receiving_id(longest, longest))
    assert check_id(contract.concluding_id(longest, longest))


def test_the_largest_transfer_there_can_be_fits_a_message() -> None:
    longest = "\U0001f4b3" * contract.MAX_NAME
    content = {
        "account": longest,
        "sender": longest,
        "transfer": longest,
        "message": "\U0001f4b3" * contract.MAX_TEXT,
        "lots": [
            {
                "source": longest,
                "amount": "999999999999.999999",
                "priority": 1000,
                "expires_at": "8999-12-31T23:59:59.999999Z",
                "unit_price": {"minor": 10**15, "currency": "EUR", "per": "999999999999.999999"},
            }
        ]
        * contract.MAX_LOTS,
    }
    raw = msgspec.json.encode(content)
    assert isinstance(decode_message("credits.receive", raw), contract.Receive)
    assert len(raw) + 1000 < contract.MAX_MESSAGE_BYTES
    assert contract.MAX_LOTS >= MAX_OPEN_GRANTS


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("codes.issue", {"codes": []}, "$.codes"),
        ("codes.issue", {"codes": ["ABC"]}, "$.codes"),
        ("codes.issue", {"codes": ["abcd"]}, "$.codes"),
        ("codes.issue", {"codes": ["AB-CD"]}, "$.codes"),
        ("codes.issue", {"codes": ["A" * 65]}, "$.codes"),
        ("codes.issue", {"codes": ["ABCD", "ABCD"]}, "twice"),
        ("codes.issue", {"codes": [f"CODE{number}" for number in range(1001)]}, "$.codes"),
        ("codes.issue", {"amount": 0}, "more than 0"),
        ("codes.issue", {"uses": 0}, "$.uses"),
        ("codes.issue", {"uses": 1_000_001}, "$.uses"),
        ("codes.issue", {"expires_at": "2027-03-01T00:00:00Z", "expires_in": 1}, "not both"),
        ("codes.issue", {"actor": "anna"}, "both or neither"),
        ("codes.issue", {"source": "pack"}, "administrator"),
        ("codes.issue", {"credits_expire_in": 60}, "administrator"),
        ("codes.withdraw", {"codes": ["ABCD", "ABCD"]}, "twice"),
        ("codes.withdraw", {"reason": "over"}, "both or neither"),
        ("codes.redeem", {"code": "abcd1234"}, "$.code"),
    ],
)
def test_what_a_gift_code_is_not(name: str, changes: dict[str, Any], said: str) -> None:
    assert said in invalid(name, **changes)


def test_a_code_is_typed_in_many_ways_and_meant_in_one() -> None:
    assert {contract.normal_code(text) for text in ("abcd-1234", " ABCD 1234", "AbCd1234\n")} == {"ABCD1234"}
