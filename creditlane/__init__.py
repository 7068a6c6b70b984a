"""creditlane: what an upstream service installs to charge credits through a broker."""

from creditlane.client import Buffer, CreditClient, Reservation
from creditlane.codes import Code
from creditlane.contract import Balance, ContractError, GrantUse, Result
from creditlane.errors import (
    AlreadyReservedError,
    BrokerUnavailableError,
    CreditlaneError,
    NoAnswerError,
    QuarantinedError,
    RefusedError,
    UnsentError,
)
from creditlane.inbox import Inbox, Notice
from creditlane.lanes import lane_of
from creditlane.reports import (
    Achievements,
    BalanceExplained,
    Forecast,
    GrantExplained,
    HistoryPage,
    Leaderboard,
    OperationExplained,
    Planned,
    Refunds,
    Simulation,
    Usage,
)
from creditlane.selling import Inquiry, Page, SaleCode

__all__ = [
    "Achievements",
    "AlreadyReservedError",
    "Balance",
    "BalanceExplained",
    "BrokerUnavailableError",
    "Buffer",
    "Code",
    "ContractError",
    "CreditClient",
    "CreditlaneError",
    "Forecast",
    "GrantExplained",
    "GrantUse",
    "HistoryPage",
    "Inbox",
    "Inquiry",
    "Leaderboard",
    "NoAnswerError",
    "Notice",
    "OperationExplained",
    "Page",
    "Planned",
    "QuarantinedError",
    "Refunds",
    "RefusedError",
    "Reservation",
    "Result",
    "SaleCode",
    "Simulation",
    "UnsentError",
    "Usage",
    "lane_of",
]
