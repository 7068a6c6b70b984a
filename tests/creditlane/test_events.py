"""Events out: which a list of patterns names, and under which key one is published."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from creditlane.events import BY_ENTRY, BY_NOTICE, TYPES, matching, routing_key
from creditlane.lanes import lane_of
from models.rules.posting import FLOWS
from models.settings import Settings


def test_every_kind_of_entry_has_its_event() -> None:
    assert set(BY_ENTRY) == set(FLOWS)
    assert len(set(TYPES)) == len(FLOWS) + 3 + len(BY_NOTICE)


@pytest.mark.parametrize(
    ("patterns", "types"),
    [
        ("", set()),
        (" , ", set()),
        ("balance.changed", {"balance.changed"}),
        ("balance.*", {"balance.changed", "balance.depleted", "balance.low"}),
        ("credits.held, credits.re*ed", {f"credits.{each}" for each in (
            "held", "released", "refunded", "revoked", "received", "reinstated")}),
        ("*", set(TYPES)),
        ("balance.changed,credits.*", {"balance.changed", *BY_ENTRY.values()}),
    ],
)  # fmt: skip
def test_patterns_name_types(patterns: str, types: set[str]) -> None:
    assert matching(patterns) == types


@pytest.mark.parametrize(
    "patterns", ["balance", "credits.grant", "balance.changed;credits.*", "[a-z]*", "Credits.*", "*,x", "credits.*\n.x"]
)
def test_a_pattern_that_names_nothing_is_refused(patterns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"is no type of event; there are balance\.changed"):
        matching(patterns)
    monkeypatch.setenv("CREDITLANE_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("CREDITLANE_DATABASE_URL", "postgresql://127.0.0.1:1/none")
    assert Settings().events == ""
    monkeypatch.setenv("CREDITLANE_EVENTS", patterns)
    with pytest.raises(ValidationError, match="is no type of event"):
        Settings()


def test_the_routing_key_is_the_type_and_the_accounts_lane() -> None:
    assert routing_key("credits.held", "user_42", 8) == f"credits.held.{lane_of('user_42', 8)}"
