"""Certificates and keys for a federation over TLS: python tools/certificates.py FOLDER CLIENTS [HOST ...]

FOLDER then holds ca.crt (every node gets it), server.pem and server.key (the superlink's, valid for HOST ..., 127.0.0.1
and localhost), client_<i> and client_<i>.pub (the supernodes' keys: the private one goes to its node alone, the public
one is registered at the superlink). For a real federation let your own authority sign server.pem instead.
"""

from __future__ import annotations

import datetime
import ipaddress
import sys
from contextlib import suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAYS = 365


def main(arguments: list[str]) -> int:
    """Write the files. Returns the exit status."""
    if len(arguments) < 2 or not arguments[1].isdigit():
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    folder, clients, hosts = Path(arguments[0]), int(arguments[1]), [*arguments[2:], "127.0.0.1", "localhost"]
    folder.mkdir(parents=True, exist_ok=True)
    authority, authority_name = key(), name("feddip_lite test authority")
    root = certificate(authority_name, authority_name, authority, authority, x509.BasicConstraints(True, None))
    server = key()
    names = x509.SubjectAlternativeName([_host(host) for host in hosts])
    signed = certificate(name(hosts[0]), authority_name, server, authority, names)
    write(folder / "ca.crt", root.public_bytes(serialization.Encoding.PEM))
    write(folder / "server.pem", signed.public_bytes(serialization.Encoding.PEM))
    write(folder / "server.key", private(server))
    for client in range(clients):
        own = key()
        write(folder / f"client_{client}", private(own, serialization.PrivateFormat.OpenSSH))
        public = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        write(folder / f"client_{client}.pub", own.public_key().public_bytes(*public))
    return 0


def key() -> ec.EllipticCurvePrivateKey:
    """A new key on the curve that Flower asks for."""
    return ec.generate_private_key(ec.SECP384R1())


def certificate(subject, issuer, subject_key, issuer_key, extension) -> x509.Certificate:
    """A certificate for `subject_key` signed by `issuer_key`, valid from a day ago for `DAYS`."""
    now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(subject_key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now)
    builder = builder.not_valid_after(now + datetime.timedelta(days=DAYS)).add_extension(extension, critical=False)
    return builder.sign(issuer_key, hashes.SHA384())


def name(common: str) -> x509.Name:
    """A name that is nothing but `common`."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def private(own: ec.EllipticCurvePrivateKey, form=serialization.PrivateFormat.PKCS8) -> bytes:
    """The private key, unencrypted."""
    return own.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def write(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read."""
    path.touch(mode=0o600)
    path.write_bytes(data)


def _host(host: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    return x509.DNSName(host)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
