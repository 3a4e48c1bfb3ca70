"""Runs the notebook of the demo and keeps what its cells print and draw."""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "train_examples" / "demo.ipynb"


def run_notebook(folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of its cells, run in a folder.

    Raises:
        CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def write_notebook() -> None:
    """The notebook of the demo, with what its cells print and draw."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = run_notebook(Path(folder))
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # Warnings and bars say more of the machine than of the demo.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, NOTEBOOK)
