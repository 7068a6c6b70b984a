"""Rows of ``operations`` and ``entries`` without padding: a tenth narrower, in the same columns.

Numbers and instants begin at multiples of eight bytes, so behind a text that is as long as it happens to be there are
bytes of nothing. With the columns of a fixed width first there are none. What was written before is copied as it
stands, in its order; for as long as that takes (some 50,000 operations a second) nobody reads or writes the two tables,
and they need their space twice.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Constraints, indexes, triggers and rights are read from the catalog and made again: what an operator added as well. A
# table with anything else of an operator's (row security, a publication, rights to columns, settings), or that
# something else depends on, such as a view, is left alone, with an error.
PUT_IN_ORDER = """
CREATE FUNCTION pg_temp.put_in_order(ordered text, wanted text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    before text := ordered || '_before';
    relation regclass := ordered::regclass;
    names text;
    columns text;
    again text[];
    statement text;
    strange text;
BEGIN
    EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', ordered);
    SELECT string_agg(what, ', ') INTO strange FROM (
        SELECT 'row security' FROM pg_class WHERE oid = relation AND (relrowsecurity OR relforcerowsecurity)
        UNION SELECT 'a policy' FROM pg_policy WHERE polrelid = relation
        UNION SELECT 'a replica identity' FROM pg_class WHERE oid = relation AND relreplident <> 'd'
        UNION SELECT 'storage parameters' FROM pg_class WHERE oid = relation AND reloptions IS NOT NULL
        UNION SELECT 'rights to or settings of the column ' || quote_ident(attname) FROM pg_attribute
        WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped
          AND (attacl IS NOT NULL OR attoptions IS NOT NULL OR coalesce(attstattarget, -1) >= 0 OR atthasdef
               OR attcompression <> '')
        UNION SELECT 'statistics' FROM pg_statistic_ext WHERE stxrelid = relation
        UNION SELECT 'a publication' FROM pg_publication_rel WHERE prrelid = relation
        UNION SELECT 'a rule' FROM pg_rewrite WHERE ev_class = relation
        UNION SELECT 'comments' FROM pg_description WHERE objoid = relation AND classoid = 'pg_class'::regclass
    ) AS found (what);
    IF strange IS NOT NULL THEN
        RAISE EXCEPTION 'the table % has what would be lost: %', ordered, strange
            USING HINT = 'Remove it, migrate, and make it again.';
    END IF;
    SELECT string_agg(quote_ident(attname), ', ' ORDER BY array_position(wanted, attname::text)),
           string_agg(format('%I %s', attname, format_type(atttypid, atttypmod))
                      || CASE WHEN attnotnull
                         THEN format(' CONSTRAINT %I NOT NULL', ordered || '_' || attname || '_not_null') ELSE '' END,
                      ', ' ORDER BY array_position(wanted, attname::text))
    INTO names, columns FROM pg_attribute WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped;
    SELECT array_agg(definition ORDER BY step, made, definition) INTO again FROM (
        SELECT 1, oid, format('ALTER TABLE %I ADD CONSTRAINT %I %s', ordered, conname, pg_get_constraintdef(oid))
        FROM pg_constraint WHERE conrelid = relation AND contype <> 'n'
        UNION ALL SELECT 2, indexrelid, pg_get_indexdef(indexrelid) FROM pg_index
        WHERE indrelid = relation AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
        UNION ALL SELECT 3, oid, pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = relation AND NOT tgisinternal
        UNION ALL SELECT 4, oid, format('ALTER TABLE %I %s TRIGGER %I', ordered,
                                     CASE tgenabled WHEN 'A' THEN 'ENABLE ALWAYS' WHEN 'R' THEN 'ENABLE REPLICA'
                                     ELSE 'DISABLE' END, tgname)
        FROM pg_trigger WHERE tgrelid = relation AND NOT tgisinternal AND tgenabled <> 'O'
        UNION ALL SELECT 5, 0, format('GRANT %s ON %I TO %s', privilege_type, ordered,
                                   CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END)
                            || CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END
        FROM pg_class, aclexplode(relacl) WHERE pg_class.oid = relation AND grantee <> relowner
        UNION ALL SELECT 6, 0, format('ALTER TABLE %I OWNER TO %I', ordered, pg_get_userbyid(relowner))
        FROM pg_class WHERE oid = relation
    ) AS definitions (step, made, definition);
    EXECUTE format('ALTER TABLE %I RENAME TO %I', ordered, before);
    EXECUTE format('CREATE TABLE %I (%s)', ordered, columns);
    EXECUTE format('INSERT INTO %I (%s) SELECT %s FROM %I', ordered, names, names, before);
    EXECUTE format('DROP TABLE %I', before);
    -- What default privileges gave it is given again below if it was there, and only then.
    FOR statement IN SELECT DISTINCT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END
        FROM pg_class, aclexplode(relacl) WHERE pg_class.oid = ordered::regclass AND grantee <> relowner LOOP
        EXECUTE format('REVOKE ALL ON %I FROM %s', ordered, statement);
    END LOOP;
    FOREACH statement IN ARRAY again LOOP
        EXECUTE statement;
    END LOOP;
    EXECUTE format('ANALYZE %I', ordered);
END $$;
"""

ORDERS = {
    "operations": (
        "number", "charged_micro", "applied_at", "quantity_micro", "first_seq", "occurred_at", "entries", "account",
        "operation", "name", "status", "code", "feature", "member", "catalog", "arguments", "result",
    ),
    "entries": (
        "seq", "amount_micro", "balance_after_micro", "at", "recorded_at", "grant_id", "account", "operation", "kind",
        "refers_to", "hash",
    ),
}  # fmt: skip
ORDERS_BEFORE = {
    "operations": (
        "account", "operation", "number", "name", "status", "code", "charged_micro", "feature", "quantity_micro",
        "member", "first_seq", "entries", "arguments", "result", "occurred_at", "applied_at", "catalog",
    ),
    "entries": (
        "account", "seq", "operation", "kind", "grant_id", "amount_micro", "balance_after_micro", "at", "refers_to",
        "recorded_at", "hash",
    ),
}  # fmt: skip


def upgrade() -> None:
    """Put the columns of a fixed width first."""
    _put_in_order(ORDERS)


def downgrade() -> None:
    """Put them where they were."""
    _put_in_order(ORDERS_BEFORE)


def _put_in_order(orders: dict[str, tuple[str, ...]]) -> None:
    """The driver's own connection runs the text as it stands, percent signs included."""
    driver = op.get_bind().connection.dbapi_connection
    assert driver is not None
    cursor = driver.cursor()
    cursor.execute(PUT_IN_ORDER)
    for table, columns in orders.items():
        cursor.execute("SELECT pg_temp.put_in_order(%s, %s)", (table, list(columns)))
    cursor.execute("DROP FUNCTION pg_temp.put_in_order")
