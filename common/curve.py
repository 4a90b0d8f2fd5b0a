"""CURVE for the links inside a cluster that are TCP: both ends prove that they hold the cluster's keys, and what passes is encrypted.

A cluster has two key pairs, one of the scheduler, whose sockets are the ones that are bound, and one that all who connect to it
share. Sockets of one machine (ipc://) stay plain: their folder is closed to other users. Keys are text (Z85), as ZeroMQ takes them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import zmq
import zmq.utils.z85

from quire.common.cluster_tls import is_loopback, new_certificates
from quire.common.errors import ConfigError

# Files in a cluster's run folder.
CLUSTER_KEY: Final = "cluster_key"
CLIENT_KEY: Final = "client_key"
# Where libzmq asks who may come in (its protocol is ZAP, RFC 27).
_ZAP_ADDRESS: Final = "inproc://zeromq.zap.01"
_ZAP_VERSION: Final = b"1.0"
_ZAP_DOMAIN: Final = b"quire"


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """A cluster's keys, or the part of them that those who connect have."""

    server_public: str
    client_public: str
    client_secret: str = field(repr=False)
    server_secret: str | None = field(default=None, repr=False)  # the scheduler's alone
    certificates: dict[str, str] | None = field(default=None, repr=False)  # of discovery (common/cluster_tls.py); None: it is local

    @classmethod
    def new(cls) -> Self:
        """Those of a new cluster on one host."""
        (server_public, server_secret), (client_public, client_secret) = zmq.curve_keypair(), zmq.curve_keypair()
        return cls(server_public.decode(), client_public.decode(), client_secret.decode(), server_secret.decode())

    @classmethod
    def of_hosts(cls) -> Self:
        """Those of a new cluster on several hosts."""
        return replace(cls.new(), certificates=new_certificates())

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            ConfigError: the file holds no keys; the message repeats nothing of it.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except OSError as error:
            raise ConfigError(f"the cluster key {path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError):
            raise ConfigError(f"{path} is no cluster key; take the file client_key that the cluster's controller wrote") from None

    def write(self, path: Path) -> None:
        """For this user alone. There must be no such file yet."""
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(self), file)

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """The keys of the cluster whose run folder this is; new ones if it has none yet. `client_key` beside them is the part for
        gateways on other machines."""
        path = folder / CLUSTER_KEY
        if path.exists():
            return cls.read(path)
        keys = cls.new()
        keys.put_into(folder)
        return keys

    def put_into(self, folder: Path) -> None:
        """Write both files into a cluster's run folder, which has none yet."""
        assert self.server_secret is not None, "the keys of clients are not a cluster's"
        self.of_clients().write(folder / CLIENT_KEY)
        self.write(folder / CLUSTER_KEY)

    def of_clients(self) -> Self:
        """What those who connect have."""
        certificates = self.certificates and {name: text for name, text in self.certificates.items() if name != "server_key"}
        return replace(self, server_secret=None, certificates=certificates)

    def as_spec(self) -> dict[str, str]:
        """As a part of the specification of a child, which has no business with discovery."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "certificates"}

    @classmethod
    def of_spec(cls, spec: Mapping[str, str]) -> Self:
        """What `as_spec` gave."""
        return cls(spec["server_public"], spec["client_public"], spec["client_secret"], spec.get("server_secret"))


def keys_for(address: str, keys: CurveKeys | None) -> CurveKeys | None:
    """The keys that a socket at this ZeroMQ address uses: None on ipc, and on loopback where there are none.

    Raises:
        ConfigError: others could listen in, and there are no keys.
    """
    if not address.startswith("tcp://"):
        return None
    if keys is None and not is_loopback(address.removeprefix("tcp://")):
        raise ConfigError(
            f"{address} is reached over a network and this process has no cluster key; give one (quire gateway --cluster-key FILE)",
            reason="NO_CLUSTER_KEY",
        )
    return keys


def secure_server(socket: "zmq.Socket[Any]", keys: CurveKeys) -> None:
    """Before bind: let in who has the clients' keys. A Doorman must answer on the socket's context."""
    assert keys.server_secret is not None, "the keys of clients serve nobody"
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.server_secret.encode())
    socket.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)


def secure_client(socket: "zmq.Socket[Any]", keys: CurveKeys) -> None:
    """Before connect: speak only with who has the server's secret."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server_public.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.client_public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.client_secret.encode())


class Doorman:
    """Answers libzmq, which asks for each new connection whether its key is known. Lives in the loop of who serves: no thread."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", keys: CurveKeys) -> None:
        self._client_key = zmq.utils.z85.decode(keys.client_public.encode())
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(_ZAP_ADDRESS)

    def answer(self) -> None:
        """One question, which must be there."""
        version, request_id, _domain, _address, _identity, mechanism, *credentials = self.socket.recv_multipart(zmq.NOBLOCK)
        is_known = mechanism == b"CURVE" and credentials == [self._client_key]
        code, text = (b"200", b"OK") if is_known else (b"400", b"the key is not known")
        assert version == _ZAP_VERSION, version
        self.socket.send_multipart([version, request_id, code, text, b"", b""])
