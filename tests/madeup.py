"""Made-up outcomes of trials, and figures recorded in place of being drawn, so that tests of studies are exact."""

import jax
import numpy as np

from trimask.diffusion.studies.trainings import Outcome
from trimask.diffusion.studies.trials import Trials


class MadeUp(Trials):
    """Trials whose outcome is `outcome(config)`; nothing is trained, and no data is read."""

    def __init__(self, folder, outcome):
        self.folder, self.data, self.outcome = folder, folder / "data", outcome
        self.adds, self.asked, self.reports = True, [], []

    def report(self, *progress):
        self.reports.append(progress)

    def outcomes(self, configs, what="trials"):
        return self.measurements(configs, None, Outcome, what)

    def measurements(self, configs, measure, kind, what="trials"):
        self.asked.append((what, measure, list(configs)))
        return [self.outcome(config) for config in configs]


def outcome(loss, *, last_loss=9.0, curve=(), steps=1, batch_tokens=1.0, num_parameters=100, seconds=0.0):
    return Outcome(loss, last_loss, [list(point) for point in curve], steps, batch_tokens, num_parameters, seconds)


def figures(monkeypatch, module):
    """File name → (panels, columns) of every figure that the module draws."""
    drawn = {}

    def draw(path, panels, columns=4):
        drawn[path.name] = (list(panels), columns)

    monkeypatch.setattr(module, "draw_panels", draw)
    return drawn


def described(figures):
    """Titles, axes, labels and marks of drawn panels: a line for each figure and each panel."""
    said = []
    for name, (panels, columns) in sorted(figures.items()):
        said.append(f"{name}, {columns} columns")
        for panel in panels:
            labels = " + ".join(filter(None, (", ".join(panel.curves), ", ".join(panel.points))))
            marks = ["markers"] * panel.markers + ["coincide"] * panel.coincide + list(panel.vertical_lines or ())
            marks += [] if panel.y_max is None else [f"up to {panel.y_max:g}"]
            axes = f"{panel.x} ({panel.scales[0]}) × {panel.y} ({panel.scales[1]})"
            said.append(": ".join(filter(None, (panel.title, axes, labels, ", ".join(marks)))))
    return "\n".join(said)


def magnitudes(tree):
    """Sum of the magnitudes of every array of a tree, to check that timed inputs stay the same between versions."""
    return [float(np.abs(np.asarray(leaf, np.float64)).sum()) for leaf in jax.tree.leaves(tree)]


def written(text):
    """A literal text of a test, without the lines' indentation; a line that ends in \\ is joined with the next one."""
    lines = "\n".join(line.strip() for line in text.strip().splitlines())
    return lines.replace("\\\n", "")


def files(folder):
    """Names of all files in a folder."""
    return sorted(path.name for path in folder.iterdir())
