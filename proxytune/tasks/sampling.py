"""Which split a made-up row belongs to, by a hash of what must not be shared between splits."""

from __future__ import annotations

import hashlib


def split_of(key: str) -> str:
    """`train` 40%, `validation` 20%, `test` 40% of all keys; a key always falls into the same one."""
    bucket = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 10
    return "train" if bucket < 4 else "validation" if bucket < 6 else "test"
