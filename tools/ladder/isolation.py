"""Run tests marked `interpreter` in a process of their own, as a pytest plugin.

Triton reads TRITON_INTERPRET when it is imported, so one process either interprets kernels or
compiles them. In an ordinary session this plugin takes the selected tests marked `interpreter`,
runs them all in one child pytest with TRITON_INTERPRET=1 before the rest, and reports each result
under its own name and in its place: selection, failures, skips and counts look as for any other
test. Their fixtures run in the child only. In a session that already has TRITON_INTERPRET=1 the
marked tests run directly, which is the way to debug one, and all others are deselected.

Under pytest-xdist every worker collects every test and gets whole files of them (`--dist
loadfile`): there, a child runs the marked tests of one file when the first is due.

A conftest turns it on with

    def pytest_configure(config):
        isolation.install(config)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

MARKER = "interpreter"
_PLUGIN = "ladder-isolation"
_REPORTS = "LADDER_REPORTS"


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def install(config: pytest.Config) -> None:
    """Register the plugin once, however many conftests ask for it."""
    if not config.pluginmanager.has_plugin(_PLUGIN):
        config.addinivalue_line("markers", f"{MARKER}: runs Triton kernels in the interpreter")
        config.pluginmanager.register(_Isolation(config), _PLUGIN)


class _Isolation:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.reports: dict[str, list[pytest.TestReport]] = defaultdict(list)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if not interpreting():
            if _is_worker(self.config):
                for item in items:
                    if item.get_closest_marker(MARKER) is not None:
                        item.add_marker(pytest.mark.timeout(0), append=False)  # the child's
            return
        others = [item for item in items if item.get_closest_marker(MARKER) is None]
        if others:
            self.config.hook.pytest_deselected(items=others)
            items[:] = [item for item in items if item.get_closest_marker(MARKER) is not None]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        # Before any test is due: a timeout on the first must not apply to the whole child.
        stopped = session.testsfailed or session.config.option.collectonly
        if not interpreting() and not stopped and not _is_worker(self.config):
            self._run_child(session.items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        if interpreting() or item.get_closest_marker(MARKER) is None:
            return None
        if item.nodeid not in self.reports:
            self._run_child([other for other in item.session.items if other.path == item.path])
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.reports[item.nodeid]:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        # The test before this one may share fixtures with the next that runs here.
        item.session._setupstate.teardown_exact(nextitem)
        return True

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        path = os.environ.get(_REPORTS)
        if interpreting() and path:
            data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
            with open(path, "a") as file:
                file.write(json.dumps(data) + "\n")

    def _run_child(self, items: list[pytest.Item]) -> None:
        """Runs the marked ones of `items`, and keeps their reports."""
        items = [item for item in items if item.get_closest_marker(MARKER) is not None]
        if not items:
            return
        with tempfile.TemporaryDirectory() as folder:
            tests, log = Path(folder) / "tests.txt", Path(folder) / "reports.jsonl"
            tests.write_text("".join(f"{item.nodeid}\n" for item in items))
            log.touch()
            # The parent has selected already, so the child's -m must undo the one in the settings.
            command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider"]
            command += [f"--rootdir={self.config.rootpath}", f"@{tests}"]
            if self.config.inipath is not None:
                command += ["-c", str(self.config.inipath)]
            environment = {**os.environ, "TRITON_INTERPRET": "1", _REPORTS: str(log)}
            child = subprocess.run(
                command,
                cwd=self.config.rootpath,
                env=environment,
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for line in log.read_text().splitlines():
                report = self.config.hook.pytest_report_from_serializable(
                    config=self.config, data=json.loads(line)
                )
                if isinstance(report.longrepr, list):  # a skip's location, which JSON untupled
                    report.longrepr = tuple(report.longrepr)
                self.reports[report.nodeid].append(report)
        for item in items:
            if not any(r.when == "teardown" for r in self.reports[item.nodeid]):
                self.reports[item.nodeid].append(_lost(item, child.returncode, child.stdout))


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _lost(item: pytest.Item, status: int, output: str) -> pytest.TestReport:
    """A failure for a test that the child did not finish."""
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=f"the interpreter process ended with status {status}:\n{output[-4000:]}",
        when="call",
    )
