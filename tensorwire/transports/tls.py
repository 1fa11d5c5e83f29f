"""TLS 1.3 through the standard library, and the rule for plaintext.

Certificates are PEM files. A listener has a certificate and its key; the connecting end checks it against `ca` and the
host name. With mutual TLS, the connecting end has a certificate too, and the listener checks it against its own `ca`.
"""

import os
import ssl
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any, Final

from tensorwire.errors import ArgumentError, AuthError, TransportError

Path = str | os.PathLike[str]

_NAMING: Final = ("DNS", "URI", "email")


def server_tls(certificate: Path, key: Path, *, ca: Path | None = None) -> ssl.SSLContext:
    """The TLS context for a listener. `ca`: also require client certificates of this authority (mutual TLS).

    Raises AuthError if a file is missing or not PEM, or if key and certificate do not belong together.
    """
    if certificate is None or key is None:
        raise ArgumentError("a listener has a certificate and its key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, certificate, key, ca)
    if ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    # A peer that only sends would never read session tickets, so its close would reset the connection and lose the last
    # data that it sent.
    context.num_tickets = 0
    return context


def client_tls(*, ca: Path | None = None, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """The TLS context for connecting.

    `ca`: trust only this authority, instead of those of the system. `certificate`, `key`: our own, for mutual TLS.
    Raises AuthError as `server_tls` does.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca is None:
        context.load_default_certs()
    _load(context, certificate, key, ca)
    return context


def require_protection(host: str, tls: ssl.SSLContext | None, plaintext: bool) -> None:
    """Raise TransportError for plaintext beyond this machine, unless it was requested."""
    if tls is not None and not isinstance(tls, ssl.SSLContext):
        raise ArgumentError(f"tls is what client_tls or server_tls gives, not {type(tls).__name__}")
    if tls is None and not plaintext and not is_loopback(host):
        raise TransportError(
            f"{host or 'every address'} is not this machine: use TLS, or say that the network is trusted "
            "(plaintext=True, --plaintext)",
            retryable=False,
        )


def peer_names(context: ssl.SSLContext, certificate: Mapping[str, Any] | None) -> frozenset[str] | None:
    """The names in a peer's certificate: common names, DNS names, URIs and e-mail addresses.

    None if `context` requests no certificate. `certificate`: as returned by `SSLSocket.getpeercert`.
    """
    if context.verify_mode == ssl.CERT_NONE:
        return None
    found = certificate or {}
    common = [value for part in found.get("subject", ()) for key, value in part if key == "commonName"]
    others = [value for kind, value in found.get("subjectAltName", ()) if kind in _NAMING]
    return frozenset(name for name in common + others if name)


def speaks_for(names: frozenset[str] | None, name: str) -> bool:
    """Whether a peer with these `peer_names` may act under a name.

    certificate requested    names in it    the peer may act as
    no                                      anybody: the network is trusted
    yes                      none           nobody
    yes                      some           these, compared exactly
    """
    return names is None or name in names


def common_name(certificate: Mapping[str, Any] | None) -> str | None:
    """The common name in a certificate from `SSLSocket.getpeercert`; None if there is none. Only for display."""
    subject = (certificate or {}).get("subject", ())
    return next((value for part in subject for key, value in part if key == "commonName"), None)


def _load(context: ssl.SSLContext, certificate: Path | None, key: Path | None, ca: Path | None) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    for path in (ca, certificate, key):
        _check_pem(path)
    try:
        if ca is not None:
            context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as error:
        raise AuthError(f"{os.fsdecode(ca or '')!r} holds no certificate of an authority: {_reason(error)}") from error
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, key, password="")  # rather than ask for one on a terminal
    except (OSError, ssl.SSLError) as error:
        raise AuthError(
            f"cannot use the certificate {os.fsdecode(certificate or '')!r} "
            f"with the key {os.fsdecode(key or certificate or '')!r}: {_reason(error)}"
        ) from error


def _check_pem(path: Path | None) -> None:
    """Raise AuthError for a file that cannot be read: OpenSSL does not say which of several it was."""
    if path is None:
        return
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise AuthError(
            f"cannot use the certificate, key or authority {os.fsdecode(path)!r}: {error.strerror}"
        ) from error


def _reason(error: OSError) -> str:
    reason = getattr(error, "reason", None)
    return {None: str(error), "KEY_VALUES_MISMATCH": "the key belongs to another certificate"}.get(reason, str(reason))


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine and nothing else."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
