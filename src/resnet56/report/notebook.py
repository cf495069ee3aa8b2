"""Matplotlib figures that notebooks display without pyplot.

Import this module only after `resnet56.libraries.import_matplotlib`.
"""

import io

from matplotlib.figure import Figure

DPI = 150


class NotebookFigure(Figure):
    """A figure that a notebook displays as the output of a cell.

    IPython displays plain figures only after pyplot is imported.
    """

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI)
        return buffer.getvalue()
