"""Certificates for a server of the tests, made when they are asked for: none is stored, none can run out."""

from __future__ import annotations

import functools
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificates:
    """The paths of an authority, of what it has signed, and of one that signed nothing."""

    authority: str
    server: str
    """For localhost and 127.0.0.1."""
    server_key: str
    client: str
    client_key: str
    stranger: str
    """Another authority, whose word is worth nothing here."""


class _Folder:
    """A folder that goes with the process."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="brokerkit-tls-"))
        weakref.finalize(self, shutil.rmtree, str(self.path), ignore_errors=True)


@functools.lru_cache(maxsize=1)
def _folder() -> _Folder:
    return _Folder()


@functools.lru_cache(maxsize=1)
def certificates() -> Certificates:
    """Return certificates, the same ones to all callers in this process."""
    folder = _folder().path
    authority, stranger = trustme.CA(), trustme.CA()
    server, client = authority.issue_cert("localhost", "127.0.0.1"), authority.issue_cert("client.example")
    paths = {name: str(folder / f"{name}.pem") for name in Certificates.__dataclass_fields__}
    authority.cert_pem.write_to_path(paths["authority"])
    stranger.cert_pem.write_to_path(paths["stranger"])
    for name, cert in (("server", server), ("client", client)):
        cert.private_key_pem.write_to_path(paths[f"{name}_key"])
        for number, blob in enumerate(cert.cert_chain_pems):
            blob.write_to_path(paths[name], append=number > 0)
    return Certificates(**paths)
