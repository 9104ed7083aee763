"""Who may see the pages of a server: anybody on this machine, or whoever has the link with its token."""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

SHORTEST_TOKEN = 16

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""What every page of ours tells a browser."""

DAYS = 30
"""How long a browser keeps what it was given."""


class Refused(NamedTuple):
    """Why a request is not let in: an HTTP status, and words, None where the status says it all."""

    status: int
    words: str | None = None


@dataclass(frozen=True)
class Admission:
    """Lets a request in that comes from this machine's own pages, or has the token in its link or its cookie.

    `mark` tells one server's cookie from another's, whatever their ports; `what` is how the words call the server.
    """

    mark: str
    token: str | None
    what: str

    @property
    def cookie(self) -> str:
        """The name of the cookie in which a browser keeps the token."""
        return f"access-{self.mark}"

    def refusal(
        self, method: str, path: str, headers: Mapping[str, str], cookies: Mapping[str, str], query: Mapping[str, str]
    ) -> Refused | None:
        """Why this request is not let in; None for one that is. Names of `headers` are in lower case."""
        if method == "POST" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return Refused(403, "This was sent by another web site, and was not counted.")
        if self.token is None:
            if not names_this_machine(headers.get("host", "")):
                return Refused(403, f"This {self.what} is open to the machine alone that it runs on, as 127.0.0.1.")
        elif not (same(cookies.get(self.cookie, ""), self.token) or self.in_link(path, query)):
            return Refused(401)
        return None

    def in_link(self, path: str, query: Mapping[str, str]) -> bool:
        """Whether this is the first page, opened by the link with the token: the browser is to keep it then."""
        return self.token is not None and path == "/" and same(query.get("token", ""), self.token)


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server that binds to `host`, a name or an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_token(host: str, token: str | None) -> None:
    """Raise `ValueError` for a token that is missing where others reach the server, or that can be guessed."""
    fresh = secrets.token_urlsafe(18)
    if token is None:
        if not is_local(host):
            raise ValueError(
                f"--host {host} lets other machines in, which needs a token: add --token {fresh} (made just now), and "
                "pass on the link with it"
            )
    elif not re.fullmatch(rf"[A-Za-z0-9_-]{{{SHORTEST_TOKEN},200}}", token):
        raise ValueError(
            f"a token is {SHORTEST_TOKEN} to 200 letters, digits, - and _, and this one has {len(token)} "
            f"characters: take {fresh} (made just now)"
        )


def same(given: str, token: str) -> bool:
    """Whether both are the same, found out in a time that does not tell how much of it is."""
    return secrets.compare_digest(given.encode(), token.encode())


def names_this_machine(host_header: str) -> bool:
    """Whether a request was meant for this machine: another name may be a web site that points its name here."""
    name = host_header.rsplit(":", 1)[0] if not host_header.endswith("]") else host_header
    return name.strip("[]").lower() in LOCAL_NAMES or is_local(name.strip("[]"))


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens on `host` and `port`; 0 for a port that is free.

    Raises `OSError` that says what to do: the port is in use or not allowed, or the host is not this machine's.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise OSError(f"there is no host {host!r}: take 127.0.0.1, or an address of this machine") from None
    listening = socket.socket(family, kind, number)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(512)
    except OSError as error:
        listening.close()
        raise OSError(_why(error, host, port)) from None
    return listening


def link(listening: socket.socket, host: str, token: str | None) -> str:
    """The address that participants open."""
    anywhere = host in ("0.0.0.0", "::")
    name = socket.gethostname() if anywhere else f"[{host}]" if ":" in host else host
    query = "" if token is None else f"?token={token}"
    return f"http://{name}:{listening.getsockname()[1]}/{query}"


def _why(error: OSError, host: str, port: int) -> str:
    import errno

    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: stop the other server, or name another with --port (0 takes any free)"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} is kept for the system: name one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine: take 127.0.0.1, or one that it has"
    return f"{host}, port {port} cannot be listened on ({error.strerror})"
