"""The pictures of tools.survey and tools.sweep, drawn where --plot names a file."""

from importlib.util import find_spec
from pathlib import Path

from common.config import UserError, first_line
from common.stages import atomic_write


def check_plot(path):
    """UserError where --plot cannot be drawn, before any work. path: the setting, or None."""
    if path is None:
        return
    if find_spec("matplotlib") is None:
        raise UserError("--plot needs `pip install matplotlib`")
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {path}: the file must end in .png, .pdf or .svg")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--plot {path}: no such folder")


def draw(path, n_panels, draw_panels):
    """Write a figure of some panels side by side. draw_panels: a function of their axes. What it
    shows is written already: where it cannot be drawn there is a warning."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, n_panels, figsize=(5.5 * n_panels, 4), squeeze=False)
        draw_panels(axes[0])
        figure.tight_layout()
        with atomic_write(path) as tmp_path:
            figure.savefig(tmp_path, dpi=120, format=Path(path).suffix[1:])
        pyplot.close(figure)
    except Exception as error:
        print(f"WARNING: --plot {path}: not drawn: {first_line(error)}")
        return
    print(f"wrote {path}")


def plot_survey(path, blocks, strengths, base_nll):
    """Over the blocks: the NLL with the block's states moved, for each strength, and |v|/|b|.

    blocks: as tools.survey writes them to survey.json.
    """
    layers = [block["layer"] for block in blocks]

    def panels(axes):
        for j, strength in enumerate(strengths):
            nll = [block["nll"][j] for block in blocks]
            axes[0].plot(layers, nll, marker="o", label=f"ρ {strength:g}")
        axes[0].axhline(base_nll, color="grey", linestyle="--", label="nothing moved")
        axes[0].set(xlabel="block", ylabel="NLL per token of chosen responses")
        axes[0].legend()
        axes[1].plot(layers, [block["ratio"] for block in blocks], marker="o")
        axes[1].set(xlabel="block", ylabel="mean |v|/|b|", ylim=(0, None))

    draw(path, 2, panels)


def plot_sweep(path, reports, scores, best):
    """Each score of sampled answers over their KL to the base, a point for each adapter.

    reports: {name: report} with the base's; scores: names of scores, such as "judge".
    """
    order = sorted(reports, key=lambda name: reports[name]["kl_to_base"])
    kls = [reports[name]["kl_to_base"] for name in order]

    def panels(axes):
        for axis, score in zip(axes, scores):
            values = [reports[name][f"{score}_sampled"] for name in order]
            axis.plot(kls, values, marker="o")
            for name, kl, value in zip(order, kls, values):
                weight = "bold" if name == best else "normal"
                axis.annotate(
                    name,
                    (kl, value),
                    fontsize=8,
                    weight=weight,
                    textcoords="offset points",
                    xytext=(4, 4),
                )
            axis.set(xlabel="KL to the base, nats an answer", ylabel=score)

    draw(path, len(scores), panels)
