"""Webhooks: signed so that the standard's own library takes them, and posted nowhere else than one said."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from pydantic import ValidationError
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from creditlane.inbox import Advice
from models.settings import Settings
from scripts.embedded import free_port
from tests.receivers import Receiver
from tests.workers.conftest import SECRET
from workers.channels import ChannelAwayError, DeliveryError, Told, UndeliverableError
from workers.webhooks import post

OTHER = "whsec_" + base64.b64encode(b"another secret of 24 b..").decode()
AT = datetime(2026, 11, 21, 16, tzinfo=UTC)
TOLD = Told(
    account="Zoë", key="low_balance:7", kind="low_balance", at=AT, details={"available": "1.5", "threshold": "2"},
    email=None, locale=None, timezone=None,
)  # fmt: skip


def config(url: str, secret: str = SECRET, **others: Any) -> Settings:
    """The settings of a worker."""
    return Settings(
        broker_url="redis://127.0.0.1/0", database_url="postgresql://127.0.0.1/x",
        **{"webhook_url": url, "webhook_secret": secret, **others},
    )  # fmt: skip


def test_the_receiver_verifies_it_with_the_library(receiver: Receiver) -> None:
    post(TOLD, config(receiver.url))
    (hook,) = receiver.hooks
    assert hook.path == "/hook?of=credits"
    assert hook.headers["content-type"] == "application/json"
    body = Webhook(SECRET).verify(hook.body, hook.headers)
    assert body == {
        "type": "notice.low_balance",
        "timestamp": "2026-11-21T16:00:00Z",
        "data": {
            "account": "Zoë", "kind": "low_balance", "key": "low_balance:7", "at": "2026-11-21T16:00:00Z",
            "available": "1.5", "threshold": "2",
        },
    }  # fmt: skip
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(hook.body.replace(b"1.5", b"9.5"), hook.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER).verify(hook.body, hook.headers)


def test_while_a_secret_is_replaced_old_and_new_receivers_take_it(receiver: Receiver) -> None:
    post(TOLD, config(receiver.url, f"{SECRET}, {OTHER}"))
    (hook,) = receiver.hooks
    for secret in (SECRET, OTHER):
        assert Webhook(secret).verify(hook.body, hook.headers)


def test_its_id_is_the_notices_own(receiver: Receiver) -> None:
    settings = config(receiver.url)
    for told in (TOLD, TOLD, msgspec.structs.replace(TOLD, key="low_balance:8")):
        post(told, settings)
    first, again, other = (hook.headers["webhook-id"] for hook in receiver.hooks)
    assert first == again != other


def test_advice_goes_with_it(receiver: Receiver) -> None:
    post(msgspec.structs.replace(TOLD, advice=Advice(pace=Decimal("1.25"), until=AT)), config(receiver.url))
    advice = msgspec.json.decode(receiver.hooks[0].body)["data"]["advice"]
    assert msgspec.convert(advice, Advice) == Advice(pace=Decimal("1.25"), until=AT)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (200, None), (202, None), (204, None),
        (301, DeliveryError), (400, DeliveryError), (401, DeliveryError), (404, DeliveryError), (500, DeliveryError),
        (410, UndeliverableError),
        (429, ChannelAwayError), (502, ChannelAwayError), (503, ChannelAwayError), (504, ChannelAwayError),
    ],
)  # fmt: skip
def test_what_an_answer_means(status: int, error: type[Exception] | None, receiver: Receiver) -> None:
    receiver.status = status
    if error is None:
        post(TOLD, config(receiver.url))
        return
    with pytest.raises(error) as failed:
        post(TOLD, config(receiver.url))
    assert type(failed.value) is error
    assert str(status) in str(failed.value)


def test_a_redirect_is_not_followed(receiver: Receiver) -> None:
    receiver.status, receiver.location = 307, receiver.url
    with pytest.raises(DeliveryError, match="307"):
        post(TOLD, config(receiver.url))
    assert len(receiver.hooks) == 1


def test_nobody_is_there() -> None:
    with pytest.raises(ChannelAwayError, match="ConnectionRefusedError"):
        post(TOLD, config(f"http://127.0.0.1:{free_port()}/"))


def test_a_receiver_without_the_tls_that_was_asked_for(receiver: Receiver) -> None:
    with pytest.raises(ChannelAwayError, match="SSLError"):
        post(TOLD, config(receiver.url.replace("http:", "https:")))
    assert receiver.hooks == []


SHORT = "whsec_" + base64.b64encode(b"short").decode()


@pytest.mark.parametrize(
    "wrong",
    [
        {"webhook_url": "http://hooks.example/secret-path"},
        {"webhook_url": "ftp://hooks.example/secret-path"},
        {"webhook_url": "https://user:secret-path@hooks.example/"},
        {"webhook_url": "https:///secret-path"},
        {"webhook_url": "https://hooks.example/secret-path\r\nX-Y: z"},
        {"webhook_secret": SHORT},
        {"webhook_secret": SECRET.removeprefix("whsec_")},
        {"webhook_secret": f"{SECRET},{SHORT}"},
        {"webhook_secret": "whsec_not base64 secret-path"},
        {"webhook_secret": None},
        {"webhook_url": None},
    ],
)
def test_settings_that_would_leak_or_prove_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        config(**{"url": "https://hooks.example/", **wrong})
    assert "secret-path" not in str(refused.value)
    assert SECRET not in str(refused.value)
