"""The fake model that apps test with is a real Phi in all but the engine."""

import asyncio
import threading

import pytest

from phi_runtime.errors import ContextError, PhiError
from phi_runtime.testing import fake_phi


def test_it_says_what_it_is_told():
    with fake_phi("The sky is blue.") as phi:
        assert phi.chat("Why?").text == "The sky is blue."
        assert phi.chat("Why?").finish_reason == "stop_token"
        assert "".join(c.text for c in phi.chat_stream("Why?")) == "The sky is blue."
        assert phi.generate("x", max_tokens=3).text == "The"
        assert phi.generate("x", stop=" is").finish_reason == "stop_text"
        assert asyncio.run(phi.achat("Why?")).text == "The sky is blue."
        assert phi.generate("x", temperature=1.0, seed=3).text == "The sky is blue."


def test_its_reply_may_follow_from_the_prompt():
    phi = fake_phi(lambda prompt: prompt[-3:].upper())
    assert phi.generate("abcdef").text == "DEF"
    assert phi.generate("abcxyz").text == "XYZ"
    assert "<|USER|>" in fake_phi(lambda prompt: prompt.upper()).chat("hello").text
    assert phi.generate("long" * 200).text == "ONG"


def test_characters_of_several_bytes_come_whole():
    phi = fake_phi("Grüße, 世界 🌍")
    assert phi.generate("x").text == "Grüße, 世界 🌍"
    assert all("\ufffd" not in c.text for c in phi.stream("x"))


def test_contexts_sessions_and_threads_are_those_of_a_bundle(tmp_path):
    phi = fake_phi("ok", context=64)
    with pytest.raises(ContextError):
        phi.generate("x" * 100)
    assert phi.generate("x" * 100, policy="truncate-left", max_tokens=8).dropped > 0
    phi.generate("a prompt to keep")
    phi.save_session(tmp_path / "s")
    other = fake_phi("ok", context=64)
    assert other.load_session(tmp_path / "s") > 0
    assert other.generate("a prompt to keep, and more").reused > 10
    found = []
    threads = [threading.Thread(target=lambda: found.append(phi.generate("x").text)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == ["ok"] * 4
    phi.close()
    with pytest.raises(PhiError):
        phi.generate("x")


def test_the_server_serves_it():
    from starlette.testclient import TestClient

    from phi_runtime.server.app import app

    with TestClient(app(fake_phi("Hello there.")), base_url="http://127.0.0.1") as client:
        answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
        assert answer.json()["choices"][0]["message"]["content"] == "Hello there."
        wrong = client.post("/v1/chat/completions", json={"mesages": []})
        assert wrong.status_code == 400 and "mesages: unknown field (did you mean messages?)" in wrong.text
