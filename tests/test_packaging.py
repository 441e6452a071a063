"""The wheel: exactly four packages, with their data, and a run from it outside the repository."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"search_spaces", "hardware_profiles", "predictors", "nasbench"}


@pytest.mark.extra("setuptools")
def test_the_wheel_holds_four_packages_and_runs_an_experiment(tmp_path: Path, tiny_experiment: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == PACKAGES
    assert {f"{p}/py.typed" for p in PACKAGES} <= set(names)

    # A clean environment that sees our dependencies, but neither this repository nor its editable install.
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    zipfile.ZipFile(wheel).extractall(site)
    python = str(environment / "bin" / "python")
    where = [python, "-c", "import nasbench, search_spaces; print(nasbench.__file__, search_spaces.__file__)"]
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run(where, check=True, capture_output=True, text=True, cwd=tmp_path, env=variables).stdout
    assert all(path.startswith(str(site)) for path in found.split())
    changes = ["space.name=quickstart", "supernet.epochs=0", "evaluator.samples=20", "evaluator.verify=2", "stages=[]"]
    changes += [
        "targets.devices=['jetson_nano']",
        "strategy.evaluations=200",
        "threads=1",
        "evaluator.validation_images=50",
    ]
    arguments = [a for c in changes for a in ("--set", c)]
    result = subprocess.run(
        [python, "-m", "nasbench", "run", "quickstart", "--output", "out", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=variables,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "report.html").is_file()
