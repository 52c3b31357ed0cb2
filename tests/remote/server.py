"""A server of next-token scores in each dialect on a free loopback port, with faults and lies on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from proxytune.settings import Remote, load

PATHS = {"vllm": "/v1/completions", "sglang": "/generate", "llamacpp": "/completion", "openai": "/v1/completions"}
MODEL = "served"

Fault = Callable[["Handler", dict[str, Any]], None]


class Server(ThreadingHTTPServer):
    """Serves `model(ids) -> (T, V)` logits after each id.

    faults are used up one a request, and `luck` says what becomes of every other; `lie` changes honest answers. asked:
    the bodies of requests for scores. most_top, chosen, prompt_scores: what this server can do; told: whether it tells
    scores at all (openai). after: scores are taken after temperature and bias. longest: the context that it tells of.
    down: paths that are answered 503.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, dialect: str, model: Callable[[list[int]], Tensor], tokenizer: Any = None, **abilities: Any):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.dialect, self.model, self.tokenizer = dialect, model, tokenizer
        self.most_top = abilities.pop("most_top", None)
        self.chosen = abilities.pop("chosen", True)
        self.prompt_scores = abilities.pop("prompt_scores", True)
        self.after = abilities.pop("after", False)
        self.text = abilities.pop("text", str)
        self.told = abilities.pop("told", True)
        self.longest = abilities.pop("longest", None)
        assert not abilities
        self.faults: list[Fault | None] = []
        self.down: set[str] = set()
        self.luck: Callable[[], Fault | None] = lambda: None
        self.lie: Callable[[dict[str, Any], dict[str, Any]], Any] = lambda reply, body: reply
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.one_at_a_time = threading.Lock()
        self.connections = 0
        self.chosen_now: dict[int, bool] = {}  # by thread: whether the request that is being answered asks for ids
        self.mixed = False  # whether requests for ids and for the best scores were ever answered together
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        super().__exit__(*exception)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""

    def scores(self, ids: list[int], temperature: float, bias: dict[int, float]) -> tuple[Tensor, int]:
        """Log-probabilities after each id, and the id that the server itself says next."""
        with torch.inference_mode():
            logits = self.model(ids).double()
        changed = logits[-1].clone()
        for i, by in bias.items():
            changed[i] += by
        said = int(changed.argmax()) if temperature == 0 else int(changed.topk(3).indices[-1])
        if self.after and temperature not in (0, 1):
            logits = logits / temperature
        return logits.log_softmax(-1), said

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return getattr(self, f"_{self.dialect}")(body)

    def _vllm(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ids, chosen = body["prompt"], body.get("logprob_token_ids") if self.chosen else None
        wanted = max(body["logprobs"], body.get("prompt_logprobs", 0))
        if self.most_top and wanted > self.most_top and not chosen:
            message = f"Requested sample logprobs of {wanted}, which is greater than max allowed: {self.most_top}"
            return 400, {"error": {"message": message, "code": 400}}
        scores, said = self.scores(ids, body["temperature"], _biases(body))
        best = chosen or scores[-1].topk(body["logprobs"]).indices.tolist()
        entries = {f"token_id:{i}": float(scores[-1, i]) for i in dict.fromkeys([said, *best])}
        choice = {
            "index": 0,
            "text": "",
            "logprobs": {
                "tokens": [f"token_id:{said}"],
                "token_logprobs": [float(scores[-1, said])],
                "top_logprobs": [entries],
            },
            "finish_reason": "length",
            "prompt_logprobs": None,
        }
        if self.prompt_scores and (count := body.get("prompt_logprobs")):
            choice["prompt_logprobs"] = [
                None,
                *(self._ranked(scores[t], ids[t + 1], count) for t in range(len(ids) - 1)),
            ]
        return 200, {"model": body["model"], "choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    def _ranked(self, scores: Tensor, actual: int, count: int) -> dict[str, Any]:
        rank = int((scores > scores[actual]).sum()) + 1
        entries = {str(actual): {"logprob": float(scores[actual]), "rank": rank, "decoded_token": ""}}
        for place, i in enumerate(scores.topk(count).indices.tolist(), 1):
            entries[str(i)] = {"logprob": float(scores[i]), "rank": place, "decoded_token": ""}
        return entries

    def _sglang(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ids, top, chosen = body["input_ids"], body["top_logprobs_num"], body["token_ids_logprob"]
        sampling = body["sampling_params"]
        scores, said = self.scores(ids, sampling["temperature"], _biases(sampling))
        start = body["logprob_start_len"] if body["logprob_start_len"] >= 0 else len(ids) - 1

        def entries(t: int, which: list[int]) -> list[list[Any]]:
            return [[float(scores[t, i]), i, None] for i in which]

        inside = range(start, len(ids) - 1)
        meta = {
            "prompt_tokens": len(ids),
            "completion_tokens": 1,
            "input_token_logprobs": [[None, ids[start], None], *(entries(t, [ids[t + 1]])[0] for t in inside)],
            "output_token_logprobs": entries(-1, [said]),
        }
        if top:
            best = scores.topk(top, dim=-1).indices.tolist()
            meta["input_top_logprobs"] = [None, *(entries(t, best[t]) for t in inside)]
            meta["output_top_logprobs"] = [entries(-1, best[-1])]
        if chosen and self.chosen:
            meta["input_token_ids_logprobs"] = [None, *(entries(t, chosen) for t in inside)]
            meta["output_token_ids_logprobs"] = [entries(-1, chosen)]
        return 200, {"text": "", "meta_info": meta}

    def _llamacpp(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        scores, said = self.scores(body["prompt"], body["temperature"], dict(body.get("logit_bias") or []))
        count = min(body["n_probs"], scores.shape[-1])

        def entry(i: int) -> dict[str, Any]:
            return {"id": i, "token": "", "bytes": [], "logprob": float(scores[-1, i])}

        best = [entry(i) for i in scores[-1].topk(count).indices.tolist()]
        position = entry(said) | {"top_logprobs": best}
        reply = {"content": "", "model": MODEL, "tokens_evaluated": len(body["prompt"]), "truncated": False}
        return 200, reply | {"completion_probabilities": [position]}

    def _openai(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        count = body.get("logprobs")
        if count and (count > 5 or not self.told):
            return 400, {"error": {"message": "logprobs must be at most 5"}}
        if len(body.get("logit_bias") or {}) > 300:
            return 400, {"error": {"message": "logit_bias takes at most 300 entries"}}
        scores, said = self.scores(body["prompt"], body["temperature"], _biases(body))
        if not count:
            usage = {"prompt_tokens": len(body["prompt"])}
            return 200, {"model": body["model"], "choices": [{"text": self.text(said)}], "usage": usage}
        best = scores[-1].topk(body["logprobs"]).indices.tolist()
        entries = {self.text(i): float(scores[-1, i]) for i in [*best, *([said] if said not in best else [])]}
        listed = {"tokens": [self.text(said)], "token_logprobs": [float(scores[-1, said])], "top_logprobs": [entries]}
        choice = {"text": "", "logprobs": listed}
        return 200, {"model": body["model"], "choices": [choice], "usage": {"prompt_tokens": len(body["prompt"])}}


def behind(server: Server, **changes) -> Remote:
    """The settings of a base behind it."""
    top = 5 if server.dialect == "openai" else 20
    return load(Remote, {"name": server.dialect, "url": server.url, "model": MODEL, "top": top, **changes})


def _biases(body: dict[str, Any]) -> dict[int, float]:
    return {int(i): by for i, by in (body.get("logit_bias") or {}).items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        super().setup()
        with self.server.one_at_a_time:
            self.server.connections += 1

    def do_GET(self) -> None:
        if self.path in self.server.down:
            return self.reply(503, {"error": {"message": "down"}})
        if self.path == "/v1/models":
            told = {} if self.server.dialect in ("llamacpp", "openai") else {"max_model_len": self.server.longest}
            return self.reply(200, {"data": [{"id": MODEL, **told}]})
        if self.path == "/props" and self.server.dialect == "llamacpp":
            return self.reply(200, {"default_generation_settings": {"n_ctx": self.server.longest}})
        if self.path == "/get_model_info":
            return self.reply(200, {"model_path": MODEL})
        self.reply(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path in self.server.down:
            return self.reply(503, {"error": {"message": "down"}})
        if self.path == "/tokenize" and self.server.tokenizer:
            text = body.get("prompt", body.get("content"))
            return self.reply(200, {"tokens": self.server.tokenizer(text, add_special_tokens=False).input_ids})
        if self.path != PATHS[self.server.dialect]:
            return self.reply(404, {"error": {"message": "no such path"}})
        self.server.asked.append(body)
        self.server.headers.append(dict(self.headers))
        self.server.chosen_now[threading.get_ident()] = bool(body.get("logprob_token_ids"))
        status, reply = self.server.answer(body)
        with self.server.one_at_a_time:
            self.server.mixed |= len(set(self.server.chosen_now.values())) > 1
            self.server.chosen_now.pop(threading.get_ident())
            fault = self.server.faults.pop(0) if self.server.faults else self.server.luck()
        if fault:
            return fault(self, reply)
        self.reply(status, self.server.lie(reply, body) if status == 200 else reply)

    def reply(self, status: int, value: Any, **headers: str) -> None:
        self.send(status, json.dumps(value).encode(), **headers)

    def send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""
