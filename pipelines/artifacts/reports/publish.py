"""The report of publishing."""

from pipelines.artifacts.stage import Report


class PublishReport(Report):
    """The folders for a hub, and where they were uploaded."""

    uploaded: dict[str, str]
    """Addresses of repositories, by kind: `model` or `dataset`."""
    files: dict[str, str]
    """The folder of each kind, relative to the stage's."""
