"""Who may ask: the key, where it comes from, and which addresses a server without one may listen on."""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
from collections.abc import Iterable

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.serve.errors import ApiError

KEY_VARIABLE = "SESSA_API_KEY"
GUARDED = ("/v1", "/tokenize", "/detokenize", "/tokenizer_info")


def chosen_key(given: str | None, none_wanted: bool, host: str) -> str | None:
    """The key that clients must send: the option's, else the environment's, else none.

    Raises UserError on a key that no header carries, on one beside --no-api-key, and where others could reach a server without one.
    """
    key, source = (given, "--api-key") if given is not None else (os.environ.get(KEY_VARIABLE) or None, KEY_VARIABLE)
    if key is None:
        if not none_wanted and not is_loopback(host):
            raise UserError("others can reach that address, and there is no key", got=f"--host {host}", allowed="127.0.0.1, or a key",
                            fix=f"set {KEY_VARIABLE}, or say --no-api-key")
        return None
    if none_wanted:
        raise UserError("a key is given and --no-api-key too", got=source, allowed="one of them",
                        fix=f"leave --no-api-key out, or {'--api-key' if given is not None else f'unset {KEY_VARIABLE}'}")
    if not all(32 < ord(c) < 127 for c in key):
        raise UserError("the key cannot be sent in a header", got=f"{source} with blanks, control characters or letters beyond ASCII",
                        allowed="printable ASCII without blanks")
    return key


def is_loopback(host: str) -> bool:
    """Whether an address, or every address of a name, is this machine's own alone. A name that nobody knows is not."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        return bool(found) and all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)
    except (OSError, ValueError):  # UnicodeError of a name too long is a ValueError
        return False


def check_key(path: str, headers: Iterable[tuple[bytes, bytes]], key: str | None) -> None:
    """Raise ApiError, 401, unless the path is open or the request carries the key. Takes as long whatever is wrong with the key."""
    if key is None or not any(path == place or path.startswith(f"{place}/") for place in GUARDED):
        return
    given = [value for name, value in headers if name == b"authorization"]
    scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    right = hmac.compare_digest(token.strip(), key.encode())
    if not given:
        raise ApiError(401, "no key: send it as Authorization: Bearer KEY", code="missing_api_key")
    if scheme.lower() != b"bearer" or not right:
        raise ApiError(401, "the key is wrong", code="invalid_api_key")
