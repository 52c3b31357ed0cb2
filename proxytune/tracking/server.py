"""Whether the W&B server can be used: a key, and an answer within three seconds. Asks nobody for anything."""

from __future__ import annotations

import base64
import configparser
import json
import netrc
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

PROBE_SECONDS = 3.0


def _user_settings() -> dict[str, str]:
    """What `wandb login` left in the user's own settings file."""
    folder = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(Path(folder).expanduser() / "settings")
        return dict(parser["default"]) if parser.has_section("default") else {}
    except (OSError, UnicodeDecodeError, configparser.Error):
        return {}


def base_url() -> str:
    address = os.environ.get("WANDB_BASE_URL") or _user_settings().get("base_url") or "https://api.wandb.ai"
    return address.rstrip("/")


def api_key() -> str | None:
    """The key for `base_url()`, from the places where wandb itself looks: environment, netrc, settings file."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    named = os.environ.get("NETRC")
    candidates = [named] if named else ["~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in candidates):
        try:
            login = netrc.netrc(path).authenticators(urlsplit(base_url()).netloc)
        except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
            continue
        if login and login[2]:
            return login[2]
    return _user_settings().get("api_key")


def trouble() -> str | None:
    """Why the server cannot be used now, in a few words, or None."""
    key = api_key()
    return _ask(base_url(), key) if key else "there is no key: set WANDB_API_KEY or run `wandb login`"


def _ask(url: str, key: str) -> str | None:
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # no more: there may be a password before it
    answer = [f"{shown} did not answer within {PROBE_SECONDS:.0f} s"]
    # A thread, because looking a name up may hang for longer than any socket timeout.
    asking = threading.Thread(target=lambda: answer.append(_probe(url, shown, key) or ""), daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)
    return answer[-1] or None


class _Stay(urllib.request.HTTPRedirectHandler):
    """The key goes to nobody else."""

    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        return None


def _probe(url: str, shown: str, key: str) -> str | None:
    request = urllib.request.Request(
        f"{url}/graphql",
        data=json.dumps({"query": "query Viewer { viewer { id } }"}).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": "Basic " + base64.b64encode(f"api:{key}".encode()).decode(),
        },
    )
    try:
        # The thread is given up before its socket is, so that one line tells of both.
        with urllib.request.build_opener(_Stay).open(request, timeout=2 * PROBE_SECONDS) as reply:
            known = json.load(reply)["data"]["viewer"]
    except urllib.error.HTTPError as error:
        return f"{shown} answered {error.code} {error.reason}"
    except OSError as error:
        return f"{shown} cannot be reached: {' '.join(str(error).split())}"
    except Exception as error:  # its message may quote the address, or whatever came as an answer
        return f"{shown} is no W&B server ({type(error).__name__})"
    return None if known else f"{shown} does not know the key"
