"""Who may see the pages of a server: anybody on this machine, or whoever opened the link with its token."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

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


class Refusal(NamedTuple):
    """Why a request is not let in: an HTTP status, and a message, None where the status says it all."""

    status: int
    message: str | None = None


@dataclass(frozen=True)
class Admission:
    """Lets a request in that comes from this machine's own pages, or from a browser that opened the token's link.

    `mark` tells one server's cookie from another's, whatever their ports; `what` is how messages call the server;
    `root` is the path under which a reverse proxy serves it, "" without one.

    A browser sends a cookie to every port of a host, and to every path below its own; no attribute keeps it to one
    port. So the cookie does not hold the token but a visitor's number, signed with `secret`, the server's own: whoever
    serves another port there and keeps it can visit this one server as long as `secret` lasts, and learns no token.
    Under a `root` other paths of the host are not sent it.
    """

    mark: str
    token: str | None
    what: str
    root: str = ""
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    @property
    def cookie(self) -> str:
        """The name of the cookie by which a browser that had the token is known."""
        return f"access-{self.mark}"

    @property
    def cookie_path(self) -> str:
        """Where a browser sends the server's cookies."""
        return self.root or "/"

    def refusal(
        self, method: str, path: str, headers: Mapping[str, str], cookies: Mapping[str, str], query: Mapping[str, str]
    ) -> Refusal | None:
        """Why this request is not let in; None for one that is.

        `path` is the one below `root`; names of `headers` are in lower case.
        """
        if self._sent_from_elsewhere(method, headers):
            return Refusal(403, "This was sent by another web site, and was not counted.")
        if self.token is None:
            if not names_this_machine(headers.get("host", "")):
                return Refusal(403, f"This {self.what} is open to the machine alone that it runs on, as 127.0.0.1.")
        elif self.visitor(cookies) is None and not self.in_link(path, query):
            return Refusal(401)
        return None

    def in_link(self, path: str, query: Mapping[str, str]) -> bool:
        """Whether this is the first page, opened by the link with the token: the browser is to be known then."""
        return self.token is not None and path == "/" and same(query.get("token", ""), self.token)

    def new_visitor(self) -> str:
        """The cookie of a browser that has the token."""
        number = secrets.token_hex(8)
        return f"{number}.{self._signature(number)}"

    def visitor(self, cookies: Mapping[str, str]) -> str | None:
        """The number of the visitor whose cookie this server made; None for any other."""
        number, _, signature = cookies.get(self.cookie, "").partition(".")
        return number if same(signature, self._signature(number)) else None

    def _signature(self, number: str) -> str:
        return hmac.new(self.secret, number.encode(), hashlib.sha256).hexdigest()

    def _sent_from_elsewhere(self, method: str, headers: Mapping[str, str]) -> bool:
        """Whether a page of another server had the browser send this.

        Only opening a page, as by a link, is allowed from elsewhere. Browsers say where a request comes from in
        `Sec-Fetch-Site`, which they leave out over plain HTTP to other machines, and in `Origin` or `Referer`.
        """
        reads = method in ("GET", "HEAD")
        site = headers.get("sec-fetch-site", "none")
        if site not in ("same-origin", "none"):
            return not (reads and headers.get("sec-fetch-mode") == "navigate")
        if site == "same-origin" and self.root:
            return False  # the proxy may have put its own words into `Host`
        origin = headers.get("origin") or (None if reads else headers.get("referer"))
        if origin is None:
            return False
        forwarded = headers.get("x-forwarded-host", "").partition(",")[0].strip() if self.root else ""
        return not any(_is_of(origin, host) for host in (headers.get("host", ""), forwarded) if host)


def keyed(secret: str, token: str | None) -> bytes:
    """A secret that stays the same as long as both do."""
    return hmac.new(secret.encode(), (token or "").encode(), hashlib.sha256).digest()


def _is_of(origin: str, host: str) -> bool:
    """Whether the page at `origin`, "scheme://name:port", was served by what a `Host` header names."""
    try:
        page = urlsplit(origin)
        asked = urlsplit(f"{page.scheme}://{host}")
        usual = {"http": 80, "https": 443}.get(page.scheme)
        ports = page.port or usual, asked.port or usual
    except ValueError:
        return False
    return usual is not None and bool(page.hostname) and page.hostname == asked.hostname and ports[0] == ports[1]


def require_root(root: str) -> str:
    """The path under which a proxy serves the pages, without its last slash. Raises `ValueError` for what is none."""
    tidy = root.rstrip("/")
    if tidy and (not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", tidy) or {".", ".."} & {*tidy.split("/")}):
        raise ValueError(f"--root-path is where a proxy serves the pages, /study for instance; got {root!r}")
    return tidy


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


def link(listening: socket.socket, host: str, token: str | None, root: str = "") -> str:
    """The address that participants open, at this machine itself where a proxy serves the pages under `root`."""
    anywhere = host in ("0.0.0.0", "::")
    name = socket.gethostname() if anywhere else f"[{host}]" if ":" in host else host
    query = "" if token is None else f"?token={token}"
    return f"http://{name}:{listening.getsockname()[1]}{root}/{query}"


def _why(error: OSError, host: str, port: int) -> str:
    import errno

    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: stop the other server, or name another with --port (0 takes any free)"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} is kept for the system: name one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine: take 127.0.0.1, or one that it has"
    return f"{host}, port {port} cannot be listened on ({error.strerror})"
