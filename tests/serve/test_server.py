"""A server that listens: real clients, clients that go away, and its end."""

import http.client
import json
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from support.models import tiny_tokenizer
from support.scripted_engine import ScriptedEngine, served

for _name in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(_name, reason="needs the extra serve")

from llama_jax.errors import ServeError  # noqa: E402
from llama_jax.serve.jobs import Delta  # noqa: E402
from llama_jax.serve.server import Server  # noqa: E402
from llama_jax.serve.settings import ServeConfig  # noqa: E402

HI: list[Any] = [{"role": "user", "content": "hello"}]


def start_server(engine: ScriptedEngine, **config: Any) -> Server:
    settings = ServeConfig(port=0, drain=5.0, **config)
    server = Server([(served(tiny_tokenizer()), engine)], settings)
    server.start()
    return server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with start_server(ScriptedEngine()) as server:
        yield server


def test_the_openai_client_completes_chats_and_streams(server: Server) -> None:
    openai = pytest.importorskip("openai", reason="needs the client")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    completion = client.completions.create(model="tiny", prompt="a", logprobs=1)
    assert completion.choices[0].text == "Once upon"
    chat = client.chat.completions.create(
        model="tiny", messages=HI, n=2, logprobs=True, top_logprobs=1
    )
    assert [choice.message.content for choice in chat.choices] == ["Once upon"] * 2
    assert chat.choices[0].logprobs.content[0].top_logprobs[0].logprob == -1
    stream = client.chat.completions.create(
        model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert (text, last.choices, last.usage.completion_tokens) == ("Once upon", [], 3)
    with pytest.raises(openai.BadRequestError, match="context") as refused:
        client.completions.create(model="tiny", prompt=[5] * 99)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.completions.create(model="other", prompt="a")
    client.close()


def test_the_anthropic_client_answers_and_streams(server: Server) -> None:
    anthropic = pytest.importorskip("anthropic", reason="needs the client")
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    message = client.messages.create(model="tiny", max_tokens=9, messages=HI)
    assert message.content[0].text == "Once upon"
    with client.messages.stream(model="tiny", max_tokens=9, messages=HI) as stream:
        assert "".join(stream.text_stream) == "Once upon"
        assert stream.get_final_message().usage.output_tokens == 3
    counted = client.messages.count_tokens(model="tiny", messages=HI)
    assert counted.input_tokens > 0
    client.close()


def send(server: Server, **body: Any) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_lane(stream: bool) -> None:
    engine = ScriptedEngine(finish=None)
    with start_server(engine) as server:
        connection = send(server, prompt="a", stream=stream)
        if stream:
            response = connection.getresponse()
            assert b"Once" in response.readline()
            response.close()
        else:
            connection.sock.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.sock.recv(1)
        connection.close()
        assert engine.cancelled.wait(20)


def test_accepted_requests_are_answered_when_the_server_ends() -> None:
    engine = ScriptedEngine(finish=None)
    server = start_server(engine)
    connection = send(server, prompt="a", stream=True)
    response = connection.getresponse()
    response.readline()
    server.stop()
    [job] = engine.jobs
    job.push(Delta(0, (), "", (), "length"))
    rest = response.read().decode()
    assert '"finish_reason": "length"' in rest
    assert rest.endswith("data: [DONE]\n\n")
    connection.close()
    server.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{server.url}/health", timeout=5)


def test_a_port_that_is_taken_is_named(server: Server) -> None:
    port = urllib.parse.urlsplit(server.url).port
    with pytest.raises(ServeError, match=f"port {port}"):
        Server([(served(tiny_tokenizer()), ScriptedEngine())], ServeConfig(port=port))


def test_the_page_runs_no_code_but_its_own(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/") as response:
        policy = response.headers["Content-Security-Policy"]
        text = response.read().decode()
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "<script>" not in text
    assert "onclick" not in text
    for name, kind in {"page.js": "javascript", "style.css": "css"}.items():
        with urllib.request.urlopen(f"{server.url}/page/{name}") as response:
            assert kind in response.headers["Content-Type"]
            assert b"innerHTML" not in response.read()
