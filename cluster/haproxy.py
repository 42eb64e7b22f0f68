"""Stands in for the HAProxy that Ray Serve runs, and becomes it: `haproxy.py ERROR_FILE ADDRESS BINARY ARGUMENTS...`.

What has no setting in Serve 2.60 is mended between Serve's start of the program and the program's own. It binds
HAProxy's stats and metrics pages, which ask nobody who they are, to every interface (here the first is on loopback and
the second, like all our metrics, on the node's address in its cluster); it answers 500 in plain text while no ingress
lives; it splices requests, with which HAProxy 2.8.25 overlooks every second client that leaves before its answer; it
lets any X-Request-Id through, with which clients write into logs and Serve fails where it is not UTF-8; and where Serve
is killed, its HAProxy lives on and holds the port. Run as a program, this uses the standard library only.
"""

import ctypes
import os
import re
import shlex
import signal
import sys
from pathlib import Path

LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1
# Of all that a request has, one that is no word of up to 128 ASCII characters; Serve then makes another.
_NO_ODD_IDS = "http-request del-header x-request-id if { req.fhdr(x-request-id) -m reg [^!-~]|^$|^.{129} }"


def write_wrapper(directory: Path, binary: str, address: str = LOOPBACK) -> Path:
    """The executable to name in RAY_SERVE_HAPROXY_BINARY_PATH, on a node with this `address` in its cluster.

    `binary` may be one that was written before: where that variable is set already, in an image or below a server,
    Serve's package names it as HAProxy. Raises `ConfigError` for one that leads to no program.
    """
    from cluster.api_error import ApiError

    binary = _program(binary)
    error = ApiError.unavailable("No process is there to take the request. Please try again.", 2.0)
    lines = [
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(error.body())}",
    ]
    lines += [f"{name}: {value}" for name, value in error.headers.items()]
    answer = directory / "unavailable.http"
    answer.write_bytes("\r\n".join([*lines, "", ""]).encode() + error.body())
    script = directory / "haproxy"
    program = str(Path(__file__).resolve())
    command = shlex.join([sys.executable, "-I", "-S", program, str(answer), address, binary])
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(0o700)
    return script


def _program(binary: str) -> str:
    """The program itself, behind any number of wrappers. One around itself would start itself for ever."""
    from engine import ConfigError

    seen = [binary]
    while (behind := _wrapped(Path(seen[-1]))) is not None:
        if behind in seen:
            raise ConfigError(
                f"{seen[-1]} is to become HAProxy, but only starts {behind} again: unset "
                "RAY_SERVE_HAPROXY_BINARY_PATH, and remove that file."
            )
        seen.append(behind)
    return seen[-1]


def _wrapped(executable: Path) -> str | None:
    """What a wrapper of ours becomes; None for a program."""
    try:
        with executable.open("rb") as file:
            interpreter, _, command = file.read(4096).partition(b"\n")
    except OSError:
        return None  # Serve says so better, when it starts it
    if interpreter != b"#!/bin/sh" or not command.startswith(b"exec "):
        return None
    try:
        words = shlex.split(command.decode(errors="replace"))
    except ValueError:  # a quote that is not closed: more than ours, which is one line
        return None
    match words:
        case ["exec", _, "-I", "-S", program, _, _, binary, "$@"] if Path(program).name == Path(__file__).name:
            return binary
        case _:
            return None  # somebody else's, who knows why


def mend(configuration: str, error_file: str, address: str = LOOPBACK) -> str:
    """Every `bind` to no host (`*:8404`) moved to loopback, that of metrics to `address`; error pages replaced, no
    splicing, no odd request ids.

    The API's own `bind` names its host, also where that is 0.0.0.0, and stays.
    """
    narrow = re.sub(r"^(\s*bind )\*?:(?=\d)", r"\g<1>127.0.0.1:", configuration, flags=re.MULTILINE)
    narrow = re.sub(
        rf"^(frontend prometheus\n\s*bind ){re.escape(LOOPBACK)}:", rf"\g<1>{address}:", narrow, flags=re.MULTILINE
    )
    unspliced = re.sub(r"^\s*option splice-\w+\n", "", narrow, flags=re.MULTILINE)
    api = rf"^frontend http_frontend\n(\s*)bind .*\n(?!\s*{re.escape(_NO_ODD_IDS)})"
    plain = re.sub(api, rf"\g<0>\g<1>{_NO_ODD_IDS}\n", unspliced, flags=re.MULTILINE)
    return re.sub(r"^(\s*errorfile \d+ ).*$", rf"\g<1>{error_file}", plain, flags=re.MULTILINE)


def main() -> None:
    """Mend the configuration file among the arguments, die with the parent from now on, become HAProxy."""
    error_file, address, binary, *arguments = sys.argv[1:]
    file = Path(arguments[arguments.index("-f") + 1])
    file.write_text(mend(file.read_text(), error_file, address))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main()
