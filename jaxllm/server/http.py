"""HTTP as uvicorn's fast parser reads it, with an end to how long a request's head may be (the parser itself knows none)."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_LONGEST_HEAD = 1 << 16  # bytes of the request line and the headers


class Http(HttpToolsProtocol):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._head: int | None = None  # bytes of a head that has not come to its end

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > _LONGEST_HEAD and not self.transport.is_closing():
                self.send_400_response(f"The request's headers are longer than {_LONGEST_HEAD} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0

    def on_headers_complete(self) -> None:
        self._head = None
        super().on_headers_complete()
