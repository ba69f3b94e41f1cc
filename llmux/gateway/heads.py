"""What the heads of requests and of answers have in common."""

from __future__ import annotations

import string

# What a header's name is made of (RFC 9110 5.6.2). The parser in Debian 12 lets
# "Content-Length : 5" pass as a header called "content-length ".
TOKEN = (string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~").encode()


class BadHead(Exception):
    """What is wrong with a head."""
