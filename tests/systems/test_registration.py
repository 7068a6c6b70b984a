"""Registration: six credits at sign-up, six features at one each, subscribers without a limit.

Each test is a requirement of that system's plan.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from creditlane.codes import Code
from creditlane.events import Event
from models.forecast import forecast
from models.reading import history
from models.usage_reading import usage
from tests.support import eventually
from tests.systems.conftest import Member, System
from tests.workers.test_outbox import heard, listen

pytestmark = pytest.mark.xdist_group("system-registration")
CATALOG = "registration"
SETTINGS = {"CREDITLANE_EVENTS": "*"}

FEATURES = ["interior", "exterior", "sketch", "furnish", "remove", "video"]


def remaining(member: Member) -> str:
    """What a sidebar shows: "3/6"."""
    return f"{member.available}/{member.system.catalog.signup.credits // 10**6}"


def test_new_users_automatically_receive_6_credits(system: System) -> None:
    member = system.open()
    assert remaining(member) == "6/6"
    granted = system.read("SELECT source, granted_micro FROM grants WHERE account = %s", member.account)
    assert granted == [("signup", 6 * 10**6)], "and the grant is logged as of the registration"


@pytest.mark.parametrize("feature", FEATURES)
def test_credits_work_across_all_six_features(feature: str, system: System) -> None:
    member = system.open()
    assert member.use(feature).charged == 1
    assert remaining(member) == "5/6"


def test_the_upgrade_prompt_comes_with_the_refusal_when_credits_are_depleted(system: System) -> None:
    member = system.open()
    for feature in FEATURES:
        member.use(feature)
    refused = member.refused(Code.INSUFFICIENT_CREDITS, "credits.consume", feature="video")
    assert refused.offer == {"plan": "subscriber", "price": "9.00 EUR", "interval": "month", "unlimited": True}
    assert remaining(member) == "0/6"


def test_credits_are_checked_before_and_consumed_after_a_successful_generation(system: System) -> None:
    member = system.open()
    hold = member.send("credits.hold", feature="interior")
    assert hold.balance is not None
    assert hold.balance.available == 5
    assert hold.balance.held == 1
    member.send("credits.capture", hold=hold.id)
    assert remaining(member) == "5/6"


def test_a_failed_generation_consumes_nothing(system: System) -> None:
    member = system.open()
    hold = member.send("credits.hold", feature="video")
    member.send("credits.release", hold=hold.id)
    assert remaining(member) == "6/6"


def test_a_generation_that_never_answers_gives_its_credit_back_by_itself(system: System) -> None:
    member = system.open()
    member.send("credits.hold", feature="video", ttl=60)
    system.later(minutes=2)
    assert remaining(member) == "6/6"


def test_paid_users_bypass_credit_restrictions_and_are_counted_all_the_same(system: System) -> None:
    member = system.open()
    member.send("plans.subscribe", plan="subscriber", payment=f"{member.account}-0")
    for _ in range(10):
        assert member.use("video").charged == 0
    with system.connect() as connection:
        used = usage(connection, member.account, by="feature")
    assert used is not None
    assert {line.key: f"{line.quantity:f}" for line in used.lines} == {"video": "10"}
    assert remaining(member) == "6/6"


def test_free_users_are_subject_to_credit_limits_again_when_the_subscription_ends(system: System) -> None:
    member = system.open()
    for feature in FEATURES:
        member.use(feature)
    member.send("plans.subscribe", plan="subscriber", payment=f"{member.account}-0")
    member.use("video")
    member.send("plans.cancel")
    member.use("video")
    system.later(days=32)
    member.refused(Code.INSUFFICIENT_CREDITS, "credits.consume", feature="video")


def test_no_race_conditions_under_load(system: System) -> None:
    member = system.open()
    with ThreadPoolExecutor(16) as producers:
        answers = list(producers.map(lambda _: member.send("credits.consume", feature="sketch"), range(32)))
    assert [answer.status for answer in answers].count("applied") == 6
    assert remaining(member) == "0/6"


def test_a_generation_id_is_charged_once(system: System) -> None:
    member = system.open()
    answers = [member.send("credits.consume", id="generation-7", feature="sketch") for _ in range(3)]
    assert [answer.replayed for answer in answers] == [False, True, True]
    assert remaining(member) == "5/6"


def test_the_credit_usage_history_can_be_read_with_its_metadata(system: System) -> None:
    member = system.open()
    member.use("furnish", metadata={"room": "kitchen"})
    with system.connect() as connection:
        line = history(connection, member.account, limit=1).lines[0]
    assert (line.feature, line.charged, line.balance) == ("furnish", "1", "5")
    kept = system.read("SELECT arguments->'metadata' FROM operations WHERE account = %s AND number = 2", member.account)
    assert kept == [({"room": "kitchen"},)]


def test_administrators_grant_credits(system: System) -> None:
    member = system.open()
    member.send("credits.adjust", amount=4, actor="ana", reason="welcome back")
    assert member.available == 10


def test_balance_changes_are_told_as_they_happen(system: System) -> None:
    connection, queue = listen(system.broker_url, "balance.changed.#")
    with connection:
        member = system.open()
        member.use("video")
        told: list[Event] = []

        def both() -> bool:
            told.extend(event for _, event in heard(queue) if event.account == member.account)
            return len(told) == 2

        eventually(both, what="an event for each change")
    assert [event.balance and event.balance.available for event in told] == [6, 5]
    assert told[0].seq < told[1].seq, (
        "by which a page drops what is old; where it cannot listen it asks queries.balance"
    )


def test_depletion_is_told(system: System) -> None:
    member = system.open()
    for feature in FEATURES:
        member.use(feature)
    assert member.notices("low_balance", "depleted") == ["low_balance", "depleted"]


def test_utilisation_feature_distribution_and_time_to_depletion_are_known(system: System) -> None:
    member = system.open()
    member.use("video", 2)
    member.use("sketch")
    with system.connect() as connection:
        used = usage(connection, member.account, by="feature")
        coming = forecast(connection, member.account, system.catalog, days=90)
    assert used is not None
    assert used.utilisation is not None
    assert used.utilisation.percent == 50
    assert {line.key: f"{line.used:f}" for line in used.lines} == {"video": "2", "sketch": "1"}
    assert coming is not None
    assert coming.depleted_at is not None
