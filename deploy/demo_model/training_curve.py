"""Draws the training curve from the log: loss over tokens, for the text trained on and for text never seen."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

SHOWN = ("0.3", "0.5", "0.7", "2", "3", "4", "6")


def draw(log_path: Path, image_path: Path) -> None:
    with log_path.open() as log_file:
        rows = list(csv.DictReader(log_file))
    tokens = [int(row["tokens"]) / 1e6 for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(tokens, [float(row["train_loss"]) for row in rows], color="#9db7d5", linewidth=2, label="training text")
    held_out = [float(row["held_out_loss"]) for row in rows]
    axes.plot(tokens, held_out, color="#c8553d", linewidth=2, label="held-out text")
    axes.annotate(
        f"{held_out[-1]:.2f}",
        (tokens[-1], held_out[-1]),
        xytext=(0, 9),
        textcoords="offset points",
        ha="center",
        color="#c8553d",
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: label if (label := f"{value:g}") in SHOWN else "")
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Training the nanoserve demo model", loc="left")
    axes.grid(True, which="both", color="#e5e5e5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(image_path, dpi=120)
    pyplot.close(figure)
