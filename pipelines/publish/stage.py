"""Publish: a folder for a model hub, with a card written from the manifests, and, if wanted, its upload to ModelScope.

<place>/model/      weights, tokenizer, configuration.json, README.md
<place>/dataset/    train.jsonl, test.jsonl, README.md
<place>/upload/     what has been uploaded, so that a broken upload goes on where it stopped
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipelines.artifacts.reports.clean import CleanReport
from pipelines.artifacts.reports.evaluate import EvaluateReport
from pipelines.artifacts.reports.publish import PublishReport
from pipelines.artifacts.reports.rows import RowsReport, SplitReport
from pipelines.artifacts.reports.train import MergeReport, TrainReport
from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.stage import Inputs, Output, Stage
from pipelines.artifacts.workspace import Place, to_json
from pipelines.errors import Problem
from pipelines.progress import say
from pipelines.publish.cards import CardFacts, dataset_card, model_card, public_name
from pipelines.publish.upload import TOKEN, Kind, upload
from pipelines.recipe.ingest import Ingest
from pipelines.recipe.keys import key_problem
from pipelines.recipe.publish import Publish
from pipelines.recipe.train import Merge, Train, fingerprint_of

CONFIGURATION = {"framework": "pytorch", "task": "text-generation"}
"""ModelScope's configuration.json, without which it takes a folder for no model."""


@dataclass(frozen=True)
class PublishInputs(Inputs):
    """What is published, and what the cards tell of."""

    ingest: Output[RowsReport] | None
    synthesize: Output[RowsReport] | None
    """Where rows come from, beside those of `ingest` or in their place."""
    clean: Output[CleanReport] | None
    split: Output[SplitReport]
    train: Output[TrainReport]
    merge: Output[MergeReport] | None
    evaluate: Output[EvaluateReport] | None

    def digests(self) -> dict[str, str]:
        """All but that of synthesize, which workspaces were made without; split's follows from it."""
        return {stage: digest for stage, digest in super().digests().items() if stage != "synthesize"}


@dataclass(frozen=True)
class PublishStage(Stage[PublishInputs, PublishReport]):
    """Write the folders of model and data set with their cards, and upload those that have a repository."""

    name: ClassVar[str] = "publish"
    version: ClassVar[int] = 1
    on_disk: ClassVar[tuple[str, ...]] = ("split", "train", "merge")

    section: Publish
    recipe_name: str
    train: Train
    merge: Merge | None
    ingest: Ingest | None

    @property
    def reports(self) -> type[PublishReport]:
        """The class of its report."""
        return PublishReport

    def fingerprint_inputs(self) -> dict[str, Any]:
        """The section, and what the cards say of other sections."""
        source = self.ingest.source if self.ingest else None
        return {"section": self.section.model_dump(), "train": fingerprint_of(self.train), "source": source}

    def preflight(self) -> list[Problem]:
        """An upload is wanted, and there is no token for it."""
        if self.section.upload and not os.environ.get(TOKEN):
            return [Problem("publish.upload", f"needs the environment variable {TOKEN}")]
        if self.section.upload and (said := key_problem(TOKEN)):
            return [Problem("publish.upload", said)]
        return []

    def run(self, place: Place, inputs: PublishInputs) -> PublishReport:
        """Write the folders anew, and upload what is not uploaded yet."""
        section = self.section
        folders = {"model": place.local("model"), "dataset": place.local("dataset")}
        self._write_model(inputs, folders["model"])
        _write_dataset(inputs.split, folders["dataset"])
        facts = self._facts(inputs)
        (folders["model"] / "README.md").write_text(model_card(facts), encoding="utf-8")
        (folders["dataset"] / "README.md").write_text(dataset_card(facts), encoding="utf-8")
        uploaded: dict[str, str] = {}
        repositories: dict[Kind, str | None] = {"model": section.model_id, "dataset": section.dataset_id}
        for kind, repository in repositories.items():
            if repository and section.upload:
                memory = place.local("upload", f"{kind}.json")
                uploaded[kind] = upload(section, kind, repository, folders[kind], memory)
            elif repository:
                say(f"  {kind}: would be uploaded to {repository}; publish.upload=true does it")
        done = "; ".join(f"{kind} at {address}" for kind, address in uploaded.items()) or "nothing uploaded"
        return PublishReport(
            summary=f"model and data set with their cards; {done}",
            digest=hashlib.sha256(to_json(_sizes(folders))).hexdigest(),
            uploaded=uploaded,
            files={kind: kind for kind in folders},
        )

    def _write_model(self, inputs: PublishInputs, folder: Path) -> None:
        """The weights that are published, without what names this machine."""
        if self.section.weights == "merged" and inputs.merge is not None:
            source = inputs.merge.folder.local(inputs.merge.report.model)
        else:
            source = inputs.train.folder.local(inputs.train.report.weights)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder, copy_function=_link)
        (folder / "configuration.json").write_bytes(to_json(CONFIGURATION))
        config = folder / "adapter_config.json"
        if config.exists():
            adapter = json.loads(config.read_text(encoding="utf-8"))
            adapter["base_model_name_or_path"] = public_name(self.section.base_model or self.train.model)
            config.unlink()  # a link to the workspace's own copy, which keeps its path
            config.write_bytes(to_json(adapter))

    def _facts(self, inputs: PublishInputs) -> CardFacts:
        origins = [output.report.rows for output in (inputs.ingest, inputs.synthesize) if output]
        return CardFacts(
            name=self.recipe_name,
            publish=self.section,
            train=self.train,
            merge=self.merge,
            ingest=self.ingest,
            is_synthesized=inputs.synthesize is not None,
            rows_read=sum(origins),
            operators=inputs.clean.report.operators if inputs.clean else [],
            evaluation_sets=inputs.clean.report.evaluation_sets if inputs.clean else [],
            not_compared=inputs.clean.report.not_compared if inputs.clean else [],
            sides=inputs.split.report.rows,
            trained=inputs.train.report,
            evaluated=inputs.evaluate.report if inputs.evaluate else None,
        )


def _link(source: str, target: str) -> None:
    """A second name for the same bytes where the file system has that, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)  # with its time, by which the client knows what it has uploaded


def _write_dataset(split: Output[SplitReport], folder: Path) -> None:
    """Both sides of the split as JSONL, without columns that are empty throughout a row."""
    folder.mkdir(parents=True, exist_ok=True)
    files = split.report.outputs
    for side, names in (("train", files.train), ("test", files.test)):
        with open(folder / f"{side}.jsonl", "w", encoding="utf-8") as sink:
            for table in read_tables(split.folder.workspace, split.paths(names)):
                for row in table.drop_columns(["pos"]).to_pylist():
                    kept = {name: value for name, value in row.items() if value is not None}
                    sink.write(json.dumps(kept, ensure_ascii=False, default=str) + "\n")


def _sizes(folders: dict[str, Path]) -> dict[str, int]:
    files = [file for folder in folders.values() for file in sorted(folder.rglob("*")) if file.is_file()]
    return {f"{file.parent.name}/{file.name}": file.stat().st_size for file in files}
