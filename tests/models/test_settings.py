"""Settings of payments: what would prove nothing, leak or mix up money is refused, in words that hold no secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.settings import Settings, listed
from workers.providers.configured import adapters

GOOD = "whsec_0123456789abcdef"
LIVE, TEST = "sk_live_0123456789abcdef", "sk_test_0123456789abcdef"


def config(**given: Any) -> Settings:
    """The settings of a server."""
    return Settings(broker_url="redis://127.0.0.1/0", database_url="postgresql://127.0.0.1/x", **given)


def test_what_docker_compose_passes_on_unset_is_not_set() -> None:
    names = (
        "stripe_webhook_secrets", "stripe_api_key", "stripe_api_base", "paypal_webhook_id", "paypal_authorities",
        "creem_secrets", "sepay_secrets",
    )  # fmt: skip
    found = config(**dict.fromkeys(names, ""))
    assert not any(getattr(found, name) for name in names)
    assert found.payments_livemode
    assert adapters(found) == {}


def test_each_provider_that_has_its_secrets_gets_its_adapter(tmp_path: Path) -> None:
    authorities = tmp_path / "authorities.pem"
    authorities.write_text("none")
    found = config(stripe_webhook_secrets=f"{GOOD},{GOOD}2", creem_secrets=GOOD, sepay_secrets=GOOD)
    assert listed(found.stripe_webhook_secrets) == (GOOD, f"{GOOD}2")
    assert list(adapters(found)) == ["stripe", "creem", "sepay"]
    with pytest.raises(ValueError, match="PEM"):
        adapters(config(paypal_webhook_id="8PT597110X687430LKGECATA", paypal_authorities=authorities))


@pytest.mark.parametrize(
    "wrong",
    [
        {"stripe_webhook_secrets": "whsec_tooshort"},
        {"stripe_webhook_secrets": "0123456789abcdef0123456789"},
        {"stripe_webhook_secrets": f"{GOOD},"},
        {"stripe_webhook_secrets": f"{GOOD}, {GOOD}"},
        {"stripe_webhook_secrets": f"{GOOD}é"},
        {"creem_secrets": "0123456789"},
        {"sepay_secrets": "0123456789 0123456789"},
        {"stripe_api_key": "pk_live_0123456789abcdef"},
        {"stripe_api_key": "sk_live_0123456789\nabcdef"},
        {"stripe_api_key": TEST},
        {"stripe_api_key": LIVE, "payments_livemode": False},
        {"stripe_api_base": "http://api.example"},
        {"stripe_api_base": "https://user@api.example"},
        {"stripe_api_base": "api.example"},
        {"paypal_webhook_id": "8PT597110X687430LKGECATA"},
        {"paypal_authorities": __file__},
        {"paypal_webhook_id": "one,,two", "paypal_authorities": __file__},
        {"relay_address": "localhost"},
        {"relay_connections": 1},
    ],
)
def test_settings_that_would_leak_or_prove_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        config(**wrong)
    assert "0123456789" not in str(refused.value)


@pytest.mark.parametrize(
    "right",
    [
        {"stripe_api_key": LIVE, "stripe_api_base": "https://api.example/"},
        {"stripe_api_key": "rk_test_0123456789abcdef", "payments_livemode": False},
        {"stripe_api_base": "http://127.0.0.1:12111"},
        {"relay_address": "::1"},
    ],
)
def test_these_are_not(right: dict[str, Any]) -> None:
    assert config(**right)
