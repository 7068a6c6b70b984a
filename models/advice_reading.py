"""What advice is drawn from: an account's balance, pace, use and purchases, all read by its own keys."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from psycopg import Connection

from creditlane.inbox import Advice
from models.pace import PACE_DAYS, pace_micro
from models.reading import load_account
from models.rules.advice import MAX_ALTERNATIVES, Use, advise
from models.rules.catalog import Catalog
from models.rules.settling import settle

MAX_OPERATIONS = 10_000
"""The most operations that are looked at, the last ones first."""

FEATURES = f"""
SELECT feature FROM (
    SELECT feature, charged_micro, applied_at FROM operations
    WHERE account = %s ORDER BY number DESC LIMIT {MAX_OPERATIONS}
) last
WHERE applied_at >= %s AND charged_micro > 0 AND feature IS NOT NULL
GROUP BY feature ORDER BY sum(charged_micro) DESC, feature LIMIT {MAX_ALTERNATIVES}
"""
SPENT = """
SELECT coalesce(round(sum(granted_micro::numeric * price_minor / price_per_micro)), 0)::bigint FROM grants
WHERE account = %s AND purchase IS NOT NULL AND created_at >= %s AND origin IS NULL AND price_per_micro > 0
  AND price_currency = %s AND source <> ALL(%s)
"""
"""Money paid for packs: lots of plans have prices too."""


def account_advice(connection: Connection[Any], account: str, catalog: Catalog) -> Advice | None:
    """What an account can do about its credits, as it stands now.

    :param connection: not within a transaction.
    :param catalog: the one in force.
    :returns: None for an account that no operation ever named, or one that is charged nothing.
    """
    loaded = load_account(connection, account)
    if loaded is None:
        return None
    state, now = loaded
    settle(state, now, catalog)
    if state.is_unlimited:
        return None
    since = now - timedelta(days=PACE_DAYS)
    sources = [source for plan in catalog.plans.values() for source in (plan.source, plan.rollover_source)]
    spent = connection.execute(SPENT, (account, since, catalog.catalog.currency, sources)).fetchone()
    assert spent is not None
    subscription = state.subscription if state.subscription is not None and state.subscription.is_active else None
    use = Use(
        balance_micro=state.spendable(now),
        pace_micro=pace_micro(connection, account, now, state.opened_at),
        features=[feature for (feature,) in connection.execute(FEATURES, (account, since))],
        spent_minor=spent[0],
        plan=None if subscription is None else subscription.terms.plan,
        rank=(False, 0) if subscription is None else subscription.terms.rank,
        period_end=None if subscription is None else subscription.period_end,
    )
    return advise(use, now, catalog)
