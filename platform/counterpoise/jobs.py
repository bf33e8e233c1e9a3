"""What `counterpoise submit` sends: a command of this package, checked here before a cluster is asked to run it.

The command line is that of the command itself. What can be known on this machine is looked at first: options,
experiment, places that every node must reach, and whether the run exists. The sending is in `launch/submit.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterpoise import storage
from counterpoise.contracts import ConfigError, DataError, RefusedError, ResourceError
from counterpoise.wording import did_you_mean, duration

if TYPE_CHECKING:
    from counterpoise.launch.submit import Order

RUNTIME_ENV = "runtime_env.yaml"
HOME = "COUNTERPOISE_HOME"
SENT = "submitted"  # folder of files that lie outside of what is sent


@dataclass(frozen=True)
class Kind:
    """A command that can be a job.

    file: its parameter that names a file to be sent along. places: parameters that every node must reach.
    more: what is added to its command line. manifest: of the folder that it makes under --runs, {} if it makes none.
    cpus: of the driver, where the driver itself does the work.
    """

    file: str | None = None
    places: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    manifest: str | None = None
    cpus: float = 0


_ON_RAY = ("--engine", "ray")
KINDS = {
    "train": Kind("experiment", ("runs",), _ON_RAY, "run.json"),
    "compare": Kind("experiment", ("runs", "out"), _ON_RAY, "comparison.json"),
    "sweep": Kind("file", ("runs", "reuse", "out"), (), "sweep.json"),
    "evaluate": Kind(None, ("run",), cpus=1),
    "predict": Kind(None, ("model", "data", "out"), _ON_RAY),
    "corpora prepare": Kind(None, ("raw", "out"), _ON_RAY),
}


@dataclass(frozen=True)
class Asked:
    """A command line of ours, parsed."""

    name: str
    kind: Kind
    context: Any  # of click
    argv: list[str]

    def __getitem__(self, parameter: str) -> Any:
        return self.context.params.get(parameter)

    def given(self, parameter: str) -> str:
        """Where its value comes from: "commandline", "environment" or "default"."""
        source = self.context.get_parameter_source(parameter)
        return source.name.lower() if source else "default"

    def flag(self, parameter: str) -> str:
        """How people name the parameter."""
        named = next(p for p in self.context.command.params if p.name == parameter)
        return named.opts[0] if named.param_type_name == "option" else f"{parameter.upper()} of {self.name}"


def parse(root: Any, words: Sequence[str]) -> Asked:
    """The words after `counterpoise submit`; errors in them are those of the command itself.

    root: the command of click that holds all others.
    """
    name = next((name for name in KINDS if list(words[: name.count(" ") + 1]) == name.split()), None)
    if name is None:
        first = " ".join(words[:2]) if words and words[0] == "corpora" else " ".join(words[:1])
        raise ConfigError(f"{first!r} is no job{did_you_mean(first, KINDS)}; choose {', '.join(KINDS)}")
    parts, command = name.split(), root
    rest = list(words[len(parts) :])
    for part in parts:
        command = command.commands[part]
    context = command.make_context(f"counterpoise submit {name}", list(rest))
    asked = Asked(name, KINDS[name], context, [*parts, *rest])
    if asked.given("address") == "commandline":
        raise ConfigError("--address belongs before the command: counterpoise submit --address URL -- train ...")
    return asked


def plan(
    asked: Asked,
    *,
    name: str | None = None,
    working_dir: str | None = None,
    runtime_env: str | None = None,
    env: Sequence[str] = (),
    shared: bool = False,
    grace_s: int | None = None,
    cpus: float | None = None,
    gpus: float = 0,
    say: Callable[[str], None] = print,
) -> Order:
    """The job that a command line asks for, after everything that can be checked here.

    shared: absolute paths are mounted on every node.
    """
    from counterpoise.engine.run import check_name
    from counterpoise.launch.submit import GRACE_S, Order, refuse_secrets

    folder = _folder(working_dir)
    environment, variables = _runtime_env(runtime_env, folder), _variables(env)
    _check_places(asked, shared, HOME in variables)
    argv, files = _travelling(asked, folder)
    run = asked["name"] if asked.kind.manifest else None
    default, corpus = _resolved(asked)
    if corpus is not None:
        _check_corpus(corpus, folder, HOME in variables, shared, say)
    if run is None and asked.kind.manifest:
        run = name or default
        argv += ["--name", run]
    title = name or run or asked.name.replace(" ", "-")
    check_name(title)
    place = storage.join(asked["runs"], run) if run else str(asked["out"] or "")
    order = Order(
        argv=[*argv, *asked.kind.more],
        name=title,
        place=storage.show(place),
        folder=folder,
        code=folder is None or folder != checkout(),
        files=files,
        runtime_env=environment,
        env=variables,
        grace_s=GRACE_S if grace_s is None else grace_s,
        cpus=asked.kind.cpus if cpus is None else cpus,
        gpus=gpus,
    )
    refuse_secrets(order)  # before any place is looked at, and named in a message
    if run:
        _check_run(asked, run, place, say)
    return order


def checkout() -> Path | None:
    """The checkout that this package runs from; None if it is installed."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "trainables").is_dir() and (root / "pyproject.toml").is_file() else None


def _folder(given: str | None) -> Path | None:
    """The folder that is sent."""
    if given is None:
        return checkout()
    folder = Path(given).resolve()
    if not folder.is_dir():
        raise ConfigError(f"--working-dir is {given!r}, and there is no such folder")
    return folder


def _runtime_env(given: str | None, folder: Path | None) -> dict[str, Any]:
    """The runtime environment of a file, by default cluster/runtime_env.yaml of the checkout or its copy in here."""
    from counterpoise.config import read_yaml

    root = checkout()
    own = root / "cluster" / RUNTIME_ENV if root else Path(__file__).with_name("launch") / RUNTIME_ENV
    content = read_yaml(given or own)
    env_vars = content.get("env_vars") or {}
    if not isinstance(env_vars, dict) or not all(isinstance(v, str) for v in env_vars.values()):
        raise ConfigError(f"{given or own}: env_vars maps names to texts; put numbers into quotes")
    if given is None and (folder is None or folder != root):  # its excludes and its PYTHONPATH are about our checkout
        content.pop("excludes", None)
        env_vars = {k: v for k, v in env_vars.items() if k != "PYTHONPATH"}
    return {**content, "env_vars": env_vars}


def _variables(env: Sequence[str]) -> dict[str, str]:
    """--env NAME=VALUE, and the home of corpora where every node can reach it."""
    found = {}
    if (home := os.environ.get(HOME)) and not storage.is_local(home):
        found[HOME] = home
    for text in env:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise ConfigError(f"--env is {storage.show(text)!r}; give NAME=VALUE")
        found[name] = value
    return found


def _check_places(asked: Asked, shared: bool, home: bool) -> None:
    """Refuse places that only this machine, or one node, can reach."""
    for parameter in asked.kind.places:
        value = asked[parameter]
        if value is None and asked.name == "corpora prepare" and parameter == "out" and not home:
            raise ConfigError(
                "--out is missing: nodes have no home of corpora in common; give --out s3://bucket/prefix, or set "
                f"{HOME}=s3://bucket/prefix here (it is passed on)"
            )
        for place in [value] if isinstance(value, str) else value or []:
            if parameter != "data" or "/" in place:  # else the name of a corpus
                _check_place(asked, parameter, place, shared)


def _check_place(asked: Asked, parameter: str, place: str, shared: bool) -> None:
    if not storage.is_local(place):
        return
    absolute = place.startswith(("/", "file:///"))
    if absolute and shared:
        return
    flag = asked.flag(parameter)
    said = "is missing" if asked.given(parameter) == "default" else f"is {place!r}, on one machine"
    also = f"; or, if {place} is mounted on every node, say --shared" if absolute else ""
    raise ConfigError(
        f"{flag} {said}: workers on other nodes, and you, reach only what all of them can; give s3://bucket/prefix"
        + (also or ", or with --shared the absolute path of a folder that is mounted on every node")
    )


def _travelling(asked: Asked, folder: Path | None) -> tuple[list[str], dict[str, Path]]:
    """The command line as it is on the nodes, and files that are sent beside the folder."""
    argv = list(asked.argv)
    for parameter in ("runs", "track"):  # variables of this shell are not there
        if asked.given(parameter) == "environment":
            flag = asked.flag(parameter)
            values = asked[parameter]
            argv += [w for v in ([values] if isinstance(values, str) else values) for w in (flag, str(v))]
    files: dict[str, Path] = {}
    given = asked[asked.kind.file] if asked.kind.file else None
    if given is None:
        return argv, files
    needed = [Path(given).absolute(), *_named_by(asked, Path(given))]
    if folder is not None and all(file.resolve().is_relative_to(folder) for file in needed):
        there = Path(given).resolve().relative_to(folder).as_posix()
    else:
        needed = [Path(os.path.normpath(file)) for file in needed]
        top = Path(os.path.commonpath([file.parent for file in needed]))
        files = {f"{SENT}/{file.relative_to(top).as_posix()}": file for file in needed}
        there = next(iter(files))
    argv[argv.index(given)] = there
    return argv, files


def _named_by(asked: Asked, file: Path) -> list[Path]:
    """Files that a sweep file takes in."""
    if asked.name != "sweep":
        return []
    from counterpoise.config import read_yaml
    from counterpoise.sweepfile import read_sweep

    corpus = asked["corpus"]
    other = file.parent / f"{corpus}.yaml" if corpus else None
    own = read_sweep(read_yaml(file), str(file)).experiment
    found = [file.parent / own] if own else []
    return [p.absolute() for p in (*found, *([other] if other and other.is_file() else []))]


def _resolved(asked: Asked) -> tuple[str, str | None]:
    """The name that the command would give, and its corpus, after resolving experiment or sweep as it will."""
    given = asked[asked.kind.file] if asked.kind.file else None
    if asked.name == "predict" and "/" not in asked["data"]:
        return "", str(asked["data"])
    if asked.kind.file is None:
        return "", asked["corpus"]
    if given is None:
        if not asked["resume"] or not asked["name"]:
            raise ConfigError(f"{asked.name} takes a file, or --resume and the --name of what it goes on with")
        return str(asked["name"]), None
    if asked.name == "sweep":
        from counterpoise.sweepfile import ask

        seeds = range(asked["seeds"]) if asked["seeds"] else None
        found = ask(given, asked["corpus"], asked["sets"] or [], asked["workers"], seeds, asked["weak"])
        return f"{found.name}-{datetime.now():%Y%m%d-%H%M%S}", str(found.experiment["corpus"])
    from counterpoise.config import read_yaml, resolve
    from counterpoise.start import default_name

    experiment, _ = resolve(read_yaml(given), asked["sets"] or [], given)
    name = default_name(experiment)
    if asked.name == "compare":
        name = name.replace(f"-{experiment.method_name}-", "-compare-")
    return name, experiment.corpus


def _check_corpus(corpus: str, folder: Path | None, home: bool, shared: bool, say: Callable[[str], None]) -> None:
    """Refuse a corpus of this machine. One given by name is a matter of the nodes."""
    if not storage.is_local(corpus) or (shared and corpus.startswith("/")):
        return
    if "/" not in corpus and not corpus.endswith((".yaml", ".yml")):
        if not home:
            say(f"note: corpus {corpus} must be prepared on every node; {HOME}=s3://bucket/home makes it one for all")
        return
    if folder == Path.cwd() and not corpus.startswith("/") and Path(corpus).resolve().is_relative_to(folder):
        from counterpoise.data.card import load_card

        places = [getattr(split, "files", None) for split in load_card(corpus).splits.values()]
        files = [f for place in places for f in ([place] if isinstance(place, str) else place or [])]
        if not any(storage.is_local(file) for file in files):
            return  # the card is sent, what it names lies in a bucket
    raise ConfigError(
        f"corpus is {corpus!r}, a place of this machine; put it into a bucket and say --set corpus=s3://..., or with "
        "--shared the absolute path of a folder that is mounted on every node"
    )


def _check_run(asked: Asked, run: str, place: str, say: Callable[[str], None]) -> None:
    """Whether the run is there and what that means, if this machine may look."""
    manifest = storage.join(place, str(asked.kind.manifest))
    try:
        with storage.limits(deadline_s=15.0, attempts=2):
            there = storage.exists(manifest)
    except (ResourceError, ConfigError) as error:
        say(f"note: not looked whether {storage.show(place)} exists ({error})")
        return
    if there and not asked["resume"] and not asked["auto_resume"]:
        raise RefusedError(
            f"{run!r} exists in {storage.show(asked['runs'])}; continue it with --resume, or choose another --name"
        )
    if asked["resume"] and not there:
        raise DataError(f"{storage.show(place)} holds no {asked.kind.manifest}, so there is nothing to resume")


def lines(order: Order, url: str, num_bytes: int | None) -> list[str]:
    """What is sent, for people."""
    sent = " and ".join([*([str(order.folder)] if order.folder else []), *(["this package"] if order.code else [])])
    size = f", {num_bytes / 2**20:.1f} MiB" if num_bytes is not None else ""
    driver = f"{order.cpus:g} CPUs, {order.gpus:g} GPUs" if order.cpus or order.gpus else "on the head node"
    found = [f"cluster     {url}", f"sends       {sent}{size}{''.join(f', {file}' for file in order.files.values())}"]
    if order.place:
        found.append(f"writes      {order.place}")
    found.append(f"driver      {driver}; {order.grace_s} s to end when it is stopped")
    return [*found, f"command     counterpoise {' '.join(order.argv)}"]


def submit(
    order: Order, address: str | None, *, detach: bool, dry_run: bool, say: Callable[[str], None]
) -> tuple[str, int]:
    """Send a job and follow it: its ID and exit code (0 if nothing was sent or followed)."""
    from counterpoise.launch import submit as cluster

    client = cluster.connect(address, say)
    with cluster.packed(order) as (package, num_bytes):
        for line in lines(order, client.get_address(), num_bytes):
            say(line)
        if dry_run:
            say("dry run: everything that could be checked is in order; nothing was sent")
            return "", 0
        job_id = cluster.send(client, order, package)
    say(f"job         {job_id}")
    if detach:
        say(f"follow it with: counterpoise jobs logs -f {job_id}")
        return job_id, 0
    return job_id, follow(client, job_id, say)


def follow(client: Any, job_id: str, say: Callable[[str], None]) -> int:
    """Show the log of a job until it ends; its exit code. Ctrl-C leaves the job alone."""
    from counterpoise.launch import submit as cluster

    def write(text: str) -> None:
        print(text, end="", flush=True)

    try:
        job = cluster.follow(client, job_id, write, say)
    except KeyboardInterrupt:
        say(
            f"\njob {job_id} goes on; come back with `counterpoise jobs logs -f {job_id}`, end it with "
            f"`counterpoise jobs stop {job_id}`"
        )
        return 130
    fact = cluster.facts(job)
    again = "; go on with the same command and --resume" if fact["exit_code"] in (75, 130) else ""
    reason = f": {fact['message']}" if fact["message"] else ""
    say(f"job {job_id} {fact['state']} after {duration(fact['seconds'])}, exit code {fact['exit_code']}{reason}{again}")
    return int(fact["exit_code"] or 0)
