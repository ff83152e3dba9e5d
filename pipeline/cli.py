"""The `sonoscope` command, and `run_stage`, which gives every file of stages/ the same exit codes and error text.

    sonoscope doctor | check | preset [NAME] | inspect FOLDER | data ACTION | compare EXP EXP | export WEIGHTS | embed MEDIA | similar QUERY | sync | ui
    (or: python -m pipeline.cli doctor)

Exit codes: 0 done; 1 a bug of Sonoscope (traceback kept), or `doctor` or `data check` found a problem; 2 a mistake that the message
explains (parameters, data, arguments); 130 interrupted. Each sub-command imports what it needs, so that this module
costs a stage nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.errors import PipelineError

__all__ = ["EXIT_BUG", "EXIT_INTERRUPTED", "EXIT_MISTAKE", "main", "run_stage"]

EXIT_BUG = 1
EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
"""128 + SIGINT, what a shell reports for a command that Ctrl-C ended."""


def run_stage(function: Callable[[], None]) -> int:
    """Run `function` and turn its end into an exit code; used as `sys.exit(run_stage(main))`.

    Returns:
        0 when it returns; 2 for a `PipelineError`, whose message goes to stderr without a traceback; 130 for Ctrl-C;
        1 for anything else, with the traceback and the words that this is a bug. `SystemExit` passes through.
    """
    try:
        function()
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        print("interrupted; start the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception:
        import traceback

        traceback.print_exc()
        print(
            "\nThis is a bug of Sonoscope, or a machine in trouble ('sonoscope doctor' tells which): "
            "no mistake in parameters or data should end in a traceback. Please report it with the lines above.",
            file=sys.stderr,
        )
        return EXIT_BUG
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from pipeline.doctor import run_doctor

    return run_doctor(as_json=arguments.json)


def _check(arguments: argparse.Namespace) -> int:
    from pipeline.preflight import check_named_files
    from pipeline.presets import overridden

    for config in overridden(arguments.set, Path(arguments.params)):
        check_named_files(config)
        print(
            f"{' -S '.join([arguments.params, *arguments.set])}: valid. Source {config.data.source}, {config.split.words}, pretraining "
            f"{config.pretrain.method} on {config.pretrain.backbone} for {config.pretrain.epochs} epochs "
            f"(scope {config.pretrain.scope}), fine-tuning {', '.join(config.finetune.initialisations)} with {len(config.finetune.seeds)} seed(s)."
        )
    return 0


def _preset(arguments: argparse.Namespace) -> int:
    from pipeline.presets import as_overrides, load_preset, preset_names, write_preset

    if arguments.name is None:
        if arguments.write:
            raise PipelineError("preset --write: name the preset, such as 'sonoscope preset --write ucl_official_gb'; 'sonoscope preset' lists them")
        names = preset_names()
        width = max((len(name) for name in names), default=0)
        for name in names:
            print(f"{name:<{width}}  {load_preset(name).description}")
        return 0
    preset = load_preset(arguments.name)
    if not arguments.write:
        print(" ".join(as_overrides(preset)))
        return 0
    changes = write_preset(preset, Path(arguments.params))
    print("\n".join(changes) if changes else f"{arguments.params} already says what preset {preset.name} says")
    return 0


def _sync(arguments: argparse.Namespace) -> int:
    from pipeline.tracking import sync

    summary = sync()
    print(
        f"delivered {summary['runs']} run(s), {summary['events']} events"
        + (f"; {summary['in_use']} still being written" if summary["in_use"] else "")
        + (f"; {summary['refused']} events that the store does not take are kept" if summary["refused"] else "")
    )
    return 0


def _ui(arguments: argparse.Namespace) -> int:
    import os
    import shlex

    from pipeline.config import load_config
    from pipeline.tracking import tracking_uri

    config = load_config(arguments.params)
    uri = tracking_uri(config)
    if uri.startswith(("http://", "https://", "databricks")):
        print(f"The runs are on the tracking server {uri.rsplit('@')[-1]}; open it in a browser.")
        if uri.startswith("http") and not arguments.print:
            _show_views(uri, config.tracking.experiment, f"{uri.partition('://')[0]}://{uri.partition('://')[2].rpartition('@')[2].rstrip('/')}/")
        return 0
    # 127.0.0.1: the page shows runs on medical data and has no password.
    words = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    words += ["--host", "127.0.0.1", "--port", str(arguments.port), "--workers", "1"]
    if arguments.print:
        print(shlex.join(["mlflow", *words[3:]]))
        return 0
    home = f"http://127.0.0.1:{arguments.port}/"
    print(f"MLflow at {home} answers in some seconds and stays until Ctrl-C; --port chooses another port", flush=True)
    _show_views(uri, config.tracking.experiment, home)
    # In place of this process, so that Ctrl-C and signals reach the server itself.
    os.execv(words[0], words)


def _show_views(uri: str, experiment: str, home: str) -> None:
    """Print the addresses at which MLflow's table and charts show what differs between the experiments."""
    from pipeline.tracking_view import prepare_view

    try:
        views = prepare_view(uri, experiment)
    except Exception as error:  # a store that is away or locked raises what its driver likes
        print(f"note: the table of experiments could not be prepared ({type(error).__name__})", file=sys.stderr)
        return
    for name, place in views.items():
        print(f"  {name}: {home}{place}", flush=True)
    if views and "compare" not in views:
        print("  compare: comes with the second evaluated experiment; start this command again then", flush=True)


def _compare(arguments: argparse.Namespace) -> int:
    from pipeline.evaluation.compare import Settings, compare, compare_by
    from pipeline.evaluation.compare_sources import Finder
    from pipeline.evaluation.compare_tables import as_markdown, headline

    settings = Settings(
        metric=arguments.metric, level=arguments.level, initialisation=arguments.init, reference=arguments.reference,
        all_pairs=arguments.all_pairs, join_seeds=arguments.join_seeds,
    )
    finder = Finder(Path(arguments.params))
    if arguments.by:
        found = compare_by(arguments.experiments, arguments.by, settings, finder)
    else:
        found = compare(arguments.experiments, settings, finder)
    print(as_markdown(found, full=False))
    print(headline(found))
    for line in found.warnings:
        print(f"warning: {line}", file=sys.stderr)
    if arguments.out:
        from pipeline.evaluation.compare_pages import write_comparison

        write_comparison(found, Path(arguments.out))
        print(f"{arguments.out} holds compare.html (everything, for reading and printing), compare.png, compare.csv, compare.md, compare.json")
    return 0


def _protocols(arguments: argparse.Namespace) -> int:
    import shlex

    from pipeline.protocols import choose_protocols, commands, run_protocols, show_protocols

    if arguments.show is not None:
        print(show_protocols(arguments.show, initialisation=arguments.init, level=arguments.level, prefix=arguments.prefix))
        return 0
    chosen = choose_protocols([key for key in arguments.rows.split(",") if key])
    if arguments.print:
        print("\n".join(shlex.join(words) for words in commands(arguments.set, chosen, prefix=arguments.prefix, queue=arguments.queue).values()))
        return 0
    names = run_protocols(arguments.set, chosen, prefix=arguments.prefix, queue=arguments.queue)
    if arguments.queue:
        print(f"{len(names)} experiments are queued. Run them with `dvc queue start`, then: sonoscope protocols --show --prefix {arguments.prefix}")
        return 0
    print(show_protocols(names, initialisation=arguments.init, level=arguments.level, prefix=arguments.prefix))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from pipeline.export.facts import check_form, find_weights

    check_form(find_weights(arguments.weights), arguments.to)  # torch takes many seconds to start
    from pipeline.export.formats import export

    print("\n".join(export(arguments.weights, arguments.to, arguments.out, image_size=arguments.image_size, opset=arguments.opset)))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from pipeline.config import load_config
    from pipeline.data.inspect import inspect_folder
    from pipeline.data.inspect_report import as_json, as_text, write_inspection

    output, params = Path(arguments.out), Path(arguments.params)
    inspection = inspect_folder(
        Path(arguments.folder), labels=arguments.labels, data=load_config(params).data if params.is_file() else None,
        quick=arguments.quick, workers=arguments.workers, ignore=output,
    )
    facts = write_inspection(inspection, output)
    if arguments.json:
        print(as_json(facts))
        return 0
    print(as_text(facts))
    print(f"\n{output / 'index.html'} shows it, files.csv lists every file. Both hold file names: keep them where the videos are.")
    return 0


def _embed(arguments: argparse.Namespace) -> int:
    from pipeline.embed import embed, open_encoder

    encoder = open_encoder(Path(arguments.encoder))
    info = embed(
        Path(arguments.source), encoder, Path(arguments.out), labels=arguments.labels, frames_per_video=arguments.frames_per_video,
        batch=arguments.batch, params=Path(arguments.params),
    )
    print(
        f"{info['frames']} frames, {info['videos']} videos, {info['patients']} patients as vectors of {info['features']} numbers in "
        f"{arguments.out}" + (f"; {info['unreadable']} files could not be read (quarantine.csv)" if info["unreadable"] else "")
    )
    return 0


def _similar(arguments: argparse.Namespace) -> int:
    from pipeline.retrieval import similar

    print(
        similar(
            arguments.query, Path(arguments.folder), top=arguments.top, other_patients=arguments.other_patients,
            picture=Path(arguments.picture) if arguments.picture else None,
            encoder=Path(arguments.encoder) if arguments.encoder else None,
        )
    )
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from pipeline import datasets

    if arguments.action == "list":
        print(datasets.list_datasets())
    elif arguments.action == "show":
        print(datasets.show_dataset(arguments.name))
    elif arguments.action == "check":
        text, good = datasets.check_dataset(arguments.name, arguments.path, arguments.variant)
        print(text)
        return 0 if good else 1
    elif arguments.action == "prepare":
        print(datasets.prepare_dataset(arguments.name, arguments.path, arguments.out, arguments.variant))
    else:
        print(datasets.fetch_dataset(arguments.name, arguments.path, accepted=arguments.accept_licence, **arguments.clone))
    return 0


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The sub-command `data` and its actions."""
    data = commands.add_parser("data", help="public data sets: what they are, how to get them, whether a copy is whole, how to run it")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="all recipes")
    show = actions.add_parser("show", help="layout, labels, patients, licence, published counts")
    check = actions.add_parser("check", help="compare a copy with what was published; exit code 1 if it deviates")
    prepare = actions.add_parser("prepare", help="write labels.csv and split.json for a copy, and print the command that runs it")
    fetch = actions.add_parser("fetch", help="clone a data set where that is allowed, or say what to sign and where to put the files")
    for action in (show, check, prepare, fetch):
        action.add_argument("name", metavar="NAME", help="of 'sonoscope data list'; folder for any folder of yours")
    for action in (check, prepare):
        action.add_argument("path", type=Path, metavar="PATH", help="folder of the data set")
        action.add_argument("--variant", default="", help="see 'sonoscope data show NAME'")
    prepare.add_argument("--out", type=Path, help="folder to write (default: data/recipes/NAME)")
    fetch.add_argument("path", type=Path, nargs="?", metavar="PATH", help="folder to write (default: data/download/NAME)")
    fetch.add_argument("--accept-licence", action="store_true", help="you have read the terms and keep to them")
    fetch.add_argument("--revision", dest="clone", type=lambda text: {"revision": text}, default={}, help="another commit, 40 hex digits")
    data.set_defaults(run=_data)


def _count(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: whole numbers from 1 on")
    return int(text)


def _count_or_all(text: str) -> int | None:
    return None if text == "all" else _count(text)


def _add_features(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The sub-commands `embed` and `similar`."""
    embed = commands.add_parser(
        "embed",
        example="sonoscope embed /path/to/videos --encoder models/encoders/fold0",
        help="feature vectors of frames, videos and patients, as CSV tables and NPY arrays",
        description="Reads what the pipeline reads, with the preprocessing of the encoder's card. The folder holds pictures and file "
        "names: share it as you would share the videos.",
    )
    embed.add_argument("source", metavar="VIDEO_OR_FOLDER", help="a media file, a folder of media, or a frame store (data/frames/main)")
    embed.add_argument("--encoder", required=True, help="folder of an encoder, such as models/encoders/fold0")
    embed.add_argument("--out", default="embeddings", help="folder to write (default: embeddings)")
    embed.add_argument("--labels", default="auto", help="auto, none, or a table in the folder (default: auto)")
    embed.add_argument("--frames-per-video", type=_count_or_all, default=16, metavar="N|all", help="evenly spaced frames (default: 16)")
    embed.add_argument("--batch", type=_count, default=64, help="images a forward pass (default: 64)")
    embed.add_argument("--params", default="params.yaml", help="its section data, if the file is there, is used to read labels")
    embed.set_defaults(run=_embed)

    similar = commands.add_parser(
        "similar", help="nearest neighbours of a video or frame among embedded ones, with a picture",
        example="sonoscope similar ward3/scan01.mp4 --other-patients (after 'sonoscope embed FOLDER --encoder models/encoders/fold0')",
    )
    similar.add_argument("query", metavar="QUERY", help="video id, path in files.csv, or a video file; QUERY:FRAME for one frame")
    similar.add_argument("--in", dest="folder", default="embeddings", help="folder that embed has written (default: embeddings)")
    similar.add_argument("--top", type=_count, default=5, help="neighbours (default: 5)")
    similar.add_argument("--other-patients", action="store_true", help="only videos of other, known patients")
    similar.add_argument("--picture", help="PNG to write (default: into the folder)")
    similar.add_argument("--encoder", help="for a file that was not embedded (default: the one in models/encoders that embedding.json names)")
    similar.set_defaults(run=_similar)


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The sub-command `inspect`."""
    inspect = commands.add_parser(
        "inspect",
        example="sonoscope inspect /path/to/videos",
        help="what is in a folder of videos, and everything that is wrong with it",
        description="Looks at every frame of every file and at the labels table, before anything is computed. Writes index.html, files.csv "
        "and summary.json. Finding something is no failure: the exit code stays 0.",
    )
    inspect.add_argument("folder", metavar="FOLDER")
    inspect.add_argument("--labels", default="auto", help="auto, none, or a table in the folder (default: auto)")
    inspect.add_argument("--out", default="inspection", help="folder to write (default: inspection)")
    inspect.add_argument("--quick", action="store_true", help="read headers only: no frozen, black or double clips")
    inspect.add_argument("--workers", type=_count, help="processes (default: one a core)")
    inspect.add_argument("--json", action="store_true", help="print the summary as JSON")
    inspect.add_argument("--params", default="params.yaml", help="its section data, if the file is there, is used to read labels")
    inspect.set_defaults(run=_inspect)


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The sub-command `compare`."""
    compare = commands.add_parser(
        "compare",
        example="sonoscope compare EXP_A EXP_B (names of 'dvc exp show')",
        help="compare experiments on the same folds, with intervals and corrected p values",
        description="Names of 'dvc exp show', git revisions, project folders, or runs in MLflow (name or id). A-s0+A-s1 joins experiments that "
        "differ only in their seeds into one row, NAME=A-s0+A-s1 names it. The first is what the others are compared with.",
    )
    compare.add_argument("experiments", nargs="+", metavar="EXPERIMENT")
    metrics = ["balanced_accuracy", "accuracy", "macro_f1", "macro_auroc", "log_loss", "brier"]
    compare.add_argument("--metric", default=metrics[0], choices=metrics, help="of the differences (default: balanced_accuracy)")
    compare.add_argument("--level", default="video", choices=["video", "patient", "frame"], help="what is judged (default: video)")
    compare.add_argument("--init", default="pretrained", choices=["pretrained", "random"], help="the network that was fine-tuned (default: pretrained)")
    compare.add_argument("--join-seeds", action="store_true", help="experiments that differ only in pretrain.seed and finetune.seeds become one row")
    compare.add_argument("--reference", metavar="NAME", help="the row the others are compared with (default: the first)")
    compare.add_argument("--all-pairs", action="store_true", help="compare every row with every other; Holm over all pairs")
    compare.add_argument("--by", metavar="KEY", help="draw the metric against this parameter, such as finetune.label_fraction; seeds are joined")
    compare.add_argument("--out", metavar="FOLDER", help="write a page, a picture and tables there")
    compare.set_defaults(run=_compare)


def _add_overrides(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("-S", "--set", action="append", default=[], metavar="KEY=VALUE", help=f"{what}, as for 'dvc exp run -S'")


_ROWS = (
    "protocols to run, such as patient-inner,video-test (default: all but the last): "
    "patient-inner (patients apart, epoch by inner patients: the honest one), patient-test (patients apart, best epoch on test), "
    "video-inner (videos apart, epoch by inner videos), video-test (videos apart, best epoch on test), "
    "frame-test (frames apart, best epoch on test), patient-transductive (as patient-inner, but pretraining has seen the test videos)"
)


def _add_protocols(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The sub-command `protocols`."""
    protocols = commands.add_parser(
        "protocols",
        example="sonoscope protocols -S data.source=/path/to/clips",
        help="the same data and model under published and honest protocols: runs them, and prints one table",
        description="Runs an experiment for each protocol (which unit is kept apart, and on what the epoch is chosen) in a copy of the project, "
        "then prints their numbers side by side. params.yaml stays as it is.",
    )
    _add_overrides(protocols, "parameter of all of them")
    protocols.add_argument("--rows", default="", metavar="A,B", help=_ROWS)
    protocols.add_argument("--queue", action="store_true", help="put them into DVC's queue instead of running them")
    protocols.add_argument("--print", action="store_true", help="print the commands instead of running them")
    protocols.add_argument("--prefix", default="protocol", help="start of the experiments' names (default: protocol)")
    protocols.add_argument("--show", nargs="*", metavar="NAME", help="only print the table, of these experiments or of all of the prefix")
    protocols.add_argument("--init", default="pretrained", choices=["pretrained", "random"], help="whose numbers (default: pretrained)")
    protocols.add_argument("--level", default="video", choices=["video", "patient", "frame"], help="unit that is judged (default: video)")
    protocols.set_defaults(run=_protocols)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, and an example instead of the whole usage."""

    def __init__(self, *arguments: Any, example: str = "", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._example = example

    def error(self, message: str) -> NoReturn:
        """Print and end with EXIT_MISTAKE."""
        message = message.replace("the following arguments are required:", "missing:")
        self.exit(EXIT_MISTAKE, f"{self.prog}: {message}\nexample: {self._example or f'{self.prog} --help'}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sonoscope",
        description="Helpers around the pipeline; the pipeline itself runs with 'dvc repro' and 'dvc exp run'.",
        epilog="Exit codes: 0 done, 1 bug, or problem found by doctor or data check, 2 explained mistake, 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="say what this machine has, what is wrong, and what to do about it")
    doctor.add_argument("--json", action="store_true", help="print the table as JSON")
    doctor.set_defaults(run=_doctor)

    check = commands.add_parser(
        "check", help="check params.yaml, all problems at once",
        example="sonoscope check -S pretrain.method=byol (sonoscope check --help tells more)",
    )
    _add_overrides(check, "check params.yaml with this value (repeatable; a,b checks both); the file stays as it is")
    check.set_defaults(run=_check)

    preset = commands.add_parser(
        "preset",
        example="dvc exp run $(sonoscope preset ucl_official_gb)",
        help="list the presets, or print one as words for 'dvc exp run'",
        description="Without NAME: the list. With NAME: the words for 'dvc exp run $(sonoscope preset NAME)'.",
    )
    preset.add_argument("name", nargs="?", metavar="NAME")
    preset.add_argument("--write", action="store_true", help="edit params.yaml instead, keeping its comments")
    preset.set_defaults(run=_preset)

    sync = commands.add_parser("sync", help="deliver what was logged while the MLflow store was away")
    sync.set_defaults(run=_sync)

    _add_compare(commands)
    _add_protocols(commands)

    export = commands.add_parser(
        "export",
        example="sonoscope export models/encoders/fold0 --to torchvision",
        help="write an encoder or classifier for torchvision, timm, safetensors or ONNX, with a model card",
        description="WEIGHTS: a folder such as models/encoders/fold0 or models/finetuned/pretrained-seed0-fold0, or the weights file in it.",
    )
    export.add_argument("weights", type=Path, metavar="WEIGHTS")
    export.add_argument("--to", required=True, choices=["torchvision", "timm", "safetensors", "onnx"])
    export.add_argument("--out", type=Path, help="file to write (default: exports/<folder>-<form>/<backbone>-<kind>.<suffix>)")
    export.add_argument("--image-size", type=int, help="side of the images in pixels (default: that of training)")
    export.add_argument("--opset", type=int, help="ONNX operator set (default: torch's)")
    export.set_defaults(run=_export)

    ui = commands.add_parser("ui", help="open MLflow on this project's store (127.0.0.1 only)")
    ui.add_argument("--port", type=int, default=5000)
    ui.add_argument("--print", action="store_true", help="print the command instead of starting it")
    ui.set_defaults(run=_ui)

    _add_features(commands)
    _add_inspect(commands)
    _add_data(commands)

    for command in (check, preset, ui, commands.choices["compare"]):
        command.add_argument("--params", default="params.yaml", help="parameter file (default: params.yaml)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the `sonoscope` command; `argv` (default `sys.argv[1:]`) is what follows it. Returns the exit code."""
    parser = _parser()
    arguments, surplus = parser.parse_known_args(argv)
    if surplus:  # argparse would name neither the command nor its help
        command = f"{parser.prog} {arguments.command}"
        parser.exit(EXIT_MISTAKE, f"{command}: unrecognized arguments: {' '.join(surplus)}\nexample: {command} --help\n")
    code = 0

    def run() -> None:
        nonlocal code
        code = arguments.run(arguments)

    return run_stage(run) or code


if __name__ == "__main__":
    sys.exit(main())
