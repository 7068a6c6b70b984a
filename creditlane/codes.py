"""The refusal codes: what a caller decides by. No code is ever parsed out of a sentence.

Where several would fit, the one that stands earlier in :class:`Code` is given.
"""

from __future__ import annotations

from enum import StrEnum


class Code(StrEnum):
    """Why an operation was refused (status ``rejected``) or put in quarantine (the task failed)."""

    # Quarantine: the message cannot be understood. It is kept whole for an operator.
    MALFORMED = "malformed"
    UNKNOWN_OPERATION = "unknown_operation"
    UNKNOWN_VERSION = "unknown_version"
    INVALID_MESSAGE = "invalid_message"
    OUT_OF_RANGE = "out_of_range"
    INTERNAL_ERROR = "internal_error"

    # Refusals: the message was understood, and this is the answer.
    ID_CONFLICT = "id_conflict"
    UNKNOWN_ACCOUNT = "unknown_account"
    ACCOUNT_CLOSED = "account_closed"
    ACCOUNT_FROZEN = "account_frozen"
    ALREADY_CONVERTED = "already_converted"
    ACCOUNT_EXISTS = "account_exists"
    INVALID = "invalid"
    UNKNOWN_PLAN = "unknown_plan"
    NO_SUBSCRIPTION = "no_subscription"
    ALREADY_SUBSCRIBED = "already_subscribed"
    ALREADY_RENEWED = "already_renewed"
    NOTHING_TO_UNDO = "nothing_to_undo"
    UNKNOWN_FEATURE = "unknown_feature"
    UNKNOWN_HOLD = "unknown_hold"
    HOLD_CLOSED = "hold_closed"
    UNKNOWN_GRANT = "unknown_grant"
    UNKNOWN_CHARGE = "unknown_charge"
    UNKNOWN_TRANSFER = "unknown_transfer"
    UNKNOWN_MEMBER = "unknown_member"
    CODE_UNKNOWN = "code_unknown"
    CODE_EXISTS = "code_exists"
    CODE_EXPIRED = "code_expired"
    CODE_USED = "code_used"
    SELF_REFERRAL = "self_referral"
    ALREADY_REFERRED = "already_referred"
    EXCEEDS_ORIGINAL = "exceeds_original"
    DAILY_LIMIT = "daily_limit"
    LIMIT_REACHED = "limit_reached"
    MEMBER_LIMIT = "member_limit"
    POOL_EXHAUSTED = "pool_exhausted"
    INSUFFICIENT_CREDITS = "insufficient_credits"
    NOT_TRANSFERABLE = "not_transferable"

    @property
    def sentence(self) -> str:
        """What it means and what to do, in one sentence."""
        return SENTENCES[self]


SENTENCES: dict[Code, str] = {
    Code.MALFORMED: "The message is not a Celery task in JSON; mend the producer and replay it from quarantine.",
    Code.UNKNOWN_OPERATION: "No operation has this name; see the contract for those that exist.",
    Code.UNKNOWN_VERSION: "The message is of a newer contract than this worker knows; "
    "update the workers, then replay it from quarantine.",
    Code.INVALID_MESSAGE: "The arguments do not fit the operation; mend what the reason names and send it again.",
    Code.OUT_OF_RANGE: "The database cannot hold a value of this message; send smaller numbers.",
    Code.INTERNAL_ERROR: "The operation failed inside the worker; the traceback is in quarantine, "
    "replay it after a fix.",
    Code.ID_CONFLICT: "This operation id was used before with other content; choose a new id for a new operation.",
    Code.UNKNOWN_ACCOUNT: "The account was never opened; send credits.open first.",
    Code.ACCOUNT_EXISTS: "The account is already open; use it, no second opening is needed.",
    Code.ACCOUNT_CLOSED: "The account is closed and takes no operations.",
    Code.ACCOUNT_FROZEN: "The account was frozen by an administrator: it gives no credits out until it is thawed.",
    Code.ALREADY_CONVERTED: "What this lead had went to another account; a lead is converted once.",
    Code.INVALID: "The arguments contradict each other; the reason says which.",
    Code.UNKNOWN_PLAN: "The catalog has no such plan; name one that it has.",
    Code.NO_SUBSCRIPTION: "The account has no plan under way; send plans.subscribe first.",
    Code.ALREADY_SUBSCRIBED: "The account has a plan under way; send plans.change for another one.",
    Code.ALREADY_RENEWED: "The period of this payment was paid for before; nothing more is given for it.",
    Code.NOTHING_TO_UNDO: "No renewal began the period under way, or it was undone before.",
    Code.UNKNOWN_FEATURE: "The catalog has no such feature; add it there or send an explicit amount.",
    Code.UNKNOWN_HOLD: "The account has no hold with this id; use the operation id of the hold.",
    Code.HOLD_CLOSED: "The hold was captured or released before, or its time ran out; consume directly.",
    Code.UNKNOWN_GRANT: "The account has no such grant or purchase.",
    Code.UNKNOWN_CHARGE: "The account has no charge with this operation id; name a consume or capture that applied.",
    Code.UNKNOWN_TRANSFER: "The account has made no transfer with this operation id.",
    Code.UNKNOWN_MEMBER: "The pool does not list this member; send pools.set_member first.",
    Code.CODE_UNKNOWN: "There is no such code; look at its spelling.",
    Code.CODE_EXISTS: "A code of this text was issued before; choose another.",
    Code.CODE_EXPIRED: "The code was withdrawn, or its time is over.",
    Code.CODE_USED: "The code was used as often as it may be, in all or by this account.",
    Code.SELF_REFERRAL: "An account cannot refer itself, nor the one that referred it.",
    Code.ALREADY_REFERRED: "The account was referred before; that happens once.",
    Code.EXCEEDS_ORIGINAL: "More would be given back than was taken; refund at most what is left of the charge.",
    Code.LIMIT_REACHED: "The account has as many open grants or holds as it may; close some first.",
    Code.DAILY_LIMIT: "The account did this as much today as the catalog allows; try again tomorrow.",
    Code.MEMBER_LIMIT: "The member has used what the pool allows it in this period; see required and available.",
    Code.POOL_EXHAUSTED: "The pool's balance does not cover this; see required, available and shortfall.",
    Code.INSUFFICIENT_CREDITS: "The balance does not cover this; see required, available and shortfall.",
    Code.NOT_TRANSFERABLE: "There are enough credits, but not of sources that may be given away; "
    "see required, available and shortfall.",
}
