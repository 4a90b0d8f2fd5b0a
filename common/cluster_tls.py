"""TLS of discovery between the hosts of a cluster: both ends show certificates that come with the cluster's keys, and take no others.

No authority signs them and no name is checked: each end has the other's very certificate. Edge: files are common/curve's business.
"""

import datetime
import ipaddress
import urllib.parse
from typing import Final

# What the certificates are issued to, whatever the hosts are called.
CLUSTER_NAME: Final = "quire-cluster"
# They end with the cluster's keys, which are made anew when somebody else may know them.
LIFETIME: Final = datetime.timedelta(days=3650)
# Clocks of hosts differ.
CLOCK_TOLERANCE: Final = datetime.timedelta(days=1)


def new_certificates() -> dict[str, str]:
    """Certificates and keys of the controller (server_...) and of those who ask it (client_...), PEM."""
    pairs = {"server": _self_signed(), "client": _self_signed()}
    return {f"{side}_{part}": text for side, pair in pairs.items() for part, text in zip(("certificate", "key"), pair, strict=True)}


def is_local(address: str) -> bool:
    """Whether discovery at this address, unix:/PATH or HOST:PORT, stays on this machine."""
    return address.startswith("unix:") or is_loopback(address)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches HOST:PORT."""
    host = urllib.parse.urlsplit(f"//{address}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or *
        return host == "localhost"


def _self_signed() -> tuple[str, str]:
    """A certificate and its key."""
    from cryptography import x509  # takes a moment to import, and few processes need it
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, CLUSTER_NAME)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(CLUSTER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode()
