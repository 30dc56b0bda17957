"""The routes: OpenAI's API over one engine, health, metrics, and a page to try the model on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from sessa_deploy import __version__
from sessa_deploy.errors import UserError
from sessa_deploy.reading import parse_json
from sessa_deploy.runtime.serve import metrics, pages
from sessa_deploy.runtime.serve.chat import converse
from sessa_deploy.runtime.serve.completions import complete
from sessa_deploy.runtime.serve.door import Door
from sessa_deploy.runtime.serve.errors import ApiError
from sessa_deploy.runtime.serve.schema import ChatBody, CompletionBody, DetokenizeBody, ErrorAnswer, TokenizeBody, refusal
from sessa_deploy.runtime.serve.security import GUARDED
from sessa_deploy.runtime.serve.service import Service, encoded

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
_ERRORS: dict[int | str, dict[str, Any]] = {status: {"description": what, "model": ErrorAnswer} for status, what in {
    400: "The request is wrong", 401: "The key is missing or wrong", 404: "No such model", 408: "The body did not come", 413: "The body is too large",
    429: "The queue is full", 500: "The engine failed", 503: "Loading, draining, unhealthy, or waited too long", 504: "The time limit",
}.items()}
_STREAMED: dict[int | str, dict[str, Any]] = {**_ERRORS, 200: {"description": "The answer; with stream, its parts", "content": {"text/event-stream": {}}}}


def make_app(service: Service, lifespan: Lifespan | None = None) -> FastAPI:
    """The ASGI application of a service. lifespan: what happens when the server starts and ends."""
    app = FastAPI(title="sessa-deploy", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan or _nothing, redirect_slashes=False,
                  description="OpenAI's API over one Sessa model.")
    app.router.route_class = _StrictRoute
    _openai(app, service)
    _watching(app, service)
    app.add_exception_handler(RequestValidationError, _wrong_body)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.openapi = _openapi(app, service.settings.key is not None)  # type: ignore[method-assign]
    app.add_middleware(Door, service=service)
    return app


def _openai(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=_STREAMED, tags=["text"], openapi_extra=_example(prompt="Once upon a time", max_tokens=64, temperature=0.7))
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Text behind a prompt, or behind several."""
        return await complete(service, body, request)

    @app.post("/v1/chat/completions", responses=_STREAMED, tags=["text"], openapi_extra=_example(messages=[{"role": "user", "content": "Hello"}]))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """The answer to a conversation, where the model has a chat template."""
        return await converse(service, body, request)

    def card() -> dict[str, Any]:
        engine = service.loaded
        return {"id": service.settings.name, "object": "model", "created": service.created, "owned_by": "sessa-deploy",
                "max_model_len": engine.capacity if engine is not None else None, "chat": engine is not None and engine.template is not None}

    @app.get("/v1/models", responses={401: _ERRORS[401]}, tags=["models"])
    async def models() -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [card()]})

    @app.get("/v1/models/{model:path}", responses={401: _ERRORS[401], 404: _ERRORS[404]}, tags=["models"])
    async def model(model: str) -> Response:
        """The model by its name."""
        service.check_model(model)
        return JSONResponse(card())

    @app.get("/tokenizer_info", responses={code: _ERRORS[code] for code in (400, 401, 503)}, tags=["tokens"])
    async def tokenizer_info() -> Response:
        """The special tokens and the chat template, as vLLM tells them."""
        return JSONResponse(service.engine.tokenizer_info())

    @app.post("/tokenize", responses=_ERRORS, tags=["tokens"], openapi_extra=_example(prompt="Hello"))
    async def tokenize(body: TokenizeBody) -> Response:
        """Token ids of text, or of a conversation."""
        service.check_model(body.model)
        engine = service.engine
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "tokenize needs prompt or messages, and not both", "prompt")
        if body.prompt is not None and body.add_generation_prompt is not None:
            raise ApiError(400, "add_generation_prompt goes with messages", "add_generation_prompt")
        if body.messages is not None and body.add_special_tokens is not None:
            raise ApiError(400, "add_special_tokens goes with prompt", "add_special_tokens")
        if body.messages is None:
            ids = await encoded(engine, body.prompt or "", body.add_special_tokens is not False)
        else:
            text = engine.render([m.plain() for m in body.messages], body.add_generation_prompt is not False)
            ids = await encoded(engine, text, False, "messages")
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": engine.capacity})

    @app.post("/detokenize", responses=_ERRORS, tags=["tokens"], openapi_extra=_example(tokens=[72, 105]))
    async def detokenize(body: DetokenizeBody) -> Response:
        """Text of token ids, special tokens written out."""
        service.check_model(body.model)
        engine = service.engine
        engine.check_ids(body.tokens, "tokens")
        return JSONResponse({"prompt": engine.text("prompt").decode(body.tokens, skip_special=False)})


def _example(**body: Any) -> dict[str, Any]:
    """What the page at /docs shows as a request."""
    return {"x-example": body}


def _watching(app: FastAPI, service: Service) -> None:
    @app.get("/health/live", tags=["health"])
    async def live() -> Response:
        """Whether the process answers."""
        return JSONResponse({"status": "live"})

    @app.get("/health", include_in_schema=False)  # where load generators look
    @app.get("/health/ready", responses={503: _ERRORS[503]}, tags=["health"])
    async def ready() -> Response:
        """Whether requests are taken: not while the model loads, after failures in a row, or while the server drains."""
        trouble = service.trouble
        return trouble.response() if trouble is not None else JSONResponse({"status": "ready"})

    if service.settings.metrics:
        @app.get("/metrics", tags=["health"], response_class=Response)
        async def prometheus() -> Response:
            """Figures for Prometheus."""
            return Response(service.metrics.text(), headers={"Content-Type": metrics.CONTENT_TYPE})

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return pages.respond("page.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return pages.respond("docs.html")


class _StrictRequest(Request):
    """Its JSON is UTF-8 and names no key twice."""

    async def json(self) -> Any:
        try:
            return parse_json(await self.body(), "the body")
        except UserError as error:
            raise ApiError(400, f"{error.what}: {error.got}", code="invalid_json") from None


class _StrictRoute(APIRoute):
    """FastAPI's own way to give handlers another Request."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                # A page of another site could post text or a form to this server without asking; JSON it cannot.
                raise ApiError(400, f"the body must be sent as Content-Type: application/json; got {kind[:100] or 'none'}", code="not_json")
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


async def _wrong_body(request: Request, error: RequestValidationError) -> Response:
    return refusal(error.errors()).response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    if isinstance(error.__cause__, ApiError):
        return error.__cause__.response()
    what = {404: f"there is no {request.url.path[:200]} here", 405: f"{request.method[:20]} is not what {request.url.path[:200]} takes"}
    code = {404: "unknown_route", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, what.get(error.status_code, str(error.detail)), code=code).response(error.headers)


def _openapi(app: FastAPI, guarded: bool) -> Callable[[], dict[str, Any]]:
    """FastAPI's description without the 422 that never comes, and with the key where one is asked for."""
    made = FastAPI.openapi

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = json.loads(json.dumps(made(app)))
            for path, methods in schema["paths"].items():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
                    if guarded and path.startswith(GUARDED):
                        operation["security"] = [{"key": []}]
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            if guarded:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = schema
        return app.openapi_schema

    return describe


@asynccontextmanager
async def _nothing(app: FastAPI) -> AsyncIterator[None]:
    yield
