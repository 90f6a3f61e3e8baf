"""Running an app until a signal ends it."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import signal
import socket
import ssl
import time

import uvicorn

from jaxllm.errors import ConfigError
from jaxllm.server.app import make_app
from jaxllm.server.config import ServerConfig
from jaxllm.server.http import Http
from jaxllm.server.service import Service
from jaxllm.serving import AsyncLLM

logger = logging.getLogger(__name__)


def listen(config: ServerConfig) -> socket.socket:
    """The socket to serve at, bound before a model is loaded for it: a port that is taken shows at once. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        where, why = f"{config.host}:{config.port}", error.strerror or error
        raise ConfigError(f"cannot listen at {where}: {why}; choose another --port or --host") from error
    listener.set_inheritable(False)
    return listener


def address(config: ServerConfig, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"{'https' if config.tls_key else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def check_tls(config: ServerConfig) -> None:
    """What is wrong with the certificate or its key shows before a model is loaded. Raises ConfigError."""
    if config.tls_certificate is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(config.tls_certificate, config.tls_key)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            files = f"tls_certificate={config.tls_certificate} and tls_key={config.tls_key}"
            raise ConfigError(f"{files} cannot be read as a certificate and its key (PEM): {error}") from error


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT lets the requests that are there finish, and refuses others; the second ends at once."""

    def __init__(self, settings: uvicorn.Config, service: Service, timeout: float):
        super().__init__(settings)
        self._service, self._timeout, self._deadline = service, timeout, math.inf
        self._hangs = False

    def handle_exit(self, sig: int, frame: object) -> None:
        if self._service.draining or not self.started:
            self.should_exit = self.force_exit = True
            return
        self._service.draining, self._deadline = True, time.monotonic() + self._timeout
        name, pending = signal.Signals(sig).name, self._service.pending
        logger.warning("%s: %d prompts have %g s to finish; the same signal again ends them at once", name, pending, self._timeout)

    def close(self) -> None:
        """Sends the traces that have not been sent."""
        if self._service.tracer is not None:
            self._service.tracer.close()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to end."""
        trouble = self._service.trouble()
        if (hangs := trouble is not None and trouble.code == "engine_hangs") != self._hangs:
            self._hangs = hangs
            logger.error("%s", trouble.message) if hangs else logger.warning("the engine hangs no more")
        if self._service.draining and self._service.pending and time.monotonic() > self._deadline:
            logger.warning("%d prompts have not finished in time: they are ended with an error", self._service.pending)
            await asyncio.to_thread(self._service.llm.shutdown)
            self._deadline = math.inf
        return await super().on_tick(counter) or (self._service.draining and not self._service.pending)


def run_server(llm: AsyncLLM, config: ServerConfig, listener: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT, drains, and shuts the engine down."""
    try:
        server = make_server(llm, config)
        gc.collect()
        gc.freeze()  # what is there now stays: no collection, which halts all streams, need look at it again
        server.run(sockets=[listener])
        server.close()
    finally:
        llm.shutdown()


def make_server(llm: AsyncLLM, config: ServerConfig) -> Server:
    app = make_app(llm, config)
    settings = uvicorn.Config(
        app,
        log_config=None,
        lifespan="off",
        access_log=False,
        server_header=False,
        ssl_certfile=config.tls_certificate,
        ssl_keyfile=config.tls_key,
        timeout_graceful_shutdown=5,
        http=Http,
    )
    return Server(settings, app.state.server, config.drain_timeout)
