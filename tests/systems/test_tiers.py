"""Tiers: free, paid and subscription credits, leads, gifts, referrals, pools, notices and reports.

Each test is a requirement of that system's plan.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from creditlane.codes import Code
from creditlane.gift_codes import new_code
from models.forecast import forecast
from models.reading import history
from models.rules.calendar import add_months
from models.rules.state import achieved_at
from models.usage_reading import usage
from schedules.warnings import due
from tests.support import eventually
from tests.systems.conftest import Member, System

pytestmark = pytest.mark.xdist_group("system-tiers")
CATALOG = "tiers"


def subscriber(system: System, plan: str = "plus") -> tuple[Member, datetime]:
    """An account with a plan that is paid for, and when its second month begins."""
    member = system.open()
    begun = member.send("plans.subscribe", plan=plan, payment=f"{member.account}-0")
    assert begun.period_start is not None
    return member, add_months(begun.period_start, 1, system.catalog.zone_of(plan))


def pass_to(system: System, instant: datetime) -> None:
    """Let time pass to an instant."""
    system.later(seconds=(instant - datetime.now(UTC) - system.away).total_seconds())


def renew(system: System, member: Member, start: datetime) -> None:
    """Let time pass to a period's beginning, and its payment arrive."""
    pass_to(system, start)
    answer = member.send("plans.renew", period_start=start.isoformat(), payment=f"{member.account}-{start:%Y-%m}")
    assert answer.status == "applied", answer


# Leads.


def test_a_lead_has_20_free_credits(system: System) -> None:
    assert system.open("lead", kind="lead").by_source == {"lead": "20"}


def test_a_lead_keeps_its_credits_on_sign_up(system: System) -> None:
    lead = system.open("lead", kind="lead")
    lead.burn(5)
    user = system.open()
    lead.send("credits.convert", to=user.account)
    eventually(lambda: user.by_source == {"lead": "15"}, what="the worked example: 15 of 20 are left, and kept")
    lead.refused(Code.ACCOUNT_CLOSED, "credits.consume", feature="chat")


def test_a_lead_that_is_named_when_its_user_signs_up_follows_by_itself(system: System) -> None:
    lead = system.open("lead", kind="lead")
    lead.burn(5)
    user = system.open(lead=lead.account)
    eventually(lambda: user.by_source == {"lead": "15"}, what="one message from the sign-up is enough")


def test_a_lead_is_converted_once(system: System) -> None:
    lead = system.open("lead", kind="lead")
    users = [system.open(), system.open()]
    for user in users:
        lead.send("credits.convert", to=user.account)
    eventually(lambda: users[0].available == 20, what="the first gets it")
    assert users[1].available == 0


# Endpoints: check, execute, deduct, log.


def test_an_endpoint_costs_what_its_definition_says(system: System) -> None:
    member, _ = subscriber(system)
    costs = {"chat_basic": "0", "chat": "1", "chat_expert": "5", "search": "2", "image": "4", "transcription": "0.5"}
    assert {feature: f"{member.use(feature).charged:f}" for feature in costs} == costs


def test_credits_are_reserved_before_execution_and_deducted_on_success(system: System) -> None:
    member, _ = subscriber(system)
    hold = member.send("credits.hold", feature="transcription", quantity=60)
    assert member.available == 470
    captured = member.send("credits.capture", hold=hold.id, quantity=20)
    assert captured.charged == 10
    assert member.available == 490


def test_a_reservation_is_released_on_failure(system: System) -> None:
    member, _ = subscriber(system)
    hold = member.send("credits.hold", feature="image")
    member.send("credits.release", hold=hold.id)
    assert member.available == 500


def test_too_few_credits_are_told_before_the_endpoint_runs(system: System) -> None:
    member = system.open(plan="free")
    member.burn(18)
    refused = member.refused(Code.INSUFFICIENT_CREDITS, "credits.hold", feature="image")
    assert refused.shortfall == 2
    assert refused.offer is not None
    assert member.available == 2


def test_retries_and_duplicates_deduct_once(system: System) -> None:
    member, _ = subscriber(system)
    with ThreadPoolExecutor(4) as retries:
        answers = list(retries.map(lambda _: member.send("credits.consume", id="r-1", feature="image"), range(8)))
    assert {answer.charged for answer in answers} == {4}
    assert member.available == 496


def test_every_deduction_is_logged_with_its_cost_and_the_catalog_that_priced_it(system: System) -> None:
    member, _ = subscriber(system)
    member.use("search")
    logged = system.read(
        "SELECT feature, charged_micro, catalog FROM operations WHERE account = %s ORDER BY number DESC LIMIT 1",
        member.account,
    )
    assert logged == [("search", 2 * 10**6, "tiers-1")]


# Packs, bundles, offers.


def test_credits_are_added_after_a_payment_and_it_is_confirmed(system: System) -> None:
    member = system.open(plan="free")
    member.buy("small")
    assert member.by_source == {"free": "20", "pack": "100"}
    assert member.notices("pack_bought") == ["pack_bought"]


def test_a_bundle_packages_credits_for_several_features(system: System) -> None:
    member = system.open()
    member.buy("creator_kit")
    assert member.use("image", 25).charged == 100
    told = system.read(
        "SELECT features, available_micro / 1000000 FROM grants WHERE account = %s ORDER BY grant_id", member.account
    )
    assert told == [(None, 150), (["image", "image_draft"], 100), (["transcription"], 100)], "its own credits go first"
    member.refused(Code.INSUFFICIENT_CREDITS, "credits.consume", feature="chat", quantity=151)


def test_a_bundle_is_discounted_and_an_offer_is_limited_in_time(system: System) -> None:
    black_week = system.catalog.offers["black_week"]
    assert black_week.begins_at is not None
    assert black_week.ends_at is not None
    assert black_week.runs_at(black_week.begins_at)
    assert not black_week.runs_at(black_week.ends_at), "over at its end"
    assert system.catalog.offers["first_pack"].per_account == 1


# Subscriptions.


def test_monthly_credits_last_to_the_end_of_the_billing_period(system: System) -> None:
    member, end = subscriber(system, "business")
    member.send("plans.cancel")
    pass_to(system, end)
    member.refused(Code.INSUFFICIENT_CREDITS, "credits.consume", feature="chat")
    assert member.available == 0


def test_a_renewal_expires_the_old_credits_allots_the_new_and_is_told(system: System) -> None:
    member, start = subscriber(system, "business")
    member.burn(900)
    renew(system, member, start)
    assert member.by_source == {"monthly": "10000"}
    assert "period_renewed" in member.notices()


def test_unused_credits_roll_over_up_to_a_limit_and_are_shown_separately(system: System) -> None:
    member, start = subscriber(system)
    member.burn(100)
    renew(system, member, start)
    assert member.by_source == {"rollover": "250", "monthly": "500"}, "400 were left, half a month's are carried"


def test_rolled_over_credits_expire_after_so_many_months(system: System) -> None:
    member, start = subscriber(system)
    renew(system, member, start)
    ends = system.read("SELECT expires_at FROM grants WHERE account = %s AND source = 'rollover'", member.account)
    months = system.catalog.plans["plus"].rollover_months
    assert months == 3
    assert ends == [(add_months(start, months, "Europe/Berlin"),)]


def test_a_higher_tier_gives_the_difference_and_a_lower_one_waits(system: System) -> None:
    member, _ = subscriber(system)
    member.send("plans.change", plan="pro", payment=f"{member.account}-up")
    assert member.available == 2000
    down = member.send("plans.change", plan="plus")
    assert down.plan_next == "plus"
    assert member.available == 2000
    member.send("plans.change", plan="pro")
    assert member.available == 2000, "however often it is changed"


def test_a_cancellation_stops_allocations_keeps_the_credits_and_is_confirmed(system: System) -> None:
    member, end = subscriber(system)
    member.send("plans.cancel", reason="too dear")
    assert member.available == 500
    assert "plan_cancelled" in member.notices()
    pass_to(system, end)
    assert member.available == 0


# Notices, advice.


def test_low_balance_is_told_at_20_10_and_5_percent_once_each_and_again_after_a_renewal(system: System) -> None:
    member, start = subscriber(system)
    for _ in range(50):
        member.burn(10)
    assert member.notices("low_balance") == ["low_balance"] * 3
    renew(system, member, start)
    member.burn(400)
    assert member.notices("low_balance") == ["low_balance"] * 4


def test_a_low_balance_comes_with_advice_by_mail_and_in_the_app(system: System) -> None:
    member, _ = subscriber(system)
    member.burn(400)
    ((channels, read_at),) = system.read(
        "SELECT channels, read_at FROM notices WHERE account = %s AND kind = 'low_balance'", member.account
    )
    assert (channels, read_at) == (["email"], None)


def test_it_is_warned_before_credits_expire(system: System) -> None:
    member = system.open()
    assert system.catalog.notify.expiry_days == [14, 3, 1]
    member.buy("creator_kit")
    system.later(days=77)
    with system.connect() as connection:
        pages = list(due(connection, datetime.now(UTC) + system.away, system.catalog))
    warned = [each.details for page in pages for each in page if each.account == member.account]
    assert [(each["amount"], each["days"]) for each in warned] == [("200", 14), ("100", 14)], (
        "what was bought for good is not"
    )


def test_what_expires_soonest_is_spent_first(system: System) -> None:
    member = system.open("lead", kind="lead")
    member.buy("small")
    assert [use.source for use in member.burn(30).grants] == ["lead", "pack"]


def test_cheaper_and_free_alternatives_are_known(system: System) -> None:
    assert system.catalog.features["chat_expert"].alternatives == ["chat", "chat_basic"]
    member = system.open(plan="free")
    member.burn(20)
    assert member.use("chat_basic").charged == 0, "the free one goes on without a credit"


def test_when_credits_run_out_is_forecast(system: System) -> None:
    member, _ = subscriber(system)
    member.burn(300)
    with system.connect() as connection:
        coming = forecast(connection, member.account, system.catalog, days=60)
    assert coming is not None
    assert coming.depleted_at is not None


# Gifts.


def test_credits_are_transferred_between_users(system: System) -> None:
    giver, receiver = system.open(), system.open()
    giver.buy("small")
    giver.send("credits.transfer", to=receiver.account, amount=30, message="for you")
    eventually(lambda: receiver.by_source == {"pack": "30"}, what="the gift arrives, a pack's as before")
    eventually(lambda: giver.send("credits.settle").balance.in_transit == 0, what="and is on its way no more")  # type: ignore[union-attr]
    assert giver.available == 70
    assert receiver.notices("gift_received") == ["gift_received"]


def test_promotional_credits_are_not_given_away(system: System) -> None:
    lead, other = system.open("lead", kind="lead"), system.open()
    lead.refused(Code.NOT_TRANSFERABLE, "credits.transfer", to=other.account, amount=5)


def test_a_gift_code_is_paid_for_by_who_gives_it_and_redeemed_once(system: System) -> None:
    giver, friend, late = system.open(), system.open(), system.open()
    giver.buy("small")
    code = new_code()
    giver.send("codes.issue", codes=[code], amount=25)
    assert giver.available == 75
    friend.send("codes.redeem", code=code)
    assert friend.by_source == {"pack": "25"}
    late.refused(Code.CODE_USED, "codes.redeem", code=code)
    friend.refused(Code.CODE_USED, "codes.redeem", code=code)
    friend.refused(Code.CODE_UNKNOWN, "codes.redeem", code=new_code())


def test_a_code_of_many_uses_is_given_out_by_an_administrator(system: System) -> None:
    house = system.open("house", kind="pool")
    code = new_code()
    house.send("codes.issue", codes=[code], amount=10, uses=2, actor="ana", reason="spring")
    users = [system.open() for _ in range(3)]
    with ThreadPoolExecutor(3) as together:
        answers = list(together.map(lambda user: user.send("codes.redeem", code=code), users))
    assert sorted(answer.status for answer in answers) == ["applied", "applied", "rejected"]
    assert [answer.code for answer in answers if answer.code] == [Code.CODE_USED]
    assert sum(user.available for user in users) == 20


def test_gifts_for_a_whole_team_are_made_in_bulk(system: System) -> None:
    giver = system.open()
    giver.buy("large")
    codes = [new_code() for _ in range(50)]
    giver.send("codes.issue", codes=codes, amount=20)
    assert giver.available == 1000
    team = [system.open() for _ in range(3)]
    for user, code in zip(team, codes, strict=False):
        user.send("codes.redeem", code=code)
    assert [user.available for user in team] == [20, 20, 20]
    giver.send("codes.withdraw", codes=codes[3:])
    assert giver.available == 1940, "what nobody redeemed comes back"


def test_each_gift_is_in_the_audit_log_of_both(system: System) -> None:
    giver, receiver = system.open(), system.open()
    giver.buy("small")
    giver.send("credits.transfer", to=receiver.account, amount=1)

    def logged(member: Member) -> list[str]:
        query = "SELECT name FROM operations WHERE account = %s AND name LIKE 'credits.%%' ORDER BY number"
        return [name for (name,) in system.read(query, member.account)]

    eventually(lambda: logged(giver)[-1] == "credits.confirm", what="the transfer is over")
    assert logged(giver) == ["credits.open", "credits.grant", "credits.transfer", "credits.confirm"]
    assert logged(receiver) == ["credits.open", "credits.receive"]


def test_gifts_have_a_daily_limit(system: System) -> None:
    giver, receiver = system.open(), system.open()
    giver.buy("large")
    giver.refused(Code.DAILY_LIMIT, "credits.transfer", to=receiver.account, amount=1001)
    giver.send("credits.transfer", to=receiver.account, amount=1000)
    giver.refused(Code.DAILY_LIMIT, "credits.transfer", to=receiver.account, amount=1)
    system.later(days=1)
    assert giver.send("credits.transfer", to=receiver.account, amount=1).status == "applied"


# Referrals.


def test_a_referral_rewards_referrer_and_referee_with_the_first_purchase(system: System) -> None:
    referrer, referee = system.open(), system.open()
    code = new_code()
    referrer.send("referrals.issue", code=code)
    referee.send("referrals.claim", code=code)
    assert referee.available == referrer.available == 0
    referee.buy("small")
    assert referee.by_source == {"referral": "25", "pack": "100"}
    eventually(lambda: referrer.by_source == {"referral": "50"}, what="the referrer's bonus")
    referee.buy("small")
    assert referee.by_source["referral"] == "25", "once"
    assert referrer.notices("referral_bonus") == ["referral_bonus"]


def test_a_referral_is_tracked_from_the_sign_up(system: System) -> None:
    referrer = system.open()
    code = new_code()
    referrer.send("referrals.issue", code=code)
    referee = system.open(referral_code=code)
    tracked = system.read("SELECT referrer, claimed_code FROM referrals WHERE account = %s", referee.account)
    assert tracked == [(referrer.account, code)]


def test_nobody_refers_itself(system: System) -> None:
    user, friend = system.open(), system.open()
    codes = [new_code(), new_code()]
    user.send("referrals.issue", code=codes[0])
    friend.send("referrals.issue", code=codes[1])
    user.refused(Code.SELF_REFERRAL, "referrals.claim", code=codes[0])
    friend.send("referrals.claim", code=codes[0])
    friend.buy("small")
    eventually(lambda: user.available == 50, what="the first way round is paid")
    user.refused(Code.SELF_REFERRAL, "referrals.claim", code=codes[1])


# Pools.


def test_an_organisation_shares_one_pool(system: System) -> None:
    pool = system.open("acme", kind="pool", plan="business")
    for member in ("ana", "ben"):
        pool.send("pools.set_member", member=member)
        pool.use("chat", 10, member=member)
    assert pool.available == 9980


def test_a_member_has_a_limit_within_the_pool(system: System) -> None:
    pool = system.open("acme", kind="pool", plan="business")
    pool.send("pools.set_member", member="ana", limit=10, period="month")
    pool.use("chat", 8, member="ana")
    refused = pool.refused(Code.MEMBER_LIMIT, "credits.consume", feature="chat", quantity=3, member="ana")
    assert refused.available == 2
    pool.send("pools.set_member", member="ana", limit=20, period="month")
    pool.use("chat", 3, member="ana")


def test_a_refusal_tells_the_members_limit_from_the_pools_end(system: System) -> None:
    pool = system.open("acme", kind="pool")
    pool.buy("small")
    pool.send("pools.set_member", member="ana")
    pool.refused(Code.POOL_EXHAUSTED, "credits.consume", amount=101, member="ana")
    pool.refused(Code.MEMBER_LIMIT, "credits.consume", amount=501, member="ana")
    pool.refused(Code.UNKNOWN_MEMBER, "credits.consume", amount=1, member="stranger")


def test_work_in_progress_is_held_from_the_pool(system: System) -> None:
    pool = system.open("acme", kind="pool")
    pool.buy("small")
    pool.send("pools.set_member", member="ana", limit=10)
    hold = pool.send("credits.hold", amount=10, member="ana")
    pool.refused(Code.MEMBER_LIMIT, "credits.consume", amount=1, member="ana")
    pool.send("credits.capture", hold=hold.id, amount=4)
    assert pool.send("credits.consume", amount=6, member="ana").status == "applied"


def test_usage_is_reported_per_member(system: System) -> None:
    pool = system.open("acme", kind="pool", plan="business")
    for member, amount in (("ana", 30), ("ben", 10)):
        pool.send("pools.set_member", member=member)
        pool.send("credits.consume", amount=amount, member=member)
    with system.connect() as connection:
        used = usage(connection, pool.account, by="member")
    assert used is not None
    assert [(line.key, f"{line.used:f}") for line in used.lines] == [("ana", "30"), ("ben", "10")]


# Refunds.


def test_credits_of_failed_operations_are_refunded(system: System) -> None:
    member, _ = subscriber(system)
    used = member.use("image")
    member.send("credits.refund", operation=used.id, reason="failed")
    assert member.available == 500
    member.refused(Code.EXCEEDS_ORIGINAL, "credits.refund", operation=used.id)


def test_poor_results_are_refunded_in_part_by_an_administrator(system: System) -> None:
    member, _ = subscriber(system)
    used = member.use("chat_expert")
    member.send("credits.refund", operation=used.id, amount="2.5", actor="ana", reason="poor result")
    assert f"{member.available:f}" == "497.5"
    assert member.notices("refunded") == ["refunded"]


# Usage.


def test_usage_is_aggregated_by_feature_and_compared_to_the_period_before(system: System) -> None:
    member, _ = subscriber(system)
    member.use("image", 3)
    system.later(days=1)
    member.use("chat", 6)
    with system.connect() as connection:
        used = usage(connection, member.account, by="feature")
    assert used is not None
    assert {line.key: f"{line.used:f}" for line in used.lines} == {"image": "12", "chat": "6"}
    assert used.total.used_before == 0


def test_the_whole_history_can_be_read_page_by_page(system: System) -> None:
    member, _ = subscriber(system)
    for _ in range(5):
        member.use("chat")
    with system.connect() as connection:
        first = history(connection, member.account, limit=4)
        second = history(connection, member.account, limit=4, before=first.next_before)
    assert [line.number for line in (*first.lines, *second.lines)] == [7, 6, 5, 4, 3, 2, 1]


def test_achievements_are_reached_by_use(system: System) -> None:
    member, _ = subscriber(system)
    member.burn(10)
    ((achieved,),) = system.read("SELECT achieved FROM accounts WHERE account = %s", member.account)
    assert [*achieved_at(achieved)] == ["first_steps"]
    assert member.notices("achievement") == ["achievement"]
