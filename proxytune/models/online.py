"""Whether the Hugging Face hub answers. Its own client would try for most of a minute at every file."""

from __future__ import annotations

import functools
import http.client
import sys
import threading
import urllib.error
import urllib.request

from proxytune.errors import bare

PROBE_SECONDS = 3.0
PATIENT_SECONDS = 10.0  # where a model would have to be fetched


@functools.cache
def settle() -> None:
    """Where the hub does not answer, go on offline and say so: what was fetched before is found at once."""
    from huggingface_hub import constants

    if not constants.is_offline_mode() and not answers(constants.ENDPOINT, PATIENT_SECONDS):
        constants.HF_HUB_OFFLINE = True
        where = bare(constants.ENDPOINT)
        print(f"proxytune: {where} does not answer; only what was fetched before is used", file=sys.stderr)


def answers(address: str, seconds: float = PROBE_SECONDS) -> bool:
    """Whether anything at all answers there, within seconds."""
    reached = threading.Event()
    # A thread, because looking a name up may hang for longer than any socket timeout.
    asking = threading.Thread(target=_ask, args=(address, seconds, reached), daemon=True)
    asking.start()
    asking.join(seconds)
    return reached.is_set()


def _ask(address: str, seconds: float, reached: threading.Event) -> None:
    try:
        urllib.request.urlopen(urllib.request.Request(bare(address), method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        pass  # an answer all the same
    except (OSError, ValueError, http.client.HTTPException):  # no address, or an answer in another protocol
        return
    reached.set()
