# SPDX-License-Identifier: MIT
"""TLS contexts: one certificate store for every listener, and what our own connections to others ask for.

RFC 8996 (TLS 1.2 at least), RFC 3207 §4.1 (an MX's certificate is not verified where TLS is opportunistic), RFC 6066 §3 (SNI),
RFC 7301 §3.2 (ALPN: our protocol or none).

Guarantees: files are read in the constructor and in `reload`, never at a handshake, so that privileges can be dropped in
between; a reload that fails in any way changes nothing and says why.

Never: renegotiation, compression, TLS 1.0 or 1.1.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL
from twisted.internet import ssl
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator, IOpenSSLServerConnectionCreator
from zope.interface import implementer

from polarismail.values.errors import ConfigError

# For TLS 1.2; the suites of TLS 1.3 are all good.
_CIPHERS = b"ECDHE+AESGCM:ECDHE+CHACHA20"
# Where the alternative is plain text, an old key is better than none.
_OPPORTUNISTIC_CIPHERS = b"DEFAULT:!aNULL:@SECLEVEL=1"
_OPTIONS = SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION | SSL.OP_CIPHER_SERVER_PREFERENCE
_SESSION_SECONDS = 3600


class ForeignProtocol(SSL.Error):
    """A client asked by ALPN for protocols among which ours is not: it was led here (ALPACA), and must not go on."""


@implementer(IOpenSSLServerConnectionCreator)
class CertificateStore:
    """The certificate that we show, for implicit TLS and STARTTLS alike: give it to `startTLS` as it is.

    Raises ConfigError from the constructor and from `reload`; the text names the file and what is wrong with it.
    """

    def __init__(self, certificate_path: str, key_path: str, *, pem: tuple[bytes, bytes] | None = None) -> None:
        """`pem`: what the files held when somebody read them who may not be able to any more."""
        self._paths = certificate_path, key_path
        octets = self.pem = pem or (_read_file(certificate_path), _read_file(key_path))
        self._context, self.expires = _server_context(*self._paths, octets)

    @classmethod
    def without(cls, certificate_path: str, key_path: str, problem: str) -> CertificateStore:
        """A store that has no certificate until `reload` succeeds: every handshake fails, and the rest of the server lives."""
        store = cls.__new__(cls)
        store._paths, store.pem, store.problem = (certificate_path, key_path), None, problem
        store._context, store.expires = _context(_CIPHERS), 0.0
        return store

    problem: str = ""
    """Why there is no certificate."""
    expires: float
    """When the certificate ends to be valid, in seconds since 1970."""
    pem: tuple[bytes, bytes] | None
    """Certificate chain and key as they were read."""

    def reload(self, certificate_path: str | None = None, key_path: str | None = None) -> None:
        """Read the files again, or others from now on. New handshakes use what was read; on ConfigError the old stays."""
        paths = certificate_path or self._paths[0], key_path or self._paths[1]
        self.replace(*paths, (_read_file(paths[0]), _read_file(paths[1])))

    def replace(self, certificate_path: str, key_path: str, pem: tuple[bytes, bytes]) -> None:
        """As `reload`, with what somebody else has read from these files."""
        context, expires = _server_context(certificate_path, key_path, pem)
        self._paths, self.pem, self._context, self.expires = (certificate_path, key_path), pem, context, expires
        self.problem = ""

    def serverConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
        """IOpenSSLServerConnectionCreator: for no protocol that ALPN knows."""
        return SSL.Connection(self._context, None)

    def speaking(self, protocol: str) -> Speaking:
        """The same certificate for a listener of one protocol: give this to `startTLS`."""
        return Speaking(self, protocol)


@implementer(IOpenSSLServerConnectionCreator)
class Speaking:
    """A server of one protocol, with the certificate that the store has at the time."""

    def __init__(self, store: CertificateStore, protocol: str) -> None:
        self._store, self._protocol = store, protocol.encode("ascii")

    @property
    def ready(self) -> bool:
        """Whether there is a certificate."""
        return self._store.pem is not None

    def serverConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
        """IOpenSSLServerConnectionCreator."""
        connection = self._store.serverConnectionForTLS(tlsProtocol)
        connection.set_app_data(self._protocol)
        return connection


@implementer(IOpenSSLClientConnectionCreator)
class OpportunisticTLS:
    """A client that takes any certificate, because the alternative is plain text; SNI is sent for names."""

    def __init__(self, hostname: str) -> None:
        self._server_name = _server_name(hostname)

    def clientConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
        """IOpenSSLClientConnectionCreator."""
        connection = SSL.Connection(_opportunistic_context(), None)
        if self._server_name:
            connection.set_tlsext_host_name(self._server_name)
        return connection


def client_options(hostname: str, verify: bool, ca_path: str | None = None) -> Any:
    """What `startTLS` of a client takes. With `verify`, the chain must lead to the platform's trust store (or to `ca_path`)
    and the certificate must name `hostname`, a domain or an IP address. Raises ConfigError for an unreadable `ca_path`."""
    return _verifying_options(hostname.rstrip("."), ca_path) if verify else OpportunisticTLS(hostname)


def describe(connection: Any) -> str:
    """`TLSv1.3 TLS_AES_256_GCM_SHA384` of a transport's or a pyOpenSSL connection; "" where there is no TLS."""
    handle = connection.getHandle() if hasattr(connection, "getHandle") else connection
    if not isinstance(handle, SSL.Connection):
        return ""
    return f"{handle.get_protocol_version_name()} {handle.get_cipher_name() or ''}".rstrip()


def make_self_signed(
    hostname: str, certificate_path: str, key_path: str, *, ca_path: str, now: datetime.datetime | None = None
) -> None:
    """Write a certificate authority's certificate (10 years) and a server certificate of it with its key (2 years).

    The server's names are `hostname`, `localhost`, 127.0.0.1 and ::1. The authority's own key is not kept. The key file has
    mode 0600. Existing files are replaced, each as a whole. Raises OSError.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"polarismail demo authority of {hostname}"[:64])])
    ca_identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = (
        _unsigned(ca_name, ca_name, ca_key.public_key(), now, 3650)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(ca_identifier, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    names: list[x509.GeneralName] = [x509.DNSName(name) for name in dict.fromkeys((hostname, "localhost"))]
    names += [x509.IPAddress(ipaddress.ip_address(address)) for address in ("127.0.0.1", "::1")]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hostname[:64])])
    certificate = (
        _unsigned(subject, ca_name, key.public_key(), now, 730)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_identifier), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_file(key_path, secret, 0o600)
    _write_file(certificate_path, certificate.public_bytes(pem), 0o644)
    _write_file(ca_path, ca.public_bytes(pem), 0o644)


# -- reading ---------------------------------------------------------------------------------------------------------------


def _server_context(certificate_path: str, key_path: str, pem: tuple[bytes, bytes]) -> tuple[SSL.Context, float]:
    chain = _parse_certificates(certificate_path, pem[0])
    try:
        # Without a password: an encrypted key must not stop the server at a prompt that nobody sees.
        key = serialization.load_pem_private_key(pem[1], password=None)
    except TypeError as problem:
        raise ConfigError(f"{key_path}: the private key is encrypted; store it without a passphrase") from problem
    except ValueError as problem:
        raise ConfigError(f"{key_path}: expected a private key in PEM form") from problem
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    try:
        matches = key.public_key().public_bytes(encoding, form) == chain[0].public_key().public_bytes(encoding, form)
    except ValueError as problem:
        raise ConfigError(f"{certificate_path}: the certificate's key is of no kind that can be used") from problem
    if not matches:
        raise ConfigError(f"{key_path}: the private key does not belong to the first certificate in {certificate_path}")
    context = _context(_CIPHERS)
    try:
        context.use_certificate(chain[0])
        context.use_privatekey(key)  # type: ignore[arg-type]
        for issuer in chain[1:]:
            context.add_extra_chain_cert(issuer)
    except (SSL.Error, TypeError, ValueError) as problem:
        raise ConfigError(f"{certificate_path}: the certificate cannot be used: {problem}") from problem
    context.set_alpn_select_callback(_select_protocol)
    context.set_session_id(os.urandom(32))
    context.set_session_cache_mode(SSL.SESS_CACHE_SERVER)
    context.set_timeout(_SESSION_SECONDS)
    return context, chain[0].not_valid_after_utc.timestamp()


def _select_protocol(connection: SSL.Connection, offered: list[bytes]) -> bytes:
    """Ours, or the handshake fails (RFC 7301 §3.2). Who offers nothing is not asked."""
    ours = connection.get_app_data()
    if ours is None or ours not in offered:
        raise ForeignProtocol(offered[:10])
    return bytes(ours)


def _read_certificates(path: str) -> list[x509.Certificate]:
    return _parse_certificates(path, _read_file(path))


def _parse_certificates(path: str, octets: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(octets)
    except ValueError as problem:
        raise ConfigError(f"{path}: expected one or more certificates in PEM form, the server's own first") from problem


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as source:
            return source.read()
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be read: {problem.strerror}") from problem


def _context(ciphers: bytes) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_options(_OPTIONS)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # an idle session costs 34 KB less
    context.set_cipher_list(ciphers)
    return context


@lru_cache(maxsize=1)
def _opportunistic_context() -> SSL.Context:
    context = _context(_OPPORTUNISTIC_CIPHERS)
    context.set_verify(SSL.VERIFY_NONE, None)
    return context


@lru_cache(maxsize=64)
def _verifying_options(hostname: str, ca_path: str | None) -> Any:
    # Cached, because reading the platform's trust store takes tens of milliseconds.
    trust = None
    if ca_path is not None:
        trust = ssl.trustRootFromCertificates(
            [ssl.Certificate.loadPEM(_pem(one)) for one in _read_certificates(ca_path)]
        )
    extra = {"raiseMinimumTo": ssl.TLSVersion.TLSv1_2}
    return ssl.optionsForClientTLS(hostname, trustRoot=trust, extraCertificateOptions=extra)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _server_name(hostname: str) -> bytes | None:
    """What SNI says: a name in ASCII without its final dot; nothing for an address (RFC 6066 §3)."""
    name = hostname.rstrip(".").strip("[]")
    try:
        ipaddress.ip_address(name.removeprefix("IPv6:"))
    except ValueError:
        return name.encode("ascii") if name and name.isascii() and len(name) <= 255 else None
    return None


# -- making ----------------------------------------------------------------------------------------------------------------


def _unsigned(
    subject: x509.Name, issuer: x509.Name, public_key: Any, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _write_file(path: str, octets: bytes, mode: int) -> None:
    draft = f"{path}.new"
    if os.path.lexists(draft):
        os.unlink(draft)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as sink:
        sink.write(octets)
        sink.flush()
        os.fsync(descriptor)
    os.replace(draft, path)
