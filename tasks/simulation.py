"""What operations would do, were they sent: the same rules on an account in memory; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import msgspec
from psycopg import Connection

from creditlane.contract import (
    INTERNAL,
    MAX_BATCH,
    Balance,
    ContractError,
    Message,
    Result,
    check_id,
    check_reserved,
    decode_message,
)
from creditlane.reports import Planned, Simulation
from models.reading import load_account
from models.referral_reading import own_referral
from models.rules.catalog import Catalog
from models.rules.sharing import MEMBER
from models.simulating import advance
from models.usage_reading import credits_of
from tasks.achievements import used_micro
from tasks.ledger import apply, balance_of, encode
from tasks.operation import Need
from tasks.registry import OPERATIONS

Step = tuple[str, str, Message, bytes]
"""Task name, operation id, message and arguments."""

_decode_result = msgspec.json.Decoder(Result).decode


def simulate_operations(
    connection: Connection[Any],
    account: str,
    operations: Sequence[Planned],
    catalog: Catalog,
    *,
    at: datetime | None = None,
    paid: bool = True,
) -> Simulation | None:
    """What operations would cost, which grants would pay, and which would be refused, one after the other.

    :param connection: not within a transaction; nothing is written, so it need not be able to.
    :param operations: at most :data:`creditlane.contract.MAX_BATCH` together; what the ledger sends itself, and what
        depends on more than the account, as redeeming a code does, cannot be simulated.
    :param catalog: the one in force.
    :param at: when they are applied, at most :data:`models.simulating.MAX_DAYS` ahead; now unless given.
    :param paid: whether a plan with a price is paid for in time until then.
    :returns: None for an account that no operation ever named.
    :raises ValueError: for operations that do not fit the contract, or an instant that makes no sense.
    """
    steps = list(_steps(account, operations))
    needs = [need for name, _, message, _ in steps for need in _needs(name, message)]
    named = {each.id for each in operations if each.id is not None} | {str(need.key) for need in needs}
    named |= {MEMBER + member for _, _, message, _ in steps if (member := getattr(message, "member", None)) is not None}
    loaded = load_account(connection, account, sorted(named) if named else None)
    if loaded is None:
        return None
    state, now = loaded
    if any(need.kind == "referral" for need in needs):
        state.referral = own_referral(connection, account)
    then = at or now
    advance(state, now, then, catalog, paid)
    before, used = _balance(balance_of(state, then)), used_micro(state)
    results = [
        _decode_result(apply(state, name, id, message, arguments, then, catalog).result)
        for name, id, message, arguments in steps
    ]
    return Simulation(
        account=account,
        as_of=now,
        at=then,
        paid=paid,
        before=before,
        after=_balance(balance_of(state, then)),
        charged=credits_of(used_micro(state) - used),
        refused=sum(1 for result in results if not result.applied),
        results=results,
    )


def _steps(account: str, operations: Sequence[Planned]) -> Iterator[Step]:
    """Check operations as a worker will, each with an id: its own, or its place.

    :raises ValueError: naming which one does not fit.
    """
    if not 1 <= sum(each.times for each in operations) <= MAX_BATCH:
        raise ValueError(f"one may simulate 1 to {MAX_BATCH} operations at a time")
    place = 0
    for each in operations:
        if each.name not in OPERATIONS or each.name in INTERNAL:
            raise ValueError(f"operation {place + 1}: {each.name!r} is no operation that anybody sends")
        if "account" in each.arguments:
            raise ValueError(f"operation {place + 1}: an account of its own; all are of one")
        arguments = encode({"account": account, **each.arguments})
        try:
            message = decode_message(each.name, arguments)
            if each.id is not None:
                check_reserved(each.name, check_id(each.id), message)
        except ContractError as error:
            raise ValueError(f"operation {place + 1}: {error}") from None
        if any(need.kind == "code" for need in _needs(each.name, message)):
            raise ValueError(f"operation {place + 1}: {each.name} depends on what others do: it cannot be simulated")
        for _ in range(each.times):
            place += 1
            yield each.name, each.id or f"simulated:{place}", message, arguments


def _needs(name: str, message: Message) -> Sequence[Need]:
    """The past rows that an operation works on."""
    find = OPERATIONS[name].need
    return () if find is None else find(message)


def _balance(told: dict[str, Any]) -> Balance:
    return msgspec.convert(told, Balance)
