"""Makes ``scripts/sample_usage.csv``: a made-up day and a half of a service that charges by use.

python -m scripts.make_sample            # the same seed gives the same file
"""

from __future__ import annotations

import csv
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import typer

from scripts.replay import ZipfDraw

OUTPUT = Path(__file__).with_name("sample_usage.csv")
START = datetime(2026, 3, 2, tzinfo=UTC)
HOURS = 36

# How busy each hour of a day is, from midnight: nights are quiet, lunch dips, the afternoon is full.
BUSY = (3, 2, 1, 1, 1, 2, 5, 11, 22, 34, 40, 38, 26, 33, 42, 44, 41, 34, 24, 18, 15, 12, 8, 5)

# Of a hundred uses; each account leans towards one of them.
FEATURES = {"completion": 62, "embedding": 22, "image": 12, "export": 4}


def quantity_of(feature: str, draw: random.Random) -> Decimal:
    """Draw how much of a feature one use takes.

    :returns: thousands of tokens for completions and embeddings, pieces for the others.
    """
    if feature == "completion":
        tokens = min(16_000, int(draw.lognormvariate(6.2, 1.0)) + 1)
        return Decimal(tokens) / 1000
    if feature == "embedding":
        tokens = min(64_000, int(draw.lognormvariate(7.4, 0.9)) + 1)
        return Decimal(tokens) / 1000
    if feature == "image":
        return Decimal(draw.choice((1, 1, 1, 2, 4, 4, 8)))
    return Decimal(1)


def make_rows(rows: int, accounts: int, seed: int) -> list[tuple[str, str, str, str]]:
    """Make the rows of the file, in the order of time.

    :param rows: how many.
    :param accounts: how many accounts use the service, few of them much.
    :param seed: the same seed gives the same rows.
    :returns: time, account, feature and quantity of each, as text.
    """
    draw = random.Random(seed)  # noqa: S311 - to be repeatable is its purpose
    who = ZipfDraw(accounts, seed, exponent=0.9)
    hours = [BUSY[hour % 24] for hour in range(HOURS)]
    times = sorted(
        START + timedelta(hours=hour, milliseconds=draw.randrange(3_600_000))
        for hour in draw.choices(range(HOURS), hours, k=rows)
    )
    favourites: dict[str, str] = {}
    result = []
    for time in times:
        account = who.draw()
        favourite = favourites.setdefault(account, draw.choices(list(FEATURES), list(FEATURES.values()))[0])
        feature = favourite if draw.random() < 0.5 else draw.choices(list(FEATURES), list(FEATURES.values()))[0]
        quantity = quantity_of(feature, draw)
        result.append((time.isoformat(timespec="milliseconds"), account, feature, f"{quantity.normalize():f}"))
    return result


def main(
    output: Annotated[Path, typer.Option(help="The file to write.")] = OUTPUT,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 2000,
    accounts: Annotated[int, typer.Option(min=1, help="How many accounts.")] = 60,
    seed: Annotated[int, typer.Option(help="The same seed gives the same file.")] = 20260302,
) -> None:
    """Write a made-up usage file with the columns time, account, feature, quantity."""
    with output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("time", "account", "feature", "quantity"))
        writer.writerows(make_rows(rows, accounts, seed))
    print(f"{rows} rows of at most {accounts} accounts in {output}")


if __name__ == "__main__":
    typer.run(main)
