"""What only shows between accounts: each use of a gift code is one account's, once, and paid for (ledger rules: proof).

The audit of each account proves what it did with the codes that it was told of. Here those tellings are held against
the rows of the codes and of their uses, and against each other.
"""

from __future__ import annotations

from typing import Any

from psycopg import Connection

from models.report import Report
from models.rules.sharing import fingerprint

CHUNK = 10
"""Issues that one round trip brings, with up to 1,000 codes each."""

TERMS = """
SELECT c.account, c.codes, c.terms, o.arguments -> 'codes', o.result -> 'terms'
FROM (
    SELECT account, operation, array_agg(code) AS codes, array_agg(terms::text) AS terms
    FROM codes WHERE kind = 'gift' GROUP BY account, operation
) c
LEFT JOIN operations o ON o.account = c.account AND o.operation = c.operation
    AND o.name = 'codes.issue' AND o.status = 'applied'
"""
"""The codes of each issue with what it says of them: its JSON is read once, not for each of a thousand codes."""

USED = "o.name = 'codes.redeem' AND o.status = 'applied'"
SLOT = "(o.result -> 'code_row' ->> 'used')"
"""Of a redemption; the first use is not spelt out."""

DIGESTED = "octet_length(r.code) || ':' || r.code || octet_length(r.slot::text) || ':' || r.slot"
"""What :func:`creditlane.contract.redeemed_id` is the digest of."""

REDEEMED_ID = f"'code.conclude:' || encode(sha256(convert_to({DIGESTED}, 'UTF8')), 'hex')"

COLUMNS = """
SELECT account, 'codes', code, 'has other columns than its terms say' FROM codes
WHERE (code, kind, account, operation, place, amount_micro) IS DISTINCT FROM
      (terms ->> 'code', terms ->> 'kind', terms ->> 'account', terms ->> 'operation',
       coalesce((terms ->> 'place')::int, 0), coalesce((terms ->> 'amount')::bigint, 0))
   OR uses IS DISTINCT FROM (terms ->> 'uses')::bigint
   OR expires_at IS DISTINCT FROM (terms ->> 'expires_at')::timestamptz
   OR (status = 'closed') IS DISTINCT FROM (closed_at IS NOT NULL) OR status NOT IN ('open', 'closed')
"""
MISSING = """
SELECT o.account, 'codes', n.code, 'has no row, and operation ' || o.operation || ' issued it'
FROM operations o CROSS JOIN LATERAL json_array_elements_text(o.arguments -> 'codes') AS n(code)
WHERE o.name = 'codes.issue' AND o.status = 'applied'
  AND NOT EXISTS (SELECT FROM codes c WHERE c.code = n.code AND c.account = o.account AND c.operation = o.operation)
"""
COUNTED = """
SELECT c.account, 'codes', c.code, 'says it was used ' || c.used || ' times, and there are ' || count(r.slot)
       || ' uses, the last of slot ' || coalesce(max(r.slot)::text, 'none')
FROM codes c LEFT JOIN redemptions r ON r.code = c.code
WHERE c.kind = 'gift' GROUP BY c.code
HAVING count(r.slot) <> c.used OR coalesce(min(r.slot), 0) <> 0 OR coalesce(max(r.slot), -1) <> c.used - 1
    OR c.used > c.uses
"""
UNANSWERED = f"""
SELECT r.account, 'redemptions', r.code || ' ' || r.slot, 'is of no operation that redeemed this use of this code'
FROM redemptions r
WHERE NOT EXISTS (SELECT FROM codes c WHERE c.code = r.code AND c.kind <> 'gift') AND NOT EXISTS (
    SELECT FROM codes c JOIN operations o ON o.account = r.account AND o.operation = r.operation
    WHERE c.code = r.code AND c.amount_micro = r.amount_micro AND {USED} AND o.arguments ->> 'code' = r.code
      AND coalesce({SLOT}, '0') = r.slot::text AND o.applied_at = r.at
)
"""
UNNOTED = f"""
SELECT o.account, 'operations', o.operation, 'redeemed a use of a code that has no such row'
FROM operations o WHERE {USED} AND NOT EXISTS (
    SELECT FROM redemptions r WHERE r.code = o.arguments ->> 'code' AND r.slot = coalesce({SLOT}, '0')::bigint
      AND r.account = o.account AND r.operation = o.operation
)
"""
UNUSED = """
SELECT o.account, 'operations', o.operation, 'concludes a use of a code that nobody made'
FROM operations o WHERE o.name = 'codes.conclude' AND o.status = 'applied' AND NOT EXISTS (
    SELECT FROM redemptions r JOIN codes c ON c.code = r.code
    WHERE r.code = o.arguments ->> 'code' AND r.slot::text = o.arguments ->> 'slot' AND c.account = o.account
      AND r.account = o.arguments ->> 'redeemed_by'
)
"""
REFUSED = f"""
SELECT c.account, 'operations', o.operation, 'refused to conclude a use of a code that was made'
FROM redemptions r JOIN codes c ON c.code = r.code
JOIN operations o ON o.account = c.account AND o.operation = {REDEEMED_ID}
WHERE c.terms ->> 'source' IS NULL AND o.status <> 'applied'
"""
WITHDRAWN = """
SELECT c.account, 'codes', c.code, 'is closed, and no operation withdrew it with the uses that it has'
FROM codes c WHERE c.kind = 'gift' AND c.status = 'closed' AND NOT EXISTS (
    SELECT FROM withdrawn w WHERE w.account = c.account AND w.code = c.code AND w.used = c.used AND w.at = c.closed_at
)
UNION ALL
SELECT w.account, 'codes', w.code, 'is open, and operation ' || w.operation || ' withdrew it'
FROM withdrawn w JOIN codes c ON c.code = w.code WHERE c.status <> 'closed'
"""
"""Of the withdrawals of a code the one that found it open."""

WITH_WITHDRAWN = """
WITH withdrawn AS MATERIALIZED (
    SELECT o.account, o.operation, o.applied_at AS at, w.told -> 'terms' ->> 'code' AS code,
           coalesce((w.told ->> 'used')::bigint, 0) AS used
    FROM operations o CROSS JOIN LATERAL json_array_elements(o.result -> 'code_rows') AS w(told)
    WHERE o.name = 'codes.withdraw' AND o.status = 'applied' AND coalesce(w.told ->> 'status', 'open') = 'open'
)
"""
IN_TRANSIT = f"""
WITH waiting AS (
    SELECT c.account, c.operation, sum(c.amount_micro * (
        CASE c.status WHEN 'open' THEN c.uses - c.used ELSE 0 END + c.used
        - (SELECT count(*) FROM redemptions r JOIN operations o ON o.account = c.account AND o.operation = {REDEEMED_ID}
           WHERE r.code = c.code AND o.status = 'applied')
    )) AS amount_micro
    FROM codes c WHERE c.kind = 'gift' AND c.terms ->> 'source' IS NULL GROUP BY 1, 2
), moved AS (
    SELECT e.account, coalesce(e.refers_to, e.operation) AS operation,
           sum(CASE e.kind WHEN 'transferred' THEN e.amount_micro ELSE -e.amount_micro END) AS amount_micro
    FROM entries e WHERE e.kind IN ('transferred', 'sent', 'bounced') GROUP BY 1, 2
)
SELECT account, 'operations', w.operation, 'has other credits in transit than the uses of its codes wait for'
FROM waiting w LEFT JOIN moved m USING (account, operation) WHERE w.amount_micro IS DISTINCT FROM m.amount_micro
"""

CHECKS = (
    COLUMNS, MISSING, COUNTED, UNANSWERED, UNNOTED, UNUSED, REFUSED, WITH_WITHDRAWN + WITHDRAWN, IN_TRANSIT,
)  # fmt: skip
"""Each gives account, table, key and what is wrong of every row that is not as it should be."""


EVER = """
SELECT EXISTS (SELECT FROM codes) OR EXISTS (SELECT FROM redemptions)
    OR EXISTS (SELECT FROM operations WHERE name IN ('codes.issue', 'codes.redeem', 'codes.withdraw', 'codes.conclude'))
"""
"""Whether there is anything to look at; the checks read all operations, each by itself."""


def check_codes(connection: Connection[Any], report: Report) -> None:
    """Hold codes, their uses and the operations of all accounts against one another.

    :param connection: in a transaction that sees one snapshot.
    """
    if not connection.execute(EVER).fetchall()[0][0]:
        return
    with connection.cursor(name="codes") as codes:
        codes.itersize = CHUNK
        for account, made, terms, named, fingerprints in codes.execute(TERMS):
            issued = dict(zip(named or (), fingerprints or (), strict=False))
            for code, own in zip(made, terms, strict=True):
                if code not in issued:
                    report.add(account, "codes", code, "was issued by no operation of its account")
                elif issued[code] != fingerprint(own.encode()):
                    report.add(account, "codes", code, "has other terms than its issue gave it")
    for check in CHECKS:
        for row in connection.execute(check):
            report.add(*row)
