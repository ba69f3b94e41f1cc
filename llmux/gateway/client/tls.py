"""TLS for the TCP addresses. The certificate can be replaced while clients are connected."""

from __future__ import annotations

import logging
import ssl

from llmux.errors import LlmuxError

logger = logging.getLogger(__name__)


class Tls:
    """``context`` is for listeners; ``reload`` re-reads the files for new connections."""

    def __init__(self, certificate: str, key: str) -> None:
        self._files = (certificate, key)
        self.context = _context(*self._files)

    def reload(self) -> None:
        """Unreadable or invalid files leave the current certificate in use."""
        try:
            _context(*self._files)  # first into an unused context
            self.context.load_cert_chain(*self._files)
        except LlmuxError as error:
            logger.error("cannot reload the certificate, the current one stays in use: %s", error)
            return
        logger.info("certificate reloaded")


def _context(certificate: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Never ask for a passphrase: a service has no terminal.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        cause = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise LlmuxError(f"cannot use {certificate} and {key} for TLS: {cause}") from None
    return context
