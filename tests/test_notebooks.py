"""Every notebook runs from the first cell to the last."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
# What a notebook needs besides the base install.
EXTRAS = {"add_a_device": ["openvino"], "compression": ["prune"]}


@pytest.mark.extra("nbclient", "nbformat", "ipykernel")
@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=pytest.mark.extra(*EXTRAS.get(p.stem, []))) for p in NOTEBOOKS]
)
def test_notebook_runs(path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    if any("NASBENCH_RUN" in cell.source for cell in notebook.cells):
        monkeypatch.setenv("NASBENCH_RUN", str(request.getfixturevalue("finished_run")))
    monkeypatch.setenv("NASBENCH_NOTEBOOK_NETWORKS", "8")  # measured, where a notebook measures: a few
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs), "the notebook draws no figure"
