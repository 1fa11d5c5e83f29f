"""`tensorwire certificate`: make a certificate for the receiver, and the authority that senders trust."""

import argparse
import os
import re
import sys
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from typing import Any, Final

from tensorwire.cli.common import UsageError, verb
from tensorwire.cli.outputs import add_force, check_output
from tensorwire.storage import write_file

_TEXT: Final = """\
Writes NAME.pem and NAME.key for the receiver (--cert, --key), and authority.pem for the sender (--ca). NAME is
the host name or address by which senders reach this machine. The authority's own key is discarded, so it can sign
nothing else. For client certificates and lasting authorities, see docs/transports.md.

examples:
  tensorwire certificate host.example
  tensorwire certificate host.example 192.0.2.7 --folder keys --days 30
"""
_RECIPE: Final = (
    "this needs the package cryptography (pip install cryptography). With openssl: openssl req -x509 -newkey ec "
    "-pkeyopt ec_paramgen_curve:P-256 -nodes -days {days} -keyout {key} -out {cert} -subj /CN={name} "
    "-addext subjectAltName={kind}:{name} makes a certificate that is its own authority: --ca {cert}"
)
_NAME: Final = re.compile("[A-Za-z0-9*_:][A-Za-z0-9*_.:-]*")  # which also is the name of a file
_PRIVATE: Final = 0o077  # the umask for a key
_COMMON_NAME: Final = 64  # characters at most


def add_parser(verbs: Any) -> None:
    """Add this command to the command line."""
    summary = "make a certificate for the receiver, and its authority"
    parser = verb(verbs, "certificate", _run, summary=summary, text=_TEXT)
    parser.add_argument("names", metavar="NAME", nargs="+", help="host names and addresses of the receiver")
    parser.add_argument("--folder", metavar="DIR", default="", help="where to write the files (the current folder)")
    parser.add_argument("--days", type=int, default=90, metavar="N", help="days until they expire (90)")
    add_force(parser, "these files")


def _run(arguments: argparse.Namespace) -> int:
    name, days = arguments.names[0], arguments.days
    if days < 1 or not all(map(_NAME.fullmatch, arguments.names)):
        raise UsageError("NAME must be a host name or an address, and --days at least 1")
    stem = os.path.join(arguments.folder, name)
    cert, key, authority = f"{stem}.pem", f"{stem}.key", os.path.join(arguments.folder, "authority.pem")
    for path in (cert, key, authority):
        check_output(path, force=arguments.force)
    try:
        made = _issued(arguments.names, days)
    except ImportError:
        kind = "IP" if _is_address(name) else "DNS"
        raise UsageError(_RECIPE.format(days=days, key=key, cert=cert, name=name, kind=kind)) from None
    for path, data in zip((cert, key, authority), made, strict=True):
        before = os.umask(_PRIVATE if path == key else 0o022)
        try:
            write_file(path, [data])
        finally:
            os.umask(before)
    print(f"here:  tensorwire receive OUT --listen 0.0.0.0 --cert {cert} --key {key}", file=sys.stderr)
    print(f"there: tensorwire send IN {name} --ca {authority}", file=sys.stderr)
    return 0


def _issued(names: list[str], days: int) -> tuple[bytes, bytes, bytes]:
    """A certificate for `names`, its key and the authority that signed it, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.now(timezone.utc)

    def builder(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))  # clocks differ
            .not_valid_after(now + timedelta(days=days))
        )

    issuer = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "tensorwire certificate")])
    own, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = builder(issuer, own).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    root = root.add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), critical=False)
    leaf = builder(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0][:_COMMON_NAME])]), key)
    alternatives = [x509.IPAddress(ip_address(name)) if _is_address(name) else x509.DNSName(name) for name in names]
    leaf = leaf.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    leaf = leaf.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own.public_key()), critical=False)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    signed, authority = (each.sign(own, hashes.SHA256()).public_bytes(pem) for each in (leaf, root))
    return signed, private, authority


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
