"""The server's certificate, read again when its files change: a renewed one needs no restart. Edge."""

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc

from quire.common.errors import ConfigError

log = logging.getLogger("quire.gateway")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files."""

    certificate: Path  # the chain, the server's own first
    key: Path
    client_ca: Path | None = None  # who may sign clients' certificates; None: clients need none


class Certificates:
    """What handshakes use. Files that do not fit together, as in the midst of a renewal, change nothing."""

    def __init__(self, files: TlsFiles) -> None:
        """
        Raises:
            ConfigError: they cannot be used.
        """
        self._files = files
        self._lock = threading.Lock()  # gRPC asks from threads of its own
        self._stamps = self._stat()
        self._configuration = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """For one server."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._renewed,  # type: ignore[arg-type]  # None is "no change"; the stubs do not say so
            require_client_authentication=self._files.client_ca is not None,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Before each handshake: what is new, None if nothing is.

        gRPC replaces what it makes handshakes with whenever it gets a configuration, while other threads use the old one without a
        lock. With one for each handshake, 300 that came at once ended the process by SIGSEGV (3 times in 8, 2 cores, 2026-11-25).
        """
        with self._lock:
            stamps = self._stat()
            if stamps == self._stamps:
                return None
            self._stamps = stamps
            try:
                self._configuration = self._read()
            except ConfigError as error:
                log.error("%s; the certificate from before stays in use", error.message)
                return None
            log.info("the certificate has changed: %s", self._files.certificate)
            return self._configuration

    def _read(self) -> grpc.ServerCertificateConfiguration:
        files = self._files
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(files.certificate, files.key, password=lambda: b"")  # else an encrypted key asks the terminal
            if files.client_ca is not None:
                context.load_verify_locations(files.client_ca)
            return grpc.ssl_server_certificate_configuration(
                [(files.key.read_bytes(), files.certificate.read_bytes())],
                files.client_ca.read_bytes() if files.client_ca is not None else None,
            )
        except ssl.SSLError as error:
            raise ConfigError(
                f"certificate {files.certificate}, key {files.key} and client CA {files.client_ca} cannot be used together: "
                f"{error.reason or 'no PEM in them'}; all must be PEM, the key unencrypted and the certificate's own"
            ) from None
        except OSError as error:
            raise ConfigError(f"a file of the certificate ({files.certificate}, {files.key}) cannot be read: {error.strerror}") from None

    def _stat(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in (self._files.certificate, self._files.key, self._files.client_ca) if path is not None]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does; None when there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
