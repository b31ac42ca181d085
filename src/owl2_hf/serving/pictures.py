"""Images of a request: data URLs and, where allowed, images from public addresses. Never a file of
the server.
"""

import base64
import binascii
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

DATA_URL = re.compile(r"data:image/[\w.+-]{1,40};base64", re.IGNORECASE)
MAX_DOWNLOAD_BYTES = 20 * 2**20  # for each request
MAX_REDIRECTS = 4
DOWNLOAD_SECONDS = 15.0  # for all downloads of a request, redirects included
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def read_pictures(urls: Sequence[str], allow_http: bool) -> list[bytes]:
    """The files behind the URLs, downloaded where they are not in the URL itself.

    Raises:
        ValueError: If a URL is none of those taken, or its content cannot be had. The message says
            which.
    """
    deadline, max_bytes = time.monotonic() + DOWNLOAD_SECONDS, MAX_DOWNLOAD_BYTES
    files = []
    for index, url in enumerate(urls, start=1):
        try:
            if is_http(url) and allow_http:
                files.append(download(url, deadline, max_bytes))
                max_bytes -= len(files[-1])
            else:
                files.append(_decode(url))
        except ValueError as error:
            raise ValueError(f"image {index} of {len(urls)}: {error}") from None
    return files


def is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _decode(url: str) -> bytes:
    """The content of a data URL."""
    header, _, content = url.partition(",")
    if is_http(url):
        raise ValueError(
            "this server does not fetch URLs; send the image as 'data:image/png;base64,...'."
        )
    if not DATA_URL.fullmatch(header):
        raise ValueError(
            "expected a data URL such as 'data:image/png;base64,...'; paths and bare base64 are "
            "not supported."
        )
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the data after 'base64,' is not valid base64.") from None


def download(url: str, deadline: float, max_bytes: int) -> bytes:
    """The content behind an http(s) URL on a public address.

    The connection goes to the very address that was checked, so that a name cannot point elsewhere
    a moment later, and no proxy stands between. Redirects are followed and checked alike.

    Args:
        deadline: When it must be here, as `time.monotonic` tells the time.

    Raises:
        ValueError: If an address is not public, or the content is too large, too slow or not to be
            had.
    """
    try:
        for _ in range(MAX_REDIRECTS + 1):
            status, location, content = _get(url, deadline, max_bytes)
            if status == 200:
                return content
            if status not in (301, 302, 303, 307, 308) or not location:
                raise ValueError(f"the URL returned status {status}.")
            url = urllib.parse.urljoin(url, location)
        raise ValueError(f"the URL redirects more than {MAX_REDIRECTS} times.")
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        if time.monotonic() >= deadline:
            raise ValueError(
                f"the downloads of a request took more than {DOWNLOAD_SECONDS:g} seconds."
            ) from None
        raise ValueError(f"the URL could not be fetched ({type(error).__name__}).") from None


def _get(url: str, deadline: float, max_bytes: int) -> tuple[int, str | None, bytes]:
    """Status, target of a redirect, and content."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected an http or https URL with a host.")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    sock = _connect(_public_addresses(parts.hostname, port), deadline)
    # A server that sends a byte now and then would never hit the timeout of a single read.
    watchdog = threading.Timer(max(0.0, deadline - time.monotonic()), _hang_up, [sock])
    watchdog.daemon = True
    watchdog.start()
    connection = http.client.HTTPConnection(parts.hostname, port)
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            sock = context.wrap_socket(
                sock, server_hostname=parts.hostname, do_handshake_on_connect=False
            )
            watchdog.args = [sock]
            sock.do_handshake()
        connection.sock = sock
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (
            f"?{parts.query}" if parts.query else ""
        )
        connection.request("GET", path, headers={"User-Agent": "owl2-hf", "Accept": "image/*"})
        response = connection.getresponse()
        content = response.read(max_bytes + 1) if response.status == 200 else b""
        if len(content) > max_bytes:
            raise ValueError(
                f"the downloads of a request have more than {MAX_DOWNLOAD_BYTES:,} bytes."
            )
        if time.monotonic() >= deadline:
            raise TimeoutError
        return response.status, response.headers.get("Location"), content
    finally:
        watchdog.cancel()
        connection.close()
        sock.close()


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):  # already closed
        # Not the TLS socket's own shutdown, because another thread is reading from it.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _connect(addresses: list[tuple[Any, ...]], deadline: float) -> socket.socket:
    """A connection to the first address that takes one."""
    failure: OSError = TimeoutError()
    for family, address in addresses:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def _public_addresses(host: str, port: int) -> list[tuple[Any, ...]]:
    """Family and socket address of all that a host resolves to; all of them must be public."""
    found = [(info[0], info[4]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(is_public(str(address[0])) for _, address in found):
        raise ValueError("the URL leads to an address that is not public.")
    return found


def is_public(address: str) -> bool:
    """Whether an IP address is out in the internet, also behind every way to wrap IPv4 in IPv6."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.sixtofour is not None or ip.teredo is not None or ip in NAT64:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)
