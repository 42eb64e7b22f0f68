"""Everything the engine raises on purpose.

    NanoserveError
    ├── ConfigError (also ValueError)      a setting is wrong: what, where, what would be right
    │   ├── CheckpointError                the checkpoint is missing, malformed or of an unknown architecture
    │   └── CapacityError                  the model or its cache does not fit the device
    ├── RequestError (also ValueError)     one request is wrong; `parameter` names the field
    └── EngineDeadError                    a step failed or a rank died; every open request ends with it

Capacity outcomes of a running engine (no free block, no free row) are values inside the scheduler, never exceptions.
"""


class NanoserveError(Exception):
    """Root of every error the project raises on purpose."""


class ConfigError(NanoserveError, ValueError):
    """A setting that cannot work; raised before anything starts."""


class CheckpointError(ConfigError):
    """A checkpoint that is missing, malformed, or of an architecture that is not supported."""


class CapacityError(ConfigError):
    """The model or its KV cache does not fit the device."""


class RequestError(NanoserveError, ValueError):
    """A request that can never run; `parameter` is the name of the offending field."""

    def __init__(self, message: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.parameter = parameter
        self.code = code

    def __reduce__(self) -> tuple[type["RequestError"], tuple[str, str | None, str | None]]:
        return type(self), (self.message, self.parameter, self.code)


class EngineDeadError(NanoserveError):
    """The engine cannot run another step; the message names the rank and the cause."""


def first_line(error: BaseException) -> str:
    """What an error says, for a message of ours: libraries go on for pages. Its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
