"""A stand-in for `vllm serve`: POST /v1/completions with token ids and prompt_logprobs, answered by a model in memory.

Requests and answers have vLLM's form as far as a teacher needs it, so that the client works with a real server unchanged.
``served_teacher.py`` starts it; it prints nothing.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor


class BadRequest(ValueError):
    """Answered with status 400."""


def position(logp: Tensor, token: int, k: int) -> dict[str, dict[str, Any]]:
    """One position of ``prompt_logprobs``: the prompt's token, then the top K without it; keys are JSON strings."""
    top = logp.topk(k).indices.tolist()
    ids = [token, *(i for i in top if i != token)]
    ranks = [1 + int((logp > logp[i]).sum()) for i in ids]
    found = {str(i): {"logprob": max(logp[i].item(), -9999.0), "rank": r} for i, r in zip(ids, ranks, strict=True)}
    return {i: {**entry, "decoded_token": None} for i, entry in found.items()}


@torch.no_grad()
def complete(model: torch.nn.Module, name: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    prompt, k, limit = body.get("prompt"), body.get("prompt_logprobs"), body.get("max_tokens", 16)
    if body.get("model") != name:
        raise BadRequest(f"The model `{body.get('model')}` does not exist.")
    if not isinstance(prompt, list) or not prompt:
        raise BadRequest("this stand-in has no tokenizer: prompt must be token ids or a list of them")
    if not isinstance(k, int) or not 0 < k <= 20:
        raise BadRequest(f"Requested prompt logprobs of {k}, which is greater than max allowed: 20")  # vLLM's --max-logprobs
    if limit != 1 or body.get("stream"):
        raise BadRequest("this stand-in scores prompts: wanted max_tokens=1 and no stream")
    prompts = prompt if isinstance(prompt[0], list) else [prompt]
    choices = []
    for index, ids in enumerate(prompts):
        logp = model(input_ids=torch.tensor([ids], device=next(model.parameters()).device)).logits[0].float().log_softmax(-1)
        scored = [None, *(position(logp[t - 1], ids[t], k) for t in range(1, len(ids)))]
        new = int(logp[-1].exp().multinomial(1)) if body.get("temperature", 1.0) else int(logp[-1].argmax())
        choice = {"index": index, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        asked = {"prompt_token_ids": ids, "token_ids": [new]} if body.get("return_token_ids") else {}
        choices.append({**choice, "prompt_logprobs": scored, **asked})
    tokens = sum(map(len, prompts))
    usage = {"prompt_tokens": tokens, "completion_tokens": len(prompts), "total_tokens": tokens + len(prompts)}
    head = {"id": f"cmpl-{time.time_ns():x}", "object": "text_completion", "created": int(time.time()), "model": name}
    return {**head, "choices": choices, "usage": usage}


@contextmanager
def serve(model: torch.nn.Module, name: str) -> Iterator[str]:
    """Serve ``model`` on a free port of the loopback; gives the base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, answer = 200, {}
            try:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/completions":
                    raise BadRequest(f"no {self.path} here")
                answer = complete(model, name, body)
            except BadRequest as error:
                status, answer = 400, {"error": {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}}
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
