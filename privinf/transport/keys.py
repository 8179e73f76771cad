"""The private CA and one certificate for each role: made, shown, renewed and loaded here.

    DIR/ca.key                       the CA's key; stays behind on the machine where `keys init` ran
    DIR/ca.pem                       the CA's certificate
    DIR/ROLE/{ca.pem,cert.pem,key.pem}   the bundle to carry to the machine of that role (server, client, and dealer if there is one)
    DIR/clients/NAME/...             the bundle of a further client

The role is a URI among a certificate's alternative names, `privinf:server` and so on; the common name is `privinf ROLE`, and a further
client's `privinf client NAME`, which a renewed certificate keeps. Keys are EC P-256, files 0600, directories 0700.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privinf.files import check_private, make_private, write_private
from protocols.errors import ConfigError

ROLES = ("server", "client", "dealer")
ROLE_PREFIX = "privinf:"
HOSTS = ("localhost", "127.0.0.1", "::1")
DAYS = 397
CA_DAYS = 3650
CLIENTS = "clients"
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,38}[a-z0-9])?")
_SKEW = datetime.timedelta(minutes=5)  # two machines' clocks may differ a little
_DNS = re.compile(r"(\*\.)?([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)


@dataclass(frozen=True)
class Credentials:
    """Paths of a role's certificate, of its key and of the CA's certificate, checked by `load_credentials`."""

    role: str
    cert: Path
    key: Path
    ca: Path

    @property
    def fingerprint(self) -> str:
        """Of the certificate, as a peer sees it: SHA-256 in hexadecimal."""
        return _load_certificate(self.cert).fingerprint(hashes.SHA256()).hex()


@dataclass(frozen=True)
class KeyInfo:
    """What `keys show` says about a certificate. `role` is `ca` for the CA's own; `fingerprint` is SHA-256 in hexadecimal."""

    role: str
    subject: str
    fingerprint: str
    not_before: datetime.datetime
    not_after: datetime.datetime
    hosts: tuple[str, ...]
    path: Path

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.not_after < _now()


def init_keys(directory: Path | str, hosts: Sequence[str] = HOSTS, *, days: int = DAYS, dealer: bool = True) -> None:
    """Makes the CA and a bundle for each role, or all but the dealer's, valid for `days` days and for the given host names and addresses.

    Raises ConfigError if the directory already has a CA or bundles, cannot be written, or a host is not a name or an address.
    """
    directory = Path(directory)
    names = _names(hosts)
    for taken in (directory / "ca.key", directory / "ca.pem", *(directory / role for role in ROLES)):
        if taken.exists():
            raise ConfigError(
                f"{taken} exists already, and a new CA would cut off every party that holds a certificate of the old one",
                remedy="run `privinf keys renew` for new certificates, or give another directory",
            )
    key = ec.generate_private_key(ec.SECP256R1())
    ca = _make_ca(key)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".new-", dir=directory))
        try:
            roles = [role for role in ROLES if dealer or role != "dealer"]
            for role in roles:
                _issue(staging / role, role, names, ca, key, days)
            write_private(staging / "ca.pem", _pem(ca))
            write_private(staging / "ca.key", _key_pem(key))
            for name in (*roles, "ca.pem", "ca.key"):  # the CA's key last: with it, `renew` can make everything else
                (staging / name).rename(directory / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"cannot write keys to {directory}: {error.strerror or error}", remedy="give a directory of your own") from None


def renew_keys(directory: Path | str, hosts: Sequence[str] | None = None, *, days: int = DAYS) -> None:
    """Issues new role certificates, with new keys, from the CA in the directory; `hosts` None keeps each certificate's own.

    Certificates that were issued before stay valid until they expire. A dealer's that was never made is not made. Raises ConfigError.
    """
    directory = Path(directory)
    ca, key = _authority(directory)
    alone = not (directory / "dealer").exists() and all((directory / role).exists() for role in ("server", "client"))
    bundles = [(directory / role, role, "") for role in ROLES if role != "dealer" or not alone]
    bundles += [(path.parent, "client", path.parent.name) for path in sorted((directory / CLIENTS).glob("*/cert.pem"))]
    with _writing(directory):
        for bundle, role, name in bundles:
            names = _names(hosts) if hosts is not None else _names(HOSTS)
            if hosts is None and (bundle / "cert.pem").exists():
                names = _names(_hosts(_load_certificate(bundle / "cert.pem")))
            _issue(bundle, role, names, ca, key, days, name)


def add_client(directory: Path | str, name: str, *, days: int = DAYS) -> Path:
    """Issues a further client's certificate, with the name in it, from the CA in the directory; its bundle. Raises ConfigError."""
    directory = Path(directory)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name[:100]!r} is no name for a client", remedy="give up to 40 small letters, digits, dots and hyphens")
    bundle = directory / CLIENTS / name
    if (bundle / "cert.pem").exists():
        raise ConfigError(f"{bundle} exists already", remedy="run `privinf keys renew` for a new certificate, or choose another name")
    ca, key = _authority(directory)
    with _writing(directory):
        _issue(bundle, "client", _names(HOSTS), ca, key, days, name)
    return bundle


def _authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The CA's certificate and key, which belong together and can be used."""
    if not (directory / "ca.key").is_file():
        raise ConfigError(
            f"{directory} does not hold the CA's key (ca.key)",
            remedy="work in the directory where `privinf keys init` ran, then carry bundles over",
        )
    check_private(
        directory / "ca.key", "make a new CA in another directory by `privinf keys init`, for whoever has the key can be any party"
    )
    ca = _load_certificate(directory / "ca.pem")
    key = _load_key(directory / "ca.key")
    if ca.public_key() != key.public_key():
        raise ConfigError(f"{directory / 'ca.key'} does not belong to {directory / 'ca.pem'}", remedy="restore the pair from a backup")
    if ca.not_valid_after_utc < _now():
        raise ConfigError(f"the CA in {directory} has expired", remedy="make a new one in another directory by `privinf keys init`")
    return ca, key


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write keys to {directory}: {error.strerror or error}", remedy="check its permissions") from None


def show_keys(directory: Path | str) -> list[KeyInfo]:
    """The certificates of a directory (the CA's and every role's) or of a bundle, unchecked; ConfigError if there are none."""
    directory = Path(directory)
    paths = [directory / "ca.pem", directory / "cert.pem", *(directory / role / "cert.pem" for role in ROLES)]
    paths += sorted((directory / CLIENTS).glob("*/cert.pem"))
    result = []
    for path in paths:
        if path.is_file():
            certificate = _load_certificate(path)
            result.append(
                KeyInfo(
                    role="ca" if path.name == "ca.pem" else _role(certificate) or "none",
                    subject=certificate.subject.rfc4514_string(),
                    fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
                    not_before=certificate.not_valid_before_utc,
                    not_after=certificate.not_valid_after_utc,
                    hosts=_hosts(certificate),
                    path=path,
                )
            )
    if not result:
        raise ConfigError(f"there are no certificates in {directory}", remedy=f"make them by `privinf keys init --keys {directory}`")
    return result


def load_credentials(directory: Path | str, role: str) -> Credentials:
    """Finds and checks a role's certificate and key in a directory of all roles or in a bundle; raises ConfigError with the remedy."""
    directory = Path(directory)
    if role not in ROLES:
        raise ConfigError(f"there is no role {role!r}", remedy=f"use one of {', '.join(ROLES)}")
    bundle = directory / role if (directory / role / "cert.pem").exists() else directory
    found = Credentials(role, bundle / "cert.pem", bundle / "key.pem", bundle / "ca.pem")
    for path in (found.cert, found.key, found.ca):
        if not path.is_file():
            raise ConfigError(
                f"no {path.name} for the {role} in {bundle}",
                remedy=f"run `privinf keys init --keys {directory}`, or give --keys the {role}'s bundle",
            )
    certificate, ca = _load_certificate(found.cert), _load_certificate(found.ca)
    key = _load_key(found.key)
    renew = "run `privinf keys renew` where the CA is, and carry the new bundle over"
    if _role(certificate) != role:
        raise ConfigError(
            f"{found.cert} is for the role {_role(certificate) or 'none'}, not {role}", remedy=f"give --keys the {role}'s bundle"
        )
    if certificate.public_key() != key.public_key():
        raise ConfigError(f"{found.key} does not belong to {found.cert}", remedy=renew)
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError(f"{found.cert} was not signed by {found.ca}", remedy="give a bundle as `privinf keys init` made it") from None
    clock = f"the clock here shows {_now():%Y-%m-%d %H:%M} UTC"
    for path, one in ((found.cert, certificate), (found.ca, ca)):
        if one.not_valid_after_utc < _now():
            raise ConfigError(f"{path} has expired on {one.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and {clock}", remedy=renew)
        if one.not_valid_before_utc > _now():
            message = f"{path} is not valid before {one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, and {clock}"
            raise ConfigError(message, remedy="set the clock here, or that of the machine that issued it")
    check_private(found.key)
    return found


# ---- making


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host.strip("[]"))))
        except ValueError:
            if len(host) > 253 or not _DNS.fullmatch(host) or host.replace(".", "").isdigit():
                raise ConfigError(
                    f"{host[:100]!r} is neither a host name nor an address", remedy="give names as they are dialled, without a port"
                ) from None
            names.append(x509.DNSName(host.lower()))
    if not names:
        raise ConfigError("a certificate needs a host name", remedy="give at least one by --host")
    return names


def _make_ca(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    # a name of its own for every CA: a stranger's is then 'unknown' and not a bad signature
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"privinf CA {secrets.token_hex(4)}")])
    usage = _usage(key_cert_sign=True)
    return (
        _builder(name, name, key, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _issue(
    bundle: Path,
    role: str,
    names: Sequence[x509.GeneralName],
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    days: int,
    name: str = "",
) -> None:
    """Writes a role's bundle, over an old one if there is one; `name` tells clients apart."""
    if days < 1:
        raise ConfigError(f"a certificate cannot be valid for {days} days", remedy="give 1 or more")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"privinf {role} {name}".rstrip())])
    certificate = (
        _builder(subject, ca.subject, key, days, last=ca.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(ROLE_PREFIX + role), *names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(key_cert_sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    make_private(bundle)
    write_private(bundle / "ca.pem", _pem(ca))
    write_private(bundle / "key.pem", _key_pem(key))
    write_private(bundle / "cert.pem", _pem(certificate))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int, last: datetime.datetime | None = None
) -> x509.CertificateBuilder:
    until = _now() + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _SKEW)
        .not_valid_after(min(until, last) if last else until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, key_cert_sign: bool) -> x509.KeyUsage:
    never = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only")
    signs = {"digital_signature": not key_cert_sign, "key_cert_sign": key_cert_sign, "crl_sign": key_cert_sign}
    return x509.KeyUsage(**signs, **dict.fromkeys(never, False))


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


# ---- reading


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", remedy="check its permissions") from None
    except ValueError:
        raise ConfigError(f"{path} is not a certificate in PEM form", remedy="run `privinf keys renew`, or restore it") from None


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", remedy="check its owner and permissions") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{path} is not an open private key in PEM form", remedy="run `privinf keys renew`, or restore it") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an elliptic-curve key", remedy="run `privinf keys renew`, or restore it")
    return key


def _alternative_names(certificate: x509.Certificate) -> Sequence[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (x509.ExtensionNotFound, ValueError):
        return []


def _role(certificate: x509.Certificate) -> str | None:
    uris = [name.value for name in _alternative_names(certificate) if isinstance(name, x509.UniformResourceIdentifier)]
    roles = [uri.removeprefix(ROLE_PREFIX) for uri in uris if uri.startswith(ROLE_PREFIX)]
    return roles[0] if len(roles) == 1 else None


def _hosts(certificate: x509.Certificate) -> tuple[str, ...]:
    names = _alternative_names(certificate)
    return tuple(str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress))
