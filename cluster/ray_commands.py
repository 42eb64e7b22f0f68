"""`nanoserve ray`: the command that `ray_cluster.yaml` runs on each machine, and the one to run before `ray up`."""

from pathlib import Path
from typing import Annotated

import typer

from cluster import launch_check, ray_node
from cluster.fixed_port import RAY_HEAD
from cluster.node_keeper import start_keeper
from cluster.ray_node import RayNode
from cluster.start_display import StartDisplay
from cluster.state_directory import state_directory
from engine import ConfigError

EXIT_PROBLEMS = 2

app = typer.Typer(no_args_is_help=True, help="Ray on the machines of a cluster.")


@app.callback()
def ray() -> None:
    """Ray on the machines of a cluster."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def start(
    context: typer.Context,
    head: Annotated[bool, typer.Option("--head", help="This machine is the cluster's head.")] = False,
    address: Annotated[str | None, typer.Option(help="Of a worker: the head's host:port.")] = None,
    port: Annotated[int, typer.Option(help="Of the head: the port others join at.")] = RAY_HEAD.number,
    node_ip_address: Annotated[str | None, typer.Option(help="This machine's address for the others.")] = None,
    autoscaling_config: Annotated[
        Path | None, typer.Option(help="Of the head: what `ray up` leaves at ~/ray_bootstrap_config.yaml.")
    ] = None,
) -> None:
    """Like `ray start`, with what nanoserve needs; started already in the same way, it stays as it is.

    Further options are those of `ray start`.
    """
    if head == (address is not None):
        raise ConfigError("`nanoserve ray start` needs either --head or --address with the head's host:port.")
    if head:
        node = RayNode.of_head(port, autoscaling_config, node_ip_address, tuple(context.args))
    else:
        node = RayNode.of_worker(str(address), node_ip_address, tuple(context.args))
    display = StartDisplay()
    is_new = ray_node.start(node)
    role = "the head" if node.is_head else f"a worker of {node.head}"
    display.say(f"Ray {'runs' if is_new else 'ran already'} at {node.address} as {role}.")
    raylet = ray_node.running_node()
    if raylet is not None:
        for line in start_keeper(state_directory(), raylet):
            display.say(line)


@app.command()
def stop() -> None:
    """End what `nanoserve ray start` started on this machine. Unlike `ray stop`, nothing else of Ray."""
    StartDisplay().say(f"Ended {ray_node.stop()} processes.")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A cluster file of `ray up`.")] = Path("ray_cluster.yaml"),
) -> None:
    """Say what would go wrong with `ray up`, and what would be right, within seconds. Starts nothing."""
    display = StartDisplay()
    machines, problems = launch_check.check(file)
    for machine in machines:
        gpus = f"{machine.num_gpus} GPU{'s' * (machine.num_gpus != 1)}"
        runs = "runs this cluster already" if machine.is_node else "can be reached"
        display.say(f"{machine.name} {runs}: {machine.num_cores} cores, {gpus}.")
    for problem in problems:
        display.fail(problem)
    if problems:
        raise typer.Exit(EXIT_PROBLEMS)
    display.say(f"{file} can be launched: ray up -y {file}")
