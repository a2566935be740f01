"""Logins: a file with a line NAME:PASSWORD for each person, where a hash may replace the password."""

import asyncio
import base64
import binascii
import getpass
import hashlib
import hmac
import secrets
import sys
from pathlib import Path

PREFIX = "scrypt$"
BLOCKS, BLOCK_SIZE, PARALLEL = 2**14, 8, 1  # scrypt's n, r and p: 16 MB and a few hundredths of a second
MOST_BLOCKS = 2**18


class Passwords:
    """Names and the hashes of their passwords.

    Args:
        passwords: by name, each as text or as a hash that `hash_password` made.

    Raises:
        ValueError: a hash is malformed.
    """

    def __init__(self, passwords: dict[str, str]) -> None:
        # A hash is compared for unknown names too, so that response times do not reveal which names exist.
        self.hashes = {
            name: text if text.startswith(PREFIX) else hash_password(text) for name, text in passwords.items()
        }
        self.unknown = hash_password(secrets.token_hex())
        for text in self.hashes.values():
            parse_hash(text)
        self.lock = asyncio.Lock()

    @classmethod
    def read(cls, path: str) -> "Passwords":
        """The names and passwords of a file. Empty lines and lines that begin with # are skipped.

        Raises:
            ValueError: a line is not NAME:PASSWORD, or there is none.
            OSError: the file cannot be read.
        """
        passwords: dict[str, str] = {}
        for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, _, password = line.partition(":")
            if not (name.strip() and password):
                raise ValueError(f"{path}, line {number}: should be NAME:PASSWORD")
            if name.strip() in passwords:
                raise ValueError(f"{path}, line {number}: {name.strip()!r} has a line already")
            if password.startswith(PREFIX):
                try:
                    parse_hash(password)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
            passwords[name.strip()] = password
        if not passwords:
            raise ValueError(f"{path} names nobody")
        return cls(passwords)

    def matches(self, name: str, password: str) -> bool:
        """Whether the password is that of the name."""
        fits = matches(password, self.hashes.get(name, self.unknown))
        return fits and name in self.hashes

    async def check(self, name: str, password: str) -> bool:
        """As `matches`, without blocking the event loop. One check at a time, so attempts cannot fill the memory."""
        async with self.lock:
            return await asyncio.to_thread(self.matches, name, password)


def hash_password(password: str) -> str:
    """The scrypt hash of a password as text: scrypt$n$r$p$salt$key, with salt and key in base64."""
    salt = secrets.token_bytes(16)
    key = derive(password, salt, BLOCKS, BLOCK_SIZE, PARALLEL)
    encoded = (base64.b64encode(part).decode() for part in (salt, key))
    return PREFIX + "$".join([str(BLOCKS), str(BLOCK_SIZE), str(PARALLEL), *encoded])


def matches(password: str, text: str) -> bool:
    """Whether the hash is that of the password, compared in constant time."""
    *cost, salt, key = parse_hash(text)
    return hmac.compare_digest(derive(password, salt, *cost), key)


def parse_hash(text: str) -> tuple[int, int, int, bytes, bytes]:
    """scrypt's n, r and p, the salt and the key in a hash. Raises ValueError if it is malformed."""
    try:
        blocks, size, parallel, salt, key = text.removeprefix(PREFIX).split("$")
        n, r, p = int(blocks), int(size), int(parallel)
        parts = base64.b64decode(salt, validate=True), base64.b64decode(key, validate=True)
    except (ValueError, binascii.Error):
        n = r = p = 0
        parts = b"", b""
    if not (1 < n <= MOST_BLOCKS and n & (n - 1) == 0 and 1 <= r <= 16 and 1 <= p <= 4 and all(parts)):
        raise ValueError("the hash of the password is damaged; make a new one with --hash-password NAME")
    return n, r, p, *parts


def derive(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    """scrypt's key for a password."""
    data = password.encode("utf-8", "surrogatepass")
    return hashlib.scrypt(data, salt=salt, n=n, r=r, p=p, maxmem=256 * n * r, dklen=32)


def ask_password(name: str) -> str:
    """A line for the file of passwords. The password is typed twice, or read from standard input if it is no terminal.

    Raises:
        ValueError: the name or the password is not allowed, or the two passwords differ.
    """
    if not name.strip() or ":" in name or name.startswith("#"):
        raise ValueError(f"a name must have a letter, no colon, and no # at its start, unlike {name!r}")
    if sys.stdin.isatty():
        password = getpass.getpass(f"Password of {name.strip()}: ")
        if getpass.getpass("Again: ") != password:
            raise ValueError("the two passwords differ")
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise ValueError("the password is empty")
    return f"{name.strip()}:{hash_password(password)}"
