"""The report of a run: figures, and one self-contained HTML page that opens offline."""

from nasbench.report.figures import pareto_figure, prediction_figure, training_figure
from nasbench.report.page import write_report

__all__ = ["pareto_figure", "prediction_figure", "training_figure", "write_report"]
