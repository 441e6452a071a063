"""A run in optuna-dashboard: the studies, and what a real browser shows of them."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from nasbench.archive import Archive
from nasbench.config import load_config
from nasbench.dashboard import RunStudies
from nasbench.plan import make_plan
from nasbench.run import Run

CHANGES = ["objectives.latency_ms.limit=2.0", "targets.calibration_networks=8"]


@pytest.fixture
def run(tiny_experiment: Path, tmp_path: Path) -> Path:
    """A run with an archive as a search leaves it, without the search."""
    plan = make_plan(load_config(tiny_experiment, CHANGES), tiny_experiment.parent)
    run = Run.create(tmp_path / "lenses", plan.config)
    run.mark(where=str(tiny_experiment.parent))
    rng = np.random.default_rng(0)
    for id, arch in enumerate(plan.space.sample(30, rng)):
        accuracy, latency = rng.uniform(0.3, 0.9), rng.uniform(0.5, 3.0)
        if id == 7:
            run.archive.record_evaluation("search", id, arch, {"latency_ms": latency}, status=1, message="too hot")
        else:
            run.archive.record_evaluation("search", id, arch, {"accuracy": accuracy, "latency_ms": latency})
    run.close()
    return run.path


def test_studies_hold_what_the_archive_holds_and_follow_it(run: Path) -> None:
    studies = RunStudies(run)
    assert studies.refresh() == 30
    (study,) = studies.studies.values()
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    rows = Archive(run / "archive.sqlite", readonly=True).evaluations().set_index("id")
    for trial in study.trials:
        row = rows.loc[trial.user_attrs["id"]]
        if trial.user_attrs["id"] == 7:
            assert trial.state.name == "FAIL"
            assert trial.user_attrs["message"] == "too hot"
        else:
            assert trial.values == [row["accuracy"], row["latency_ms"]]
            assert (trial.system_attrs["constraints"][0] > 0) == (row["latency_ms"] > 2)
        assert trial.user_attrs["architecture"] == row["arch"]
    assert studies.refresh() == 0
    archive = Archive(run / "archive.sqlite")
    archive.record_evaluation("search", 30, rows["arch"].iloc[0], {"accuracy": 0.5, "latency_ms": 1.0})
    archive.close()
    assert studies.refresh() == 1
    assert len(study.trials) == 31


@pytest.mark.extra("dashboard", "selenium")
def test_a_browser_shows_trials_and_the_pareto_front(run: Path, tmp_path: Path) -> None:
    if not (shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("chromium-browser"))):
        if os.environ.get("NASBENCH_ALL_EXTRAS") == "1":
            pytest.fail("chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    command = [sys.executable, "-m", "nasbench", "dashboard", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            address = said.split(" at ")[1].split()[0]
            listed = json.load(urllib.request.urlopen(f"{address}api/studies"))
            (study,) = listed["study_summaries"]
            assert study["study_name"] == "lenses: search"
            options = webdriver.ChromeOptions()
            for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1600"):
                options.add_argument(option)
            options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser") or ""
            browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
            try:
                browser.get(f"{address}dashboard/studies/{study['study_id']}")
                shown = WebDriverWait(browser, 60)
                shown.until(lambda b: "lenses: search" in b.find_element(By.TAG_NAME, "body").text)
                # One trace for each kind of trial: those that keep the limit, those that do not, and the best.
                points = "#plot-pareto-front .scatterlayer .point, .js-plotly-plot .scatterlayer .point"
                shown.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, points)) >= 29)
                text = browser.find_element(By.TAG_NAME, "body").text
                assert "Pareto" in text
                picture = Path(os.environ.get("NASBENCH_SCREENSHOT", tmp_path / "dashboard.png"))
                assert browser.save_screenshot(str(picture))
                browser.get(f"{address}dashboard/studies/{study['study_id']}/trials")
                shown.until(lambda b: "Trial 0" in b.find_element(By.TAG_NAME, "body").text)
            finally:
                browser.quit()
        finally:
            server.send_signal(2)
        assert server.wait(30) == 130
