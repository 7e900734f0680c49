"""The server over real HTTP, with the tiny world's run: answers as asked alone, in batches, within bounds, and safe."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from html_tree import elements
from http_server import HEAD, Held, Running, running
from processes import QUICK_TO_COMPILE
from world import LANDS

import ragjax
from ragjax.answerer import Answerer
from ragjax.cli import main
from ragjax.commands.serve import ServeOptions, allowed_hosts, examples, read_token, serve
from ragjax.config import load_config
from ragjax.errors import InputError
from ragjax.runs.run_dir import load_run_config
from ragjax.serving import telemetry
from ragjax.serving.app import Server, Serving
from ragjax.serving.guard import HEADERS
from ragjax.serving.server import bind
from ragjax.serving.settings import Limits
from ragjax.terminal import terminal

QUESTIONS = [f"Capital of {land}?" for land in LANDS[:8]]
LIMITS = Limits(batch=2, receive_s=0.4, deadline_s=30.0)
LOCKED = (("GET", "/metrics"), ("GET", "/openapi.json"), ("POST", "/v1/answer"), ("POST", "/stages"))


@pytest.fixture(scope="module")
def answerer(run: Path) -> Answerer:
    return ragjax.load(run)


@pytest.fixture(scope="module")
def serving(answerer: Answerer) -> Serving:
    hosts = allowed_hosts(ServeOptions())
    return Serving(answerer, "tiny", LIMITS, None, hosts, QUESTIONS[:2], False)


@pytest.fixture(scope="module")
def here(serving: Serving) -> Iterator[Running]:
    with running(serving) as server:
        yield server


def test_an_answer_is_that_of_python(here: Running, answerer: Answerer) -> None:
    status, told = here.post("/v1/answer", {"questions": QUESTIONS[:3]})
    assert status == 200
    for made, alone in zip(told["answers"], answerer.answer(QUESTIONS[:3]), strict=True):
        assert made.keys() == alone.__dataclass_fields__.keys()
        assert (made["question"], made["text"]) == (alone.question, alone.text)
        assert made["probability"] == pytest.approx(alone.probability, rel=1e-4)
        assert [d["id"] for d in made["documents"]] == [d.id for d in alone.documents]
    status, told = here.post(
        "/v1/answer", {"question": QUESTIONS[0], "mode": "fast", "num_docs": 2, "num_beams": 1, "n_best": 1}
    )
    [one] = told["answers"]
    assert status == 200 and one["mode"] == "fast" and (len(one["documents"]), len(one["candidates"])) == (2, 1)
    status, told = here.post(
        "/v1/answer", {"question": QUESTIONS[0], "passages": ["a", "c", {"text": "b", "title": "t"}]}
    )
    assert {d["title"] for d in told["answers"][0]["documents"]} == {"", "t"}


def test_many_clients_share_batches(here: Running, answerer: Answerer) -> None:
    alone = {answer.question: answer for answer in answerer.answer(QUESTIONS)}
    before = figures(here)
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda q: here.post("/v1/answer", {"question": q}), QUESTIONS * 4))
    for question, (status, body) in zip(QUESTIONS * 4, told, strict=True):
        [made] = body["answers"]
        assert status == 200 and made["question"] == question and made["text"] == alone[question].text
        assert made["probability"] == pytest.approx(alone[question].probability, rel=1e-3)
    after = figures(here)
    batches = after["ragjax_batch_size_count"] - before["ragjax_batch_size_count"]
    assert after["ragjax_batch_size_sum"] - before["ragjax_batch_size_sum"] == 32 and batches < 32
    assert after['ragjax_questions_total{mode="thorough"}'] - before['ragjax_questions_total{mode="thorough"}'] == 32


def figures(here: Running) -> dict[str, float]:
    text = here.ask("GET", "/metrics")[2]
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_the_form_of_openai(here: Running, answerer: Answerer) -> None:
    [alone] = answerer.answer(QUESTIONS[0])
    asked = {"model": "x", "messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0, "n": 1}
    status, told = here.post("/v1/chat/completions", asked)
    [choice] = told["choices"]
    assert status == 200 and told["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": alone.text, "refusal": None}
    assert told["ragjax"]["probability"] == pytest.approx(alone.probability, rel=1e-4)
    parts = [{"type": "text", "text": QUESTIONS[0]}]
    assert here.post("/v1/chat/completions", asked | {"stream": None, "documents": None})[0] == 200
    asked |= {"stream": True, "messages": [{"role": "user", "content": parts}], "documents": ["Its capital is X."] * 3}
    status, headers, text = here.ask("POST", "/v1/chat/completions", asked)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert deltas[-1]["finish_reason"] in ("stop", "length") and deltas[0]["delta"]["role"] == "assistant"
    [given] = answerer.answer(QUESTIONS[0], passages=["Its capital is X."] * 3)
    assert "".join(delta["delta"].get("content", "") for delta in deltas) == given.text
    status, _, text = here.ask("GET", "/v1/models")
    assert status == 200 and [model["id"] for model in json.loads(text)["data"]] == [told["model"]]


USER = {"role": "user", "content": "Where?"}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"n": 2}, "n: only 1 is offered"),
        ({"temperature": 0.7}, "temperature: only 0 is offered"),
        ({"tools": [{"type": "function"}]}, "tools: only"),
        ({"top_logprobs": 3}, "top_logprobs: is not offered"),
        ({"max_tokens": 5}, "max_tokens: is not offered"),
        ({"messages": [USER, {"role": "assistant", "content": "Here"}, USER]}, "messages: expected one message"),
        ({"messages": [{"role": "system", "content": "Be kind"}, USER]}, "messages: expected one message"),
        ({"messages": []}, "messages: expected one message"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content: an empty question"),
        ({"documents": ["x"] * 21}, "documents: are 21; at most 20"),
        ({"documents": []}, "documents: an empty list"),
        ({"documents": ["x", {"text": " "}]}, "documents[1]: an empty text"),
        ({"documents": [{"text": "x", "score": 1}]}, "documents.0.score: extra inputs"),
    ],
)
def test_what_openai_offers_and_this_does_not_is_named(here: Running, more: dict[str, Any], named: str) -> None:
    status, told = here.post("/v1/chat/completions", {"messages": [USER]} | more)
    assert status == 400 and told["error"]["message"].startswith(named), told
    assert told["error"]["type"] == "invalid_request_error"


BAD = [
    (b"", "the body: not JSON"),
    (b"{", "the body: not JSON"),
    (b"[]", "the body: input should be"),
    (b"\xff", "the body: not UTF-8"),
    (b"[" * 5000 + b"]" * 5000, "the body: not JSON: nested too deeply"),
    (b'{"question": "\\ud800"}', "the body: holds half of a"),
    (b'{"question": 3}', "question: input should be a valid string"),
    (b'{"question": "a", "questions": ["b"]}', "question: give it, or questions"),
    (b"{}", "question: give it, or questions"),
    (b'{"questions": []}', "questions: an empty list"),
    (b'{"questions": ["Where?", " "]}', "questions[1]: an empty question"),
    (b'{"questions": ["' + b'a", "' * 40 + b'a"]}', "questions: are 41; at most 32"),
    (b'{"question": "' + b"a" * 2001 + b'"}', "question: has 2001 characters; at most 2000"),
    (b'{"question": "' + b"a b " * 400 + b'"}', "questions[0]: a prompt needs"),
    (b'{"question": "a", "mode": "best"}', "mode: is 'best'; expected one of thorough, exact"),
    (b'{"question": "a", "num_docs": 7}', "num_docs: is 7; expected one of 3, 1, 2, 5"),
    (b'{"question": "a", "num_beams": 1e9}', "num_beams: "),
    (b'{"question": "a", "path": "/etc/passwd"}', "path: extra inputs are not permitted"),
    (b'{"question": "a", "n_best": 0}', "n_best: input should be greater than 0"),
    (b'{"question": "a", "passages": [" "]}', "passages[0]: an empty text"),
    (b'{"question": "a", "passages": []}', "passages: an empty list"),
    (b'{"question": "a", "mode": "closed_book", "passages": ["a"]}', "passages: closed_book reads none"),
]


@pytest.mark.parametrize(("body", "named"), BAD)
def test_bad_bodies_are_refused_by_name(here: Running, body: bytes, named: str) -> None:
    for path in ("/v1/answer", "/stages"):
        if path == "/stages" and (b"closed_book" in body or b'"Where?", ' in body):
            continue  # the stream has begun by then; and it takes one question
        status, told = here.post(path, body)
        assert status == 400 and told["error"]["message"].startswith(named), told
        assert "Traceback" not in told["error"]["message"]


def test_bounds_of_a_request(here: Running) -> None:
    status, told = here.post("/v1/answer", b" " * (LIMITS.body_bytes + 1))
    assert status == 413 and f"more than {LIMITS.body_bytes} bytes" in told["error"]["message"]
    status, _, text = here.ask("POST", "/v1/answer", {"question": "a"}, {"Content-Type": "text/plain"})
    assert status == 415 and "expected application/json" in text
    assert here.ask("GET", "/nothing/../../etc/passwd")[0] == 404 and here.ask("GET", "/v1/answer")[0] == 405
    assert here.ask("GET", "/v1/answer")[1]["allow"] == "POST"
    status, _, text = here.ask("GET", "/health", headers={"Host": "evil.example"})
    assert status == 400 and "host" in text.lower(), "a name from elsewhere that points here"
    with socket.create_connection(("127.0.0.1", here.port), timeout=5) as long:
        try:
            long.sendall(b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 200_000)
            answer = long.recv(4096)
        except ConnectionError:
            answer = b""
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert here.ask("GET", "/health")[0] == 200


def test_slow_clients_are_left(here: Running) -> None:
    """One that sends no head, one that sends half of it, and one whose body does not come."""
    body = (
        b"POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    for sent, told in ((b"", b""), (b"GET /health HTT", b""), (body, b"HTTP/1.1 408 ")):
        with socket.create_connection(("127.0.0.1", here.port), timeout=5) as slow:
            slow.sendall(sent)
            began, answer = time.monotonic(), slow.recv(4096)
            assert answer.startswith(told) and bool(answer) == bool(told)
            assert time.monotonic() - began < 3
    assert here.ask("GET", "/health")[0] == 200


def test_the_page_and_its_link(here: Running, answerer: Answerer) -> None:
    status, headers, html = here.ask("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    for name, value in HEADERS.items():
        assert headers[name] == value
    found = elements(html)
    links = [e.attributes["href"] for e in found if e.tag == "a"]
    assert links == [f"./?question=Capital%20of%20{land}%3F" for land in LANDS[:2]]
    assert {here.ask("GET", f"/{name}")[0] for name in ("style.css", "serve.js")} == {200}
    status, _, html = here.ask("GET", f"/{links[0].removeprefix('./')}&mode=thorough&num_docs=2&num_beams=1")
    config = answerer.rag.config
    decode = config.decode.replace(num_docs=2, num_beams=1)
    rag = replace(answerer.rag, config=config.replace(decode=decode))
    [alone] = replace(answerer, rag=rag).answer(QUESTIONS[0])
    shown = [float(e.attributes["value"]) for e in elements(html) if e.tag == "data"]
    assert status == 200 and shown[-1] == pytest.approx(alone.probability, rel=1e-4)
    chosen = [e.attributes["value"] for e in elements(html) if "selected" in e.attributes]
    assert chosen == ["thorough", "2", "1"]
    embedded = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert "data value" not in here.ask("GET", f"/?question={LANDS[0]}", headers=embedded)[2]
    for bad in ("?question=a&num_docs=x", "?question=a&mode=best", f"?question={'a' * 2001}"):
        status, _, html = here.ask("GET", f"/{bad}")
        assert status == 400 and "refused" in html


def test_hostile_texts_on_the_page(here: Running) -> None:
    bad = '"><img src=x onerror=alert(1)><script>alert(1)</script>\u202e'
    passages = [{"text": bad, "title": bad, "id": f"{bad}{i}"} for i in range(3)]
    status, _, text = here.ask("POST", "/stages", {"question": bad, "passages": passages})
    assert status == 200
    for event in (json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")):
        tags = {element.tag for element in elements(event)}
        assert not {"img", "script"} & tags and "\u202e" not in event and "&lt;img src=x" in event
    query = "%22%3E%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E%3Cscript%3Ealert(1)%3C%2Fscript%3E"
    _, _, html = here.ask("GET", f"/?question={query}&mode={query}")
    found = elements(html)
    assert sum(e.tag == "script" for e in found) == 1 and not any(e.tag == "img" for e in found)
    assert not any(name.startswith("on") for e in found for name in e.attributes)


def test_stages_come_as_they_are_ready(here: Running, answerer: Answerer) -> None:
    status, headers, text = here.ask("POST", "/stages", {"question": QUESTIONS[0]})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    names = re.findall(r"^event: (\w+)$", text, re.MULTILINE)
    assert names == ["retrieval", "answer"]
    first, last = (json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: "))
    assert "2 Proposals" not in " ".join(e.cells for e in elements(first)) and "Reading the documents" in first
    [alone] = answerer.answer(QUESTIONS[0])
    assert [float(e.attributes["value"]) for e in elements(last) if e.tag == "data"][-1] == pytest.approx(
        alone.probability, rel=1e-4
    )


def test_its_description_names_what_it_offers(here: Running) -> None:
    told = json.loads(here.ask("GET", "/openapi.json")[2])
    served = {"/v1/answer", "/v1/chat/completions", "/v1/models", "/stages", "/health", "/metrics"}
    assert told["openapi"] == "3.1.0" and told["paths"].keys() == served
    offered = told["components"]["schemas"]["AnswerRequest"]["properties"]
    assert offered["num_docs"]["enum"] == [3, 1, 2, 5, 10, 20, None]
    references = re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(told))
    assert set(references) <= told["components"]["schemas"].keys() and "Candidate" in references


def test_bounds_of_the_queue(serving: Serving, answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One runs, two wait, the fourth is told to come again; one that fails costs no other; all get what they asked."""
    held = Held(answerer, monkeypatch)
    limits = replace(LIMITS, waiting=3, batch=4)
    with running(replace(serving, limits=limits)) as here, ThreadPoolExecutor(8) as pool:
        first = pool.submit(here.post, "/v1/answer", {"question": QUESTIONS[0]})
        assert held.begun.wait(10)
        others = [pool.submit(here.post, "/v1/answer", {"question": q}) for q in (QUESTIONS[1], "break", QUESTIONS[2])]
        while here.server.batcher.waiting < 3:
            time.sleep(0.01)
        status, told = here.post("/v1/answer", {"questions": QUESTIONS[:4]})  # for which there is never room
        assert status == 400 and told["error"]["message"] == "questions: are 4; at most 3 in one request"
        status, headers, text = here.ask("POST", "/v1/answer", {"question": QUESTIONS[3]})
        assert status == 503 and headers["retry-after"] == "2" and "the queue is full" in text
        assert json.loads(here.ask("GET", "/health")[2]) == {"status": "ok", "waiting": 3, "step": answerer.step}
        held.go.set()
        assert first.result()[0] == 200
        results = [other.result() for other in others]
        assert [status for status, _ in results] == [200, 500, 200]
        assert "secret" not in json.dumps(results[1][1]) and results[0][1]["answers"][0]["question"] == QUESTIONS[1]
    assert [len(batch) for batch in held.batches] == [1, 3, 1, 1, 1]


def test_what_was_asked_is_answered_before_the_end(
    serving: Serving, answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a client that is gone takes its question along; one whose time is over is told."""
    held = Held(answerer, monkeypatch)
    with running(replace(serving, limits=replace(LIMITS, deadline_s=1.2))) as here, ThreadPoolExecutor(8) as pool:
        first = pool.submit(here.post, "/v1/answer", {"question": QUESTIONS[0]})
        assert held.begun.wait(10)
        gone = socket.create_connection(("127.0.0.1", here.port))
        body = json.dumps({"question": QUESTIONS[1]}).encode()
        gone.sendall(HEAD.format(len(body)).encode() + body)
        while here.server.batcher.waiting < 1:
            time.sleep(0.01)
        gone.close()
        late = pool.submit(here.post, "/v1/answer", {"question": QUESTIONS[2]})
        assert late.result()[0] == 504 and first.result()[0] == 504
        last = pool.submit(here.post, "/v1/answer", {"question": QUESTIONS[3]})
        while here.server.batcher.waiting < 1:
            time.sleep(0.01)
        threading.Timer(0.3, held.go.set).start()
        here.stop()
        assert last.result()[0] == 200
    assert held.batches == [[QUESTIONS[0]], [QUESTIONS[3]]]


def test_warming_up(serving: Serving, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A batch of each size on two devices, as the run decodes; bounded in time, and a failure stops nothing."""
    batches: list[list[str]] = []

    def answer(these: Answerer, texts: list[str], mode: str) -> None:
        assert mode == "thorough" and these.rag.config.evaluate.batch_size == 8
        batches.append(texts)
        if len(batches) == fails:
            raise MemoryError("secret within")

    monkeypatch.setattr(Answerer, "answer", answer)
    monkeypatch.setattr(telemetry, "terminal", terminal)
    server = Server(replace(serving, limits=replace(LIMITS, batch=8)))
    told = "batches of {} are compiled; "
    for seconds, fails, sizes in ((60.0, 0, [2, 8, 6, 4]), (60.0, 3, [2, 8]), (1e-9, 0, [])):
        batches.clear()
        server.warm_up(["", *QUESTIONS], seconds)  # one that cannot be answered is left out
        assert [len(batch) for batch in batches][: len(sizes)] == sizes
        assert len(batches) == (fails or len(sizes)) and not any("" in batch for batch in batches)
        said = capfd.readouterr().err
        assert told.format(", ".join(map(str, sizes)) or "no size") in said
        assert ("MemoryError" in said) == bool(fails) and "secret" not in said
    server.warm_up(QUESTIONS, 0.0)
    server.warm_up([""], 60.0)
    assert capfd.readouterr().err == "" and b"ragjax_batch_size_count 0.0" in server.telemetry.text()


def test_a_token(serving: Serving) -> None:
    with running(replace(serving, token="correct-horse-battery")) as here:
        for path in ("/", "/health", "/style.css"):
            assert here.ask("GET", path)[0] == 200
        html = here.ask("GET", f"/?question={QUESTIONS[0].replace(' ', '%20')}")[2]
        assert "Give the token, and ask." in html and 'id="token"' in html
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "correct-horse-battery"}):
            for method, path in (
                ("GET", "/metrics"),
                ("GET", "/openapi.json"),
                ("POST", "/v1/answer"),
                ("POST", "/stages"),
            ):
                status, headers, _ = here.ask(method, path, {"question": "a"} if method == "POST" else None, wrong)
                assert status == 401 and headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer correct-horse-battery"}
        assert here.ask("GET", "/metrics", headers=right)[0] == 200
        assert here.post("/v1/answer", {"question": QUESTIONS[0]}, **right)[0] == 200


def test_questions_are_not_logged_unless_asked(serving: Serving, capfd: pytest.CaptureFixture[str]) -> None:
    with running(serving, logged=True) as here:
        here.post("/v1/answer", {"question": QUESTIONS[0]})
        here.ask("GET", f"/?question={QUESTIONS[0].replace(' ', '%20')}")
    silent = capfd.readouterr().err
    assert "POST /v1/answer 200" in silent and LANDS[0] not in silent
    with running(replace(serving, log_questions=True), logged=True) as here:
        here.post("/v1/answer", {"question": f"{QUESTIONS[0]}\x1b[31m"})
    assert f"question: {QUESTIONS[0]}␛[31m" in capfd.readouterr().err


@pytest.mark.parametrize(
    "option", ["--deadline=nan", "--deadline=inf", "--deadline=0", "--queue=0", "--warm-up=-1", "--warm-up=nan"]
)
def test_bad_numbers(run: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", str(run), option])
    assert stop.value.code == 2 and f"argument {option.partition('=')[0]}: invalid" in capsys.readouterr().err


def test_bad_options(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(world / "config.yaml")
    token = tmp_path / "token"
    for text in ("short", "two words of some length", ""):
        token.write_text(text)
        with pytest.raises(InputError, match="expected one word of 16 or more characters"):
            serve(config, ServeOptions(token_file=token))
    with pytest.raises(InputError, match="cannot be read as a token"):
        read_token(tmp_path / "none")
    with pytest.raises(InputError, match="port 70000: expected 0 to 65535"):
        serve(config, ServeOptions(port=70_000))
    for name in ("*evil", "a.*", "*.*"):
        with pytest.raises(InputError, match="expected a name, "):
            serve(config, ServeOptions(allowed_hosts=(name,)))
    with bind("127.0.0.1", 0) as taken, pytest.raises(InputError, match="cannot be listened on"):
        serve(config, ServeOptions(port=taken.getsockname()[1]))
    assert allowed_hosts(ServeOptions(host="0.0.0.0")) == ("*",)
    assert allowed_hosts(ServeOptions(host="0.0.0.0", allowed_hosts=("rag.example",))) == ("rag.example",)
    assert examples(config) == [f"Capital of {land}?" for land in LANDS[25:30]]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs an extra .*: pip install 'ragjax\[serve\]'"):
        serve(config, ServeOptions())


def test_too_little_room_is_told_before_anybody_asks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has room for a batch of the evaluation, and not for one of the server."""
    monkeypatch.setattr("ragjax.serving.server.run_server", lambda *_: None)
    config = load_run_config(run)
    config = config.replace(decode=config.decode.replace(passage_cache_gib=1e-4))
    with pytest.raises(InputError, match=r"one device may retrieve 24; .* or lower evaluate\.batch_size \(of a server"):
        serve(config, ServeOptions(port=0))
    serve(config, ServeOptions(port=0, batch=2, warm_up_s=0.0))


@pytest.mark.slow
def test_sigterm_ends_it_when_all_is_answered(run: Path) -> None:
    """Under load, as a process of its own; the exit code is that of every command."""
    command = [sys.executable, "-m", "ragjax", "serve", str(run), "--port", "0", "--warm-up", "0"]
    environment = os.environ | QUICK_TO_COMPILE
    opened = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    with opened as process, ThreadPoolExecutor(24) as pool:
        assert process.stderr is not None
        told = next(line for line in process.stderr if line.startswith("serving "))
        port = int(told.rstrip().rsplit(":", 1)[1])
        asking = Running(None, port, None)
        asked = [pool.submit(asking.post, "/v1/answer", {"question": q}) for q in QUESTIONS * 3]
        while json.loads(asking.ask("GET", "/health")[2])["waiting"] < 16:  # the others are being compiled for
            time.sleep(0.05)
        time.sleep(0.3)
        process.terminate()
        assert [one.result()[0] for one in asked] == [200] * 24
        rest = process.stderr.read()
        assert process.wait(30) == 143 and "Traceback" not in rest
