"""The command ``creditlane``: the server's command line, where the server is installed.

A producer installs the contract and the client only. So the command line is looked for by its name, and
nothing here imports the server.
"""

from __future__ import annotations

import importlib
import sys

COMMAND_LINE = "scripts.command_line"

NOT_HERE = (
    "creditlane: only the client is installed here; the command line belongs to the server: "
    "run it from a checkout installed with: pip install -e '.[server]'\n"
)


def main() -> None:
    """Run the operator's command line; exits with 2 and a sentence where there is none."""
    try:
        command_line = importlib.import_module(COMMAND_LINE)
    except ModuleNotFoundError as error:
        if error.name is not None and COMMAND_LINE.startswith(error.name):
            sys.stderr.write(NOT_HERE)
        else:
            sys.stderr.write(
                f"creditlane: the command line needs {error.name}, which is not installed; "
                "install the server with: pip install -e '.[server]'\n"
            )
        raise SystemExit(2) from None
    command_line.main()


if __name__ == "__main__":
    main()
