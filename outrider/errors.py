"""Every error that outrider raises on purpose. The message is one sentence that says what to change.

OutriderError
├── ConfigError            bad flag, file or checkpoint; the command line exits with code 2
│   └── CheckpointError    a tensor or config entry of the checkpoint is wrong
├── RequestError           the client's request cannot be served as it is (HTTP 400)
│   ├── NotFoundError      unknown model or id (404)
│   ├── TooLargeError      the body is larger than the server reads (413)
│   ├── MediaError         an image could not be fetched or decoded (422)
│   └── OverloadedError    the queue is full (503, with Retry-After)
└── EngineError            the engine failed or is gone (500/503/504); the text never leaks internals
    ├── EngineDeadError    the engine process has ended, or is not ready
    └── DeadlineError      the request took longer than allowed (504)
"""

from __future__ import annotations


class OutriderError(Exception):
    """Base of all deliberate errors."""


class ConfigError(OutriderError):
    """A flag, a config file or an environment value cannot be used."""


class CheckpointError(ConfigError):
    """The checkpoint's files contradict themselves or what was asked for."""


class RequestError(OutriderError):
    """The request is refused: ``param`` names the field, ``value`` what it held."""

    status = 400
    type = "BadRequestError"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class NotFoundError(RequestError):
    """The thing named by the request does not exist."""

    status = 404
    type = "NotFoundError"


class TooLargeError(RequestError):
    """The request's body is larger than the server reads."""

    status = 413
    type = "PayloadTooLargeError"


class MediaError(RequestError):
    """An image of the request could not be fetched or decoded."""

    status = 422
    type = "UnprocessableEntityError"


class OverloadedError(RequestError):
    """The server cannot take the request now; ``retry_after_s`` tells when to try again."""

    status = 503
    type = "ServiceUnavailableError"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineError(OutriderError):
    """The engine could not finish the request; details are in the server's log only."""

    status = 500
    type = "InternalServerError"


class EngineDeadError(EngineError):
    """The engine process has ended, or is not ready yet."""

    status = 503
    type = "ServiceUnavailableError"


class DeadlineError(EngineError):
    """The request took longer than ``--request-timeout``."""

    status = 504
    type = "GatewayTimeoutError"
