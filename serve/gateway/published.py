"""The names under which adapters are published, read from the registries while requests come in."""

import asyncio
import logging
import time
from dataclasses import dataclass

from pipelines.models.served import ServedModel
from serve import adapter_registry
from serve.asgi import RequestError

PATIENCE_SECONDS = 5.0
"""How long a request for a name that is not known waits for a registry that does not answer."""

SCAN_SECONDS = 0.1
"""How often the registries are read for such names: they may have been published a moment ago."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class NamedModel:
    """What a requested name stands for: the base or merged model whose engine answers, and the name it knows."""

    engine: str
    name: str


class PublishedAdapters:
    """Versions and aliases in the registries of some models, as they were when last read."""

    def __init__(self, models: list[ServedModel]) -> None:
        self._models = [model for model in models if model.registry is not None]
        self._reading: asyncio.Task[None] | None = None
        self._began = self._seen = -SCAN_SECONDS
        self.names: dict[str, NamedModel] = {}

    def read(self) -> None:
        """Read the registries; blocking. Raises what their storage raises."""
        names: dict[str, NamedModel] = {}
        for model in self._models:
            assert model.registry is not None
            for version in adapter_registry.versions(model.registry):
                names[version] = NamedModel(model.name, version)
            for alias, version in adapter_registry.aliases(model.registry).items():
                names[alias] = NamedModel(model.name, version)
        self.names = names

    async def read_again(self) -> None:
        """Wait until a reading has ended that began after this was asked; raises RequestError 503 if it fails."""
        asked = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while self._models and self._seen < asked:
                    if self._reading is None or self._reading.done():
                        self._reading = asyncio.create_task(self._read())
                    await asyncio.shield(self._reading)
        except Exception as error:
            why = "timed out" if isinstance(error, TimeoutError) else getattr(error, "strerror", type(error).__name__)
            message = f"The published adapters cannot be read: {why}"
            raise RequestError(503, message, "registry_unavailable", retry_after=2) from None

    async def _read(self) -> None:
        """Read in a thread, for all who wait; one at a time, for a storage that hangs would take every thread."""
        await asyncio.sleep(self._began + SCAN_SECONDS - time.monotonic())
        self._began = time.monotonic()
        try:
            await asyncio.to_thread(self.read)
        except Exception:
            logger.exception("the registry of adapters cannot be read")
            raise
        self._seen = self._began
