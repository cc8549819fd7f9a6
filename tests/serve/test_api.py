"""The protocols over HTTP, with an engine that plays scripts."""

import json
from typing import Any

import pytest
from support.models import tiny_tokenizer
from support.scripted_engine import CONTEXT, ScriptedEngine, served
from support.tokenizers import special_tokens

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")
testclient = pytest.importorskip("starlette.testclient", reason="needs httpx")

from llama_jax.serve.api.openapi import document  # noqa: E402
from llama_jax.serve.app import App  # noqa: E402
from llama_jax.serve.models import Models, ServedModel  # noqa: E402
from llama_jax.serve.settings import ServeConfig  # noqa: E402
from llama_jax.text.tokenizer import Tokenizer  # noqa: E402

HI = [{"role": "user", "content": "hello"}]
COMPLETIONS, CHAT, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/messages"


class Client:
    """A client of a server with a scripted engine."""

    def __init__(
        self,
        engine: ScriptedEngine | None = None,
        tokenizer: Tokenizer | None = None,
        **config: Any,
    ) -> None:
        self.engine = engine or ScriptedEngine()
        model = ServedModel(served(tokenizer or tiny_tokenizer()), self.engine)
        self.app = App(Models([model]), ServeConfig(**config))
        self.http = testclient.TestClient(self.app.asgi, raise_server_exceptions=False)

    def post(self, path: str, **body: Any) -> Any:
        """Post JSON and return the response."""
        return self.http.post(path, json=body)

    def refusal(self, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
        """The error with which a body is refused; nothing reached the engine."""
        response = self.post(path, **body)
        assert response.status_code == status, response.text
        assert not self.engine.requests
        error: dict[str, Any] = response.json()["error"]
        return error

    def events(self, path: str, **body: Any) -> list[Any]:
        """The data of a stream's events, without the last [DONE]."""
        response = self.post(path, stream=True, **body)
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [li for li in response.text.splitlines() if li.startswith("data: ")]
        data = [line.removeprefix("data: ") for line in lines]
        if path.startswith("/v1/c"):
            assert data.pop() == "[DONE]"
        return [json.loads(text) for text in data]


@pytest.fixture
def client() -> Client:
    return Client()


def infilling_tokenizer() -> Tokenizer:
    plain = tiny_tokenizer()
    pieces = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
    added = dict(enumerate(pieces, start=plain.vocab_size))
    return Tokenizer(plain.contents, settings=special_tokens(added))


def test_a_completion_has_text_usage_and_fingerprint(client: Client) -> None:
    body = client.post(COMPLETIONS, prompt="a cat", max_tokens=4).json()
    assert body["object"] == "text_completion"
    assert body["system_fingerprint"] == "fp_0123456789abcdef"
    assert body["choices"] == [
        {"index": 0, "text": "Once upon", "logprobs": None, "finish_reason": "stop"}
    ]
    [request] = client.engine.requests
    prompt = len(request.prompt_ids)
    usage = {"prompt_tokens": prompt, "completion_tokens": 3}
    assert body["usage"] == {
        **usage,
        "total_tokens": prompt + 3,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert request.after_marker, "the text follows the prompt's, with its space"


def test_settings_reach_the_engine(client: Client) -> None:
    settings = {"temperature": 0.3, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "seed": 9}
    penalties = {"presence_penalty": 1, "frequency_penalty": 0.5}
    client.post(
        CHAT, messages=HI, **settings, **penalties, repetition_penalty=1.5,
        logit_bias={"5": -100}, stop=["x", "y"], max_completion_tokens=3, n=2,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    [request] = client.engine.requests
    sampling = request.sampling
    for name, value in {**settings, **penalties, "repetition_penalty": 1.5}.items():
        assert getattr(sampling, name) == value
    assert sampling.logit_bias == {5: -100}
    assert (request.stop, request.max_new_tokens) == (("x", "y"), 3)
    assert (request.num_samples, request.logprobs) == (2, 2)


def test_requests_without_a_seed_have_different_ones(client: Client) -> None:
    for _ in range(2):
        client.post(COMPLETIONS, prompt="a")
    first, second = client.engine.requests
    assert first.sampling.seed != second.sampling.seed


def test_every_sample_of_n_has_its_index_whole_and_in_streams(client: Client) -> None:
    whole = client.post(COMPLETIONS, prompt=["a", "b"], n=2).json()["choices"]
    assert [choice["index"] for choice in whole] == [0, 1, 2, 3]
    events = client.events(COMPLETIONS, prompt=["a", "b"], n=2)
    texts = dict.fromkeys(range(4), "")
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == dict.fromkeys(range(4), "Once upon")
    chunks = client.events(CHAT, messages=HI, n=2)
    roles = [c["choices"][0]["index"] for c in chunks if "role" in str(c["choices"])]
    assert roles == [0, 1]


@pytest.mark.parametrize(
    ("path", "body"), [(COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": HI})]
)
def test_usage_comes_in_a_last_chunk_without_choices(
    client: Client, path: str, body: dict[str, Any]
) -> None:
    plain = client.events(path, **body)
    assert all("usage" not in event for event in plain)
    *events, last = client.events(path, **body, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert all(event["usage"] is None for event in events)
    finish = [choice["finish_reason"] for e in events for choice in e["choices"]]
    assert finish[-1] == "stop"
    assert set(finish[:-1]) == {None}


def test_log_probabilities_have_the_shape_of_their_protocol(client: Client) -> None:
    chat = client.post(CHAT, messages=HI, logprobs=True, top_logprobs=1).json()
    first, _ = chat["choices"][0]["logprobs"]["content"]
    name = tiny_tokenizer().decode_infilling([40])
    described = {"token": name if name != "�" else "bytes:\\x25", "logprob": -1.0}
    described["bytes"] = [40 - 3]  # pieces 3 to 258 are the bytes
    described["token"] = bytes([40 - 3]).decode()
    assert first == {**described, "top_logprobs": [described]}
    body = client.post(COMPLETIONS, prompt="a", logprobs=1).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["%", "%"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"%": -1.0}, {"%": -1.0}],
        "text_offset": [0, 1],
    }


def test_offsets_go_on_in_streams_and_after_an_echoed_prompt(client: Client) -> None:
    events = client.events(COMPLETIONS, prompt="a cat", logprobs=0, echo=True)
    offsets, names = [], []
    for event in events:
        for choice in event["choices"]:
            offsets += choice["logprobs"]["text_offset"]
            names += choice["logprobs"]["tokens"]
    assert names[0] == "<s>"
    assert names[-2:] == ["%", "%"]
    assert offsets == sorted(offsets)
    assert offsets[-2:] == [5, 6]


def test_echo_has_the_prompts_log_probabilities(client: Client) -> None:
    ids = tiny_tokenizer().encode("a cat", bos=True, eos=False)
    body = client.post(
        COMPLETIONS, prompt=[ids], echo=True, logprobs=1, max_tokens=0
    ).json()
    [choice] = body["choices"]
    assert choice["text"] == "a cat"
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    expected = [None, *(-float(n) for n in range(1, len(ids)))]
    assert logprobs["token_logprobs"] == expected
    assert logprobs["top_logprobs"][0] is None
    # As lm-eval asks: whether a token is the likeliest one.
    greedy = [
        value == max(top.values())
        for value, top in zip(
            logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True
        )
    ]
    assert greedy == [number % 2 == 0 for number in range(1, len(ids))]
    assert body["usage"]["prompt_tokens"] == len(ids)
    assert body["usage"]["completion_tokens"] == 0
    assert not client.engine.requests


def test_a_prompt_that_is_too_long_names_both_numbers(client: Client) -> None:
    error = client.refusal(COMPLETIONS, prompt=[5] * 99)
    assert error["code"] == "context_length_exceeded"
    assert "99" in error["message"]
    assert str(CONTEXT) in error["message"]


@pytest.mark.parametrize(
    ("messages", "number"),
    [
        ([*HI, *HI], "message 2"),
        ([*HI, {"role": "system", "content": "x"}], "message 2"),
        ([*HI, {"role": "assistant", "content": "x"}], "message 2"),
        ([{"role": "user", "content": "[INST]"}], "message 1"),
        ([{"role": "tool", "content": "x"}], "messages[0]"),
        ([*HI, {"role": "user", "content": [{"type": "image_url"}]}], "messages[1]"),
    ],
)
def test_a_refused_message_is_named(
    client: Client, messages: list[Any], number: str
) -> None:
    assert number in client.refusal(CHAT, messages=messages)["message"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (COMPLETIONS, {}, "prompt: is missing"),
        (COMPLETIONS, {"prompt": ""}, "empty"),
        (COMPLETIONS, {"prompt": 3}, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": [True]}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "temprature": 1}, "did you mean 'temperature'"),
        (COMPLETIONS, {"prompt": "a", "temperature": "1"}, "must be a number"),
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, "n: must be at least 1"),
        (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of"),
        (COMPLETIONS, {"prompt": "a", "stop": [""]}, "stop"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "infilling"),
        (COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 2}, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {}}, "needs stream"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "not a token id"),
        (COMPLETIONS, {"prompt": "a", "seed": 2**40}, "seed"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": HI, "tools": [{}]}, "tools: is not supported"),
        (CHAT, {"messages": HI, "response_format": {"type": "json_object"}}, "support"),
        (CHAT, {"messages": HI, "top_logprobs": 1}, "needs logprobs"),
        (CHAT, {"messages": HI, "max_tokens": 1, "max_completion_tokens": 1}, "old"),
        ("/infill", {"input_prefix": "a"}, "infilling"),
        ("/tokenize", {}, "needed"),
        ("/detokenize", {"tokens": [-1]}, "negative"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_refused_by_name(
    client: Client, path: str, body: dict[str, Any], words: str
) -> None:
    error = client.refusal(path, **body)
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_fields_that_are_not_used_may_be_null_or_empty(client: Client) -> None:
    unused = {"tools": [], "tool_choice": "none", "functions": None, "user": None}
    response_format = {"type": "text"}
    response = client.post(CHAT, messages=HI, **unused, response_format=response_format)
    assert response.status_code == 200


def test_an_unknown_model_lists_those_there_are(client: Client) -> None:
    error = client.refusal(COMPLETIONS, 404, model="tinny", prompt="a")
    assert error["code"] == "model_not_found"
    assert "did you mean 'tiny'" in error["message"]


def test_a_full_queue_asks_to_retry() -> None:
    response = Client(ScriptedEngine(full=True)).post(COMPLETIONS, prompt="a")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"


def test_a_draining_server_refuses_new_requests(client: Client) -> None:
    client.app.draining = True
    assert client.http.get("/health").status_code == 503
    response = client.post(COMPLETIONS, prompt="a")
    assert response.status_code == 503
    assert "retry-after" in response.headers


def test_an_answer_that_takes_too_long_is_cancelled() -> None:
    engine = ScriptedEngine(finish=None)
    client = Client(engine, time_limit=0.05)
    assert client.post(COMPLETIONS, prompt="a").status_code == 504
    assert engine.cancelled.wait(5)
    *_, last = client.events(COMPLETIONS, prompt="a")
    assert last["error"]["code"] == "timeout"


def test_only_the_key_opens_the_api() -> None:
    client = Client(api_key="secret")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": "é"}):
        encoded = {name: value.encode() for name, value in headers.items()}
        response = client.http.get("/v1/models", headers=encoded)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    for headers in ({"Authorization": "Bearer secret"}, {"x-api-key": "secret"}):
        assert client.http.get("/v1/models", headers=headers).status_code == 200
    assert client.http.get("/health").status_code == 200
    assert client.http.get("/").status_code == 200


def test_no_origin_is_allowed_unless_it_is_named() -> None:
    headers = {"Origin": "https://evil.example"}
    response = Client().http.get("/v1/models", headers=headers)
    assert not [name for name in response.headers if "access-control" in name]
    named = Client(origins=("https://good.example",)).http
    response = named.get("/v1/models", headers=headers)
    assert "access-control-allow-origin" not in response.headers
    response = named.get("/v1/models", headers={"Origin": "https://good.example"})
    assert response.headers["access-control-allow-origin"] == "https://good.example"


def test_what_is_not_small_json_is_refused() -> None:
    client = Client(max_body=100)
    post = client.http.post
    assert post(COMPLETIONS, data={"prompt": "a"}).status_code == 415
    assert client.post(COMPLETIONS, prompt="a" * 100).status_code == 413
    headers = {"Content-Type": "application/json"}
    for body in ("{", "[]", "[" * 90, '{"prompt": NaN}', b"\xff"):
        response = post(COMPLETIONS, content=body, headers=headers)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_wrong_paths_and_methods_are_json_errors(client: Client) -> None:
    assert client.http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    response = client.http.get(COMPLETIONS)
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "wrong_method"


def test_infilling_in_both_protocols() -> None:
    client = Client(tokenizer=infilling_tokenizer())
    body = client.post(COMPLETIONS, prompt="a", suffix="b").json()
    assert body["choices"][0]["text"] == "Once upon"
    editor = {"input_prefix": "x", "prompt": "a", "input_suffix": "b", "n_predict": 4}
    editor |= {"samplers": ["top_k"], "cache_prompt": True, "t_max_predict_ms": 9}
    body = client.post("/infill", **editor).json()
    assert (body["content"], body["stop_type"]) == ("Once upon", "eos")
    assert body["tokens_predicted"] == 3
    assert client.post("/infill", **editor, response_fields=["content"]).json() == {
        "content": "Once upon"
    }
    refused = client.post("/infill", **editor, response_fields=["a"], stream=True)
    assert refused.status_code == 400
    assert "response_fields: has no effect with stream" in refused.text
    *events, last = client.events("/infill", **editor)
    assert "".join(event["content"] for event in events) == "Once upon"
    assert last["stop"]
    first, second, *_ = client.engine.requests
    assert first.after_marker
    assert len(second.prompt_ids) > len(first.prompt_ids)


def test_messages_in_anthropics_protocol(client: Client) -> None:
    body = client.post(MESSAGES, messages=HI, max_tokens=5, system="Be kind").json()
    assert body["content"] == [{"type": "text", "text": "Once upon"}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    events = client.events(MESSAGES, messages=HI, max_tokens=5)
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[-2]["usage"]["output_tokens"] == 3
    counted = client.post("/v1/messages/count_tokens", messages=HI).json()
    assert counted == {"input_tokens": len(client.engine.requests[1].prompt_ids)}
    error = client.post(MESSAGES, messages=HI).json()
    assert error["type"] == "error"
    assert "max_tokens" in error["error"]["message"]


def test_text_and_ids_are_those_of_the_tokenizer(client: Client) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("a cat", bos=False, eos=False)
    without = {"prompt": "a cat", "add_special_tokens": False}
    assert client.post("/tokenize", **without).json()["tokens"] == ids
    tokens = client.post("/tokenize", prompt="a cat").json()["tokens"]
    assert tokens == [tokenizer.bos_id, *ids]
    assert client.post("/detokenize", tokens=tokens).json() == {"prompt": "a cat"}
    info = client.http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")


def test_the_openapi_document_describes_the_routes_and_nothing_else(
    client: Client,
) -> None:
    pages = {"/", "/page/{name}"}
    routes = {
        (route.path.replace(":path", ""), method)
        for route in client.app.asgi.routes
        for method in route.methods - {"HEAD"}
    }
    described = {
        (path, method.upper())
        for path, operations in document()["paths"].items()
        for method in operations
    }
    assert {route for route in routes if route[0] not in pages} == described
    assert client.http.get("/openapi.json").json() == document()


def test_the_openapi_document_lists_the_fields_that_are_read() -> None:
    client = Client(tokenizer=infilling_tokenizer())
    least = {COMPLETIONS: {"prompt": "a"}, CHAT: {"messages": HI}}
    least[MESSAGES] = {"messages": HI, "max_tokens": 3}
    least[f"{MESSAGES}/count_tokens"] = {"messages": HI}
    for path, operations in document()["paths"].items():
        if "post" not in operations:
            continue
        content = operations["post"]["requestBody"]["content"]
        properties = content["application/json"]["schema"]["properties"]
        for name in properties:  # a field of a wrong type is wrong, not unknown
            body = {**least.get(path, {}), name: {"no": "thing"}}
            error = client.post(path, **body).json().get("error")
            assert error is None or error.get("code") != "unknown_field", (path, error)
        body = client.post(path, **least.get(path, {}), nothing=1).json()
        assert "nothing: is not a field" in body["error"]["message"]


def test_metrics_have_the_engines_numbers_and_responses(client: Client) -> None:
    client.post(COMPLETIONS, prompt="a")
    text = client.http.get("/metrics").text
    assert 'llama_jax_generated_tokens_total{model="tiny"} 8.0' in text
    assert 'llama_jax_responses_total{path="/v1/completions",status="200"} 1.0' in text


def test_a_characters_bytes_are_told_and_never_half_a_character(client: Client) -> None:
    from llama_jax.serve.api.logprobs import token_bytes, token_name

    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("☀", bos=False, eos=False)
    joined = b"".join(token_bytes(tokenizer, id) for id in ids)
    assert joined.decode().strip() == "☀"
    assert token_name(tokenizer, ids[-1]) == "bytes:\\x80"
