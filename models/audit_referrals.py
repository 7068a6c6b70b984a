"""What only shows between accounts: whose a referral code is, and whom each reward is for (ledger rules: proof).

The audit of each account proves what it did with the codes that it was told of. Here those tellings are held against
the rows of the codes, and of those who were referred.
"""

from __future__ import annotations

from typing import Any

from psycopg import Connection

from models.report import Report

NOBODYS = """
SELECT c.account, 'codes', c.code, 'is a referral code, and not that of its account'
FROM codes c WHERE c.kind = 'referral'
  AND NOT EXISTS (SELECT FROM referrals r WHERE r.account = c.account AND r.code = c.code)
"""
MISSING = """
SELECT r.account, 'referrals', r.code, 'is a code that has no row as this account''s'
FROM referrals r WHERE r.code IS NOT NULL
  AND NOT EXISTS (SELECT FROM codes c WHERE c.code = r.code AND c.account = r.account AND c.kind = 'referral')
"""
MISTAKEN = """
SELECT r.account, 'referrals', r.claimed_code, 'was claimed as the code of ' || r.referrer || ', and is not'
FROM referrals r WHERE r.referrer IS NOT NULL
  AND NOT EXISTS (SELECT FROM codes c WHERE c.code = r.claimed_code AND c.account = r.referrer AND c.kind = 'referral')
"""
REWARDED = """
WITH rewards AS MATERIALIZED (
    SELECT account, operation, arguments ->> 'referee' AS referee, arguments ->> 'code' AS code FROM operations
    WHERE name = 'referrals.reward' AND status = 'applied'
)
SELECT w.account, 'operations', w.operation, 'rewards for ' || w.referee || ', who was not given a bonus for its code'
FROM rewards w WHERE NOT EXISTS (
    SELECT FROM referrals r WHERE r.account = w.referee AND r.referrer = w.account AND r.claimed_code = w.code
      AND r.settled_at IS NOT NULL
)
UNION ALL
SELECT w.account, 'operations', w.operation, 'rewards for ' || w.referee || ', who was rewarded for this account'
FROM rewards w JOIN rewards o ON o.account = w.referee AND o.referee = w.account
"""

CHECKS = NOBODYS, MISSING, MISTAKEN, REWARDED
"""Each gives account, table, key and what is wrong of every row that is not as it should be."""


def check_referrals(connection: Connection[Any], report: Report) -> None:
    """Hold referral codes, claims and rewards of all accounts against one another.

    :param connection: in a transaction that sees one snapshot.
    """
    for check in CHECKS:
        for row in connection.execute(check):
            report.add(*row)
