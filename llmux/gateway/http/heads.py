"""Syntax shared by the heads of requests and responses."""

from __future__ import annotations

import string

# The characters of a header's name (RFC 9110 5.6.2). The parser in Debian 12 lets
# "Content-Length : 5" pass as a header called "content-length ".
TOKEN = (string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~").encode()


class BadHead(Exception):
    """The head is malformed; the text says how."""
