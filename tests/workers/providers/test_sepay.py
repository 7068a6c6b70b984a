"""SePay: the signature and its time, and transfers."""

from __future__ import annotations

import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from models.rules.facts import PackPaid
from tests.workers.providers.making import NOW, aliases, body, fetching, made, parked, read_fact
from workers.providers.base import VerificationError
from workers.providers.sepay import SePay

SEPAY = SePay(["older", "made"], livemode=True)
RAW = body(made("sepay_transfer"))


def signed(raw: bytes, at: datetime = NOW, secret: str = "made") -> dict[str, str]:
    """The headers of a delivery by SePay."""
    stamp = str(int(at.timestamp()))
    signature = hmac.new(secret.encode(), stamp.encode() + b"." + raw, hashlib.sha256).hexdigest()
    return {"X-SePay-Signature": f"sha256={signature}", "X-SePay-Timestamp": stamp}


def code_of(raw: bytes, headers: dict[str, str]) -> str:
    """The code that a delivery is refused with."""
    with pytest.raises(VerificationError) as refused:
        SEPAY.verify(raw, headers, NOW)
    return refused.value.code


def test_a_signed_event_is_read_and_answered() -> None:
    event = SEPAY.verify(RAW, signed(RAW), NOW)
    assert (event.provider, event.id, event.type, event.livemode) == ("sepay", "92001", "transfer.in", True)
    assert event.created == datetime(2026, 9, 21, 7, 2, 37, tzinfo=UTC)  # it was two in the afternoon in Vietnam
    assert SEPAY.verify(RAW, signed(RAW, secret="older"), NOW) == SEPAY.read(RAW) == event
    assert json.loads(SEPAY.accepted) == {"success": True}


@pytest.mark.parametrize(("seconds", "code"), [(300, None), (301, "too_new"), (-300, None), (-301, "too_old")])
def test_time_is_checked_both_ways(seconds: int, code: str | None) -> None:
    headers = signed(RAW, NOW + timedelta(seconds=seconds))
    if code is None:
        assert SEPAY.verify(RAW, headers, NOW)
    else:
        assert code_of(RAW, headers) == code


@pytest.mark.parametrize(
    ("change", "code"),
    [({"X-SePay-Signature": ""}, "no_signature"), ({"X-SePay-Timestamp": ""}, "no_signature"),
     ({"X-SePay-Signature": "0" * 64}, "bad_signature"), ({"X-SePay-Signature": "sha256=" + "0" * 64}, "bad_signature"),
     ({"X-SePay-Timestamp": "1"}, "bad_signature"), ({"X-SePay-Timestamp": "now"}, "bad_signature"),
     ({"X-SePay-Timestamp": "9" * 4000}, "bad_signature"), ({"X-SePay-Signature": "é"}, "bad_signature")],
)  # fmt: skip
def test_headers_that_are_none_are_refused(change: dict[str, str], code: str) -> None:
    assert code_of(RAW, signed(RAW) | change) == code
    assert code_of(RAW, signed(RAW, secret="other")) == "bad_signature"
    assert code_of(RAW.replace(b"500000", b"900000"), signed(RAW)) == "bad_signature"


@pytest.mark.parametrize(
    "changes",
    [{"id": None}, {"id": "92001"}, {"id": -1}, {"transferType": "both"}, {"transferAmount": 1.5},
     {"transferAmount": "500000"}, {"transferAmount": -1}, {"transactionDate": "21/09/2026"},
     {"transactionDate": "2026-13-21 14:02:37"}, {"transactionDate": "2026-09-21 14:02:37+01:00"}],
)  # fmt: skip
def test_a_signed_body_that_is_no_transfer_is_refused(changes: dict[str, Any]) -> None:
    raw = body(made("sepay_transfer", **changes))
    assert code_of(raw, signed(raw)) == "not_an_event"
    assert code_of(b"\xff", signed(b"\xff")) == "not_json"
    assert code_of(b" " * 1048577, signed(b" " * 1048577)) == "too_large"


def test_a_transfer_pays_the_order_that_its_text_names() -> None:
    pack = read_fact(SEPAY, made("sepay_transfer"))
    assert isinstance(pack, PackPaid)
    assert (pack.key, pack.reference, pack.paid_minor, pack.currency) == ("92001", "QUOTE7", 500_000, "VND")
    assert (pack.lines, pack.account, aliases(pack)) == ((), None, {"transfer": "92001"})


@pytest.mark.parametrize("code", [None, "", " ", "a\u0000b"])
def test_a_transfer_that_names_none_is_parked(code: str | None) -> None:
    assert parked(SEPAY, SEPAY.read(body(made("sepay_transfer", code=code)))) == "no_reference"


def test_money_that_leaves_makes_no_fact() -> None:
    assert SEPAY.normalise(SEPAY.read(body(made("sepay_transfer", transferType="out"))), fetching()) == ()
