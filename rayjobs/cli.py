"""The `danlu` command.

Exit codes: 0 done, 1 the work failed, 2 the recipe or the arguments are wrong, 3 hardware is missing, 4 `check` found a
recipe right that this machine is not ready for, 143 ended by SIGTERM.
"""

import asyncio
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.artifacts.files import Destination, created, require_writable
from pipelines.artifacts.staging import Staging
from pipelines.artifacts.workspace import Workspace, open_workspace, unwritable
from pipelines.clean.analyze import filters_of
from pipelines.clean.custom_source import declared_operators
from pipelines.clean.manual_edits import export_rows, require_exportable
from pipelines.clean.stage import plan_of
from pipelines.clean.thresholds import what_if
from pipelines.errors import DanluError, DataError, InputError, Problem, RecipeError, nearest
from pipelines.llm.dispatch import forget_failures
from pipelines.models.lineup import lineup_of
from pipelines.models.resolve import resolve
from pipelines.models.served import MODELS
from pipelines.models.tokenizer import open_tokenizer
from pipelines.progress import say
from pipelines.recipe.ingest import Source
from pipelines.recipe.keys import endpoint_key
from pipelines.recipe.load import recipe_file, shipped_recipes
from pipelines.recipe.paths import paths_read
from pipelines.recipe.schema import NAME_RULE, RECIPE_NAME, Recipe
from pipelines.recipe.synthesize import Synthesize
from pipelines.recipe.train import not_servable
from pipelines.refine.xtuner_export import export_conversations
from pipelines.report.page import closing
from pipelines.report.trace import rows_lines, trace
from pipelines.sources.read import describe_source
from pipelines.synthesize.stage import grid_of
from pipelines.synthesize.suggest import suggest_map
from pipelines.synthesize.suggest_values import suggest_values
from pipelines.synthesize.trial import try_cells
from pipelines.train.audit import audit
from pipelines.train.memory import describe, describe_merge
from pipelines.train.proof import row_at, template_of
from pipelines.train.stage import describe_model
from rayjobs import one_node, pipeline
from rayjobs.cluster import Cluster, end_on_sigterm
from rayjobs.submit import Jobs, closing_line, exit_code, start

app = typer.Typer(
    help="From raw rows to a chat model that answers over HTTP.", no_args_is_help=True, pretty_exceptions_enable=False
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"danlu {version('danlu')}")
        raise typer.Exit


@app.callback()
def danlu(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version, and end.")
    ] = False,
) -> None:
    """From raw rows to a chat model that answers over HTTP."""


out = Console(highlight=False)
NOT_READY = 4
"""Exit code of `check` for a recipe that is right, and that something on this machine would stop."""
UNCUT = 10_000
"""Columns of a table whose lines are longer than a terminal's rather than cut, so that a path can be copied."""

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Recipe keys to change.")]
WorkspaceOption = Annotated[
    str | None, typer.Option("--workspace", help="Folder or fsspec URL for all output. (default: runs/<recipe name>)")
]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Ray cluster to run on. (default: RAY_ADDRESS, else this machine)")
]


OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace a file that danlu did not write, or that was changed since.")
]


@app.command()
def recipes() -> None:
    """List the recipes that ship with danlu."""
    for name, path in shipped_recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        out.print(f"{name:14}{first.removeprefix('#').strip()}", markup=False, soft_wrap=True)


@app.command()
def init(name: str, file: Annotated[Path | None, typer.Argument()] = None, overwrite: OverwriteOption = False) -> None:
    """Copy a shipped recipe to a file of your own."""
    shipped = shipped_recipes()
    if name not in shipped:
        raise RecipeError(name, [Problem("", f"no such recipe; {nearest(name, shipped)}")])
    target = file or Path(f"{name}.yaml")
    destination = Destination("FILE", str(target), "--overwrite", overwrite)
    require_writable(destination, None)
    if not RECIPE_NAME.fullmatch(target.stem):
        raise InputError(f"{target}: the recipe is named after its file; {NAME_RULE}")
    text = shipped[name].read_text(encoding="utf-8")
    text = re.sub(r"(?m)^# +make .*\n", "", text)
    text = re.sub(rf"(?m)^(# +danlu [a-z]+ ){name}\b", lambda found: found[1] + shlex.quote(str(target)), text)
    # A name of its own, lest it share the folder `runs/<name>` with the shipped recipe.
    text = re.sub(r"(?m)^name: .*$", f"name: {target.stem}", text, count=1)
    with created(destination, None) as sink:
        sink.write(
            f"# After the recipe `{name}` that comes with danlu; docs/recipes.md has every key.\n{text}".encode()
        )
    say(f"{target}: written; danlu check {target}")


@app.command()
def check(recipe: RecipeName, overrides: Overrides = None, workspace: WorkspaceOption = None) -> None:
    """Check a recipe without running anything, and print what would be done."""
    loaded = pipeline.load(recipe, overrides)
    place = open_workspace(workspace, loaded.name, on_cluster=False)
    problems = pipeline.problems_of(pipeline.stages_of(loaded), place)
    if wrong := [problem for problem in problems if problem.on_every_machine]:
        raise RecipeError(loaded.name, wrong)
    problems += pipeline.missing_gpus(loaded)
    problems += [Problem("--workspace", reason)] if (reason := unwritable(place)) else []
    stages = " → ".join(stage.name for stage in pipeline.stages_of(loaded))
    state = "valid, but not ready here" if problems else "valid"
    out.print(f"{loaded.name}: {state}; {stages}", markup=False, soft_wrap=True)
    for name, source in {"ingest": loaded.ingest, **loaded.ingest.sources}.items() if loaded.ingest else ():
        if reading := _described(source):
            out.print(f"  {name}: {reading}", markup=False, soft_wrap=True)
    if loaded.clean:
        for line in plan_of(loaded.clean, declared_operators).describe():
            out.print(f"  clean: {line}", markup=False, soft_wrap=True)
        sets = pipeline.evaluation_sets_of(loaded)
        if loaded.clean.decontaminate and sets.places:
            out.print(
                f"  clean: without rows that hold texts of {', '.join(sets.places)}", markup=False, soft_wrap=True
            )
        for name in sets.fetched:
            told = f"  clean: rows are not compared with {name}, which evalscope fetches; give its path"
            out.print(told, markup=False, soft_wrap=True)
    if loaded.train:
        for line in filter(None, (*describe_model(loaded.train), describe(loaded.train))):
            out.print(f"  train: {line}", markup=False, soft_wrap=True)
        if loaded.merge and (merging := describe_merge(loaded.train)):
            out.print(f"  merge: {merging}", markup=False, soft_wrap=True)
    for problem in problems:
        what = ": ".join(filter(None, (problem.key, problem.message)))
        out.print(f"  not ready on this machine: {what}", markup=False, soft_wrap=True)
    if problems:
        raise typer.Exit(NOT_READY)


def _described(section: Source) -> str:
    try:
        return describe_source(section)
    except (DataError, InputError):  # what is wrong with the source is said below
        return ""


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    first: Annotated[str | None, typer.Option("--from", help="Do this stage and all after it again.")] = None,
    last: Annotated[str | None, typer.Option("--to", help="Stop after this stage.")] = None,
    workspace: WorkspaceOption = None,
    address: AddressOption = None,
) -> None:
    """Run a recipe's stages, skipping what is up to date."""
    _run(recipe, overrides, workspace, address, first, last)


@app.command()
def serve(
    recipe: RecipeName,
    overrides: Overrides = None,
    workspace: WorkspaceOption = None,
    address: AddressOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. (default: serve.host)")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. (default: serve.port)")] = None,
    serve_file: Annotated[
        Path | None, typer.Option("--write-config", help="Write the file for `serve deploy` instead of serving.")
    ] = None,
    kuberay_file: Annotated[
        Path | None, typer.Option("--write-kuberay", help="Write a KubeRay RayService instead of serving.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Serve base, adapter and merged model as an OpenAI-compatible endpoint until stopped."""
    from rayjobs.deploy import serve_forever, write_config  # Ray Serve stands behind it

    loaded = pipeline.load(recipe, overrides)
    with Cluster(address) as cluster:
        place = open_workspace(workspace, loaded.name, on_cluster=cluster.is_shared)
        if serve_file or kuberay_file:
            config, kuberay = (
                _destination(option, file, overwrite, recipe, loaded) if file else None
                for option, file in (("--write-config", serve_file), ("--write-kuberay", kuberay_file))
            )
            write_config(loaded, place, cluster, config, kuberay)
        else:
            serve_forever(loaded, place, cluster, host, port)


@app.command()
def chat(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|URL", help="A recipe that is being served, or a /v1 address.")
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Model to begin with. (default: the recipe's, or the first)")
    ] = None,
) -> None:
    """Talk to a served model in the terminal; the key, if one is needed, comes from OPENAI_API_KEY."""
    from serve.ui import chat as terminal  # openai stands behind it

    models, system, sampling = _how_to_chat(target, overrides)
    url, key = _endpoint_of(target, overrides), endpoint_key()
    if model and model not in (names := terminal.model_names(terminal.endpoint_client(url, key))):
        raise InputError(f"--model {model}: {url} does not serve it; {nearest(model, names)}")
    terminal.chat(url, terminal.ChatStart((model,) if model else models, system, sampling), key)


def _how_to_chat(target: str, overrides: list[str] | None) -> tuple[tuple[str, ...], str, dict[str, Any]]:
    """A recipe's models, the best first, its system prompt, and the sampling that it says; nothing of an address."""
    if "://" in target:
        return (), "", {}
    recipe = pipeline.load(target, overrides)
    lineup = lineup_of(recipe)
    models = (recipe.name, *reversed(lineup.names())) if lineup else (recipe.name,)
    system = recipe.train.system if recipe.train else None
    for section in (recipe.merge, recipe.evaluate, recipe.compare):
        generation = section.generation if section is not None else None
        said = generation.model_dump(exclude_unset=True, exclude_none=True) if generation is not None else {}
        if said:
            return models, system or "", said
    return models, system or "", {}


@app.command()
def ui(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|URL", help="A recipe that is being served, or a /v1 address.")
    ],
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address the page listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port the page listens on.")] = 8501,
) -> None:
    """Talk to served models in the browser; the key, if one is needed, comes from OPENAI_API_KEY."""
    from serve.ui.chat import ChatStart, open_page  # as above

    url = _endpoint_of(target, overrides)
    say(f"http://{host}:{port}: asks {url}; Ctrl-C stops")
    endpoint_key()  # the page asks with it
    open_page(url, host, port, ChatStart(*_how_to_chat(target, overrides)))


def _endpoint_of(target: str, overrides: list[str] | None) -> str:
    """A /v1 address as it stands, or that of a recipe; who listens on all addresses is asked on this machine's own."""
    if "://" in target:
        return target
    section = pipeline.load(target, overrides).serve
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(section.host, section.host)
    return f"http://[{host}]:{section.port}/v1" if ":" in host else f"http://{host}:{section.port}/v1"


@app.command()
def status(recipe: RecipeName, overrides: Overrides = None, workspace: WorkspaceOption = None) -> None:
    """Show which stages are complete, and where their output lies."""
    loaded = pipeline.load(recipe, overrides)
    place = open_workspace(workspace, loaded.name, on_cluster=False)
    table = Table("stage", "state", "seconds", "result", "folder", box=None, pad_edge=False)
    for name, output in pipeline.status(loaded, place).items():
        began = output.place is not None and place.list(output.place.path())
        seconds = summary = ""
        if output.manifest:
            seconds, summary = f"{output.manifest.seconds:.1f}", output.report.summary
        state = "partial" if began else "missing"
        if output.is_complete:
            state = "complete" if (path := output.damaged()) is None else f"damaged: {path} is not there, or not whole"
        table.add_row(name, state, seconds, Text(summary), Text(output.place.path() if output.place else ""))
    Console(highlight=False, width=UNCUT).print(table)
    if who := place.at_work():
        out.print(who, markup=False, soft_wrap=True)


@app.command()
def template(
    recipe: RecipeName,
    overrides: Overrides = None,
    row: Annotated[int, typer.Option("--row", min=1, help="Which of the rows to train on, from 1.")] = 1,
    workspace: WorkspaceOption = None,
) -> None:
    """Show a row as it is trained, token by token, beside what a server sends for the same conversation."""
    loaded = pipeline.load(recipe, overrides)
    if loaded.train is None:
        raise RecipeError(loaded.name, [Problem("train", "the recipe has no such section")])
    place = open_workspace(workspace, loaded.name, on_cluster=False)
    split = pipeline.status(loaded, place).get("split")
    with Staging(place) as staging:
        staging.fetch(MODELS)
        model = resolve(loaded.train.model, staging.here.local(MODELS))
        # transformers would load torch, which takes seconds, and no tokenizer needs it: None makes it look absent
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        tokenizer = open_tokenizer(model)
    tokenizer.chat_template = (
        template_of(loaded.train, loaded.chat_template_kwargs, tokenizer) or tokenizer.chat_template
    )
    shown = row_at(loaded.train, loaded.ingest, split, row - 1)
    name = f"row {shown.row_id}" if shown.row_id else "an example, because no row can be read yet"
    out.print(f"{name}, {model.name}", markup=False, soft_wrap=True)
    try:
        for part in audit(tokenizer, loaded.train, shown):
            out.print(part)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


@app.command()
def why(recipe: RecipeName, row_id: str, overrides: Overrides = None, workspace: WorkspaceOption = None) -> None:
    """Say what became of one row: which operator dropped it and why, or where it is now."""
    loaded = pipeline.load(recipe, overrides)
    place = open_workspace(workspace, loaded.name, on_cluster=False)
    for line in trace([found for found in pipeline.status(loaded, place).values() if found.is_complete], row_id):
        out.print(line, markup=False, soft_wrap=True)


@app.command()
def rows(
    recipe: RecipeName,
    overrides: Overrides = None,
    workspace: WorkspaceOption = None,
    dropped: Annotated[bool, typer.Option("--dropped", help="Rows that were dropped or set aside, with why.")] = False,
    operator: Annotated[str | None, typer.Option(help="Only those that this operator dropped.")] = None,
    grep: Annotated[str | None, typer.Option(help="Only those with this text.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Lines at most.")] = 20,
) -> None:
    """Show rows that are kept, or with --dropped those that are not and why."""
    loaded = pipeline.load(recipe, overrides)
    place = open_workspace(workspace, loaded.name, on_cluster=False)
    finished = [found for found in pipeline.status(loaded, place).values() if found.is_complete]
    for line in rows_lines(finished, dropped=dropped, operator=operator, grep=grep, limit=limit):
        out.print(line, markup=False, soft_wrap=True)


JobName = Annotated[str, typer.Argument(metavar="JOB|RECIPE", help="A job's name, or a recipe's for its newest job.")]
JobsAddress = Annotated[
    str | None, typer.Option("--address", help="The cluster's dashboard. (default: RAY_API_SERVER_ADDRESS, else :8265)")
]


@app.command()
def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option("--stage", help="Stop after this stage.")] = None,
    workspace: WorkspaceOption = None,
    address: JobsAddress = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show its log to its end. (the default)")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end without showing its log.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for its end.")] = False,
    kuberay_file: Annotated[
        Path | None, typer.Option("--write-kuberay", help="Write a KubeRay RayJob instead of submitting.")
    ] = None,
    node_selector: Annotated[
        list[str] | None,
        typer.Option("--node-selector", help="LABEL=VALUE of the nodes for GPU pods, with --write-kuberay."),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Run a recipe as a job on a Ray cluster, show its log, and end with its exit code."""
    if follow + wait + detach > 1:
        raise InputError("--follow, --wait and --detach: one of them")
    loaded = pipeline.load(recipe, overrides)
    place = open_workspace(workspace, loaded.name, on_cluster=True)
    chosen = pipeline.stages_of(loaded, stage)
    if wrong := [problem for problem in pipeline.problems_of(chosen, place) if problem.on_every_machine]:
        raise RecipeError(loaded.name, wrong)
    if kuberay_file:
        from rayjobs.kubernetes import write_ray_job  # Ray Serve stands behind it

        file = _destination("--write-kuberay", kuberay_file, overwrite, recipe, loaded)
        write_ray_job(loaded, recipe_file(recipe), overrides or [], stage, place, file, node_selector or [])
        return
    if node_selector:
        raise InputError("--node-selector: for --write-kuberay alone")
    cluster = Jobs(address)
    name = start(cluster, loaded, recipe_file(recipe), overrides or [], stage, place)
    say(f"{name}: submitted to {cluster.address}; danlu logs --follow {name} shows it, danlu stop {name} ends it")
    if not detach:
        _follow(cluster, name, printing=not wait)


@app.command("jobs")
def list_jobs(address: JobsAddress = None) -> None:
    """List the jobs of a cluster that were started by `danlu submit`, the newest first."""
    table = Table("job", "up to", "state", "began", "minutes", "exit code", "workspace", box=None, pad_edge=False)
    for job in Jobs(address).all():
        began = time.strftime("%m-%d %H:%M", time.localtime(job.began)) if job.began else ""
        minutes = f"{((job.ended or time.time()) - job.began) / 60:.1f}" if job.began else ""
        code = "" if job.exit_code is None else str(job.exit_code)
        table.add_row(Text(job.name), job.stage, job.state.lower(), began, minutes, code, Text(job.workspace))
    Console(highlight=False, width=UNCUT).print(table)


@app.command()
def logs(
    job: JobName,
    address: JobsAddress = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on to its end, and end with its exit code.")] = False,
) -> None:
    """Show what a job on a cluster has printed."""
    cluster = Jobs(address)
    found = cluster.find(job)
    if follow:
        _follow(cluster, found.name, printing=True)
    else:
        out.print(cluster.log(found.name), markup=False, soft_wrap=True, end="")


@app.command()
def stop(job: JobName, address: JobsAddress = None) -> None:
    """End a job on a cluster; what is finished is kept."""
    cluster = Jobs(address)
    found = cluster.find(job)
    if found.goes_on:
        cluster.stop(found.name)
        found = asyncio.run(cluster.follow(found.name, printing=False))
    say(closing_line(found))


def _follow(cluster: Jobs, name: str, *, printing: bool) -> None:
    """Wait for a job's end, and end with its exit code; Ctrl-C leaves it running."""
    try:
        ended = asyncio.run(cluster.follow(name, printing=printing))
    except KeyboardInterrupt:
        say(f"{name} goes on without being followed; danlu logs --follow {name} shows it, danlu stop {name} ends it")
        raise
    say(closing_line(ended))
    if code := exit_code(ended):
        raise typer.Exit(code)


def _stage_command(name: str) -> Callable[..., None]:
    def command(
        recipe: RecipeName,
        overrides: Overrides = None,
        workspace: WorkspaceOption = None,
        address: AddressOption = None,
    ) -> None:
        _run(recipe, overrides, workspace, address, None, name)

    command.__doc__ = f"Run the recipe up to {name}, skipping what is up to date."
    return command


def synthesize(
    recipe: RecipeName,
    overrides: Overrides = None,
    workspace: WorkspaceOption = None,
    address: AddressOption = None,
    dry_run: Annotated[
        int | None, typer.Option("--dry-run", min=1, help="Ask so many cells, and project tokens, money and time.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what failed.")] = False,
    suggest_map: Annotated[
        bool, typer.Option("--suggest-map", help="Let the model propose synthesize.compatibility, printed as YAML.")
    ] = False,
    more: Annotated[
        str | None,
        typer.Option(
            "--suggest-values",
            metavar="DIMENSION[=N]",
            help="Let the model propose N (10) more values of a dimension, or of queries, printed as YAML.",
        ),
    ] = None,
) -> None:
    """Run the recipe up to synthesize, skipping what is up to date."""
    if suggest_map:
        _suggest_map(recipe, overrides, workspace, address)
        return
    if more is not None:
        _suggest_values(recipe, overrides, workspace, address, more)
        return
    if dry_run is not None:
        _try_cells(recipe, overrides, workspace, address, dry_run)
        return
    again = None
    if retry_failed:
        loaded = pipeline.load(recipe, overrides)
        grid = grid_of(_synthesize_section(loaded), loaded.seed)
        found = open_workspace(workspace, loaded.name, on_cluster=Cluster(address).is_shared)
        say(f"{forget_failures(found, grid)} failed requests are asked again")
        again = "synthesize"
    _run(recipe, overrides, workspace, address, again, "synthesize")


def refine(
    recipe: RecipeName,
    overrides: Overrides = None,
    workspace: WorkspaceOption = None,
    address: AddressOption = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", help="Also write the conversations to a JSON file for xtuner."),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Run the recipe up to refine, skipping what is up to date."""
    target = _export_target(export, overwrite, recipe, overrides, workspace)
    done = _run(recipe, overrides, workspace, address, None, "refine")
    if target is not None:
        say(f"{export}: {export_conversations(done['refine'], target)} conversations")


def analyze(
    recipe: RecipeName,
    overrides: Overrides = None,
    workspace: WorkspaceOption = None,
    address: AddressOption = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--what-if", help="Say what another limit would do, such as text_length_filter.min_len=50."),
    ] = None,
) -> None:
    """Run the recipe up to analyze, skipping what is up to date.

    With --what-if, nothing runs: the statistics that analyze kept give the answer.
    """
    if not change:
        _run(recipe, overrides, workspace, address, None, "analyze")
        return
    loaded = pipeline.load(recipe, overrides)
    place = open_workspace(workspace, loaded.name, on_cluster=False)
    analyzed = pipeline.status(loaded, place).get("analyze")
    if loaded.clean is None or analyzed is None or analyzed.manifest is None:
        raise InputError(f"{loaded.name}: nothing is analyzed yet; run danlu analyze {recipe} first")
    for line in what_if(analyzed, filters_of(loaded.clean), change):
        out.print(line, markup=False, soft_wrap=True)


def clean(
    recipe: RecipeName,
    overrides: Overrides = None,
    workspace: WorkspaceOption = None,
    address: AddressOption = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", help="Also write kept and dropped rows to a .jsonl or .csv file, to edit by hand."),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Run the recipe up to clean, skipping what is up to date."""
    target = _export_target(export, overwrite, recipe, overrides, workspace)
    if target is not None:
        require_exportable(target)
    done = _run(recipe, overrides, workspace, address, None, "clean")
    if target is not None:
        cleaned = done["clean"]
        (source,) = [done[name] for name in (cleaned.manifest.inputs if cleaned.manifest else ())]
        rows, edited = export_rows(cleaned, source, target), shlex.quote(f"clean.edited={export}")
        say(f"{export}: {rows} rows; edit them, then danlu clean … {edited}")


def compare(
    recipe: RecipeName,
    overrides: Overrides = None,
    workspace: WorkspaceOption = None,
    address: AddressOption = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also try a grid of sampling settings.")] = False,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Also ask every kept checkpoint.")] = False,
) -> None:
    """Run the recipe up to compare, skipping what is up to date."""
    section = pipeline.load(recipe, overrides).compare
    asked = [*(overrides or [])]
    if sweep and (section is None or section.sweep is None):
        asked.append("compare.sweep={}")
    if checkpoints and (section is None or section.checkpoints is None):
        asked.append("compare.checkpoints={}")
    _run(recipe, asked, workspace, address, None, "compare")


def _destination(option: str, file: Path, overwrite: bool, name: str, recipe: Recipe) -> Destination:
    """A file that an option names: never the recipe, nor what it reads."""
    return Destination(option, str(file), "--overwrite", overwrite, {"the recipe": name, **paths_read(recipe)})


def _export_target(
    file: Path | None, overwrite: bool, name: str, overrides: list[str] | None, workspace: str | None
) -> Destination | None:
    """The file that `--export` names; InputError, before anything runs, where it may not be written."""
    if file is None:
        return None
    recipe = pipeline.load(name, overrides)
    target = _destination("--export", file, overwrite, name, recipe)
    require_writable(target, open_workspace(workspace, recipe.name, on_cluster=False))
    return target


def _try_cells(name: str, overrides: list[str] | None, workspace: str | None, address: str | None, count: int) -> None:
    recipe = pipeline.load(name, overrides)
    section = _synthesize_section(recipe)
    with Cluster(address) as cluster:
        place = open_workspace(workspace, recipe.name, on_cluster=cluster.is_shared)
        cluster.connect()
        for line in try_cells(section, recipe.serve, recipe.seed, place, count, recipe.chat_template_kwargs):
            out.print(line, markup=False)


def _suggest_map(name: str, overrides: list[str] | None, workspace: str | None, address: str | None) -> None:
    recipe = pipeline.load(name, overrides)
    grid = grid_of(_synthesize_section(recipe), recipe.seed)
    with Cluster(address) as cluster:
        place = open_workspace(workspace, recipe.name, on_cluster=cluster.is_shared)
        cluster.connect()
        text, unanswered = suggest_map(place, grid)
    out.print(text, markup=False, soft_wrap=True, end="")
    if unanswered:
        say(f"no usable answer about {', '.join(unanswered)}")


def _suggest_values(
    name: str, overrides: list[str] | None, workspace: str | None, address: str | None, wanted: str
) -> None:
    dimension, is_counted, count = wanted.partition("=")
    if is_counted and not (count.isdecimal() and int(count[:9])):
        raise InputError(f"--suggest-values {wanted}: write how many as a number from 1, such as {dimension}=20")
    recipe = pipeline.load(name, overrides)
    grid = grid_of(_synthesize_section(recipe), recipe.seed)
    with Cluster(address) as cluster:
        place = open_workspace(workspace, recipe.name, on_cluster=cluster.is_shared)
        cluster.connect()
        text, found = suggest_values(place, grid, dimension, int(count[:9]) if is_counted else 10)
    out.print(text, markup=False, soft_wrap=True, end="")
    say(f"{found} of these are new; accept them by pasting the list into the recipe's section synthesize")


def _synthesize_section(recipe: Recipe) -> Synthesize:
    if recipe.synthesize is None:
        raise RecipeError(recipe.name, [Problem("synthesize", "the recipe has no such section")])
    return recipe.synthesize


_OWN_OPTIONS: dict[str, Callable[..., None]] = {
    "synthesize": synthesize,
    "refine": refine,
    "analyze": analyze,
    "clean": clean,
    "compare": compare,
}
for _stage in pipeline.STAGES:
    app.command(_stage.name)(_OWN_OPTIONS.get(_stage.name) or _stage_command(_stage.name))


def _run(
    name: str,
    overrides: list[str] | None,
    workspace: str | None,
    address: str | None,
    first: str | None,
    last: str | None,
) -> pipeline.Outputs:
    recipe = pipeline.load(name, overrides)
    try:
        with Cluster(address) as cluster:
            place = open_workspace(workspace, recipe.name, on_cluster=cluster.is_shared)
            if place.is_local or not cluster.is_shared:
                done = pipeline.run(recipe, place, cluster, first, last)
            else:
                done = one_node.run(recipe, name, overrides or [], place, cluster, first, last)
    except KeyboardInterrupt:
        say("stopped; what is finished is kept, and the same command goes on from there")
        raise
    _close(recipe, place, done)
    models = done.get("merge" if recipe.merge else "train")
    if models is not None and models.is_complete and recipe.train and (recipe.merge or not not_servable(recipe.train)):
        words = shlex.join([name, *(overrides or []), *(["--workspace", workspace] if workspace else [])])
        say(f"danlu serve {words}   answers over HTTP; danlu chat and danlu ui, with the same words, talk to it")
    return done


def _close(recipe: Recipe, workspace: Workspace, done: pipeline.Outputs) -> None:
    out.print(closing(recipe.name, workspace, done), markup=False, crop=False)


def in_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale forces another encoding: paths and texts are UTF-8.

    Child processes and Ray's workers are in it, too. A character that the terminal lacks is written as its number.
    """
    if sys.getfilesystemencoding() != "utf-8":
        command = [sys.executable, "-P", *sys.orig_argv[1:]]
        os.execve(command[0], command, {**os.environ, "PYTHONUTF8": "1"})
    streams: list[Any] = [sys.stdout, sys.stderr]  # of the interpreter's own
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command line; errors of our own family print without a traceback."""
    in_utf8()
    end_on_sigterm()
    try:
        app()
    except DanluError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)


def run_stage(name: str) -> None:
    """Run `python -m rayjobs.<name>` as `danlu <name>`."""
    sys.argv.insert(1, name)
    main()


if __name__ == "__main__":
    main()
