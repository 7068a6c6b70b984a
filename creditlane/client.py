"""The client: how an upstream service charges credits.

    credits = CreditClient("redis://…")
    credits.consume("user_42", feature="image", quantity=12, id="order-991")

Every operation has an ``id`` that the caller chooses and keeps: it is the idempotency key. In doubt, send the
same call again; it is applied once and answered alike.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from decimal import Decimal
from hashlib import sha256
from itertools import count
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from uuid import uuid4

import msgspec

from creditlane.amounts import to_wire
from creditlane.answers import Outcome, make_answers
from creditlane.codes import Code
from creditlane.contract import (
    BATCH,
    INTERNAL,
    MAX_BATCH,
    MAX_MESSAGE_BYTES,
    RESERVED,
    Balance,
    ContractError,
    Result,
    check_id,
    decode_batch,
    decode_message,
    is_plain,
    normal_code,
)
from creditlane.errors import (
    AlreadyReservedError,
    BrokerUnavailableError,
    CreditlaneError,
    NoAnswerError,
    QuarantinedError,
    RefusedError,
    UnsentError,
)
from creditlane.gift_codes import ALPHABET
from creditlane.inbox import Inbox
from creditlane.lanes import LANES, lane_of
from creditlane.reports import (
    FORECAST_DAYS,
    Achievements,
    ActionsPage,
    BalanceExplained,
    Forecast,
    GrantExplained,
    Grouping,
    HistoryPage,
    Leaderboard,
    Merit,
    OperationExplained,
    Planned,
    Pool,
    Referrals,
    RefundGrouping,
    Refunds,
    Simulation,
    Status,
    Usage,
)
from creditlane.selling import Inquiry, Ordered, Page
from creditlane.sending import Outgoing, make_sender
from creditlane.tls import tls_options

Amount = int | str | Decimal
"""Credits (or units of a feature), exactly: an integer, a decimal string or a Decimal; never a float."""

QUERIES = "queries"
"""The queue of the read-only tasks."""

NOTICES = "notices"
"""The queue of what goes out to people, and of what they have read; in the outbox the exchange that stands for it."""

PAYMENTS = "payments"
"""The queue of what providers say of payments, and of what is asked of them."""

READ = "notices.read"
"""The task that marks notices as read."""

SELLING_SECONDS = 30.0
"""How long a checkout is waited for: the payment provider is asked on the way."""

NOT_SHOWN = ("email", "metadata", "occurred_at", "success_url", "cancel_url", "return_url", "note")
"""Arguments that are not for every watcher's eyes, or only take room."""

SHOWN_APART = frozenset({"account", "feature", "quantity", "amount", *NOT_SHOWN})
"""Arguments that Flower does not show by their names."""

SHOWN_CHARACTERS = 400
"""How much of an operation's arguments Flower shows."""

FULL_MARGIN_BYTES = 1024
"""What a message keeps free for its frame."""

_encode = msgspec.json.Encoder().encode
_EMBED = b',{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]'

Explained = TypeVar("Explained", BalanceExplained, OperationExplained, GrantExplained)

Member = tuple[str, str, bytes]
"""One operation of a batch: task name, operation id, arguments as JSON."""

_known: dict[str, set[bytes]] = {"credits.consume": set(), "credits.hold": set()}
"""For operations that fit the contract whatever the account is: what was found to fit, as the JSON after the account.
Charges repeat but for their account; so what repeats is checked once."""

KNOWN, KNOWN_BYTES = 4096, 256
"""How many of them are kept, and how long one may be."""


class Operations:
    """The ledger's operations as methods: a :class:`CreditClient` sends each, a :class:`Buffer` collects them.

    Common arguments: ``account`` (whose credits), ``id`` (the operation id that the caller chose and keeps:
    the idempotency key), ``wait`` (seconds to wait for the answer; without it a call returns ``None`` as soon
    as the broker has confirmed the message).

    Each raises :class:`~creditlane.contract.ContractError` for arguments that do not fit the contract (nothing
    is sent), :class:`~creditlane.errors.BrokerUnavailableError` when the broker does not confirm, and with
    ``wait`` :class:`~creditlane.errors.NoAnswerError` or :class:`~creditlane.errors.QuarantinedError`.
    A refusal is no error: it is a result with ``status`` ``rejected`` and a ``code``.
    """

    def submit(self, name: str, id: str, arguments: dict[str, Any], wait: float | None = None) -> Result | None:
        """Hand one operation on; arguments that are ``None`` are left out.

        :param name: the task name, such as ``credits.consume``.
        """
        raise NotImplementedError

    def open(
        self,
        account: str,
        *,
        id: str,
        kind: Literal["user", "lead", "pool"] = "user",
        email: str | None = None,
        locale: str | None = None,
        timezone: str | None = None,
        plan: str | None = None,
        lead: str | None = None,
        referral_code: str | None = None,
        wait: float | None = None,
    ) -> Result | None:
        """Create an account, with the catalog's sign-up grant; a ``plan`` begins at once.

        What the ``lead`` has left that it was before arrives within moments, as by :meth:`convert`.

        :param referral_code: that of who referred it, as people type it; the answer's ``referral`` says what became of
            it.
        """
        arguments = {
            "account": account, "kind": kind, "email": email, "locale": locale, "timezone": timezone, "plan": plan,
            "lead": lead, "referral_code": None if referral_code is None else normal_code(referral_code),
        }  # fmt: skip
        return self.submit("credits.open", id, arguments, wait)

    def grant(
        self,
        account: str,
        amount: Amount,
        *,
        source: str,
        id: str,
        priority: int | None = None,
        features: Sequence[str] | None = None,
        effective_at: datetime | None = None,
        expires_at: datetime | None = None,
        expires_in: int | None = None,
        unit_price: dict[str, Any] | None = None,
        purchase: str | None = None,
        reason: str | None = None,
        wait: float | None = None,
    ) -> Result | None:
        """Add a lot of ``amount`` credits; ``expires_in`` in seconds."""
        arguments = {
            "account": account, "amount": to_wire(amount), "source": source, "priority": priority,
            "features": features, "effective_at": effective_at, "expires_at": expires_at, "expires_in": expires_in,
            "unit_price": unit_price, "purchase": purchase, "reason": reason,
        }  # fmt: skip
        return self.submit("credits.grant", id, arguments, wait)

    def consume(
        self,
        account: str,
        *,
        id: str,
        feature: str | None = None,
        quantity: Amount | None = None,
        amount: Amount | None = None,
        member: str | None = None,
        partial: bool | None = None,
        occurred_at: datetime | None = None,
        metadata: dict[str, Any] | None = None,
        wait: float | None = None,
    ) -> Result | None:
        """Charge ``quantity`` (1 unless given) of a feature, or ``amount`` credits."""
        # By far the most frequent call: what is not given is not passed on to be left out.
        arguments: dict[str, Any] = {"account": account}
        if feature is not None:
            arguments["feature"] = feature
        if quantity is not None:
            arguments["quantity"] = to_wire(quantity)
        if amount is not None:
            arguments["amount"] = to_wire(amount)
        if member is not None:
            arguments["member"] = member
        if partial is not None:
            arguments["partial"] = partial
        if occurred_at is not None:
            arguments["occurred_at"] = occurred_at
        if metadata is not None:
            arguments["metadata"] = metadata
        return self.submit("credits.consume", id, arguments, wait)

    def hold(
        self,
        account: str,
        *,
        id: str,
        feature: str | None = None,
        quantity: Amount | None = None,
        amount: Amount | None = None,
        ttl: int | None = None,
        member: str | None = None,
        occurred_at: datetime | None = None,
        metadata: dict[str, Any] | None = None,
        wait: float | None = None,
    ) -> Result | None:
        """Set credits aside for ``ttl`` seconds (15 minutes unless given); ``id`` names the hold from then on."""
        arguments = {
            "account": account, "feature": feature, "quantity": _wire(quantity), "amount": _wire(amount), "ttl": ttl,
            "member": member, "occurred_at": occurred_at, "metadata": metadata,
        }  # fmt: skip
        return self.submit("credits.hold", id, arguments, wait)

    def capture(
        self,
        account: str,
        hold: str,
        *,
        id: str,
        amount: Amount | None = None,
        quantity: Amount | None = None,
        wait: float | None = None,
    ) -> Result | None:
        """Take ``amount`` credits or ``quantity`` of its feature out of a hold; all of it unless given."""
        arguments = {"account": account, "hold": hold, "amount": _wire(amount), "quantity": _wire(quantity)}
        return self.submit("credits.capture", id, arguments, wait)

    def release(self, account: str, hold: str, *, id: str, wait: float | None = None) -> Result | None:
        """Give a hold back whole."""
        return self.submit("credits.release", id, {"account": account, "hold": hold}, wait)

    def refund(
        self,
        account: str,
        operation: str,
        *,
        id: str,
        amount: Amount | None = None,
        reason: str | None = None,
        actor: str | None = None,
        wait: float | None = None,
    ) -> Result | None:
        """Give back all, or ``amount`` credits, of the consume or capture with the id ``operation``.

        :param reason: what reports of refunds tell apart.
        :param actor: the administrator who gives it back, if one does.
        """
        arguments = {
            "account": account, "operation": operation, "amount": _wire(amount), "actor": actor, "reason": reason,
        }  # fmt: skip
        return self.submit("credits.refund", id, arguments, wait)

    def adjust(
        self, account: str, amount: Amount, *, actor: str, reason: str, id: str, wait: float | None = None
    ) -> Result | None:
        """An administrator's plus or minus of ``amount`` credits."""
        arguments = {"account": account, "amount": to_wire(amount), "actor": actor, "reason": reason}
        return self.submit("credits.adjust", id, arguments, wait)

    def revoke(
        self,
        account: str,
        *,
        id: str,
        grant: int | None = None,
        purchase: str | None = None,
        amount: Amount | None = None,
        reason: str | None = None,
        wait: float | None = None,
    ) -> Result | None:
        """Take a grant's or a purchase's credits back: all of them, or ``amount``."""
        arguments = {
            "account": account, "grant": grant, "purchase": purchase, "amount": _wire(amount), "reason": reason,
        }  # fmt: skip
        return self.submit("credits.revoke", id, arguments, wait)

    def transfer(
        self,
        account: str,
        to: str,
        amount: Amount,
        *,
        id: str,
        message: str | None = None,
        wait: float | None = None,
    ) -> Result | None:
        """Give ``amount`` credits to the account ``to``; the answer says that they are on their way.

        They arrive through the recipient's lane within moments. If the recipient cannot take them they come back,
        as a ``credits.bounce`` in the sender's history.
        """
        arguments = {"account": account, "to": to, "amount": to_wire(amount), "message": message}
        return self.submit("credits.transfer", id, arguments, wait)

    def issue_codes(
        self,
        account: str,
        codes: Sequence[str],
        amount: Amount,
        *,
        id: str,
        uses: int | None = None,
        per_account: int | None = None,
        expires_at: datetime | None = None,
        expires_in: int | None = None,
        credits_expire_in: int | None = None,
        source: str | None = None,
        message: str | None = None,
        actor: str | None = None,
        reason: str | None = None,
        wait: float | None = None,
    ) -> Result | None:
        """Make gift codes of ``amount`` credits a use; the account pays for all of their uses at once.

        :param codes: their texts, at most 1,000, such as :func:`creditlane.gift_codes.new_code` makes; keep them, and
            the id, before this is sent.
        :param uses: how often each may be redeemed, in all; once unless given.
        :param per_account: how often by one account; once unless given.
        :param expires_in: seconds that they can be redeemed; the catalog says, unless this or ``expires_at`` is given.
        :param actor: an administrator, with a ``reason``: then nothing is taken from the account; and ``source`` and
            ``credits_expire_in`` (seconds from being redeemed) are of such codes alone.
        """
        arguments = {
            "account": account, "codes": [normal_code(code) for code in codes], "amount": to_wire(amount), "uses": uses,
            "per_account": per_account, "expires_at": expires_at, "expires_in": expires_in,
            "credits_expire_in": credits_expire_in, "source": source, "message": message, "actor": actor,
            "reason": reason,
        }  # fmt: skip
        return self.submit("codes.issue", id, arguments, wait)

    def redeem_code(self, account: str, code: str, *, id: str, wait: float | None = None) -> Result | None:
        """Get the credits of a gift code, typed in whatever way: ``abcd-efgh`` is ``ABCDEFGH``."""
        return self.submit("codes.redeem", id, {"account": account, "code": normal_code(code)}, wait)

    def withdraw_codes(
        self,
        account: str,
        codes: Sequence[str],
        *,
        id: str,
        actor: str | None = None,
        reason: str | None = None,
        wait: float | None = None,
    ) -> Result | None:
        """End codes that the account issued; what it paid for uses that are left comes back."""
        arguments = {
            "account": account, "codes": [normal_code(code) for code in codes], "actor": actor, "reason": reason,
        }  # fmt: skip
        return self.submit("codes.withdraw", id, arguments, wait)

    def convert(self, lead: str, to: str, *, id: str, wait: float | None = None) -> Result | None:
        """Make a lead the user ``to``, who gets all that the lead has left, within moments; the lead is closed.

        If the user cannot take it, it comes back as a ``credits.bounce`` in the lead's history, and the lead is open
        again.
        """
        return self.submit("credits.convert", id, {"account": lead, "to": to}, wait)

    def freeze_account(
        self, account: str, *, actor: str, reason: str, id: str, wait: float | None = None
    ) -> Result | None:
        """An administrator has an account give no credits out; what comes in, and what was begun, goes on."""
        return self.submit("accounts.freeze", id, {"account": account, "actor": actor, "reason": reason}, wait)

    def thaw_account(
        self, account: str, *, actor: str, reason: str, id: str, wait: float | None = None
    ) -> Result | None:
        """An administrator lets a frozen account spend again."""
        return self.submit("accounts.thaw", id, {"account": account, "actor": actor, "reason": reason}, wait)

    def close_account(
        self, account: str, *, actor: str, reason: str, id: str, wait: float | None = None
    ) -> Result | None:
        """An administrator ends an account: its plan ends, and what is left of its credits is revoked."""
        return self.submit("accounts.close", id, {"account": account, "actor": actor, "reason": reason}, wait)

    def reopen_account(
        self, account: str, *, actor: str, reason: str, id: str, wait: float | None = None
    ) -> Result | None:
        """An administrator has a closed account take operations again; what was revoked stays so."""
        return self.submit("accounts.reopen", id, {"account": account, "actor": actor, "reason": reason}, wait)

    def set_member(
        self,
        account: str,
        member: str,
        *,
        id: str,
        limit: Amount | None = None,
        period: Literal["day", "week", "month", "total"] = "month",
        wait: float | None = None,
    ) -> Result | None:
        """List ``member`` of the pool ``account``, or change its limit: credits that it may use in each period.

        :param limit: without one that of the catalog's ``[pools]`` holds, with its period.
        """
        arguments = {"account": account, "member": member, "limit": _wire(limit), "period": period}
        return self.submit("pools.set_member", id, arguments, wait)

    def remove_member(self, account: str, member: str, *, id: str, wait: float | None = None) -> Result | None:
        """Take ``member`` off the list of the pool ``account``: it uses the pool no more."""
        return self.submit("pools.remove_member", id, {"account": account, "member": member}, wait)

    def subscribe(
        self,
        account: str,
        plan: str,
        *,
        id: str,
        payment: str | None = None,
        unit_price: dict[str, Any] | None = None,
        period_start: datetime | None = None,
        period_end: datetime | None = None,
        wait: float | None = None,
    ) -> Result | None:
        """Begin a plan; its first credits come at once.

        :param payment: what was paid by: a refund of it finds the plan's credits.
        :param period_start: when the plan began; now unless given.
        :param period_end: until when it is paid for; a month or a year, as the plan says, unless given.
        """
        arguments = {
            "account": account, "plan": plan, "payment": payment, "unit_price": unit_price,
            "period_start": period_start, "period_end": period_end,
        }  # fmt: skip
        return self.submit("plans.subscribe", id, arguments, wait)

    def change_plan(
        self,
        account: str,
        plan: str,
        *,
        id: str,
        payment: str | None = None,
        unit_price: dict[str, Any] | None = None,
        period_end: datetime | None = None,
        wait: float | None = None,
    ) -> Result | None:
        """Change to a higher plan at once, to a lower one with the next renewal."""
        arguments = {
            "account": account, "plan": plan, "payment": payment, "unit_price": unit_price, "period_end": period_end,
        }  # fmt: skip
        return self.submit("plans.change", id, arguments, wait)

    def cancel_plan(
        self,
        account: str,
        *,
        id: str,
        at: Literal["period_end", "now"] = "period_end",
        reason: str | None = None,
        wait: float | None = None,
    ) -> Result | None:
        """End the plan with its period, or now; nothing more is allotted."""
        arguments = {"account": account, "at": at, "reason": reason}
        return self.submit("plans.cancel", id, arguments, wait)

    def renew_plan(
        self,
        account: str,
        *,
        id: str,
        period_start: datetime,
        period_end: datetime | None = None,
        plan: str | None = None,
        payment: str | None = None,
        unit_price: dict[str, Any] | None = None,
        wait: float | None = None,
    ) -> Result | None:
        """A payment has arrived for the period that begins at ``period_start``; however often it is told, once."""
        arguments = {
            "account": account, "period_start": period_start, "period_end": period_end, "plan": plan,
            "payment": payment, "unit_price": unit_price,
        }  # fmt: skip
        return self.submit("plans.renew", id, arguments, wait)

    def undo_renewal(
        self, account: str, *, actor: str, reason: str, id: str, wait: float | None = None
    ) -> Result | None:
        """An administrator takes back what the last renewal did."""
        return self.submit("plans.undo", id, {"account": account, "actor": actor, "reason": reason}, wait)

    def issue_referral(
        self, account: str, *, id: str, code: str | None = None, wait: float | None = None
    ) -> Result | None:
        """Give an account the code by which it refers others; the answer's ``referral_code`` is the one that it has.

        :param code: 4 to 64 letters and digits; made of the account and the id unless given.
        """
        text = made_code(account, id) if code is None else normal_code(code)
        return self.submit("referrals.issue", id, {"account": account, "code": text}, wait)

    def claim_referral(self, account: str, code: str, *, id: str, wait: float | None = None) -> Result | None:
        """Say who referred the account, by the code as people type it; that happens once."""
        return self.submit("referrals.claim", id, {"account": account, "code": normal_code(code)}, wait)

    def settle(self, account: str, *, id: str, wait: float | None = None) -> Result | None:
        """Apply what time has made due, nothing else."""
        return self.submit("credits.settle", id, {"account": account}, wait)


class CreditClient(Operations):
    """Sends operations to their lanes and, where asked to, waits for the answers. Safe to share among threads.

    :param broker_url: where the lanes are, such as ``redis://:password@host:6379/0`` or ``amqp://user:password@host//``.
    :param lanes: how many lanes the deployment has: the workers' number.
    :param result_url: a Redis that answers come from; the broker unless given.
    :param ca: for ``rediss://`` and ``amqps://``: the certificates of whom to trust, a PEM file; else the system's.
    :param certificate: our own, a PEM file, for a server that asks for one.
    :param key: its key, unless it is in the same file.
    :raises ValueError: for TLS that would be ignored, or checked by nobody.
    """

    def __init__(
        self,
        broker_url: str,
        *,
        lanes: int = LANES,
        result_url: str | None = None,
        ca: str | PathLike[str] | None = None,
        certificate: str | PathLike[str] | None = None,
        key: str | PathLike[str] | None = None,
    ) -> None:
        self.lanes = lanes
        self._sender = make_sender(broker_url, tls_options(broker_url, ca=ca, certificate=certificate, key=key))
        answers = result_url or broker_url
        self._answers = make_answers(answers, tls_options(answers, ca=ca, certificate=certificate, key=key))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; everything that was sent stays sent."""
        self._sender.close()
        self._answers.close()

    def submit(self, name: str, id: str, arguments: dict[str, Any], wait: float | None = None) -> Result | None:
        """Check one operation, send it to its account's lane, and wait for the answer if asked to."""
        encoded = checked(name, id, arguments)
        lane = lane_of(arguments["account"], self.lanes)
        if wait is None:
            self._sender.send([task_message(name, id, lane, encoded, _shown(arguments))])
            return None
        return msgspec.convert(self._ask(name, id, lane, encoded, _shown(arguments), wait), Result)

    def batch(self, operations: Sequence[tuple[str, str, dict[str, Any]]], *, id: str, wait: float) -> list[Result]:
        """Send operations of one lane as one message and wait for all their answers.

        :param operations: (task name, operation id, arguments) of each, at most 1,000; amounts as on the wire.
        :param id: the message's own id; each operation has its own besides.
        :param wait: seconds.
        :raises ContractError: when they belong to more than one lane, or one does not fit the contract.
        """
        members = [(name, operation, checked(name, operation, arguments)) for name, operation, arguments in operations]
        lanes = {lane_of(arguments["account"], self.lanes) for _, _, arguments in operations}
        if len(lanes) != 1:
            raise ContractError(Code.INVALID_MESSAGE, "the operations of a batch belong to one lane")
        encoded = _batch_arguments(members)
        decode_batch(encoded)
        answers = self._ask(BATCH, check_id(id), lanes.pop(), encoded, _counted(members), wait)
        return msgspec.convert(answers, list[Result])

    @contextmanager
    def reserve(
        self,
        account: str,
        *,
        id: str,
        feature: str | None = None,
        quantity: Amount | None = None,
        amount: Amount | None = None,
        ttl: int | None = None,
        member: str | None = None,
        resume: bool = False,
        wait: float = 10.0,
    ) -> Iterator[Reservation]:
        """Hold credits, run the block, capture; an exception gives them back.

        Call ``capture`` in the block to say what it really cost; a block that ends without doing so captures
        the whole hold. The hold's id is ``id``, the capture's ``id:capture``, the release's ``id:release``.

        :param id: a new one for each attempt: the hold of an earlier attempt may have been given back.
        :param resume: accept the hold of an earlier attempt with this id, of which the caller knows that it is open.
        :param wait: seconds to wait for the answers to hold and capture.
        :raises RefusedError: when the hold or the capture is refused.
        :raises AlreadyReservedError: when an earlier attempt with this id has made the hold.
        """
        check_id(f"{id}:capture")
        hold = self.hold(
            account,
            id=id,
            feature=feature,
            quantity=quantity,
            amount=amount,
            ttl=ttl,
            member=member,
            wait=wait,
        )
        assert hold is not None
        if not hold.applied:
            raise RefusedError(hold)
        if hold.replayed and not resume:
            raise AlreadyReservedError(f"hold {id!r} was made by an earlier attempt; take a new id for this one")
        reservation = Reservation(self, account, id, hold, wait)
        try:
            yield reservation
            if reservation.captured is None:
                reservation.capture()
        except BaseException:
            if reservation.captured is None:
                self.release(account, id, id=f"{id}:release")
            raise

    def buffer(self, *, linger_ms: float = 5, max_operations: int = MAX_BATCH) -> Buffer:
        """Collect many operations into few messages, one lane each; the order per account is kept.

        :param linger_ms: milliseconds that an operation waits for company at the most.
        :param max_operations: how many go into one message at the most.
        """
        return Buffer(self, linger_ms / 1000, max_operations)

    def backlog(self, lane: str) -> int:
        """How many messages wait in a lane for its worker to take them.

        :raises BrokerUnavailableError: when the broker is away.
        """
        return self._sender.depth(lane)

    def balance(self, account: str, *, wait: float = 10.0) -> Balance | None:
        """The account's balance as last committed; ``None`` for an account that was never opened.

        :param wait: seconds.
        """
        encoded = _encode({"account": account, "v": 1})
        answer = self._ask("queries.balance", str(uuid4()), QUERIES, encoded, f"account={account}", wait)
        return None if answer is None else msgspec.convert(answer, Balance)

    def history(
        self,
        account: str,
        *,
        limit: int = 50,
        before: int | None = None,
        name: str | None = None,
        feature: str | None = None,
        member: str | None = None,
        source: str | None = None,
        status: Status | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        entries: bool = False,
        wait: float = 10.0,
    ) -> HistoryPage:
        """A page of the account's operations, the newest first; an empty one for an account that does not exist.

        :param limit: operations of the page, at most 1,000.
        :param before: ``next_before`` of the page before.
        :param name: only of this task, such as ``credits.consume``.
        :param source: only those that moved credits of a grant of this source.
        :param since: applied at this instant or later; ``until``: applied before.
        :param entries: whether each comes with its entries.
        :param wait: seconds.
        """
        arguments = {
            "account": account, "limit": limit, "before": before, "name": name, "feature": feature, "member": member,
            "source": source, "status": status, "since": since, "until": until, "entries": entries,
        }  # fmt: skip
        return msgspec.convert(self._read("history", arguments, wait), HistoryPage)

    def usage(
        self,
        account: str | None,
        *,
        by: Grouping = "feature",
        since: date | None = None,
        until: date | None = None,
        feature: str | None = None,
        member: str | None = None,
        limit: int = 50,
        after: str | None = None,
        wait: float = 10.0,
    ) -> Usage | None:
        """What the account used, with as many days before for comparison; ``None`` for one that does not exist.

        :param account: ``None`` for all accounts together.
        :param by: what is summed: by feature, member, day, week or month, UTC.
        :param since: the first day; 30 days before ``until`` unless given.
        :param until: the day after the last; tomorrow unless given. Both together at most 3,660 days.
        :param limit: lines of the page, at most 1,000.
        :param after: ``next_after`` of the page before.
        :param wait: seconds.
        """
        arguments = {
            "account": account, "by": by, "since": since, "until": until, "feature": feature, "member": member,
            "limit": limit, "after": after,
        }  # fmt: skip
        return msgspec.convert(self._read("usage", arguments, wait), Usage | None)

    def pool(
        self,
        account: str,
        *,
        since: date | None = None,
        until: date | None = None,
        limit: int = 50,
        after: str | None = None,
        wait: float = 10.0,
    ) -> Pool | None:
        """A pool and its members, what each may use and what it used; ``None`` for an account that is no pool.

        :param since: the first day of what they were charged, UTC; 30 days before ``until`` unless given.
        :param until: the day after the last; tomorrow unless given.
        :param limit: members of the page, at most 1,000.
        :param after: ``next_after`` of the page before.
        :param wait: seconds.
        """
        arguments = {"account": account, "since": since, "until": until, "limit": limit, "after": after}
        return msgspec.convert(self._read("pool", arguments, wait), Pool | None)

    def forecast(
        self,
        account: str,
        *,
        days: int = FORECAST_DAYS,
        pace: Amount | None = None,
        paid: bool = True,
        wait: float = 10.0,
    ) -> Forecast | None:
        """How long the account's credits last and how many end unused; ``None`` for one that does not exist.

        :param days: how far ahead, at most 366.
        :param pace: credits a day; as over the last 30 days unless given.
        :param paid: whether payments for the plan are taken to arrive in time.
        :param wait: seconds.
        """
        arguments = {"account": account, "days": days, "pace": _wire(pace), "paid": paid}
        return msgspec.convert(self._read("forecast", arguments, wait), Forecast | None)

    def referrals(
        self, account: str, *, limit: int = 50, before: str | None = None, wait: float = 10.0
    ) -> Referrals | None:
        """By which code an account refers others, who referred it, and whom it referred, the latest first.

        :param limit: referees of the page, at most 1,000.
        :param before: ``next_before`` of the page before.
        :param wait: seconds.
        :returns: None for an account that no operation ever named.
        """
        answer = self._read("referrals", {"account": account, "limit": limit, "before": before}, wait)
        return None if answer is None else msgspec.convert(answer, Referrals)

    def explain(self, account: str, *, wait: float = 10.0) -> BalanceExplained | None:
        """Why the balance is what it is: what came in and went, by grant; ``None`` for an account that does not exist.

        :param wait: seconds.
        """
        return self._explain(BalanceExplained, {"account": account}, wait)

    def explain_operation(
        self, account: str, operation: str, *, limit: int = 50, after: int = 0, wait: float = 10.0
    ) -> OperationExplained | None:
        """Which grants an operation took from or gave to; ``None`` when the account has no operation of this id.

        :param limit: movements of the page, at most 1,000.
        :param after: ``next_after`` of the page before.
        :param wait: seconds.
        """
        arguments = {"account": account, "operation": operation, "limit": limit, "after": after}
        return self._explain(OperationExplained, arguments, wait)

    def explain_grant(
        self, account: str, grant: int, *, limit: int = 50, after: int = 0, wait: float = 10.0
    ) -> GrantExplained | None:
        """What came into a grant, what it paid, and what is left; ``None`` when the account has none of this number.

        :param limit: movements of the page, at most 1,000; it may have fewer and not be the last.
        :param after: ``next_after`` of the page before.
        :param wait: seconds.
        """
        arguments = {"account": account, "grant": grant, "limit": limit, "after": after}
        return self._explain(GrantExplained, arguments, wait)

    def actions(
        self,
        *,
        actor: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 50,
        before: str | None = None,
        wait: float = 10.0,
    ) -> ActionsPage:
        """A page of what administrators did, in all accounts, the newest first.

        :param actor: only by this one.
        :param since: applied then or later; 30 days ago unless given.
        :param until: applied before.
        :param limit: of the page, at most 1,000.
        :param before: ``next_before`` of the page before.
        :param wait: seconds.
        """
        arguments = {"actor": actor, "since": since, "until": until, "limit": limit, "before": before}
        return msgspec.convert(self._read("actions", arguments, wait), ActionsPage)

    def simulate(
        self,
        account: str,
        operations: Sequence[Planned] = (),
        *,
        feature: str | None = None,
        quantity: Amount | None = None,
        amount: Amount | None = None,
        member: str | None = None,
        times: int = 1,
        at: datetime | None = None,
        paid: bool = True,
        wait: float = 10.0,
    ) -> Simulation | None:
        """What operations would cost, which grants would pay, and which would be refused with which offer.

        Nothing of it is done. ``None`` for an account that does not exist.

        :param operations: one after the other, at most 1,000 together.
        :param feature: after them, a consume of ``quantity`` of it, or of ``amount`` credits; ``times`` over.
        :param at: when they are applied; now unless given.
        :param paid: whether payments for the plan are taken to arrive in time until then.
        :param wait: seconds.
        """
        planned = list(operations)
        if feature is not None or amount is not None:
            charge = {"feature": feature, "quantity": _wire(quantity), "amount": _wire(amount), "member": member}
            given = {key: value for key, value in charge.items() if value is not None}
            planned.append(Planned("credits.consume", given, times=times))
        arguments = {"account": account, "operations": planned, "at": at, "paid": paid}
        return msgspec.convert(self._read("simulate", arguments, wait), Simulation | None)

    def leaderboard(
        self,
        *,
        by: Merit = "used",
        since: date | None = None,
        until: date | None = None,
        account: str | None = None,
        limit: int = 50,
        after: str | None = None,
        wait: float = 10.0,
    ) -> Leaderboard:
        """The accounts that used the most credits, or earned the most without paying.

        :param since: the first day, UTC; 30 days before ``until`` unless given. Of all time where neither is.
        :param until: the day after the last; tomorrow unless given.
        :param account: whose rank to tell as well.
        :param limit: accounts of the page, at most 1,000.
        :param after: ``next_after`` of the page before.
        :param wait: seconds.
        """
        arguments = {"by": by, "since": since, "until": until, "account": account, "limit": limit, "after": after}
        return msgspec.convert(self._read("leaderboard", arguments, wait), Leaderboard)

    def refunds(
        self,
        account: str | None = None,
        *,
        by: Sequence[RefundGrouping] = ("reason", "feature", "actor"),
        since: date | None = None,
        until: date | None = None,
        feature: str | None = None,
        limit: int = 50,
        after: int = 0,
        wait: float = 10.0,
    ) -> Refunds | None:
        """What was given back in a span of days, and why; ``None`` for an account that does not exist.

        :param account: ``None`` for all accounts together.
        :param by: what is told apart.
        :param since: the first day, UTC; 30 days before ``until`` unless given.
        :param until: the day after the last; tomorrow unless given.
        :param limit: lines of the page, at most 1,000.
        :param after: ``next_after`` of the page before.
        :param wait: seconds.
        """
        arguments = {
            "account": account, "by": by, "since": since, "until": until, "feature": feature, "limit": limit,
            "after": after,
        }  # fmt: skip
        return msgspec.convert(self._read("refunds", arguments, wait), Refunds | None)

    def achievements(self, account: str, *, wait: float = 10.0) -> Achievements | None:
        """What the account has achieved, and how far it is with the rest; ``None`` for one that does not exist.

        :param wait: seconds.
        """
        return msgspec.convert(self._read("achievements", {"account": account}, wait), Achievements | None)

    def _explain(self, kind: type[Explained], arguments: dict[str, Any], wait: float) -> Explained | None:
        return msgspec.convert(self._read("explain", arguments, wait), kind | None)

    def _read(self, name: str, arguments: dict[str, Any], wait: float) -> Any:
        """Ask what is only read; arguments that are ``None`` are left out."""
        given = {key: value for key, value in arguments.items() if value is not None}
        shown = ", ".join(f"{key}={value}" for key, value in given.items())[:SHOWN_CHARACTERS]
        return self._ask(f"queries.{name}", uuid4().hex, QUERIES, _encode({**given, "v": 1}), shown, wait)

    def notices(
        self, account: str, *, unread: bool = False, limit: int = 50, before: str | None = None, wait: float = 10.0
    ) -> Inbox:
        """A page of the account's inbox, the newest notice first; an empty one for an account that does not exist.

        :param unread: only what was not read.
        :param limit: notices of the page, at most 1,000.
        :param before: ``next_before`` of the page before.
        :param wait: seconds.
        """
        arguments = {"account": account, "unread": unread, "limit": limit, "before": before, "v": 1}
        answer = self._ask("queries.notices", str(uuid4()), QUERIES, _encode(arguments), f"account={account}", wait)
        return msgspec.convert(answer, Inbox)

    def mark_read(
        self, account: str, key: str | None = None, *, until: datetime | None = None, wait: float | None = None
    ) -> int | None:
        """Note that notices were read; doing so again changes nothing.

        :param key: one of them; all of them unless given.
        :param until: of all of them, those made by then: give ``created_at`` of the newest that was shown, so that one
            that came since stays unread.
        :param wait: seconds; without it the call returns ``None`` as soon as the broker has confirmed the message.
        :returns: how many were not read before.
        """
        encoded = _encode({"account": account, "key": key, "until": until, "v": 1})
        id, shown = str(uuid4()), f"account={account}, key={key}"[:SHOWN_CHARACTERS]
        if wait is None:
            self._sender.send([task_message(READ, id, NOTICES, encoded, shown)])
            return None
        count: int = self._ask(READ, id, NOTICES, encoded, shown, wait)
        return count

    def checkout(
        self,
        account: str,
        *,
        request: str,
        success_url: str,
        cancel_url: str,
        pack: str | None = None,
        plan: str | None = None,
        offer: str | None = None,
        quote: str | None = None,
        quantity: int = 1,
        wait: float = SELLING_SECONDS,
    ) -> Page:
        """Make a checkout for a pack, a plan, an offer or a quote; send the buyer to its ``url``.

        A refusal is no error: it is a page with ``status`` ``rejected`` and a ``code``.

        :param request: chosen and kept by the caller: asked again with it, the same checkout is the answer for a day.
        :param success_url: where the buyer goes after paying: ``https://``, or ``http://`` on loopback.
        :param cancel_url: where the buyer goes who does not.
        :param quote: the ``order`` of an inquiry that was quoted.
        :param quantity: how many packs.
        :param wait: seconds.
        """
        arguments = {
            "account": account, "request": request, "success_url": success_url, "cancel_url": cancel_url, "pack": pack,
            "plan": plan, "offer": offer, "quote": quote, "quantity": quantity,
        }  # fmt: skip
        return msgspec.convert(self._sell("checkout", request, arguments, wait), Page)

    def portal(self, account: str, *, return_url: str, wait: float = SELLING_SECONDS) -> Page:
        """The payment provider's page where a buyer changes or cancels a plan; good for a few minutes.

        :param return_url: where the buyer goes from there: ``https://``, or ``http://`` on loopback.
        :param wait: seconds.
        """
        arguments = {"account": account, "return_url": return_url}
        return msgspec.convert(self._sell("portal", account, arguments, wait), Page)

    def inquire(
        self,
        account: str,
        credits: Amount,
        *,
        request: str,
        pack: str | None = None,
        note: str | None = None,
        wait: float = SELLING_SECONDS,
    ) -> Inquiry:
        """Ask an administrator for a quote; its ``order`` is what :meth:`checkout` takes once it is quoted.

        :param request: chosen and kept by the caller: however often it is sent, there is one inquiry.
        :param pack: of those that are sold by quote; may be left out where there is one.
        :param note: the buyer's word to who quotes.
        :param wait: seconds.
        """
        arguments = {"account": account, "credits": _wire(credits), "request": request, "pack": pack, "note": note}
        return msgspec.convert(self._sell("inquire", request, arguments, wait), Inquiry)

    def order(self, account: str, pack: str, *, request: str, wait: float = SELLING_SECONDS) -> Ordered:
        """Order a pack at the catalog's price, for a provider that takes no price ids: its payment names the order.

        :param request: chosen and kept by the caller: however often it is sent, there is one order.
        :param wait: seconds.
        """
        arguments = {"account": account, "pack": pack, "request": request}
        return msgspec.convert(self._sell("order", request, arguments, wait), Ordered)

    def _sell(self, name: str, id: str, arguments: dict[str, Any], wait: float) -> Any:
        encoded = _encode({**{key: value for key, value in arguments.items() if value is not None}, "v": 1})
        return self._ask(f"payments.{name}", id, PAYMENTS, encoded, _shown(arguments), wait)

    def query(self, name: str, queue: str, wait: float, **arguments: Any) -> Any:
        """Send a task that is no operation, and wait for what it answers.

        :param queue: where it goes, such as ``queries``.
        :param wait: seconds.
        :raises NoAnswerError: when it does not answer in time.
        """
        shown = ", ".join(f"{key}={value}" for key, value in arguments.items())[:SHOWN_CHARACTERS]
        return self._ask(name, uuid4().hex, queue, _encode(arguments), shown, wait)

    def _ask(self, name: str, id: str, queue: str, arguments: bytes, shown: str, wait: float) -> Any:
        """Send and wait; listens for the answer before sending, so that none is missed."""
        # Operation ids are unique per account only, and one id may be sent twice at a time: each sending is answered
        # under a name of its own.
        reply = uuid4().hex
        with self._answers.expect(reply) as (answer, reply_to):
            identity = reply if queue in (QUERIES, NOTICES, PAYMENTS) else id
            self._sender.send([task_message(name, identity, queue, arguments, shown, reply, reply_to)])
            try:
                outcome = answer.result(wait)
            except TimeoutError:
                raise NoAnswerError(
                    f"no answer to {name} {id!r} within {wait} s; it is applied in its turn, ask again with this id"
                ) from None
        if outcome.status == "SUCCESS":
            return outcome.result
        raise _failure(outcome)


class Reservation:
    """A hold in the hands of the block that :meth:`CreditClient.reserve` runs."""

    def __init__(self, client: CreditClient, account: str, id: str, hold: Result, wait: float) -> None:
        self.account = account
        self.id = id
        self.hold = hold
        """The answer to the hold."""
        self.captured: Result | None = None
        """The answer to the capture, once there is one."""
        self._client = client
        self._wait = wait

    def capture(self, *, amount: Amount | None = None, quantity: Amount | None = None) -> Result:
        """Take ``amount`` credits or ``quantity`` of the hold's feature; all of it unless given.

        :raises RefusedError: such as ``insufficient_credits`` for more than was held.
        """
        result = self._client.capture(
            self.account, self.id, id=f"{self.id}:capture", amount=amount, quantity=quantity, wait=self._wait
        )
        assert result is not None
        if not result.applied:
            raise RefusedError(result)
        self.captured = result
        return result


class Group:
    """Operations that make one message: their lane, and the most bytes that they take in it."""

    __slots__ = ("lane", "members", "size")

    def __init__(self, lane: str) -> None:
        self.lane = lane
        self.members: list[Member] = []
        self.size = 0


class Buffer(Operations):
    """Many operations in few messages: :meth:`CreditClient.buffer`. Use it as a context manager.

    An operation is on its way when its lane's group is full, when it has lingered, or when the block ends. What
    the broker did not confirm is raised by the next call or at the end, with everything to send again.
    """

    def __init__(self, client: CreditClient, linger_seconds: float, max_operations: int) -> None:
        if not 1 <= max_operations <= MAX_BATCH:
            raise ValueError(f"max_operations is 1 to {MAX_BATCH}")
        self._client = client
        self._linger = linger_seconds
        self._max = max_operations
        self._name = str(uuid4())
        self._numbers = count()
        self._groups: dict[str, Group] = {}
        self._full: list[Group] = []
        self._lock = threading.Lock()
        """Of what is collected."""
        self._sending = threading.Lock()
        """Held from taking groups until the broker has them, so that none overtakes another; taken before the other."""
        self._pending = threading.Event()
        self._ended = threading.Event()
        self._failed: UnsentError | None = None
        self._thread = threading.Thread(target=self._send_lingering, name="creditlane buffer", daemon=True)
        self.sent = 0
        """Operations that the broker has confirmed."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._pending.set()
        self._thread.join()
        self.flush()

    def submit(self, name: str, id: str, arguments: dict[str, Any], wait: float | None = None) -> None:
        """Check one operation and put it into its lane's group.

        :raises UnsentError: when the broker did not confirm earlier ones.
        """
        if wait is not None:
            raise ValueError("a buffer waits for no answers: use CreditClient.batch, or a single call")
        encoded = checked(name, id, arguments)
        lane = lane_of(arguments["account"], self._client.lanes)
        # A character of an id takes four bytes at the most.
        size = len(name) + 4 * len(id) + len(encoded) + 8
        with self._lock:
            if self._failed is not None:
                self._raise_failure()
            group = self._groups.get(lane)
            overflows = group is not None and group.size + size > MAX_MESSAGE_BYTES - FULL_MARGIN_BYTES
            if group is None or overflows:
                if group is not None:
                    self._full.append(group)
                group = self._groups[lane] = Group(lane)
            group.members.append((name, id, encoded))
            group.size += size
            if len(group.members) >= self._max:
                self._full.append(self._groups.pop(lane))
                overflows = True
            elif not self._pending.is_set():
                self._pending.set()
        if overflows:
            self._publish(everything=False)

    def flush(self) -> None:
        """Send everything that is collected, now.

        :raises UnsentError: with what the broker did not confirm.
        """
        self._publish(everything=True)
        with self._lock:
            self._raise_failure()

    def _publish(self, everything: bool) -> None:
        """Send the groups that are full, or all, in one round trip, where the broker can; what fails is kept for the
        caller. Others go on collecting meanwhile."""
        with self._sending:
            with self._lock:
                if everything:
                    self._pending.clear()
                    self._full += self._groups.values()
                    self._groups.clear()
                full, self._full = self._full, []
                if self._failed is not None:
                    # Sending on would overtake what was not confirmed.
                    self._failed.operations.extend(member for group in full for member in group.members)
                    return
            while full:
                # One of each lane at a time: what a broker refuses of a block is sent again after the rest of it.
                first: dict[str, Group] = {}
                for group in full:
                    first.setdefault(group.lane, group)
                try:
                    self._client._sender.send([self._message(group) for group in first.values()])
                except BrokerUnavailableError as error:
                    with self._lock:
                        self._failed = UnsentError([member for group in full for member in group.members], str(error))
                    return
                self.sent += sum(len(group.members) for group in first.values())
                full = [group for group in full if first[group.lane] is not group]

    def _message(self, group: Group) -> Outgoing:
        name = f"{self._name}-{next(self._numbers)}"
        return task_message(BATCH, name, group.lane, _batch_arguments(group.members), _counted(group.members))

    def _raise_failure(self) -> None:
        failed, self._failed = self._failed, None
        if failed is not None:
            # What was collected since comes after it, so it goes back to the caller as well.
            for group in (*self._full, *self._groups.values()):
                failed.operations.extend(group.members)
            self._full.clear()
            self._groups.clear()
            raise failed

    def _send_lingering(self) -> None:
        while not self._ended.is_set():
            self._pending.wait()
            self._ended.wait(self._linger)
            self._publish(everything=True)


def _failure(outcome: Outcome) -> CreditlaneError:
    """What a failed or revoked task raises where its answer is waited for."""
    if isinstance(outcome.result, dict):
        text = outcome.result.get("exc_message")
        told = ": ".join(map(str, text)) if isinstance(text, list) else text
        if outcome.result.get("exc_type") == QuarantinedError.__name__:
            return QuarantinedError(told)
        return CreditlaneError(f"{outcome.status.lower()}: {outcome.result.get('exc_type')}: {told}")
    return CreditlaneError(outcome.status.lower())


def checked(name: str, id: str, arguments: dict[str, Any]) -> bytes:
    """Encode an operation's arguments, having checked them as a worker will.

    :returns: the arguments as JSON; those that are ``None`` are left out.
    :raises ContractError: naming the field that does not fit.
    """
    check_id(id)
    if id.startswith(RESERVED):
        raise ContractError(
            Code.INVALID_MESSAGE,
            f"ids that begin with {' or '.join(RESERVED)} are derived by the ledger; choose another",
        )
    if name in INTERNAL:
        raise ContractError(
            Code.UNKNOWN_OPERATION, f"{name} is sent by the ledger itself, as what follows from a transfer or a payment"
        )
    try:
        if None in arguments.values():
            arguments = {key: value for key, value in arguments.items() if value is not None}
        encoded = _encode(arguments)
    except (TypeError, ValueError) as error:
        raise ContractError(Code.INVALID_MESSAGE, f"the arguments are no JSON: {error}") from None
    known, account = _known.get(name), arguments.get("account")
    if known is None or not is_plain(account):
        decode_message(name, encoded)
        return encoded
    head = b'{"account":' + _encode(account)
    rest = encoded.removeprefix(head)
    if rest not in known:
        decode_message(name, encoded)
        if len(rest) < len(encoded) and len(rest) <= KNOWN_BYTES:
            if len(known) >= KNOWN:
                known.clear()
            known.add(rest)
    return encoded


CODE_CHARACTERS = 10
"""How long a referral code is that nobody chose: of a million there are hardly ever two alike."""


def made_code(account: str, id: str) -> str:
    """A referral code for an account: the same whenever the call is repeated."""
    number = int.from_bytes(sha256(f"{account}\n{id}".encode("utf-8", "replace")).digest())
    return "".join(ALPHABET[number >> 5 * place & 31] for place in range(CODE_CHARACTERS))


def _wire(amount: Amount | None) -> str | None:
    return None if amount is None else to_wire(amount)


def task_message(
    name: str,
    id: str,
    queue: str,
    arguments: bytes,
    shown: str,
    reply: str | None = None,
    reply_to: str | None = None,
) -> Outgoing:
    """One task as it goes to the broker (messages: an operation is a Celery task).

    :param arguments: the keyword arguments, as JSON.
    :param shown: what Flower shows of them.
    :param reply: the name under which an answer is wanted; none is without.
    :param reply_to: the queue that the answer goes to, where answers travel by queue.
    :raises ContractError: when it is longer than a message may be.
    """
    body = b"[[]," + arguments + _EMBED
    if len(body) > MAX_MESSAGE_BYTES:
        raise ContractError(Code.INVALID_MESSAGE, f"the message has more than {MAX_MESSAGE_BYTES} bytes; split it")
    headers = {
        "lang": "py", "task": name, "id": id, "root_id": id, "parent_id": None, "group": None, "argsrepr": "()",
        "kwargsrepr": shown, "ignore_result": reply is None,
    }  # fmt: skip
    if reply is not None:
        headers["reply"] = reply
    return Outgoing(queue, body, headers, reply_to=reply_to)


def _batch_arguments(members: Sequence[Member]) -> bytes:
    parts = [b"[%s,%s,%s]" % (_encode(name), _encode(id), arguments) for name, id, arguments in members]
    return b'{"v":1,"operations":[' + b",".join(parts) + b"]}"


def _shown(arguments: dict[str, Any]) -> str:
    """What an operator sees of the arguments in Flower: whose credits, for what, how many."""
    shown = str(arguments["account"])
    feature, quantity, amount = arguments.get("feature"), arguments.get("quantity"), arguments.get("amount")
    if feature is not None:
        shown += f", {feature} × {1 if quantity is None else quantity}"
    elif quantity is not None:
        shown += f", quantity={quantity}"
    if amount is not None:
        shown += f", {amount} credits"
    for key, value in arguments.items():
        if key not in SHOWN_APART and value is not None:
            shown += f", {key}={value}"
    return shown[:SHOWN_CHARACTERS]


def _counted(members: Sequence[Member]) -> str:
    names = [name for name, _, _ in members]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
