"""A plugin of pytest that runs named tests in a given order and writes down how each goes.

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
"""Environment variable through which commands started by a test learn its name."""


def pytest_configure(config):
    """Lets hypothesis try the same examples in every run, however long they take on a busy machine."""
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import settings

        settings.register_profile("mutation", deadline=None, derandomize=True)
        settings.load_profile("mutation")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Keeps the listed tests, in the order of the list; without a list, those that have not ended yet.

    A mutant may change the cases of a parametrised test: then all of its cases run.
    """
    _tell(event="collected", tests=len(items))
    if "MUTATION_TESTS" not in os.environ:
        told = map(json.loads, Path(os.environ["MUTATION_EVENTS"]).read_text().splitlines())
        ended = {event["test"] for event in told if event["event"] == "end"}
        items[:] = [item for item in items if item.nodeid not in ended]
        return
    places = {name: n for n, name in enumerate(Path(os.environ["MUTATION_TESTS"]).read_text().splitlines())}
    gone = places.keys() - {item.nodeid for item in items}
    places |= {name.split("[")[0]: places[name] for name in gone}
    found = [(places.get(item.nodeid, places.get(item.nodeid.split("[")[0])), item) for item in items]
    items[:] = [item for place, item in sorted(((p, i) for p, i in found if p is not None), key=lambda pair: pair[0])]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    _tell(event="start", test=item.nodeid)
    began = time.perf_counter()
    _enter(item.nodeid)
    result = yield
    _enter("")
    shared = [
        _name(found[-1]) for found in item._fixtureinfo.name2fixturedefs.values() if found[-1].scope != "function"
    ]
    _tell(event="end", test=item.nodeid, seconds=time.perf_counter() - began, shared=shared)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    if fixturedef.scope == "function":
        return (yield)
    before = os.environ.get(CONTEXT, "")
    _enter(_name(fixturedef))
    try:
        return (yield)
    finally:
        _enter(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        why = f"{call.excinfo.typename}: {call.excinfo.value}".splitlines()[0]
        _tell(event="failed", test=item.nodeid, why=why)
    return report


def _name(fixture) -> str:
    return f"fixture {fixture.baseid}::{fixture.argname}"


def _enter(context: str) -> None:
    os.environ[CONTEXT] = context
    if measured := coverage.Coverage.current():
        measured.switch_context(context)


def _tell(**event) -> None:
    with open(os.environ["MUTATION_EVENTS"], "a") as file:
        file.write(f"{json.dumps(event)}\n")
