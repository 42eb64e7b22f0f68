"""`ClusterClient`: asks a server's `GET /cluster`, and says in words why there is no answer."""

import httpx
from pydantic import ValidationError

from cluster.status.cluster_view import ClusterView
from engine import NanoserveError

TIMEOUT_SECONDS = 5.0


class NoAnswerError(NanoserveError):
    """Nobody answers, or somebody who is no nanoserve."""


class ClusterClient:
    """For the server at `url`, with or without the /v1 that other clients want. Use as a context manager."""

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._client = httpx.Client(timeout=TIMEOUT_SECONDS, transport=transport)

    def __enter__(self) -> "ClusterClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def view(self) -> ClusterView:
        """How the cluster is now; raises `NoAnswerError`."""
        try:
            answer = self._client.get(f"{self.url}/cluster")
        except httpx.TimeoutException:
            raise NoAnswerError(f"{self.url} does not answer within {TIMEOUT_SECONDS:.0f} s.") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NoAnswerError(f"Nothing answers at {self.url}: {error}.") from None
        if answer.status_code != 200:
            hint = "; is it nanoserve, and not older than this?" if answer.status_code == 404 else "."
            raise NoAnswerError(f"{self.url}/cluster answers with status {answer.status_code}{hint}")
        try:
            return ClusterView.model_validate_json(answer.content)
        except ValidationError:
            raise NoAnswerError(f"What {self.url}/cluster answers is not what nanoserve says.") from None
