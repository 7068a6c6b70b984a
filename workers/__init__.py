"""How messages become transactions: the Celery apps, the lanes, the ledger writer."""
