"""A plugin of pytest that runs the listed tests in the order of their list, and records the outcome of each.

MUTATION_EVENTS names a file to which a line is added for every event. MUTATION_TESTS names a file that lists the tests,
one per line; without it, all tests run. While coverage is measured, lines belong to the test that runs, or to the
fixture that several tests share.
"""

import json
import os
import time
from pathlib import Path

import coverage
import pytest

CONTEXT = "MUTATION_CONTEXT"
"""Environment variable that tells commands started by a test the name of the test."""


def pytest_configure(config):
    """Makes hypothesis try the same examples in every run, without a deadline, since the machine may be busy."""
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import settings

        settings.register_profile("mutation", deadline=None, derandomize=True)
        settings.load_profile("mutation")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Keeps the listed tests, in the order of the list; without a list, the tests that have not ended yet.

    If a mutant changes the cases of a parametrised test, all of its cases run.
    """
    _record(event="collected", tests=len(items))
    if "MUTATION_TESTS" not in os.environ:
        events = map(json.loads, Path(os.environ["MUTATION_EVENTS"]).read_text().splitlines())
        ended = {event["test"] for event in events if event["event"] == "end"}
        items[:] = [item for item in items if item.nodeid not in ended]
        return
    order = {name: n for n, name in enumerate(Path(os.environ["MUTATION_TESTS"]).read_text().splitlines())}
    missing = order.keys() - {item.nodeid for item in items}
    order |= {name.split("[")[0]: order[name] for name in missing}
    ranked = [(order.get(item.nodeid, order.get(item.nodeid.split("[")[0])), item) for item in items]
    items[:] = [item for _, item in sorted((pair for pair in ranked if pair[0] is not None), key=lambda pair: pair[0])]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Records start and end of a test, and switches the coverage context to it."""
    _record(event="start", test=item.nodeid)
    began = time.perf_counter()
    _switch_context(item.nodeid)
    result = yield
    _switch_context("")
    definitions = [of_name[-1] for of_name in item._fixtureinfo.name2fixturedefs.values()]
    shared = [_name(fixture) for fixture in definitions if fixture.scope != "function"]
    _record(event="end", test=item.nodeid, seconds=time.perf_counter() - began, shared=shared)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """Switches the coverage context to a fixture that several tests share, while it is set up."""
    if fixturedef.scope == "function":
        return (yield)
    before = os.environ.get(CONTEXT, "")
    _switch_context(_name(fixturedef))
    try:
        return (yield)
    finally:
        _switch_context(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Records the error of a test that fails."""
    report = yield
    if report.failed:
        why = f"{call.excinfo.typename}: {call.excinfo.value}".splitlines()[0]
        _record(event="failed", test=item.nodeid, why=why)
    return report


def _name(fixture) -> str:
    return f"fixture {fixture.baseid}::{fixture.argname}"


def _switch_context(context: str) -> None:
    """Makes coverage, here and in processes started from now on, count lines for this test or fixture."""
    os.environ[CONTEXT] = context
    if measured := coverage.Coverage.current():
        measured.switch_context(context)


def _record(**event) -> None:
    """Appends an event to the file of events."""
    with open(os.environ["MUTATION_EVENTS"], "a") as file:
        file.write(f"{json.dumps(event)}\n")
