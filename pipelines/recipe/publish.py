"""The recipe's section `publish`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.recipe.base import Section

RepoId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]


class Publish(Section):
    """Folders for a model hub, and their upload to ModelScope where `upload` says so."""

    model_id: RepoId | None = Field(None, description="owner/name on ModelScope; null keeps the model local")
    dataset_id: RepoId | None = Field(None, description="owner/name on ModelScope; null keeps the data set local")
    weights: Literal["adapter", "merged"] = Field("adapter", description="which of the two is published")
    base_model: str | None = Field(None, description="public name of the base model; null: as in train.model")
    license: str | None = Field(None, description="licence of the model, such as apache-2.0; needed to upload it")
    data_license: str | None = Field(None, description="licence of the data set; needed to upload it")
    visibility: Literal["private", "public"] = Field("private", description="who sees a repository that is created")
    endpoint: str | None = Field(None, description="the hub's address; null: modelscope's own default")
    upload: bool = Field(False, description="false: only write the folders")

    @model_validator(mode="after")
    def _can_be_uploaded(self) -> "Publish":
        if self.upload and not (self.model_id or self.dataset_id):
            raise ValueError("upload needs model_id or dataset_id")
        for repository, licence in (("model_id", "license"), ("dataset_id", "data_license")):
            if self.upload and getattr(self, repository) and not getattr(self, licence):
                raise ValueError(f"to upload {repository}, say under which {licence}")
        return self
