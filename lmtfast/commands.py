# SPDX-License-Identifier: MIT
"""The commands of ``lmtfast``. Each imports what it needs when it runs: ``--help`` is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtfast.errors import ArgumentError, CertificateError, ConfigError, ViolationError
from lmtfast.options import (
    BudgetOption,
    CertifiedLevel,
    DataOption,
    DeltaOption,
    DrawOption,
    ImportModel,
    Level,
    MemoryOption,
    MethodOption,
    ProfileOption,
    ProofDeviceOption,
    Semantics,
    SemanticsOption,
)
from lmtfast.progress import attack_progress, bound_progress, console, training_progress

if TYPE_CHECKING:
    from lmtfast.attack_report import AttackReport
    from lmtfast.data import Dataset

EXIT_VERIFICATION_FAILED = 1

app = typer.Typer(
    name="lmtfast",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Train networks with a Lipschitz margin, bound them, certify them. "
    "Begin with `lmtfast demo`. Exit codes: 0 done, 1 a verification failed, 2 wrong usage "
    "or no way to go on.",
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("demo"),
) -> None:
    """Train a digit classifier with a Lipschitz margin and without it, and certify both.

    Needs no download and takes under two minutes on two cores. Writes certificate.npz, curve.png,
    bounds.csv and seconds.txt.

    Examples:

    `lmtfast demo --out demo`

    `lmtfast verify demo/certificate.npz --checkpoint demo/lmt`
    """
    from lmtfast.demo import run_demo
    from lmtfast.tables import certificate_table

    with training_progress() as report:
        result = run_demo(out, progress=report)
    console.print(
        certificate_table(result.certificates, result.radii, title="8 x 8 digits, test set")
    )
    console.print(f"{result.seconds:.0f} s. Written: " + ", ".join(str(p) for p in result.files))


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Option(help="A recipe shipped with the library, e.g. `mnist-lmt`.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file of your own.")] = None,
    data: DataOption = None,
    out: Annotated[Path, typer.Option(help="Directory for checkpoints and logs.")] = Path("run"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    allow_previous: Annotated[
        bool,
        typer.Option(
            "--allow-previous", help="If the newest checkpoint is damaged, use the one before."
        ),
    ] = False,
    device: Annotated[str | None, typer.Option(help="Where to train, e.g. `cuda`.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Replaces the recipe's number of epochs.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Replaces the recipe's seed.")] = None,
) -> None:
    """Train a network from a recipe or a configuration file.

    Every epoch leaves a checkpoint in --out (the last two are kept) beside history.csv, losses.csv
    and config.json. A run that was stopped continues with --resume exactly where it was.

    Examples:

    `lmtfast train --recipe digits-lmt --out runs/digits`

    `lmtfast train --recipe mnist-lmt --data mnist.npz --out runs/mnist`

    `lmtfast train --config my.toml --data images/ --out runs/mine --resume`
    """
    from lmtfast.config import from_mapping, load_config
    from lmtfast.recipes import load_recipe, recipe_names
    from lmtfast.training import train as run_training

    if (recipe is None) == (config is None):
        raise ArgumentError(
            "one of --recipe and --config",
            "both" if recipe else "neither",
            "lmtfast train",
            f"choose a recipe ({', '.join(recipe_names())}) or write a TOML file",
        )
    _use_working_directory()
    chosen = load_recipe(recipe) if recipe is not None else load_config(config or "")
    changes = {"device": device, "epochs": epochs, "seed": seed, "data": data}
    values = chosen.to_dict() | {k: v for k, v in changes.items() if v is not None}
    chosen = from_mapping(values, where="lmtfast train")
    dataset = _dataset(chosen.data, chosen.input_range)
    with training_progress() as report:
        result = run_training(
            chosen, dataset, out=out, resume=resume, allow_previous=allow_previous, progress=report
        )
    row = result.history[-1]
    console.print(
        f"{len(result.history)} epochs, test accuracy {100 * row['test_accuracy']:.2f} %, "
        f"{result.seconds:.0f} s. Checkpoint: {result.checkpoint}"
    )
    console.print(f"Next: lmtfast certify {out} --data {chosen.data} --out certificate.npz")


@app.command()
def certify(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint file or directory.")],
    data: DataOption = None,
    out: Annotated[Path, typer.Option(help="Certificate file.")] = Path("certificate.npz"),
    plot: Annotated[Path | None, typer.Option(help="Also draw the curve to this file.")] = None,
    level: Annotated[CertifiedLevel, typer.Option()] = CertifiedLevel.rigorous,
    delta: DeltaOption = None,
    draw: DrawOption = "fresh",
    device: ProofDeviceOption = "cpu",
    semantics: SemanticsOption = Semantics.ideal,
    profile: ProfileOption = None,
    method: MethodOption = "auto",
    budget: BudgetOption = 120.0,
    memory: MemoryOption = 4.0,
    radius: Annotated[
        list[float] | None,
        typer.Option("--radius", help="L2 radius to report, in input units; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N test inputs.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Also write the arrays that `check` reads to this file.")
    ] = None,
    attack: Annotated[
        bool,
        typer.Option(
            "--attack",
            help="Also attack every input (extra `attack`). If a class changes inside its radius, "
            "no certificate is written, the points go to OUT.violations.npz, and the exit code "
            "is 1.",
        ),
    ] = False,
    attack_with: Annotated[
        list[str] | None,
        typer.Option("--attack-with", help="Only this attack; may be repeated."),
    ] = None,
    slow_inputs: Annotated[
        int, typer.Option("--slow-inputs", help="How many inputs the slow attacks take.")
    ] = 1000,
    attack_csv: Annotated[
        Path | None, typer.Option("--attack-csv", help="Distances found, one line per input.")
    ] = None,
    import_model: ImportModel = False,
    allow_previous: Annotated[
        bool,
        typer.Option(
            "--allow-previous", help="If the newest checkpoint is damaged, use the one before."
        ),
    ] = False,
) -> None:
    """Certify a trained network on the test set and write the certificate.

    A certificate holds, for every test input, a radius within which no L2 perturbation changes the
    class.

    Examples:

    `lmtfast certify runs/digits --out digits.npz`

    `lmtfast certify runs/mnist --data mnist.npz --out mnist-certificate.npz --radius 0.5 --radius
    1.58`

    `lmtfast certify runs/digits --out digits.npz --plot curve.png --attack`

    `lmtfast certify runs/digits --out digits.npz --semantics executed --profile fp32a64`
    """
    from lmtfast.adversaries import choose
    from lmtfast.attacking import attack as run_attack
    from lmtfast.certification import certify as run_certify
    from lmtfast.checkpoint import load_checkpoint
    from lmtfast.description import save_weights
    from lmtfast.files import writing
    from lmtfast.tables import attack_table, certificate_table
    from lmtfast.verified.budget import Budget

    _use_working_directory()
    if attack:
        choose(attack_with)  # a missing library is better known before than after the bound
    elif attack_with or attack_csv is not None:
        raise ArgumentError(
            "--attack", "options for attacks without it", "lmtfast certify", "add --attack"
        )
    claimed = _semantics(semantics, profile)
    saved = load_checkpoint(checkpoint, allow_previous=allow_previous)
    dataset = _dataset(data or saved.config.data, saved.config.input_range)
    model = saved.model(import_model=import_model)
    pair = (dataset.x_test[:limit], dataset.y_test[:limit])
    with bound_progress(level.value) as report:
        certificate = run_certify(
            model,
            pair,
            input_shape=saved.input_shape,
            input_range=dataset.input_range,
            level=level.value,
            delta=delta,
            draw=draw,
            device=device,
            method=method,
            budget=Budget(budget, memory * 2**30),
            semantics=claimed,
            progress=report,
        )
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    attacked = None
    if attack:
        with attack_progress() as progress:
            attacked = run_attack(
                model, certificate, pair,
                attacks=attack_with, slow_inputs=slow_inputs, progress=progress,
            )  # fmt: skip
        console.print(attack_table(attacked, title="attacks"))
        if attack_csv is not None:
            attacked.to_csv(attack_csv)
        _check(attacked, out)
    certificate.save(out)
    if weights is not None:
        save_weights(model, weights, input_shape=saved.input_shape, semantics=claimed)
    radii = tuple(radius) if radius else saved.config.certify_radii
    console.print(certificate_table({saved.config.method: certificate}, radii, title=dataset.name))
    if plot is not None:
        from lmtfast.plot import plot_certificates

        curves = None if attacked is None else {saved.config.method: attacked}
        plot_certificates({saved.config.method: certificate}, plot, marks=radii, attacked=curves)
    console.print(f"Written: {out}. Check it: lmtfast verify {out} --checkpoint {checkpoint}")


@app.command()
def verify(
    certificate: Annotated[Path, typer.Argument(help="Certificate file.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint file or directory.")],
    data: DataOption = None,
    import_model: ImportModel = False,
) -> None:
    """Recompute a certificate from the network and the data, and compare.

    Exit code 1 if anything differs: the weights, the bound, or a radius.

    Example: `lmtfast verify mnist-certificate.npz --checkpoint runs/mnist --data mnist.npz`
    """
    from lmtfast.certificate import load_certificate
    from lmtfast.checkpoint import load_checkpoint

    _use_working_directory()
    if not certificate.is_file():
        raise ArgumentError("a certificate file", "none", str(certificate), "check the path")
    saved = load_checkpoint(checkpoint)
    model = saved.model(import_model=import_model)
    source = data or saved.config.data
    try:
        with console.status("recomputing"):
            loaded = load_certificate(certificate)
            pair = None
            if source:
                dataset = _dataset(source, saved.config.input_range)
                count = len(loaded.radius)
                pair = (dataset.x_test[:count], dataset.y_test[:count])
            loaded.verify(model, pair)
    except CertificateError as error:
        console.print(f"[red]not verified[/red]: {error}", soft_wrap=True)
        raise typer.Exit(EXIT_VERIFICATION_FAILED) from None
    console.print(f"[green]verified[/green]: {certificate}, {len(loaded.radius)} inputs")


@app.command()
def check(
    certificate: Annotated[Path, typer.Argument(help="Certificate file.")],
    weights: Annotated[
        Path, typer.Argument(help="Checkpoint, or the file that `certify --weights` wrote.")
    ],
) -> None:
    """Check a certificate against its weights by other code, which knows no torch.

    Proves every norm again and judges every radius again. Exit code 1 if anything is not confirmed.
    `python -m lmtfast.check` does the same without the rest of the library.

    Example: `lmtfast check mnist-certificate.npz runs/mnist`
    """
    from lmtfast.check import main as run_check
    from lmtfast.checkpoint import newest_checkpoint

    raise typer.Exit(run_check([str(certificate), str(newest_checkpoint(weights))]))


@app.command()
def bound(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint directory, or `package.module:callable` that returns a module."
        ),
    ],
    input_shape: Annotated[
        str | None,
        typer.Option(help="Shape of one input, e.g. `3,32,32`. Known for checkpoints."),
    ] = None,
    level: Annotated[Level, typer.Option()] = Level.estimate,
    engine: Annotated[str, typer.Option(help="Engine at level estimate.")] = "auto",
    method: MethodOption = "auto",
    budget: BudgetOption = 120.0,
    memory: MemoryOption = 4.0,
    csv: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
    import_model: ImportModel = False,
) -> None:
    """Print what every layer of a network contributes to its Lipschitz bound.

    Beside the norm of each layer stand two bounds from the literature that look at the kernel
    alone: Cor. 1 of the LMT paper and the one of Cisse et al.

    Examples:

    `lmtfast bound torchvision.models:resnet18 --input-shape 3,224,224`

    `lmtfast bound mynets:build --input-shape 1,28,28 --level rigorous --csv layers.csv`
    """
    from lmtfast.layer_bounds import layer_bounds, write_layers
    from lmtfast.tables import layer_table
    from lmtfast.verified.budget import Budget

    _use_working_directory()
    module, shape = _module(model, input_shape, import_model)
    with console.status(f"bounding at level {level.value}"):
        result = layer_bounds(
            module, shape, level=level.value, engine=engine, method=method,
            budget=Budget(budget, memory * 2**30),
        )  # fmt: skip
    console.print(layer_table(result))
    if csv is not None:
        write_layers(csv, {model: result})


@app.command()
def info() -> None:
    """Versions and backends, and why a backend is not available.

    Example: `lmtfast info`
    """
    from lmtfast.tables import backend_table, version_table

    console.print(version_table())
    console.print(backend_table())


def _module(model: str, input_shape: str | None, import_model: bool) -> tuple[Any, tuple[int, ...]]:
    from lmtfast.checkpoint import load_checkpoint
    from lmtfast.models import import_callable

    if Path(model).exists():
        saved = load_checkpoint(model)
        return saved.model(import_model=import_model), saved.input_shape
    if input_shape is None:
        raise ArgumentError(
            "--input-shape", "none", "lmtfast bound", "add e.g. --input-shape 3,32,32"
        )
    built = import_callable(model)
    try:
        shape = tuple(int(n) for n in input_shape.split(","))
    except ValueError:
        raise ArgumentError(
            "integers separated by commas", repr(input_shape), "--input-shape", "write e.g. 3,32,32"
        ) from None
    return built().eval(), shape


def _dataset(source: str, input_range: tuple[float, float]) -> Dataset:
    from lmtfast.data import load_dataset

    if not source:
        raise ConfigError(
            "a data set",
            "none",
            "--data",
            "pass a .npz file or a directory of IDX files with --data",
        )
    return load_dataset(source, input_range=input_range)


def _check(report: AttackReport, out: Path) -> None:
    """Leave the evidence and exit if an attack landed inside a radius."""
    try:
        report.check()
    except ViolationError as error:
        points = report.save_violations(out.with_name(f"{out.name}.violations.npz"))
        console.print(f"[red]ViolationError[/red]: {error}", soft_wrap=True)
        console.print(f"The points: {points}. No certificate was written.", soft_wrap=True)
        raise typer.Exit(EXIT_VERIFICATION_FAILED) from None


def _semantics(semantics: Semantics, profile: str | None) -> str:
    """The text a certificate carries; ``executed`` without a profile is fp32a64's."""
    from lmtfast.profiles import IDEAL, get_profile

    if semantics is Semantics.ideal and profile is not None:
        raise ArgumentError(
            "--profile with --semantics executed", "a profile without it", "lmtfast certify",
            "add --semantics executed",
        )  # fmt: skip
    return IDEAL if semantics is Semantics.ideal else get_profile(profile or "fp32a64").semantics


def _use_working_directory() -> None:
    """Let ``package.module:callable`` name a module in the working directory."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
