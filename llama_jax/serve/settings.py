"""`ServeConfig`: what a server allows; nothing here changes an answer."""

import dataclasses

from llama_jax.arguments import checked
from llama_jax.errors import ConfigError


@checked(ConfigError)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of a server.

    Attributes:
      host: address to listen on; the default is this machine alone.
      port: 0 chooses a free one.
      api_key: that requests must have; None asks for none.
      origins: of other web pages that may use the server.
      max_body: most bytes of a request.
      max_open: most requests that are answered or wait.
      time_limit: seconds that an answer may take.
      drain: seconds that accepted requests have when the server ends.

    >>> ServeConfig(port=0).host
    '127.0.0.1'
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    max_body: int = 4 << 20
    max_open: int = 1024
    time_limit: float = 600.0
    drain: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port: must be between 0 and 65535, got {self.port}")
        if self.api_key is not None and not self.api_key.isascii():
            raise ConfigError("api_key: must be ASCII, since headers are")
        if self.api_key == "":
            raise ConfigError("api_key: is empty; leave it out to ask for none")
        for name in ("max_body", "max_open", "time_limit", "drain"):
            if getattr(self, name) <= 0:
                value = getattr(self, name)
                raise ConfigError(f"{name}: must be positive, got {value}")
