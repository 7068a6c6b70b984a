"""Taking credits out of grants and putting them back: plans first, so that a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

from creditlane.codes import Code
from models.rules.posting import post
from models.rules.refusal import RefusedError
from models.rules.state import FORGIVEN, MAX_TOTAL_MICRO, OWED, REVOKED, Account, Grant, Line, Taking

Plan = list[tuple[Grant, int]]
"""Which grants give how many micro-credits, in the order of taking."""


def plan_burn(
    account: Account,
    amount_micro: int,
    feature: str | None,
    now: datetime,
    transferable: Callable[[str], bool] | None = None,
) -> tuple[Plan, int]:
    """Choose the grants that pay, in burn-down order (ledger rules: burn-down order).

    Only grants that are active at ``now``, whose scope allows ``feature`` and whose purchase is not frozen pay; a
    charge without a feature is paid by unscoped grants alone.

    :param transferable: which sources may pay, where not all may: a transfer's.
    :returns: the plan, and what it falls short of ``amount_micro`` (0 when covered).
    """
    plan: Plan = []
    missing = amount_micro
    frozen = account.purchases and account.frozen  # nearly every account has none: this is cheaper
    for grant in account.order:
        if not missing:
            break
        if not is_spendable(grant, feature, now) or (frozen and grant.purchase in frozen):
            continue
        if transferable is not None and not transferable(grant.source):
            continue
        taken = min(missing, grant.available)
        plan.append((grant, taken))
        missing -= taken
    return plan, missing


def is_spendable(grant: Grant, feature: str | None, now: datetime) -> bool:
    """Whether a grant has credits, is active in ``[effective_at, expires_at)`` and allows the feature."""
    return (
        grant.available > 0
        and grant.effective_at <= now
        and (grant.expires_at is None or now < grant.expires_at)
        and (grant.features is None or feature in grant.features)
    )


def burn(
    account: Account, plan: Plan, kind: str, now: datetime, operation: str, refers_to: str | None = None
) -> list[Line]:
    """Write a plan's entries; ``kind`` is ``consumed``, ``held``, ``transferred`` or ``revoked``.

    :returns: the receipt, in the order of taking.
    """
    for grant, taken in plan:
        post(account, grant, kind, taken, now, operation, refers_to)
    return [Line(grant.id, taken) for grant, taken in plan]


def room_of(account: Account) -> int:
    """How much may come into an account yet, in micro-credits, of all that it can ever be credited with."""
    room: int = MAX_TOTAL_MICRO - account.granted - account.received - account.restored
    return max(0, room)


def check_room(account: Account, amount_micro: int) -> None:
    """Refuse credits that would take an account's lifetime total over :data:`MAX_TOTAL_MICRO`.

    :raises RefusedError: ``limit_reached``.
    """
    if amount_micro > room_of(account):
        raise RefusedError(Code.LIMIT_REACHED, "the account was credited with as much as it can ever hold")


def pay_debt(
    account: Account,
    grant: Grant,
    came_in_micro: int,
    now: datetime,
    operation: str | None,
    at: datetime | None = None,
) -> None:
    """Credits that come in pay the debt first (ledger rules: claw-back).

    What a revocation let go of this very lot, because it was spent or set aside, is taken when it comes back.

    :param came_in_micro: how many came into the lot just now; what lay there before is left alone.
    """
    root = account.grants[grant.family]
    taken = min(root.forgiven, came_in_micro)
    if taken:
        post(account, grant, "revoked", taken, now, operation, at=at)
        root.forgiven -= taken
        root.is_dirty = True
        _make_good(account, FORGIVEN, grant, taken, root.id)
    pay_with(account, grant, came_in_micro - taken, now, operation, at)


def pay_with(
    account: Account,
    grant: Grant,
    most_micro: int,
    now: datetime,
    operation: str | None,
    at: datetime | None = None,
    purchase: str | None = None,
) -> None:
    """Pay the account's debt out of a lot, with so much of it at the most.

    :param purchase: pay no more than what is owed for this one. A lot that is frozen pays but for its own: those
        credits are away with its money.
    """
    if not (account.debt and most_micro):
        return
    if purchase is None and grant.purchase in account.frozen:
        purchase = grant.purchase
    owed = account.debt if purchase is None else account.purchases[purchase].owed_micro
    payment = min(owed, most_micro)
    if payment:
        post(account, grant, "debt_paid", payment, now, operation, at=at)
        _make_good(account, OWED, grant, payment, purchase=purchase)


def _make_good(
    account: Account,
    kind: str,
    grant: Grant,
    amount_micro: int,
    root: int | None = None,
    purchase: str | None = None,
) -> None:
    """Note that credits of a lot were taken now for what a claw-back could not take: undone, they go back to it.

    :param kind: ``owed`` or ``forgiven``; what is so of the oldest lots is made good first.
    :param root: the lot whose family it is of, where not any's will do; ``purchase`` likewise.
    """
    missing = sorted(
        (taking.root, name, place)
        for name, known in account.purchases.items()
        if purchase in (None, name)
        for place, taking in enumerate(known.takings)
        if taking.kind == kind and root in (None, taking.root)
    )
    named = [(account.purchases[name], account.purchases[name].takings[place]) for _, name, place in missing]
    for known, taking in named:
        amount = min(taking.amount_micro, amount_micro)
        if not amount:
            break
        amount_micro -= amount
        taking.amount_micro -= amount
        place = next(place for place, each in enumerate(known.takings) if each is taking)
        known.note(Taking(taking.root, grant.id, REVOKED, amount), place)
        if not taking.amount_micro:
            known.takings.remove(taking)


def came_in(account: Account, now: datetime) -> None:
    """Note what can be spent now that credits came in: thresholds in percent are of it (schedules: notices)."""
    account.reference = account.spendable(now)


def _returning(lines: list[Line], amount_micro: int) -> Iterator[tuple[Line, int]]:
    """Note on a receipt that so much goes back, in reverse order of taking; gives each line and its share."""
    for line in reversed(lines):
        back = min(line.taken - line.returned, amount_micro)
        if back:
            amount_micro -= back
            line.returned += back
            yield line, back


def give_back_held(
    account: Account,
    lines: list[Line],
    amount_micro: int,
    now: datetime,
    operation: str | None,
    hold: str,
    at: datetime | None = None,
) -> None:
    """Return held credits to their grants, in reverse order of taking.

    What has expired meanwhile lapses at once (ledger rules: release); what comes back pays debt first.

    :param amount_micro: how many of the receipt's credits that were not returned yet.
    :param at: the instant it holds from, for a time-out that is recorded later.
    """
    for line, back in _returning(lines, amount_micro):
        come_back(account, account.grants[line.grant], "released", back, now, operation, hold, at)


def come_back(
    account: Account,
    grant: Grant,
    kind: str,
    amount_micro: int,
    now: datetime,
    operation: str | None,
    refers_to: str,
    at: datetime | None = None,
) -> None:
    """Credits that were set aside or on their way return to their lot; what has expired meanwhile lapses at once.

    :param kind: ``released`` or ``bounced``.
    :param refers_to: the hold or the transfer that they were in.
    """
    before = grant.available
    post(account, grant, kind, amount_micro, now, operation, refers_to, at)
    expired = grant.expires_at is not None and grant.expires_at <= (at or now)
    if not expired or account.grants[grant.family].clawed_back:
        # Of a lot that was clawed back meanwhile, the debt is paid even by what would lapse: it was never spent.
        pay_debt(account, grant, amount_micro, now, operation, at)
    if expired and grant.available > before:
        post(account, grant, "expired", grant.available - before, now, operation, refers_to, at)


def restore_consumed(
    account: Account,
    lines: list[Line],
    amount_micro: int,
    now: datetime,
    operation: str,
    charge: str,
    refund_days: int,
) -> list[tuple[Grant, int]]:
    """Give consumed credits back, in reverse order of taking (ledger rules: refund).

    A grant that has expired meanwhile cannot take them: they go into a new grant of the same source,
    scope and price that lives ``refund_days``.

    :returns: which grants got how many micro-credits.
    """
    given: list[tuple[Grant, int]] = []
    for line, back in _returning(lines, amount_micro):
        grant = account.grants[line.grant]
        if grant.expires_at is not None and grant.expires_at <= now:
            grant = successor(account, grant, now, operation, now + timedelta(days=refund_days))
        post(account, grant, "restored", back, now, operation, charge)
        given.append((grant, back))
        pay_debt(account, grant, back, now, operation)
    return given


def successor(account: Account, grant: Grant, now: datetime, operation: str, expires_at: datetime) -> Grant:
    """A new, empty grant like an expired one: same source, priority, scope, price and purchase."""
    return new_grant(
        account,
        source=grant.source,
        priority=grant.priority,
        features=grant.features,
        effective_at=now,
        expires_at=expires_at,
        now=now,
        operation=operation,
        purchase=grant.purchase,
        price=(grant.price_minor, grant.price_currency, grant.price_per),
        origin=grant.family,
    )


def new_grant(
    account: Account,
    source: str,
    priority: int,
    now: datetime,
    operation: str,
    features: frozenset[str] | None = None,
    effective_at: datetime | None = None,
    expires_at: datetime | None = None,
    purchase: str | None = None,
    price: tuple[int | None, str | None, int | None] = (None, None, None),
    origin: int | None = None,
) -> Grant:
    """Add an empty grant to an account, numbered after its last one; credits are posted to it next."""
    account.last_grant += 1
    grant = Grant(
        account.last_grant,
        source,
        priority,
        features,
        effective_at or now,
        expires_at,
        now,
        operation,
        purchase,
        *price,
        origin=origin,
    )
    grant.is_new = True
    account.add_grant(grant)
    account.is_dirty = True
    return grant
