"""Without a network models are looked for where they were fetched before, and nowhere else."""

from __future__ import annotations

import socket
import threading

import pytest
from huggingface_hub import constants

from proxytune.errors import ModelError
from proxytune.models import online
from proxytune.models.loading import load_tokenizer
from proxytune.settings import ModelRef


@pytest.fixture
def at(monkeypatch):
    """The hub at an address, and nobody has asked yet."""

    def place(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        online.settle.cache_clear()

    yield place
    online.settle.cache_clear()


def test_a_hub_that_does_not_answer_is_asked_once_and_told_in_one_line(at, capfd):
    at("http://127.0.0.1:9")
    for _ in range(2):
        with pytest.raises(ModelError, match="cannot load the model org/nowhere"):
            load_tokenizer(ModelRef(model="org/nowhere"))
    told = "proxytune: http://127.0.0.1:9 does not answer; only what was fetched before is used\n"
    assert capfd.readouterr().err == told and constants.is_offline_mode()


def test_a_password_in_the_hub_s_address_is_not_shown(at, capfd):
    at("http://user:hunter22@127.0.0.1:9/hub")
    online.settle()
    assert capfd.readouterr().err.startswith("proxytune: http://127.0.0.1:9/hub does not answer")
    assert str(ModelError("no http://user:hunter22@host/hub, says user@host")) == "no http://host/hub, says user@host"


def test_a_hub_whose_address_has_a_password_answers():
    with socket.create_server(("127.0.0.1", 0)) as hub:
        refusal = b"HTTP/1.0 401 Unauthorized\r\n\r\n"
        threading.Thread(target=lambda: hub.accept()[0].sendall(refusal), daemon=True).start()
        assert online.answers(f"http://user:hunter22@127.0.0.1:{hub.getsockname()[1]}")


def test_a_server_that_says_nothing_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not online.answers(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.2)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_address_and_an_answer_in_another_protocol_are_no_answer():
    assert not online.answers("hub.example")
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=lambda: other.accept()[0].sendall(b"220 another protocol\r\n"), daemon=True).start()
        assert not online.answers(f"http://127.0.0.1:{other.getsockname()[1]}")


def test_models_that_are_here_ask_nobody(at, monkeypatch):
    at("http://127.0.0.1:9")
    monkeypatch.setattr(online, "answers", lambda *_: pytest.fail("the hub was asked"))
    load_tokenizer(ModelRef(model="embedded:small"))
