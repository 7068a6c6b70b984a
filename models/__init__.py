"""What a credit is: the tables, and the pure rules in :mod:`models.rules`."""
